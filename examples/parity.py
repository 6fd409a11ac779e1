"""Sparse parity, the product of three bits out of forty, with a small ReLU network: `python -m examples.parity`."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.harness.cli import main
from examples.harness.errors import require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Fast, Lamb, LearningRate, Momentum, Tx, WeightDecay, Window
from examples.harness.optimizers import stacked_muon
from examples.harness.task import Batch, Data, Task
from examples.harness.torch_init import linear
from grokfast_jax import grokfast_ema, grokfast_ma


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """Sparse parity: points of n bits ±1, each labelled with the product of its first k bits.

    The seed draws the points, too. A network fits the training points long before it predicts fresh ones.
    The step of training is `step` in examples/harness/train.py.
    """

    thresholds = (0.95,)
    max_steps = 5_000
    stop_at = 0.95

    n: int = 40  # Bits of a point.
    k: int = 3  # Bits that the label is the product of.
    points: int = 1000  # Training points.
    fresh_points: int = 2000  # Validation points.
    width: int = 256  # ReLUs.
    batch_size: int = 64  # Points per batch.
    eval_every: int = 50  # Optimizer steps between two evaluations.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.k <= self.n, "k", f"at most --n ({self.n})", self.k)

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one chunk."""
        return self.eval_every

    def model(self, key: jax.Array) -> nnx.Sequential:
        """One layer of ReLUs and a linear output, freshly initialised as PyTorch does."""
        rngs = nnx.Rngs(params=key)
        return nnx.Sequential(linear(self.n, self.width, rngs=rngs), nnx.relu, linear(self.width, 1, rngs=rngs))

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """The points, drawn at random, those to train on first; their labels; and which to validate on."""
        del shared
        x = jax.random.rademacher(key, (self.points + self.fresh_points, self.n), jnp.float32)
        return {"x": x, "y": x[:, : self.k].prod(axis=1), "val": self.points + jnp.arange(self.fresh_points)}

    def batches(self, data: Data, key: jax.Array) -> Batch:
        """Training points, drawn with replacement."""
        del data
        index = jax.random.randint(key, (self.steps, self.batch_size), 0, self.points)
        return Batch(index=index, weight=jnp.ones(index.shape, jnp.float32))

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Logistic loss of each point of a batch, and whether the logit has the sign of the label."""
        logit = self.with_params(params)(data["x"][batch["index"]])[:, 0]
        margin = data["y"][batch["index"]] * logit
        return {"loss": jax.nn.softplus(-margin), "accuracy": (margin > 0).astype(margin.dtype)}


def adamw(lr: LearningRate = 0.003, weight_decay: WeightDecay = 0.3, b1: Momentum = 0.9) -> Tx:
    """AdamW; at this learning rate it fits its training points long before it generalises."""
    return optax.adamw(lr, b1, weight_decay=weight_decay)


def ema(
    lr: LearningRate = 0.003, weight_decay: WeightDecay = 0.3, alpha: Alpha = 0.98, lamb: Lamb = 2.0, fast: Fast = 1.0
) -> Tx:
    """Grokfast-EMA, debiased, before AdamW."""
    return optax.chain(grokfast_ema(alpha, lamb, fast=fast, start="debiased"), adamw(lr, weight_decay))


def ma(
    lr: LearningRate = 0.003,
    weight_decay: WeightDecay = 0.3,
    window_size: Window = 100,
    lamb: Lamb = 5.0,
    fast: Fast = 1.0,
) -> Tx:
    """Grokfast-MA before AdamW."""
    return optax.chain(grokfast_ma(window_size, lamb, fast=fast), adamw(lr, weight_decay))


def muon(lr: LearningRate = 0.03, weight_decay: WeightDecay = 0.1) -> Tx:
    """Muon on all matrices, Nesterov's AdamW on the rest."""
    return stacked_muon(lr, weight_decay=weight_decay, adam_weight_decay=weight_decay)


METHODS = {
    "ma": ma,
    "ema": ema,
    "adamw": adamw,
    "adamw-tuned": functools.partial(adamw, lr=0.03),
    "adamw-b1-0.98": functools.partial(adamw, b1=0.98),
    "muon": muon,
}
EXPERIMENT = Experiment("parity", Parity(), METHODS, default="ma")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
