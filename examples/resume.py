"""Continue a run where its last checkpoint left it: `python -m examples.resume FOLDER`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from examples.harness.errors import UsageError, plain_errors
from examples.harness.experiment import Experiment, Run
from examples.harness.runner import Options, stored, train


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continue a run with the flags that it was started with, but for these; None keeps a flag."""

    folder: Annotated[Path, tyro.conf.Positional]  # Run folder.
    max_steps: int | None = None  # Optimizer steps after which a run stops that has not reached its --stop-at.
    stop_at: float | None = None  # Validation accuracy (or loss) at which to stop.
    hold_evals: int | None = None  # Evaluations for which the run goes on after it first reached its --stop-at.
    data_dir: Path | None = None  # Folder that now holds the data files.
    devices: int | None = None  # Devices among which every batch is divided.


def parse(argv: Sequence[str]) -> tuple[Experiment, Run, Options]:
    """The stored run, with the changes of a command line."""
    flags = tyro.cli(Resume, prog="python -m examples.resume", args=argv)
    experiment, run, options = stored(flags.folder)
    rule = {name: getattr(flags, name) for name in ("max_steps", "stop_at", "hold_evals")}
    run = dataclasses.replace(run, **{name: value for name, value in rule.items() if value is not None})
    if flags.data_dir is not None:
        if not hasattr(run.task, "data_dir"):
            raise UsageError(f"--data-dir has no effect, because {experiment.name} reads no files; leave it out")
        run = dataclasses.replace(run, task=dataclasses.replace(run.task, data_dir=flags.data_dir))  # type: ignore
    if flags.devices is not None:
        options = dataclasses.replace(options, devices=flags.devices)
    return experiment, run, options


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: train(*parse(sys.argv[1:]), resume=True)))
