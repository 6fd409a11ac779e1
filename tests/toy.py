"""A task in one file outside the examples that compiles in no time."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from examples.harness.cli import main
from examples.harness.config import Config, Experiment, Preset, Run
from examples.harness.optimizers import Filtering, Optimization
from examples.harness.task import Task


@dataclasses.dataclass(frozen=True)
class Toy(Task):
    """Logistic regression on points that a random plane divides; every third is for validation."""

    batch_size: int = 6
    """Points per batch."""
    examples: int = 30
    """Points, of which 10 are for validation."""

    @property
    def train_size(self) -> int:
        return self.examples - 10

    def init(self, key: jax.Array) -> Any:
        return {"w": 0.1 * jax.random.normal(key, (5,)), "b": jnp.zeros(())}

    def split(self, shared: Any, key: jax.Array) -> dict[str, jax.Array]:
        x = jax.random.normal(key, (self.examples, 5))
        order = jnp.arange(self.examples)
        return {"x": x, "y": (x @ jnp.arange(1.0, 6.0) > 0).astype(float), "train": order[10:], "val": order[:10]}

    def metrics(self, params: Any, data: Any, batch: Any) -> dict[str, jax.Array]:
        x, y = data["x"][batch["index"]], data["y"][batch["index"]]
        logit = x @ params["w"] + params["b"]
        loss = jnp.logaddexp(0.0, logit) - y * logit
        return {"loss": loss, "accuracy": ((logit > 0) == (y > 0)).astype(float)}


@dataclasses.dataclass(frozen=True)
class LossToy(Toy):
    """The same with a loss alone."""

    metric = "loss"

    def metrics(self, params: Any, data: Any, batch: Any) -> dict[str, jax.Array]:
        return {"loss": super().metrics(params, data, batch)["loss"]}


BASE = Config(Toy(), Filtering(filter="ema"), Optimization(lr=1e-2), Run(budget=80))
EXPERIMENT = Experiment(
    "toy",
    {
        "none": Preset(BASE.replace(filter="none"), "No filter"),
        "ema": Preset(BASE, "The EMA", controls=("none",)),
        "ma": Preset(BASE.replace(filter="ma", window_size=7, lamb=5.0), "The MA", controls=("none",)),
    },
    default="ema",
    thresholds=(0.5, 0.8),
)
LOSS = Experiment("toy", {"loss": Preset(dataclasses.replace(BASE, task=LossToy()), "A loss alone")}, default="loss")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
