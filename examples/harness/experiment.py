"""What a run is, and what an experiment is."""

import dataclasses
import difflib
import functools
import importlib
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
import tyro

from .errors import UsageError, require
from .methods import Method, base, hyperparams, split
from .records import Row
from .task import Data, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Which run it is, and when it stops."""

    seed: int = 0  # Seed of the initial parameters, the data split and the order of the batches.
    # Optimizer steps after which a run stops that has not reached --stop-at, rounded up to whole evaluations.
    max_steps: int = 10_000
    # Validation accuracy (or loss, where the task has no accuracy) at which to stop; None to train for --max-steps.
    stop_at: float | None = None
    hold_evals: int = 0  # Evaluations for which the run goes on after it first reached --stop-at.
    # Runs that are trained at once in one vmapped program, whose rounding differs from that of a run alone.
    group_size: tyro.conf.Suppress[int] = 1


RULE = tuple(field.name for field in dataclasses.fields(Rule))


@dataclasses.dataclass(frozen=True)
class Run(Rule):
    """One training run. Its key identifies its result."""

    task: Task
    method: Method
    hyperparams: Mapping[str, Any]  # all of the method

    def __post_init__(self) -> None:
        """Validate the numbers, and that the key has each name once."""
        require(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)
        require(self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        require(self.hold_evals >= 0, "hold_evals", "at least 0", self.hold_evals)
        can_hold = self.stop_at is not None or self.hold_evals == 0
        require(can_hold, "hold_evals", "0 without --stop-at", self.hold_evals)
        require(self.group_size >= 1, "group_size", "at least 1", self.group_size)
        highest = 1.0 if self.task.metric == "accuracy" else math.inf
        in_range = self.stop_at is None or 0 < self.stop_at <= highest
        require(in_range, "stop_at", f"in (0, {highest:g}], or None", self.stop_at)
        fields = [field.name for field in dataclasses.fields(self.task)]
        names = ["task", *fields, "method", *self.hyperparams, *RULE]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TypeError(f"a method, its task and the rule of a run must not share names, got {twice}; rename them")
        for name, value in self.key.items():
            if not isinstance(value, str | int | float | None):
                raise TypeError(f"{name} must be a number, a text or None, which a key can hold, got {value!r}")
            fits = not isinstance(value, int) or name == "seed" or -(2**31) <= value < 2**31
            require(fits, name, "a whole number that int32 can hold", value)

    @property
    def traced(self) -> dict[str, Any]:
        """The hyperparameters that runs of one compiled program may differ in."""
        return split(self.method, self.hyperparams)[0]

    @property
    def static(self) -> dict[str, Any]:
        """The hyperparameters that are constants of a compiled program."""
        return split(self.method, self.hyperparams)[1]

    @property
    def make_tx(self) -> Callable[[Any], optax.GradientTransformation]:
        """The optimizer as a function of the traced hyperparameters."""
        return lambda traced: base(self.method)(**self.static, **traced)

    @property
    def program_key(self) -> tuple[Any, ...]:
        """What must be equal in all runs of one compiled program."""
        return self.task, base(self.method), tuple(self.static.items()), tuple(self.traced), self.group_size

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What determines the result, except data, device and versions, as JSON can hold it."""
        fields = {f.name: getattr(self.task, f.name) for f in dataclasses.fields(self.task) if f.name != "data_dir"}
        key = {
            "task": type(self.task).__name__,
            **fields,
            "method": base(self.method).__name__,
            **self.hyperparams,
            **{name: getattr(self, name) for name in RULE},
        }
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in key.items()}


def make_run(task: Task, method: Method, **settings: Any) -> Run:
    """A run of a method; settings are fields of `Run` and hyperparameters, by default those of the task and method."""
    rule = {"max_steps": task.max_steps, "stop_at": task.stop_at}
    rule |= {name: settings.pop(name) for name in RULE if name in settings}
    return Run(task, method, hyperparams(method, **settings), **rule)


class Measure(NamedTuple):
    """What `--measure NAME` adds to a run: columns NAME_... of its records, and NAME.png drawn from these."""

    # Task, parameters and data to numbers by column; pure, to be jitted.
    columns: Callable[[Any, Any, Data], dict[str, jax.Array]]
    picture: "Callable[[Sequence[Row], str], Figure]"  # of all records and the title
    every: int  # evaluations from one that is measured, the first of the run, to the next


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task and its methods; a module that has one as `EXPERIMENT` is known to all commands."""

    name: str  # of its module: `modular` in this package, `package.module` elsewhere
    task: Task
    methods: Mapping[str, Method]
    default: str  # the method of a command line without one
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)  # by the name that --measure takes

    def method(self, name: str) -> Method:
        """A method by its name, or by that of its function, as keys have it."""
        functions = {base(method).__name__: base(method) for method in self.methods.values()}
        return (functions | dict(self.methods))[nearest("the method", name, {**self.methods, **functions})]

    def run(self, method: str | None = None, task: Task | None = None, **settings: Any) -> Run:
        """A run of a method by name; settings are fields of `Run` and hyperparameters."""
        return make_run(task or self.task, self.method(method or self.default), **settings)


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """The name, if it is known; else UsageError names the nearest known one."""
    known = list(known)
    if name not in known:
        raise UsageError(f"{what} must be one of {', '.join(known)}, got {name!r}{_hint(name, known)}")
    return name


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def object_names(kind: type, package: str) -> list[str]:
    """The modules of a package that have an object named as its kind in capitals."""
    files = (Path(__file__).parents[2] / package.replace(".", "/")).glob("*.py")
    return sorted(file.stem for file in files if f"\n{kind.__name__.upper()} = " in file.read_text("utf-8"))


def find_object(kind: type[T], name: str, package: str) -> T:
    """The object of a module of a package, or of any importable module; UsageError if there is none."""
    what, names = kind.__name__.upper(), object_names(kind, package)
    try:
        found = getattr(importlib.import_module(f"{package}.{name}" if name in names else name), what, None)
        if isinstance(found, kind):
            return found
        reason = f"{what} is of type {type(found).__name__}"
    except Exception as error:  # whatever the module raises
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}" + f", {file}, line {line}" * ("importlib" not in file)
    raise UsageError(
        f"the {what.lower()} must be one of {', '.join(names)}, or an importable module that has an object {what}, "
        f"got {name!r} ({reason}){_hint(name, names)}"
    )


def task_names() -> list[str]:
    """The experiments of this package."""
    return object_names(Experiment, "examples")


def module_name(experiment: str) -> str:
    """The module of an experiment by its name; its command is `python -m MODULE`."""
    return f"examples.{experiment}" if experiment in task_names() else experiment


def find_experiment(name: str) -> Experiment:
    """The `EXPERIMENT` of a task of this package, or of any importable module."""
    return find_object(Experiment, name, "examples")
