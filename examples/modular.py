"""Grokking modular arithmetic with a two-layer Transformer: `python -m examples.modular`."""

import dataclasses
import functools
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from .harness.batches import Batch, in_batches, shuffled, steps_per_epoch
from .harness.config import RunConfig
from .harness.errors import plain_errors
from .harness.run import main
from .harness.torch_init import linear

Operation = Literal["multiplication", "addition", "subtraction", "division"]

# Suffixes name the axes: b example, l position, q position that is read out, d channel, h head, k channel of a head,
# f channel of the MLP.


def apply(layer: nnx.Linear, x_bld: jax.Array) -> jax.Array:
    """A linear layer over all positions as one matrix product: XLA's CPU gradient of a batched one is 2.4 x slower."""
    return layer(x_bld.reshape(-1, x_bld.shape[-1])).reshape(*x_bld.shape[:-1], -1)


class Attention(nnx.Module):
    """Causal self-attention, read out at the last positions."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        # PyTorch draws queries, keys and values as one (3 dim, dim) matrix, Xavier-uniform: ±sqrt(6 / (4 dim)).
        xavier = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
        self.query = nnx.Linear(dim, dim, kernel_init=xavier, rngs=rngs)
        self.key_value = nnx.Linear(dim, 2 * dim, kernel_init=xavier, rngs=rngs)
        self.out = linear(dim, dim, zero_bias=True, rngs=rngs)
        self.heads = heads

    def __call__(self, x_bld: jax.Array, readout: int) -> jax.Array:
        """The output at the last `readout` positions."""
        length = x_bld.shape[1]

        def split(y_bld: jax.Array) -> jax.Array:
            return y_bld.reshape(*y_bld.shape[:2], self.heads, -1)

        q_bqhk = split(apply(self.query, x_bld[:, -readout:]))
        k_blhk, v_blhk = map(split, jnp.split(apply(self.key_value, x_bld), 2, axis=-1))
        scores_bhql = jnp.einsum("bqhk,blhk->bhql", q_bqhk, k_blhk) / q_bqhk.shape[-1] ** 0.5
        visible_ql = jnp.tril(jnp.ones((length, length), bool))[-readout:]
        weights_bhql = jax.nn.softmax(jnp.where(visible_ql[None, None], scores_bhql, -jnp.inf))
        y_bqhk = jnp.einsum("bhql,blhk->bqhk", weights_bhql, v_blhk)
        return apply(self.out, y_bqhk.reshape(*y_bqhk.shape[:2], -1))


class Block(nnx.Module):
    """A Transformer block whose residual stream is the normalised one, as in the authors' code."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.ln2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(dim, heads, rngs=rngs)
        self.up = linear(dim, 4 * dim, rngs=rngs)
        self.down = linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x_bld: jax.Array, readout: int) -> jax.Array:
        """The stream at the last `readout` positions."""
        x_bld = self.ln1(x_bld)
        x_bqd = x_bld[:, -readout:] + self.attention(x_bld, readout)
        hidden_bqf = jax.nn.gelu(apply(self.up, self.ln2(x_bqd)), approximate=False)
        return x_bqd + apply(self.down, hidden_bqf)


class Decoder(nnx.Module):
    """Decoder-only Transformer with learned positions, read out at the last one."""

    def __init__(self, tokens: int, *, dim: int, depth: int, heads: int, positions: int, rngs: nnx.Rngs):
        self.token = nnx.Param(jax.random.normal(rngs.params(), (tokens, dim)))
        self.position = nnx.Param(jax.random.normal(rngs.params(), (positions, dim)))
        self.blocks = nnx.List([Block(dim, heads, rngs=rngs) for _ in range(depth)])
        self.ln = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = linear(dim, tokens, use_bias=False, rngs=rngs)

    def __call__(self, tokens_bl: jax.Array) -> jax.Array:
        """Logits of the token after the last position."""
        length = tokens_bl.shape[1]
        x_bld = self.token[...][tokens_bl] + self.position[None, :length]
        for i, block in enumerate(self.blocks, start=1):
            x_bld = block(x_bld, readout=1 if i == len(self.blocks) else length)
        return self.head(self.ln(x_bld[:, -1]))


@dataclasses.dataclass(frozen=True)
class Modular:
    """Task: the last token of `x op y = z` with z = x op y mod p, a random part of all pairs being trained on."""

    p: int = 97
    operation: Operation = "multiplication"
    train_fraction: float = 0.5
    batch_size: int = 512
    dim: int = 128
    depth: int = 2
    heads: int = 4

    @functools.cached_property
    def y_values(self) -> int:
        """How many values y has: p, but one less without 0, which multiplication and division leave out."""
        return self.p - (self.operation in ("multiplication", "division"))

    @property
    def pairs(self) -> int:
        """Number of pairs (x, y)."""
        return self.p * self.y_values

    @property
    def train_pairs(self) -> int:
        """Number of pairs that are trained on."""
        return int(self.pairs * self.train_fraction)

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one epoch."""
        return steps_per_epoch(self.train_pairs, self.batch_size)

    def model(self, key: jax.Array) -> Decoder:
        """The model, freshly initialised."""
        rngs = nnx.Rngs(params=key)
        return Decoder(self.p + 2, dim=self.dim, depth=self.depth, heads=self.heads, positions=5, rngs=rngs)

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[Decoder]:
        """The model without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, a nested dict."""
        return nnx.to_pure_dict(nnx.state(self.model(key)))

    def logits(self, params: Any, pair: jax.Array) -> jax.Array:
        """The answer's logits for pairs given by number: (examples, p + 2)."""
        return nnx.merge(self.graphdef, params)(self.tokens(pair))

    def tokens(self, pair: jax.Array) -> jax.Array:
        """The question `x op y =` of pairs given by number: (examples, 4)."""
        x, y = self.operands(pair)
        equals, op = jnp.full_like(x, self.p), jnp.full_like(x, self.p + 1)
        return jnp.stack([x, op, y, equals], axis=-1)

    def operands(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers x and y of pairs given by number."""
        return pair // self.y_values, pair % self.y_values + self.p - self.y_values

    def answer(self, pair: jax.Array) -> jax.Array:
        """The answer z of pairs given by number."""
        x, y = self.operands(pair)
        match self.operation:
            case "multiplication":
                return x * y % self.p
            case "addition":
                return (x + y) % self.p
            case "subtraction":
                return (x - y) % self.p
            case "division":
                # z y = x: the inverse of y is y^(p - 2) by Fermat, taken from a table made in exact arithmetic.
                inverse = jnp.array([pow(k, -1, self.p) if k else 0 for k in range(self.p)])
                return x * inverse[y] % self.p

    def split(self, key: jax.Array) -> dict[str, jax.Array]:
        """Numbers of the training and of the validation pairs, drawn at random."""
        order = jax.random.permutation(key, self.pairs)
        return {"train": order[: self.train_pairs], "val": order[self.train_pairs :]}

    def batches(self, data: dict[str, jax.Array], key: jax.Array) -> Batch:
        """An epoch of shuffled training pairs."""
        return shuffled(key, data["train"], self.batch_size)

    def validation(self, data: dict[str, jax.Array]) -> Batch:
        """The validation pairs."""
        return in_batches(data["val"], self.batch_size)

    def measure(self, params: Any, data: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums of cross-entropy and correct answers over a batch."""
        del data
        logits, answer = self.logits(params, batch["index"]), self.answer(batch["index"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, answer)
        correct = (jnp.argmax(logits, axis=-1) == answer).astype(loss.dtype)
        weight = batch["weight"].astype(loss.dtype)
        return {"count": weight.sum(), "loss": weight @ loss, "accuracy": weight @ correct}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Grokking of modular arithmetic. Flags are named as those of the authors' script."""

    budget: int = 5_000
    """Optimizer steps at most."""
    p: int = 97
    """Prime modulus."""
    operation: Operation = "multiplication"
    """What is done to x and y."""
    train_fraction: float = 0.5
    """Part of all pairs that is trained on."""
    batch_size: int = 512
    """Pairs a batch."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        super().__post_init__()
        prime = self.p >= 2 and all(self.p % k for k in range(2, int(self.p**0.5) + 1))
        self.require(prime, "p", "a prime number")
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        task = self.task()
        self.require(0 < task.train_pairs < task.pairs, "train_fraction", "in (0, 1) and leave a pair on either side")

    def task(self) -> Modular:
        """The task of this run."""
        return Modular(self.p, self.operation, self.train_fraction, self.batch_size)


THRESHOLDS = (0.95,)  # validation accuracies whose first crossing is reported

PRESETS = {
    # The paper's runs
    "baseline": Config(filter="none", weight_decay=0.0, budget=50_000),
    "ema": Config(),
    "ma": Config(filter="ma", lamb=5.0, weight_decay=0.01),
    "two-stage": Config(filter="ma", lamb=5.0, weight_decay=0.01, two_stage=True),
    "slow-only": Config(filter="ma", lamb=5.0, weight_decay=0.01, fast=0.0),
    # Their controls: the same weight decay without a filter, and AdamW with a strong one
    "decay-005": Config(filter="none"),
    "decay-01": Config(filter="none", weight_decay=0.01),
    "adamw-1": Config(filter="none", optimizer="adamw", weight_decay=1.0),
}

if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main("modular", PRESETS, default="ema")))
