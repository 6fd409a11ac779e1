"""The configuration of one run, and what an experiment is."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from matplotlib.figure import Figure

from .errors import UsageError, require
from .optimizers import Filtering, Hyper, Optimization, describe
from .records import Row
from .task import Data, Task

RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("in [0, 1)", lambda x: 0 <= x < 1, ("alpha", "beta1", "beta2")),
    ("a finite number", math.isfinite, ("lamb", "fast")),
    ("a finite number of at least 0", lambda x: 0 <= x < math.inf, ("lr", "weight_decay")),
    ("at least 0", lambda x: x >= 0, ("filter_from", "lr_warmup", "hold")),
    ("at least 1", lambda x: x >= 1, ("window_size", "budget")),
    ("positive, or None for no clipping", lambda x: x is None or x > 0, ("clip_norm",)),
    ("in [0, 2**32)", lambda x: 0 <= x < 2**32, ("seed",)),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Which run it is, how long it may take, and where it is trained."""

    seed: int = 0
    """Seed of the initial parameters, the data split and the order of the batches."""
    budget: int = 10_000
    """Optimizer steps at most, rounded up to whole evaluations."""
    stop_at: float | None = None
    """Validation accuracy (or loss, where the task has no accuracy) at which to stop; None to use the whole budget."""
    hold: int = 0
    """Further evaluations at stop_at before the run stops."""
    devices: int = 1
    """Devices among which every batch is divided; the batch size must be a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A task, what is done to its gradients, and a run of it. Field names are unique over the four parts."""

    task: Task
    filtering: Filtering = dataclasses.field(default_factory=Filtering)
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    run: Run = dataclasses.field(default_factory=Run)

    def __post_init__(self) -> None:
        """Validate the numbers."""
        f, r, values = self.filtering, self.run, self.flat()
        for allowed, ok, names in RANGES:
            for name in names:
                require(ok(values[name]), name, allowed, values[name])
        divides = f.stride >= 1 and f.window_size % f.stride == 0
        require(divides or f.filter != "ma", "stride", f"a divisor of --window-size ({f.window_size})", f.stride)
        highest = 1.0 if self.task.metric == "accuracy" else math.inf
        require(r.stop_at is None or 0 < r.stop_at <= highest, "stop_at", f"in (0, {highest:g}], or None", r.stop_at)
        divides = r.devices >= 1 and self.task.batch_size % r.devices == 0
        require(divides, "devices", f"a divisor of the batch size ({self.task.batch_size})", r.devices)

    @property
    def hyper(self) -> Hyper:
        """What `make_tx` takes: a pytree whose leaves are the numbers that may differ within one compiled program."""
        return self.filtering, self.optimization

    def flat(self) -> dict[str, Any]:
        """All fields by name."""
        parts = (getattr(self, part.name) for part in dataclasses.fields(self))
        return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}

    def facts(self) -> dict[str, Any]:
        """All that the results depend on but the data, for files; not where these lie on this machine."""
        return {name: value for name, value in self.flat().items() if name not in ("data_dir", "devices")}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of some fields, named as by `flat`."""
        parts = {}
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            names = {one.name for one in dataclasses.fields(part)} & changes.keys()
            parts[field.name] = dataclasses.replace(part, **{name: changes.pop(name) for name in names})
        if changes:
            raise TypeError(f"a configuration has no field {', '.join(changes)}")
        return dataclasses.replace(self, **parts)


class Preset(NamedTuple):
    """A configuration with a name: a published run, a control, a method of the study."""

    config: Config
    about: str  # in a few words, for --help
    controls: tuple[str, ...] = ()  # presets that tell what the filter adds, the fairest first


def two_by_two(paper: Config, weight_decay: float) -> dict[str, Preset]:
    """The paper's configuration and its baseline, which has another decay and no filter; and each change alone."""
    undecayed = paper.replace(weight_decay=weight_decay)
    return {
        "baseline": Preset(undecayed.replace(filter="none"), "The paper's baseline"),
        "filter-only": Preset(undecayed, "The paper's filter with the baseline's decay", ("baseline",)),
        "decay-only": Preset(paper.replace(filter="none"), "The paper's decay without its filter"),
        "paper": Preset(paper, "The paper's filter and decay", ("decay-only",)),
    }


class Measure(NamedTuple):
    """What `--measure NAME` adds to a run: columns NAME_... of its records, and NAME.png drawn from these."""

    # Task, parameters and data to numbers by column; pure, to be jitted.
    columns: Callable[[Any, Any, Data], dict[str, jax.Array]]
    picture: Callable[[Sequence[Row], str], Figure]  # of all records and the title
    every: int  # evaluations from one that is measured, the first of the run, to the next


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that the commands know of an experiment; a module that has one as `EXPERIMENT` is a task to all of them."""

    name: str
    presets: Mapping[str, Preset]
    default: str  # the preset of a command line without --preset
    thresholds: tuple[float, ...] = ()  # values of the metric whose first crossing is reported
    show: Callable[[Any, Any], str] | None = None  # task and trained parameters to what is printed at the end
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)  # by the name that --measure takes

    @property
    def base(self) -> Config:
        """The configuration of the default preset."""
        return self.presets[self.default].config

    def preset(self, name: str) -> Config:
        """The configuration of a preset."""
        if name not in self.presets:
            raise UsageError(f"--preset must be one of {', '.join(self.presets)}, got {name!r}")
        return self.presets[name].config


def task_names() -> list[str]:
    """The experiments of this package: its modules that have an EXPERIMENT."""
    files = sorted(Path(__file__).parents[1].glob("*.py"))
    return [file.stem for file in files if "\nEXPERIMENT = " in file.read_text()]


def find_experiment(name: str) -> Experiment:
    """The `EXPERIMENT` of a task of this package, or of any importable module."""
    names = task_names()
    try:
        return importlib.import_module(f"examples.{name}" if name in names else name).EXPERIMENT
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the experiment must be one of {', '.join(names)}, or an importable module that has an EXPERIMENT, "
            f"got {name!r} ({error})"
        ) from error


def title(name: str, config: Config) -> str:
    """A run in words, for its picture."""
    return f"{name}: {describe(*config.hyper)}, seed {config.run.seed}"
