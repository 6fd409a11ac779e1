"""A character GPT on tiny Shakespeare, the filter on at once, later or never: `python -m examples.shakespeare`."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from .harness.batches import in_batches
from .harness.config import RunConfig
from .harness.errors import plain_errors
from .harness.files import fetch
from .harness.optimizers import Optimizer
from .harness.run import main

SOURCES = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",)
FILES = {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}  # SHA-256
TRAIN_FRACTION = 0.9

# Suffixes name the axes: b window, l position, m position that is attended to, t window and position in one, d channel,
# h head, k channel of a head, c query, key or value, v character.


def linear(in_features: int, out_features: int, *, std: float = 0.02, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without bias, normally distributed as in GPT-2."""
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs)


def layer_norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation without bias."""
    return nnx.LayerNorm(width, epsilon=1e-5, use_bias=False, rngs=rngs)


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
        self.blocks = nnx.List(
            [Block(width, heads, out_std=out_std, dropout=dropout, rngs=rngs) for _ in range(layers)]
        )
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


def load(data_dir: Path | None) -> str:
    """Tiny Shakespeare: 1,115,394 characters, 65 different ones."""
    return fetch(FILES, SOURCES, data_dir)["input.txt"].read_text("ascii")


@dataclasses.dataclass(frozen=True, eq=False)
class Shakespeare:
    """Task: the next character, at every position of a window of text; the last tenth of the text is for validation."""

    text: str
    layers: int
    heads: int
    width: int
    context: int
    dropout: float
    batch_size: int
    steps: int = 10  # optimizer steps between two evaluations
    val_windows: int = 60

    @functools.cached_property
    def characters(self) -> str:
        """The different characters in their order: number k of the model is the k-th of them."""
        return "".join(sorted(set(self.text)))

    @property
    def train_size(self) -> int:
        """Characters that are trained on."""
        return int(TRAIN_FRACTION * len(self.text))

    def model(self, key: jax.Array) -> GPT:
        """The model, freshly initialised."""
        return GPT(
            len(self.characters),
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            dropout=self.dropout,
            rngs=nnx.Rngs(params=key),
        )

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[GPT]:
        """The model without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, a nested dict."""
        return nnx.to_pure_dict(nnx.state(self.model(key)))

    def encode(self, text: str) -> np.ndarray:
        """The numbers of characters, uint8."""
        codes, sought = (np.frombuffer(part.encode("ascii"), np.uint8) for part in (self.characters, text))
        return np.searchsorted(codes, sought).astype(np.uint8)

    def split(self, key: jax.Array) -> jax.Array:
        """The text as numbers; the same for every key."""
        del key
        return jnp.asarray(self.encode(self.text))

    def batches(self, data: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """Random windows of the training part, given by their first character, and a dropout key for each batch."""
        del data
        window_key, dropout_key = jax.random.split(key)
        # The window's targets reach one character further than the window.
        first = jax.random.randint(window_key, (self.steps, self.batch_size), 0, self.train_size - self.context)
        keys = jax.random.split(dropout_key, self.steps)
        return {"index": first, "weight": jnp.ones(first.shape, jnp.float32), "dropout": keys}

    def validation(self, data: jax.Array) -> dict[str, jax.Array]:
        """Windows evenly spaced over the validation part; without a dropout key."""
        last = data.shape[0] - self.context - 1
        first = np.linspace(self.train_size, last, self.val_windows).astype(np.int32)
        batch = in_batches(jnp.asarray(first), self.batch_size)
        return {"index": batch["index"], "weight": batch["weight"]}

    def measure(self, params: Any, data: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sum over the windows of a batch of their cross-entropy, the mean over a window's positions, in nats."""
        place_bl = batch["index"][:, None] + jnp.arange(self.context + 1, dtype=jnp.int32)[None]
        text_bl = data[place_bl].astype(jnp.int32)
        rngs = nnx.Rngs(dropout=batch["dropout"]) if self.dropout and "dropout" in batch else None
        logits = nnx.merge(self.graphdef, params)(text_bl[:, :-1], rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text_bl[:, 1:]).mean(axis=-1)
        weight = batch["weight"].astype(loss.dtype)
        return {"count": weight.sum(), "loss": weight @ loss}

    def sample(self, params: Any, key: jax.Array, length: int) -> str:
        """Text that the model writes after the first window of the validation part."""
        model = nnx.merge(self.graphdef, params)

        def write(text_l: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            character = jax.random.categorical(key, model(text_l[None])[0, -1])
            return jnp.append(text_l[1:], character), character

        prompt = jnp.asarray(self.encode(self.text[self.train_size :][: self.context]), jnp.int32)
        _, written = jax.jit(functools.partial(lax.scan, write))(prompt, jax.random.split(key, length))
        return "".join(self.characters[k] for k in np.asarray(written))


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """A character GPT on tiny Shakespeare."""

    has_accuracy = False

    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block; they divide the width."""
    width: int = 64
    """Channels of the residual stream."""
    context: int = 64
    """Characters in a window."""
    dropout: float = 0.0
    """Part of the activations that is dropped in training, in [0, 1)."""
    batch_size: int = 12
    """Windows a batch."""
    optimizer: Optimizer = "adamw"
    """adam has coupled L2, the decay being added to the filtered gradient; the others have decoupled weight decay."""
    weight_decay: float = 0.1
    """Weight decay."""
    beta2: float = 0.99
    """Adam's decay of the second moment."""
    lr_warmup: int = 100
    """Steps over which the learning rate rises from 0; 0 for none."""
    budget: int = 1_500
    """Optimizer steps at most, rounded up to whole evaluations."""
    stop_at: float | None = None
    """Stop when the validation loss is at most this; None to use the whole budget."""
    data_dir: Path | None = None
    """Folder with input.txt, tiny Shakespeare; None downloads it once."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        super().__post_init__()
        for name in ("layers", "heads", "width", "context", "batch_size"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.width % self.heads == 0, "width", f"a multiple of --heads ({self.heads})")
        self.require(self.context <= 100_000, "context", "at most 100,000, for the validation part to hold a window")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    def task(self) -> Shakespeare:
        """The task of this run."""
        return Shakespeare(
            load(self.data_dir), self.layers, self.heads, self.width, self.context, self.dropout, self.batch_size
        )


THRESHOLDS = ()  # of the validation accuracy, which is not measured here


def variants(config: Config, *steps: int) -> dict[str, Config]:
    """`config` with the filter from the first step on and without it; switched on at other steps, collecting or not."""
    presets = {"baseline": dataclasses.replace(config, filter="none"), "ema": config}
    for step in steps:
        late = dataclasses.replace(config, filter_from=step)
        presets |= {f"ema-{step}": late, f"ema-{step}-empty": dataclasses.replace(late, collect=False)}
    return presets


# nanoGPT's model for this text. Its weight decay leaves the LayerNorms out, its learning rate falls, its gradients are
# clipped: not so here.
GPT_10M = Config(layers=6, heads=6, width=384, context=256, dropout=0.2, batch_size=64, budget=6_000)

PRESETS = {
    **variants(Config(), 500, 1000),
    # What else changes when the filter is switched on: the size of the updates. Without it, and it alone
    "ema-1000-empty-mean": Config(filter_from=1000, collect=False, fast=1 / 3, lamb=2 / 3),
    "tripled-1000": Config(filter_from=1000, fast=3.0, lamb=0.0),
    # The published variants at their size, for a GPU
    **{f"10m-{name}": config for name, config in variants(GPT_10M, 1000, 2000, 5000).items()},
}


def show(task: Shakespeare, params: Any) -> str:
    """A sample of what the model writes."""
    return f"\nIt writes:\n{task.sample(params, jax.random.key(0), 300)}"


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main("shakespeare", PRESETS, default="ema", show=show)))
