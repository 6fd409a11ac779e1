"""The command line of an experiment: a subcommand per method, whose flags are its hyperparameters."""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from .errors import plain_errors, prepare_process, program_name
from .experiment import Experiment, Rule, Run, module_name, nearest
from .methods import Method, base, hyperparams, parameters, ranges
from .runner import Options, train


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run the experiment of a command line (by default that of this process); return the exit code."""
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
        descriptions={name: (cls.__doc__ or "").split("\n")[0] for name, cls in classes.items()},
        prefix_names=False,
        sort_subcommands=False,
    )
    task = experiment.task
    fields: list[tuple[str, Any, Any]] = [
        ("task", type(task), task),
        ("run", Rule, Rule(max_steps=task.max_steps, stop_at=task.stop_at)),
        ("training", Options, Options()),
        ("method", methods, classes[experiment.default]()),
    ]
    program = f"python -m {module_name(experiment.name)}"
    with program_name(program) as prog:
        parsed: Any = tyro.cli(
            dataclasses.make_dataclass("command", fields),
            prog=prog,
            description=f"{(type(task).__doc__ or '').split(chr(10) * 2)[0]}\n\n"
            f"Example: {program} {experiment.default} --seed 1 --out runs/my-run",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
        )
    method = next(experiment.methods[name] for name, cls in classes.items() if type(parsed.method) is cls)
    values = hyperparams(method, **dataclasses.asdict(parsed.method))
    return Run(parsed.task, method, values, **dataclasses.asdict(parsed.run)), parsed.training


def _flags(name: str, method: Method) -> type:
    """The hyperparameters of a method as a dataclass; their ranges, or else the docstring, say what they are."""
    fields = []
    for key, parameter in parameters(method).items():
        about = " ".join(f"{limit.about}, {limit.allowed}." for limit in ranges(parameter.annotation))
        default = tyro.MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        fields.append((key, Annotated[parameter.annotation, tyro.conf.arg(help=about or None)], default))
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__doc__": base(method).__doc__ or ""})
