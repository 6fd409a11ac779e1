"""Programs that many tests train with are compiled once."""

from collections.abc import Iterator
from typing import Any

import pytest

PROGRAMS: dict[Any, Any] = {}
FITTED: dict[Any, Any] = {}


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Reuse, in runs and sweeps of a module, the programs that earlier tests compiled; they are pure functions."""
    from examples.harness import engine, runner, train  # tests of the library alone run without what these need

    def program(run: Any, *, devices: int = 1, precision: train.Precision = "float32") -> train.Program:
        key = run.program_key, devices, precision
        if key not in PROGRAMS:
            PROGRAMS[key] = train.program(run, devices=devices, precision=precision)
        return PROGRAMS[key]

    def fitted(program: train.Program, hyper: Any, key: Any) -> train.Program:
        if program not in FITTED:
            FITTED[program] = train.fitted(program, hyper, key)
        return FITTED[program]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "program", program)
        patch.setattr(runner, "fitted", fitted)
        patch.setattr(engine, "program", program)
        yield
