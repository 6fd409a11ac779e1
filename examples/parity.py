"""Sparse parity, the product of three bits out of forty, with a small ReLU network: `python -m examples.parity`."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .harness.batches import Batch
from .harness.cli import main
from .harness.config import Config, Experiment, Preset
from .harness.errors import require
from .harness.task import Data, Task
from .harness.torch_init import linear


class MLP(nnx.Module):
    """One layer of ReLUs and a linear output."""

    def __init__(self, bits: int, width: int, *, rngs: nnx.Rngs):
        self.hidden = linear(bits, width, rngs=rngs)
        self.out = linear(width, 1, rngs=rngs)

    def __call__(self, x_bd: jax.Array) -> jax.Array:
        """The logit of each point, (b,)."""
        return self.out(jax.nn.relu(self.hidden(x_bd)))[:, 0]


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """Sparse parity: points of n bits ±1, each labelled with the product of its first k bits.

    The seed draws the points, too. A network fits the training points long before it predicts fresh ones.
    """

    n: int = 40
    """Bits of a point."""
    k: int = 3
    """Bits that the label is the product of."""
    points: int = 1000
    """Training points."""
    fresh_points: int = 2000
    """Validation points."""
    width: int = 256
    """ReLUs."""
    batch_size: int = 64
    """Points per batch."""
    eval_every: int = 50
    """Optimizer steps between two evaluations."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        require(self.k <= self.n, "k", f"at most --n ({self.n})", self.k)

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one chunk."""
        return self.eval_every

    def model(self, key: jax.Array) -> MLP:
        """The model, freshly initialised as PyTorch does."""
        return MLP(self.n, self.width, rngs=nnx.Rngs(params=key))

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
        margin = data["y"][batch["index"]] * self.with_params(params)(data["x"][batch["index"]])
        return {"loss": jax.nn.softplus(-margin), "accuracy": (margin > 0).astype(margin.dtype)}


def method(about: str = "", *, controls: tuple[str, ...] = (), **changes: Any) -> Preset:
    """A method: AdamW without a filter, at a learning rate that is too small for it, but for the changes."""
    base = Config(Parity()).replace(
        filter="none",
        optimizer="adamw",
        lr=0.003,
        weight_decay=0.3,
        beta2=0.999,
        lr_warmup=0,
        budget=5_000,
        stop_at=0.95,
    )
    return Preset(base.replace(**changes), about, controls)


EMA: dict[str, Any] = {"filter": "ema", "start": "debiased"}
MA: dict[str, Any] = {"filter": "ma", "lamb": 5.0}
MUON: dict[str, Any] = {"optimizer": "muon", "lr": 0.03, "weight_decay": 0.1}

PRESETS = {
    "adamw": method("No filter: fits its training points and generalises to no others"),
    "adamw-tuned": method("No filter at a tuned learning rate", lr=0.03),
    "adamw-b1-0.98": method("A memory as long as the EMA's, within AdamW", beta1=0.98),
    "ema+adamw": method("The EMA, debiased", controls=("adamw", "adamw-b1-0.98"), **EMA),
    "ma+adamw": method("The MA", controls=("adamw", "adamw-b1-0.98"), **MA),
    "ma+adamw-lamb-3": method(
        "The MA, which λ 3 leaves stable", controls=("adamw", "adamw-b1-0.98"), **MA | {"lamb": 3.0}
    ),
    "muon": method(**MUON),
    "ema+muon": method(controls=("muon",), **EMA, **MUON),
    "ma+muon": method(controls=("muon",), **MA, **MUON),
}
EXPERIMENT = Experiment("parity", PRESETS, default="ma+adamw", thresholds=(0.95,))

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
