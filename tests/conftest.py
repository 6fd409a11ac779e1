"""Programs that many tests train with are compiled once."""

from typing import Any

import pytest

PROGRAMS: dict[Any, Any] = {}
FITTED: dict[Any, Any] = {}


@pytest.fixture
def shared_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reuse, in runs and sweeps of a test, the programs that earlier tests compiled; they are pure functions."""
    from examples.harness import engine, runner, train  # tests of the library alone run without what these need

    def program(run: Any, **options: Any) -> train.Program:
        key = run.program_key, *options.values()
        if key not in PROGRAMS:
            PROGRAMS[key] = train.program(run, **options)
        return PROGRAMS[key]

    def fitted(program: train.Program, hyper: Any, key: Any) -> train.Program:
        if program not in FITTED:
            FITTED[program] = train.fitted(program, hyper, key)
        return FITTED[program]

    monkeypatch.setattr(runner, "program", program)
    monkeypatch.setattr(runner, "fitted", fitted)
    monkeypatch.setattr(engine, "program", program)
