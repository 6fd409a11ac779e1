"""Studies of what the filters do, and measurements of what they cost."""

import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from examples.harness.errors import plain_errors

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def run_command(main: Callable[..., object], module: str) -> None:
    """Call `main` with the flags of the command line and exit; what the user can cure ends in a plain message."""
    sys.exit(plain_errors(lambda: tyro.cli(main, prog=f"python -m {module}")))
