"""What every experiment can be told on the command line."""

import dataclasses
import math
from typing import ClassVar

from .errors import UserError
from .optimizers import OptimizerConfig
from .train import Task


@dataclasses.dataclass(frozen=True)
class RunConfig(OptimizerConfig):
    """One run: how it is optimised, and for how long."""

    has_accuracy: ClassVar[bool] = True  # False: the task has a loss alone, and `stop_at` is one

    seed: int = 0
    """Seed of the initial parameters, the data split and the order of the batches."""
    budget: int = 10_000
    """Optimizer steps at most, rounded up to whole evaluations."""
    stop_at: float | None = 0.95
    """Stop when the validation accuracy reaches this; None to use the whole budget."""
    hold: int = 0
    """How many further evaluations it must stay there before the run stops."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        self.require(0 <= self.alpha < 1, "alpha", "in [0, 1)")
        self.require(math.isfinite(self.lamb), "lamb", "a finite number")
        self.require(math.isfinite(self.fast), "fast", "a finite number")
        self.require(self.window_size >= 1, "window_size", "at least 1")
        divides = self.stride >= 1 and self.window_size % self.stride == 0
        self.require(divides or self.filter != "ma", "stride", f"a divisor of --window-size ({self.window_size})")
        self.require(0 <= self.lr < math.inf, "lr", "a finite number of at least 0")
        self.require(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number of at least 0")
        self.require(0 <= self.beta1 < 1, "beta1", "in [0, 1)")
        self.require(0 <= self.beta2 < 1, "beta2", "in [0, 1)")
        self.require(self.lr_warmup >= 0, "lr_warmup", "at least 0")
        self.require(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")
        self.require(self.budget >= 1, "budget", "at least 1")
        highest = 1.0 if self.has_accuracy else math.inf
        self.require(self.stop_at is None or 0 < self.stop_at <= highest, "stop_at", f"in (0, {highest:g}], or None")
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None for no clipping")
        self.require(self.filter_from >= 0, "filter_from", "at least 0")
        self.require(self.hold >= 0, "hold", "at least 0")

    def task(self) -> Task:
        """The task of this run; UserError if its data cannot be had."""
        raise NotImplementedError

    def require(self, ok: bool, name: str, allowed: str) -> None:
        """Raise UserError with the flag's name, what it allows and its value unless `ok`."""
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(self, name)}")

    def facts(self) -> dict[str, object]:
        """All that the results depend on but the data, for files; not where these lie on this machine."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "data_dir"}
