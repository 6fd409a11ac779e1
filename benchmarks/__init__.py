"""Studies of what the filters do, and measurements of what they cost."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.harness.errors import plain_errors, require
from examples.harness.methods import Range

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"

Count = Annotated[int, Range("at least 1", lambda number: number >= 1)]
Names = Annotated[tuple[str, ...], Range("one or more names", bool)]
OutFile = Annotated[
    Path,
    Range("a file in a writable folder", lambda path: os.access(path.parent, os.W_OK) and not path.is_dir()),
]


def run_command(main: Callable[..., object], module: str) -> None:
    """Call `main` with the flags of the command line and exit; a value must be in the Range of its annotation."""

    @functools.wraps(main)
    def checked(**flags: Any) -> None:
        for name, value in flags.items():
            for limit in getattr(main.__annotations__[name], "__metadata__", ()):
                require(limit.contains(value), name, limit.allowed, value)
        main(**flags)

    sys.exit(plain_errors(lambda: tyro.cli(checked, prog=f"python -m {module}")))
