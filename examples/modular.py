"""Grokking modular arithmetic with a two-layer Transformer: `python -m examples.modular`."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import grokfast_jax
from examples import circuits
from examples.harness.cli import main
from examples.harness.errors import require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Fast, Lamb, LearningRate, StartStep, Tx, WeightDecay, Window
from examples.harness.optimizers import from_step, stacked_muon, warmup
from examples.harness.task import Batch, Data, Task, shuffled
from examples.harness.torch_init import linear
from grokfast_jax import grokfast_ema, grokfast_ma

Operation = Literal["multiplication", "addition", "subtraction", "division"]

# Suffixes name the axes: b example, l position, q position that is read out, m position that is attended to, d channel,
# h head, k channel of a head, c key or value, v token.


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        # PyTorch draws queries, keys and values as one (3 dim, dim) matrix, Xavier-uniform: ±sqrt(6 / (4 dim)).
        xavier = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
        self.query = nnx.Linear(dim, dim, kernel_init=xavier, rngs=rngs)
        self.key_value = nnx.Linear(dim, 2 * dim, kernel_init=xavier, rngs=rngs)
        self.out = linear(dim, dim, zero_bias=True, rngs=rngs)
        self.heads = heads

    def project(self, x_bld: jax.Array, readout: int) -> tuple[jax.Array, jax.Array]:
        """Queries at the last `readout` positions, and keys and values at all: (b, q, h, k) and (b, l, c, h, k)."""
        b, length, _ = x_bld.shape
        q_bqhk = apply(self.query, x_bld[:, -readout:]).reshape(b, readout, self.heads, -1)
        return q_bqhk, apply(self.key_value, x_bld).reshape(b, length, 2, self.heads, -1)

    def __call__(self, q_bqhk: jax.Array, kv_bmchk: jax.Array) -> jax.Array:
        """What each of the last positions takes from itself and those before it, (b, q, d)."""
        scores_bhqm = jnp.einsum("bqhk,bmhk->bhqm", q_bqhk, kv_bmchk[:, :, 0]) / q_bqhk.shape[-1] ** 0.5
        visible_qm = jnp.tril(jnp.ones((kv_bmchk.shape[1],) * 2, bool))[-q_bqhk.shape[1] :]
        weights_bhqm = jax.nn.softmax(jnp.where(visible_qm[None, None], scores_bhqm, -jnp.inf))
        y_bqhk = jnp.einsum("bhqm,bmhk->bqhk", weights_bhqm, kv_bmchk[:, :, 1])
        return apply(self.out, y_bqhk.reshape(*q_bqhk.shape[:2], -1))


class Block(nnx.Module):
    """A Transformer block whose residual stream is the normalised one, as in the authors' code."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.ln2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(dim, heads, rngs=rngs)
        self.up = linear(dim, 4 * dim, rngs=rngs)
        self.down = linear(4 * dim, dim, rngs=rngs)

    def project(self, x_bld: jax.Array, readout: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The normalised stream, then what `Attention.project` makes of it."""
        x_bld = self.ln1(x_bld)
        return x_bld, *self.attention.project(x_bld, readout)

    def __call__(self, x_bqd: jax.Array, q_bqhk: jax.Array, kv_bmchk: jax.Array) -> jax.Array:
        """The stream after the block, at the last positions."""
        x_bqd = x_bqd + self.attention(q_bqhk, kv_bmchk)
        return x_bqd + apply(self.down, gelu(apply(self.up, self.ln2(x_bqd))))


def apply(layer: nnx.Linear, x_bld: jax.Array) -> jax.Array:
    """A linear layer over all positions as one matrix product; the gradient of a batched one is slow on XLA's CPU."""
    return layer(x_bld.reshape(-1, x_bld.shape[-1])).reshape(*x_bld.shape[:-1], -1)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU by erf; jax.nn.gelu is slower, because its erfc is also exact far below 0."""
    return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


class Decoder(nnx.Module):
    """Decoder-only Transformer with learned positions."""

    def __init__(self, tokens: int, *, dim: int, depth: int, heads: int, embedding_std: float, rngs: nnx.Rngs):
        self.token = nnx.Param(embedding_std * jax.random.normal(rngs.params(), (tokens, dim)))
        self.position = nnx.Param(embedding_std * jax.random.normal(rngs.params(), (5, dim)))
        self.blocks = nnx.List([Block(dim, heads, rngs=rngs) for _ in range(depth)])
        self.ln = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = linear(dim, tokens, use_bias=False, rngs=rngs)

    def __call__(self, tokens_bl: jax.Array) -> jax.Array:
        """Logits of the token after each position, (b, l, v)."""
        length = tokens_bl.shape[1]
        x_bld = self.token[...][tokens_bl] + self.position[None, :length]
        for block in self.blocks:
            x_bld = block(*block.project(x_bld, length))
        return self.head(self.ln(x_bld))

    def last_logits(self, tokens_bl: jax.Array, *, prefixes: int) -> jax.Array:
        """The logits of `self(tokens_bl)[:, -1]`, (b, v), in a third of the time.

        The first token is below `prefixes` and the second is the same in all examples. Their keys and values are
        therefore computed once for each value of the first token.
        """
        first = jnp.arange(prefixes)
        cache, _ = self._decode(jnp.stack([first, jnp.broadcast_to(tokens_bl[0, 1], first.shape)], axis=-1))
        return self._decode(tokens_bl[:, 2:], [kv_bmchk[tokens_bl[:, 0]] for kv_bmchk in cache])[1]

    def _decode(self, tokens_bl: jax.Array, past: Sequence[jax.Array] = ()) -> tuple[list[jax.Array], jax.Array]:
        """The keys and values of each block, `past` included, and the logits after the last position."""
        first, length = past[0].shape[1] if past else 0, tokens_bl.shape[1]
        # The first block's projections depend on token and position alone: they are computed once for each pair.
        x_bld = self.token[...][:, None] + self.position[None, first : first + length]
        cache = []
        for i, block in enumerate(self.blocks):
            readout = 1 if i == len(self.blocks) - 1 else length
            projected = block.project(x_bld, readout if i else length)
            if i == 0:
                projected = jax.tree.map(lambda table: table[tokens_bl, jnp.arange(length)[None]], projected)
            x_bld, q_bqhk, kv_blchk = projected
            cache.append(jnp.concatenate([past[i], kv_blchk], axis=1) if past else kv_blchk)
            x_bld = block(x_bld[:, -readout:], q_bqhk[:, -readout:], cache[-1])
        return cache, self.head(self.ln(x_bld[:, -1]))


@dataclasses.dataclass(frozen=True)
class Modular(Task):
    """Grokking of modular arithmetic: the last token of `x op y = z`, with z = x op y mod p.

    A random part of all pairs is trained on. The step of training is `step` in examples/harness/train.py.
    """

    thresholds = (0.95,)
    max_steps = 5_000
    stop_at = 0.95

    p: int = 97  # Prime modulus.
    operation: Operation = "multiplication"  # What is done to x and y.
    train_fraction: float = 0.5  # Part of all pairs that is trained on.
    batch_size: int = 512  # Pairs per batch.
    dim: int = 128  # Channels of the residual stream.
    depth: int = 2  # Transformer blocks.
    heads: int = 4  # Attention heads per block; they divide dim.
    embedding_std: float = 1.0  # Standard deviation of the initial token and position embeddings.

    def __post_init__(self) -> None:
        super().__post_init__()
        is_prime = 2 <= self.p < 46_349 and all(self.p % k for k in range(2, int(self.p**0.5) + 1))
        require(is_prime, "p", "a prime number below 46,349", self.p)  # pairs are numbered in int32
        require(self.depth <= 1_000, "depth", "at most 1,000", self.depth)
        require(self.dim % self.heads == 0, "dim", f"a multiple of --heads ({self.heads})", self.dim)
        both = 0 < self.train_fraction < 1 and 0 < self.train_size < self.pairs
        require(both, "train_fraction", "in (0, 1) and leave a pair on either side", self.train_fraction)
        require(0 < self.embedding_std < float("inf"), "embedding_std", "a positive number", self.embedding_std)

    @property
    def y_values(self) -> int:
        """How many values y has: p, but one less without 0, which multiplication and division leave out."""
        return self.p - (self.operation in ("multiplication", "division"))

    @property
    def pairs(self) -> int:
        """Number of pairs (x, y)."""
        return self.p * self.y_values

    @property
    def train_size(self) -> int:
        """Number of pairs that are trained on."""
        return int(self.pairs * self.train_fraction)

    def model(self, key: jax.Array) -> Decoder:
        """The model, freshly initialised."""
        shape = {"dim": self.dim, "depth": self.depth, "heads": self.heads}
        return Decoder(self.p + 2, **shape, embedding_std=self.embedding_std, rngs=nnx.Rngs(params=key))

    def operands(self, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numbers x and y of pairs given by number."""
        return pair // self.y_values, pair % self.y_values + self.p - self.y_values

    def answer(self, pair: jax.Array) -> jax.Array:
        """The answer z of pairs given by number."""
        x, y = self.operands(pair)
        inverse = jnp.array([pow(k, -1, self.p) if k else 0 for k in range(self.p)])  # x / y = x times it
        answers = {"multiplication": x * y, "addition": x + y, "subtraction": x - y, "division": x * inverse[y]}
        return answers[self.operation] % self.p

    def tokens(self, pair: jax.Array) -> jax.Array:
        """The tokens of `x op y =`: (examples, 4)."""
        x, y = self.operands(pair)
        equals, op = self.p, self.p + 1
        return jnp.stack([x, jnp.full_like(x, op), y, jnp.full_like(y, equals)], axis=-1)

    def logits(self, params: Any, pair: jax.Array) -> jax.Array:
        """The model's logits of the answers of pairs, (examples, tokens)."""
        return self.with_params(params).last_logits(self.tokens(pair), prefixes=self.p)

    def split(self, shared: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Numbers of the training and of the validation pairs, drawn at random."""
        del shared
        order = jax.random.permutation(key, self.pairs)
        return {"train": order[: self.train_size], "val": order[self.train_size :]}

    def batches(self, data: Data, key: jax.Array) -> Batch:
        """An epoch of shuffled training pairs."""
        return shuffled(key, data["train"], self.batch_size)

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Cross-entropy and accuracy of each pair of a batch."""
        del data
        logits, answer = self.logits(params, batch["index"]), self.answer(batch["index"])
        loss = self.loss(logits, answer)
        return {"loss": loss, "accuracy": (jnp.argmax(logits, axis=-1) == answer).astype(loss.dtype)}

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """Cross-entropy of each pair."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer)


def adam(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.0) -> Tx:
    """The paper's baseline: Adam with coupled weight decay."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.scale_by_adam(0.9, 0.98), optax.scale_by_learning_rate(warmup(lr)))


def adamw(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0) -> Tx:
    """AdamW: decoupled weight decay."""
    return optax.adamw(warmup(lr), 0.9, 0.98, weight_decay=weight_decay)


def muon(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0) -> Tx:
    """Muon on all matrices, Nesterov's AdamW on the rest."""
    return stacked_muon(warmup(lr), adam_b2=0.98, weight_decay=weight_decay, adam_weight_decay=weight_decay)


def ema(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.005, alpha: Alpha = 0.98, lamb: Lamb = 2.0, fast: Fast = 1.0
) -> Tx:
    """The paper's Grokfast-EMA before Adam."""
    return optax.chain(grokfast_ema(alpha, lamb, fast=fast), adam(lr, weight_decay))


def ma(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.01,
    window_size: Window = 100,
    lamb: Lamb = 5.0,
    fast: Fast = 1.0,
) -> Tx:
    """The paper's Grokfast-MA before Adam."""
    return optax.chain(grokfast_ma(window_size, lamb, fast=fast), adam(lr, weight_decay))


def two_stage(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.01,
    window_size: Window = 100,
    lamb: Lamb = 5.0,
    fast: Fast = 1.0,
    start_step: StartStep = 500,
) -> Tx:
    """The paper's two stages: the MA collects from the first step on, and amplifies from a later one on."""
    late_fast = from_step(start_step, fast, before=1.0)
    return optax.chain(grokfast_ma(window_size, from_step(start_step, lamb), fast=late_fast), adam(lr, weight_decay))


def ema_adamw(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0, alpha: Alpha = 0.98, lamb: Lamb = 2.0, fast: Fast = 1.0
) -> Tx:
    """Grokfast-EMA before AdamW."""
    return optax.chain(grokfast_ema(alpha, lamb, fast=fast), adamw(lr, weight_decay))


def late_ema_adamw(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 1.0,
    alpha: Alpha = 0.98,
    lamb: Lamb = 5.0,
    fast: Fast = 1.0,
    start_step: StartStep = 100,
) -> Tx:
    """Grokfast-EMA before AdamW, which collects from the first step on, and amplifies from a later one on."""
    late_fast = from_step(start_step, fast, before=1.0)
    return optax.chain(grokfast_ema(alpha, from_step(start_step, lamb), fast=late_fast), adamw(lr, weight_decay))


def ma_adamw(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 1.0,
    window_size: Window = 100,
    lamb: Lamb = 5.0,
    fast: Fast = 1.0,
) -> Tx:
    """Grokfast-MA before AdamW: the one to try first where the learning rate is fixed."""
    return optax.chain(grokfast_ma(window_size, lamb, fast=fast), adamw(lr, weight_decay))


def fastest(lr: LearningRate = 0.06, weight_decay: WeightDecay = 0.3) -> Tx:
    """The fewest steps: Muon with a short momentum on the matrices of blocks, Nesterov's AdamW on the rest.

    The rest takes smaller steps. The output matrix, `head`, takes the smallest, with ten times the decay.
    """

    def group_of(path: Any, p: jax.Array) -> str:
        name = jax.tree_util.keystr(path)
        return "hidden" if "blocks" in name and p.ndim == 2 else "head" if "head" in name else "rest"

    def nadamw(factor: float, weight_decay: float) -> Tx:
        return optax.adamw(lambda step: factor * warmup(lr)(step), 0.9, 0.98, weight_decay=weight_decay, nesterov=True)

    momentum = grokfast_jax.parallel((0.2, optax.identity()), (0.8, grokfast_jax.ema(0.8, start="debiased")))
    groups: dict[Any, Tx] = {
        "hidden": optax.chain(momentum, stacked_muon(warmup(lr), beta=0.0, ns_steps=8, weight_decay=weight_decay)),
        "head": nadamw(0.06, 10 * weight_decay),
        "rest": nadamw(0.2, weight_decay),
    }
    return optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(group_of, params))


METHODS = {
    "ema": ema,
    "ma": ma,
    "adam": adam,
    "adam-third-decay": functools.partial(adam, weight_decay=0.00167),
    "two-stage": two_stage,
    "slow-only": functools.partial(two_stage, fast=0.0, start_step=99),
    "adamw": adamw,
    "ema-adamw": ema_adamw,
    "late-ema-adamw": late_ema_adamw,
    "ma-adamw": ma_adamw,
    "muon": muon,
    "fastest": fastest,
}
EXPERIMENT = Experiment("modular", Modular(), METHODS, default="ema", measures={"circuit": circuits.MEASURE})

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
