"""A character GPT on tiny Shakespeare, the filter on at once, later or never: `python -m examples.shakespeare`."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.harness.cli import main
from examples.harness.downloads import fetch
from examples.harness.errors import require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Lamb, LearningRate, Range, StartStep, Tx, WeightDecay
from examples.harness.optimizers import from_step, warmup
from examples.harness.task import Batch, Data, Task
from grokfast_jax import grokfast_ema

SOURCES = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/",
)
FILES = {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}  # SHA-256
CHARACTERS = 65  # different ones

# Suffixes name the axes: b window, l position, m position that is attended to, t window and position in one, d channel,
# h head, k channel of a head, c query, key or value, v character.


def linear(in_features: int, out_features: int, *, std: float = 0.02, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without bias, normally distributed as in GPT-2."""
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs)


layer_norm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_bias=False)


class Block(nnx.Module):
    """A Transformer block: causal self-attention, then an MLP, each on the normalised stream and added to it.

    The stream is a matrix with a row for each position of each window: the gradient of a batched matrix product is slow
    on XLA's CPU.
    """

    def __init__(self, width: int, heads: int, *, out_std: float, dropout: float, rngs: nnx.Rngs):
        self.ln1 = layer_norm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, rngs=rngs)
        self.out = linear(width, width, std=out_std, rngs=rngs)
        self.ln2 = layer_norm(width, rngs=rngs)
        self.up = linear(width, 4 * width, rngs=rngs)
        self.down = linear(4 * width, width, std=out_std, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.heads = heads

    def __call__(self, x_td: jax.Array, windows: int, rngs: nnx.Rngs | None) -> jax.Array:
        """The stream after the block; without `rngs` nothing is dropped."""
        drop = functools.partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x_td = x_td + drop(self.out(self.attend(self.qkv(self.ln1(x_td)), windows, drop)))
        return x_td + drop(self.down(jax.nn.gelu(self.up(self.ln2(x_td)), approximate=False)))

    def attend(self, qkv: jax.Array, windows: int, drop: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What each position takes from itself and those before it in its window, (t, d), of all heads."""
        qkv_blchk = qkv.reshape(windows, qkv.shape[0] // windows, 3, self.heads, -1)
        q_blhk, k_bmhk, v_bmhk = (qkv_blchk[:, :, c] for c in range(3))
        scores_bhlm = jnp.einsum("blhk,bmhk->bhlm", q_blhk, k_bmhk) / q_blhk.shape[-1] ** 0.5
        visible_lm = jnp.tril(jnp.ones(scores_bhlm.shape[2:], bool))
        weights_bhlm = drop(jax.nn.softmax(jnp.where(visible_lm[None, None], scores_bhlm, -jnp.inf)))
        return jnp.einsum("bhlm,bmhk->blhk", weights_bhlm, v_bmhk).reshape(qkv.shape[0], -1)


class GPT(nnx.Module):
    """Decoder-only Transformer in the shape of GPT-2, without biases, whose head is the embedding of the characters."""

    def __init__(
        self, characters: int, *, context: int, layers: int, heads: int, width: int, dropout: float, rngs: nnx.Rngs
    ):
        self.character = nnx.Param(0.02 * jax.random.normal(rngs.params(), (characters, width)))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
        # 2 layers terms are added to the stream, whose variance is then the same for every depth.
        out_std = 0.02 / (2 * layers) ** 0.5
        make_block = functools.partial(Block, width, heads, out_std=out_std, dropout=dropout, rngs=rngs)
        self.blocks = nnx.List([make_block() for _ in range(layers)])
        self.ln = layer_norm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, text_bl: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits of the character after each position, (b, l, v); without `rngs` nothing is dropped."""
        b, length = text_bl.shape
        x_bld = self.character[...][text_bl] + self.position[None, :length]
        x_td = self.dropout(x_bld.reshape(b * length, -1), deterministic=rngs is None, rngs=rngs)
        for block in self.blocks:
            x_td = block(x_td, b, rngs)
        return (self.ln(x_td) @ self.character[...].T).reshape(b, length, -1)


def train_part(size: int) -> int:
    """How many characters of a text are trained on, from the first on."""
    return int(0.9 * size)


@dataclasses.dataclass(frozen=True)
class Shakespeare(Task):
    """A character GPT on tiny Shakespeare: the next character, at every position of a window of text.

    The last tenth of the text is for validation. The loss is in nats per character.
    The step of training is `step` in examples/harness/train.py.
    """

    metric = "loss"
    max_steps = 1_500

    layers: int = 4  # Transformer blocks.
    heads: int = 4  # Attention heads per block; they divide the width.
    width: int = 64  # Channels of the residual stream.
    context: int = 64  # Characters in a window.
    dropout: float = 0.0  # Part of the activations that is dropped in training, in [0, 1).
    batch_size: int = 12  # Windows per batch.
    eval_every: int = 10  # Optimizer steps between two evaluations.
    val_windows: int = 60  # Windows of the validation part, evenly spaced, on which the loss is taken.
    data_dir: Path | None = None  # Folder with input.txt, tiny Shakespeare; None downloads it once.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width % self.heads == 0, "width", f"a multiple of --heads ({self.heads})", self.width)
        limit = "at most 100,000, for the validation part to hold a window"
        require(self.context <= 100_000, "context", limit, self.context)
        require(self.val_windows <= 100_000, "val_windows", "at most 100,000", self.val_windows)
        require(self.layers <= 1_000, "layers", "at most 1,000", self.layers)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one chunk."""
        return self.eval_every

    def model(self, key: jax.Array) -> GPT:
        """The model, freshly initialised."""
        shape = {"context": self.context, "layers": self.layers, "heads": self.heads, "width": self.width}
        return GPT(CHARACTERS, **shape, dropout=self.dropout, rngs=nnx.Rngs(params=key))

    def load(self) -> dict[str, np.ndarray]:
        """The text, each character by its number in the order of all characters: (characters,) uint8."""
        text = np.frombuffer(fetch(FILES, SOURCES, self.data_dir)["input.txt"].read_bytes(), np.uint8)
        return {"text": np.unique(text, return_inverse=True)[1].astype(np.uint8)}

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """First characters of the validation windows, the same for every key."""
        del key
        size = shared["text"].shape[0]
        first = np.linspace(train_part(size), size - self.context - 1, self.val_windows, dtype=np.int32)
        return {"val": jnp.asarray(first)}

    def batches(self, data: Data, key: jax.Array) -> Batch:
        """Random windows of the training part, given by their first character, and a dropout key for each batch."""
        window_key, dropout_key = jax.random.split(key)
        # The window's targets reach one character further than the window.
        last = train_part(data["text"].shape[0]) - self.context
        first = jax.random.randint(window_key, (self.steps, self.batch_size), 0, last)
        keys = jax.random.split(dropout_key, self.steps)
        return Batch(index=first, weight=jnp.ones(first.shape, jnp.float32), dropout=keys)

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Cross-entropy of each window of a batch, the mean over the window's positions, in nats."""
        place_bl = batch["index"][:, None] + jnp.arange(self.context + 1, dtype=jnp.int32)[None]
        text_bl = data["text"][place_bl].astype(jnp.int32)
        rngs = nnx.Rngs(dropout=batch["dropout"]) if self.dropout and "dropout" in batch else None
        logits = self.with_params(params)(text_bl[:, :-1], rngs)
        return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, text_bl[:, 1:]).mean(axis=-1)}


def baseline(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.1) -> Tx:
    """AdamW without a filter."""
    return optax.adamw(warmup(lr, 100), 0.9, 0.99, weight_decay=weight_decay)


def ema(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.1, alpha: Alpha = 0.98, lamb: Lamb = 2.0) -> Tx:
    """Grokfast-EMA before AdamW, from the first step on."""
    return optax.chain(grokfast_ema(alpha, lamb), baseline(lr, weight_decay))


def late_ema(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.1,
    alpha: Alpha = 0.98,
    lamb: Lamb = 2.0,
    start_step: StartStep = 1_000,
) -> Tx:
    """Grokfast-EMA before AdamW, which collects from the first step on, and amplifies from a later one on."""
    return optax.chain(grokfast_ema(alpha, from_step(start_step, lamb)), baseline(lr, weight_decay))


def empty_ema(
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.1,
    alpha: Alpha = 0.98,
    lamb: Lamb = 2.0,
    fast: float = 1.0,
    start_step: StartStep = 1_000,
) -> Tx:
    """Grokfast-EMA before AdamW that is empty when it is switched on."""
    lowpass = grokfast_ema(alpha, lamb, fast=fast)
    late = optax.conditionally_transform(lowpass, lambda step, **_: jnp.asarray(step) >= start_step)
    return optax.chain(late, baseline(lr, weight_decay))


Factor = Annotated[float, Range("a finite number", math.isfinite, "Factor of the gradients")]


def tripled(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.1, factor: Factor = 3.0, start_step: StartStep = 1_000
) -> Tx:
    """Gradients times a factor from a step on, nothing filtered: the size of the updates that the filter gives."""
    return optax.chain(optax.scale_by_schedule(from_step(start_step, factor, before=1.0)), baseline(lr, weight_decay))


METHODS = {
    "ema": ema,
    "baseline": baseline,
    "late-ema": late_ema,
    "empty-ema": empty_ema,
    "empty-ema-mean": functools.partial(empty_ema, lamb=2 / 3, fast=1 / 3),
    "tripled": tripled,
}
EXPERIMENT = Experiment("shakespeare", Shakespeare(), METHODS, default="ema")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
