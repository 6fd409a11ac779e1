"""A task and its methods in one file outside the examples; it compiles in no time."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.harness.cli import main
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Lamb, LearningRate, Tx, WeightDecay, Window
from examples.harness.task import Task
from grokfast_jax import grokfast_ema, grokfast_ma


@dataclasses.dataclass(frozen=True)
class Toy(Task):
    """Logistic regression on points that a random plane divides; every third is for validation."""

    thresholds = (0.5, 0.8)
    max_steps = 80

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
    thresholds = ()

    def metrics(self, params: Any, data: Any, batch: Any) -> dict[str, jax.Array]:
        return {"loss": super().metrics(params, data, batch)["loss"]}


def adam(lr: LearningRate = 1e-2, weight_decay: WeightDecay = 0.005) -> Tx:
    """Adam without a filter."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(lr))


def ema(lr: LearningRate = 1e-2, weight_decay: WeightDecay = 0.005, alpha: Alpha = 0.98, lamb: Lamb = 2.0) -> Tx:
    """The EMA before Adam."""
    return optax.chain(grokfast_ema(alpha, lamb), adam(lr, weight_decay))


def ma(lr: LearningRate = 1e-2, weight_decay: WeightDecay = 0.005, window_size: Window = 7, lamb: Lamb = 5.0) -> Tx:
    """The MA before Adam."""
    return optax.chain(grokfast_ma(window_size, lamb), adam(lr, weight_decay))


EXPERIMENT = Experiment("tests.toy", Toy(), {"ema": ema, "ma": ma, "adam": adam}, default="ema")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
