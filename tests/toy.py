"""A task that compiles in no time, for tests of the harness."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from examples.harness.batches import in_batches, shuffled
from examples.harness.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Toy:
    """Logistic regression on points that a random plane divides; every third is for validation."""

    examples: int = 30
    steps: int = 4
    accuracy: bool = True

    def init(self, key: jax.Array) -> Any:
        return {"w": 0.1 * jax.random.normal(key, (5,)), "b": jnp.zeros(())}

    def split(self, key: jax.Array) -> Any:
        x = jax.random.normal(key, (self.examples, 5))
        order = jnp.arange(self.examples)
        return {"x": x, "y": (x @ jnp.arange(1.0, 6.0) > 0).astype(float), "train": order[10:], "val": order[:10]}

    def batches(self, data: Any, key: jax.Array) -> Any:
        return shuffled(key, data["train"], 6)

    def validation(self, data: Any) -> Any:
        return in_batches(data["val"], 6)

    def measure(self, params: Any, data: Any, batch: Any) -> dict[str, jax.Array]:
        x, y, weight = data["x"][batch["index"]], data["y"][batch["index"]], batch["weight"]
        logit = x @ params["w"] + params["b"]
        loss = jnp.logaddexp(0.0, logit) - y * logit
        correct = ((logit > 0) == (y > 0)).astype(float)
        sums = {"count": weight.sum(), "loss": weight @ loss}
        return sums | {"accuracy": weight @ correct} if self.accuracy else sums


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A toy run."""

    lr: float = 1e-2
    budget: int = 80
    stop_at: float | None = None

    def task(self) -> Toy:
        return Toy()


@dataclasses.dataclass(frozen=True)
class LossConfig(Config):
    """A toy run that has a loss alone."""

    has_accuracy = False

    def task(self) -> Toy:
        return Toy(accuracy=False)


THRESHOLDS = (0.5, 0.8)
PRESETS = {"ema": Config(), "ma": Config(filter="ma", window_size=7, lamb=5.0), "none": Config(filter="none")}
