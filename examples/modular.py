"""Grokking modular arithmetic with a two-layer Transformer: `python -m examples.modular`."""

import dataclasses
import functools
import math
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

# Suffixes name the axes: b example, l position, q position that is read out, m position that is attended to,
# d channel, h head, k channel of a head, f channel of the MLP, c key or value.
Cache = list[jax.Array]  # keys and values of earlier positions, block by block: (b, l, c, h, k)


def apply(layer: nnx.Linear, x_bld: jax.Array) -> jax.Array:
    """A linear layer over all positions as one matrix product; the gradient of a batched one is slow on XLA's CPU."""
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

    def __call__(self, x_bld: jax.Array, past: jax.Array | None, readout: int) -> tuple[jax.Array, jax.Array]:
        """The output at the last `readout` positions, and the keys and values of all positions so far."""
        b, length, d = x_bld.shape
        kv_bmchk = apply(self.key_value, x_bld).reshape(b, length, 2, self.heads, d // self.heads)
        if past is not None:
            kv_bmchk = jnp.concatenate([past, kv_bmchk], axis=1)
        q_bqhk = apply(self.query, x_bld[:, -readout:]).reshape(b, readout, self.heads, d // self.heads)
        scores_bhqm = jnp.einsum("bqhk,bmhk->bhqm", q_bqhk, kv_bmchk[:, :, 0]) / q_bqhk.shape[-1] ** 0.5
        visible_qm = jnp.tril(jnp.ones((kv_bmchk.shape[1],) * 2, bool))[-readout:]
        weights_bhqm = jax.nn.softmax(jnp.where(visible_qm[None, None], scores_bhqm, -jnp.inf))
        y_bqhk = jnp.einsum("bhqm,bmhk->bqhk", weights_bhqm, kv_bmchk[:, :, 1])
        return apply(self.out, y_bqhk.reshape(b, readout, d)), kv_bmchk


class Block(nnx.Module):
    """A Transformer block whose residual stream is the normalised one, as in the authors' code."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.ln2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(dim, heads, rngs=rngs)
        self.up = linear(dim, 4 * dim, rngs=rngs)
        self.down = linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x_bld: jax.Array, past: jax.Array | None, readout: int) -> tuple[jax.Array, jax.Array]:
        """The stream at the last `readout` positions, and the keys and values of all positions so far."""
        x_bld = self.ln1(x_bld)
        y_bqd, kv_bmchk = self.attention(x_bld, past, readout)
        x_bqd = x_bld[:, -readout:] + y_bqd
        hidden_bqf = jax.nn.gelu(apply(self.up, self.ln2(x_bqd)), approximate=False)
        return x_bqd + apply(self.down, hidden_bqf), kv_bmchk


class Decoder(nnx.Module):
    """Decoder-only Transformer with learned positions, read out at the last one."""

    def __init__(
        self,
        tokens: int,
        *,
        dim: int,
        depth: int,
        heads: int,
        positions: int,
        embedding_std: float,
        rngs: nnx.Rngs,
    ):
        self.token = nnx.Param(embedding_std * jax.random.normal(rngs.params(), (tokens, dim)))
        self.position = nnx.Param(embedding_std * jax.random.normal(rngs.params(), (positions, dim)))
        self.blocks = nnx.List([Block(dim, heads, rngs=rngs) for _ in range(depth)])
        self.ln = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = linear(dim, tokens, use_bias=False, rngs=rngs)

    def __call__(self, tokens_bl: jax.Array, past: Cache | None = None) -> tuple[jax.Array, Cache]:
        """Logits of the token after the last position, and the cache with `past`, what came before, extended."""
        first = past[0].shape[1] if past else 0
        length = tokens_bl.shape[1]
        x_bld = self.token[...][tokens_bl] + self.position[None, first : first + length]
        cache = []
        for i, block in enumerate(self.blocks):
            # Nothing but the last position is read out, so the last block computes nothing but keys for the others.
            readout = 1 if i == len(self.blocks) - 1 else length
            x_bld, kv_bmchk = block(x_bld, past[i] if past else None, readout)
            cache.append(kv_bmchk)
        return self.head(self.ln(x_bld[:, -1])), cache


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
    embedding_std: float = 1.0

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
        return Decoder(
            self.p + 2,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            positions=5,
            embedding_std=self.embedding_std,
            rngs=nnx.Rngs(params=key),
        )

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[Decoder]:
        """The model without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, a nested dict."""
        return nnx.to_pure_dict(nnx.state(self.model(key)))

    def logits(self, params: Any, pair: jax.Array) -> jax.Array:
        """The logits of the answer to `x op y =` for pairs given by number: (examples, p + 2)."""
        model = nnx.merge(self.graphdef, params)
        x, y = self.operands(pair)
        equals, op = self.p, self.p + 1
        # `x op` has only p values, and what comes first does not see what follows: so it is computed once for each x.
        every_x = jnp.arange(self.p)
        _, cache = model(jnp.stack([every_x, jnp.full_like(every_x, op)], axis=-1))
        past = [kv[x] for kv in cache]
        return model(jnp.stack([y, jnp.full_like(y, equals)], axis=-1), past)[0]

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
    """Optimizer steps at most, rounded up to whole evaluations."""
    p: int = 97
    """Prime modulus."""
    operation: Operation = "multiplication"
    """What is done to x and y."""
    train_fraction: float = 0.5
    """Part of all pairs that is trained on."""
    batch_size: int = 512
    """Pairs a batch."""
    embedding_std: float = 1.0
    """Standard deviation of the initial token and position embeddings."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        super().__post_init__()
        prime = self.p >= 2 and all(self.p % k for k in range(2, int(self.p**0.5) + 1))
        self.require(prime, "p", "a prime number")
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        task = self.task()
        both = 0 < self.train_fraction < 1 and 0 < task.train_pairs < task.pairs
        self.require(both, "train_fraction", "in (0, 1) and leave a pair on either side")
        self.require(0 < self.embedding_std < math.inf, "embedding_std", "a positive number")

    def task(self) -> Modular:
        """The task of this run."""
        return Modular(self.p, self.operation, self.train_fraction, self.batch_size, embedding_std=self.embedding_std)


THRESHOLDS = (0.95,)  # validation accuracies whose first crossing is reported

PRESETS = {
    # The paper's runs
    "baseline": Config(filter="none", weight_decay=0.0, budget=50_000),
    "ema": Config(),
    "ma": Config(filter="ma", lamb=5.0, weight_decay=0.01),
    "two-stage": Config(filter="ma", lamb=5.0, weight_decay=0.01, filter_from=500),
    # On when the window is full: before, there is no slow part, and the decay alone would shrink all weights to nothing
    "slow-only": Config(filter="ma", lamb=5.0, weight_decay=0.01, fast=0.0, filter_from=99),
    # Their controls: the same weight decay without a filter, and AdamW with a strong one
    "decay-005": Config(filter="none"),
    "decay-01": Config(filter="none", weight_decay=0.01),
    "adamw-1": Config(filter="none", optimizer="adamw", weight_decay=1.0),
}

if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main("modular", PRESETS, default="ema")))
