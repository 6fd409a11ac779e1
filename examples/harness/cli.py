"""The command line of an experiment: a subcommand per method, whose flags are its hyperparameters."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from .errors import plain_errors, prepare_process
from .experiment import Experiment, Run, module_name, nearest
from .methods import Method, base, hyperparams, parameters
from .runner import Options, train


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which run it is, and when it stops."""

    seed: int
    """Seed of the initial parameters, the data split and the order of the batches."""
    max_steps: int
    """Optimizer steps after which a run stops that has not reached --stop-at, rounded up to whole evaluations."""
    stop_at: float | None
    """Validation accuracy (or loss, where the task has no accuracy) at which to stop; None to train for --max-steps."""
    hold_evals: int = 0
    """Evaluations for which the run goes on after it first reached --stop-at."""


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run an experiment as a command line says, by default that of this process; the exit code."""
    if argv is None:
        prepare_process()
        argv = sys.argv[1:]
    return plain_errors(lambda: train(experiment, *parse(experiment, argv)))


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Run, Options]:
    """The run and the options of a command line."""
    if argv and not argv[0].startswith("-"):
        nearest("the method", argv[0], experiment.methods)
    classes = {name: _flags(name, method) for name, method in experiment.methods.items()}
    methods = tyro.extras.subcommand_type_from_defaults(
        {name: cls() for name, cls in classes.items()},
        descriptions={name: (base(method).__doc__ or "").split("\n")[0] for name, method in experiment.methods.items()},
        prefix_names=False,
        sort_subcommands=False,
    )
    task = experiment.task
    fields: list[tuple[str, Any, Any]] = [
        ("task", type(task), task),
        ("run", Rule, Rule(0, task.max_steps, task.stop_at)),
        ("training", Options, Options()),
        ("method", methods, classes[experiment.default]()),
    ]
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("command", fields),
        prog=f"python -m {module_name(experiment.name)}",
        description=f"{(type(task).__doc__ or '').split(chr(10) * 2)[0]}\n\n"
        f"Example: python -m {module_name(experiment.name)} {experiment.default} --seed 1 --out runs/my-run",
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
    )
    method = next(experiment.methods[name] for name, cls in classes.items() if type(parsed.method) is cls)
    values = hyperparams(method, **dataclasses.asdict(parsed.method))
    return Run(parsed.task, method, values, **dataclasses.asdict(parsed.run)), parsed.training


def _flags(name: str, method: Method) -> type:
    """The hyperparameters of a method as a dataclass."""
    fields = [
        (key, Annotated[one.annotation, tyro.conf.arg(help=one.help or None)], one.default)
        for key, one in parameters(method).items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True)
