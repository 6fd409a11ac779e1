"""Sentiment of 1,000 IMDb reviews, by a two-layer LSTM: `python -m examples.imdb`."""

import dataclasses
import functools
import itertools
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from jax import lax

from examples.harness.cli import main
from examples.harness.downloads import fetch
from examples.harness.errors import UserError, require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Lamb, LearningRate, Tx, WeightDecay
from examples.harness.task import Batch, Data, Task
from examples.harness.torch_init import linear, uniform
from grokfast_jax import grokfast_ema

ARCHIVE = "aclImdb_v1.tar.gz"  # the Large Movie Review Dataset of Maas et al. 2011
SOURCE = "https://ai.stanford.edu/~amaas/data/sentiment/"
MD5 = "md5:7c2ac02c03563afcf9b574c7e56c153a"
REVIEWS = 1000
BLOCK = 20  # positions that the model reads at once

# NLTK's English stop words, which the authors list in their script. Those with an apostrophe are left out: as
# apostrophes are stripped before words are looked up, "don't" is the word "dont", and stays.
NLTK = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
its itself they them their theirs themselves what which who whom this that these those am is are was were be been
being have has had having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over under again further
then once here there when where why how all any both each few more most other some such no nor not only own same so
than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma
mightn mustn needn shan shouldn wasn weren won wouldn
"""
STOP_WORDS = frozenset(NLTK.split())

# Suffixes name the axes: b review, l position, d channel of the input, h channel of the state, g gate and channel.
State = tuple[jax.Array, jax.Array]  # hidden and cell state of a layer: (b, h) each


class LSTM(nnx.Module):
    """A layer of LSTM cells with PyTorch's parameters: gates in the order input, forget, cell, output; two biases."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        init = uniform(hidden**-0.5)
        self.input = nnx.Param(init(rngs.params(), (inputs, 4 * hidden)))
        self.recurrent = nnx.Param(init(rngs.params(), (hidden, 4 * hidden)))
        # Only their sum matters to the output, but each is drawn, updated and decayed by itself.
        self.biases = nnx.Param(init(rngs.params(), (2, 4 * hidden)))

    def __call__(self, state: State, x_lbd: jax.Array) -> tuple[State, jax.Array]:
        """The state after the last position, and the hidden state at every position."""
        length, b, d = x_lbd.shape
        input_lbg = (x_lbd.reshape(-1, d) @ self.input[...] + self.biases.sum(axis=0)[None]).reshape(length, b, -1)

        def step(state: State, input_bg: jax.Array) -> tuple[State, jax.Array]:
            h_bh, c_bh = state
            i, f, g, o = jnp.split(input_bg + h_bh @ self.recurrent[...], 4, axis=-1)
            c_bh = jax.nn.sigmoid(f) * c_bh + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_bh = jax.nn.sigmoid(o) * jnp.tanh(c_bh)
            return (h_bh, c_bh), h_bh

        return lax.scan(step, state, input_lbg)


class Classifier(nnx.Module):
    """Embedding, two LSTM layers, and a linear layer on the last hidden state."""

    def __init__(self, tokens: int, *, dim: int, hidden: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (tokens, dim)))
        self.layers = nnx.List([LSTM(dim, hidden, rngs=rngs), LSTM(hidden, hidden, rngs=rngs)])
        self.head = linear(hidden, 1, rngs=rngs)
        self.hidden = hidden

    def __call__(self, tokens_bl: jax.Array) -> jax.Array:
        """Logits of reviews being positive, (b,). Tokens are 0 for padding, on the left.

        Reviews of which only padding was seen so far share one state. The positions are therefore read in blocks, the
        longest reviews first, and a block is computed for the reviews that have words there and one more, which stands
        for all the rest. Static shapes allow a few numbers of reviews.
        """
        b = tokens_bl.shape[0]
        longest_first = jnp.argsort(-jnp.count_nonzero(tokens_bl, axis=1))
        blocks_nlb = tokens_bl[longest_first].T.reshape(-1, BLOCK, b)
        sizes = sorted({1, b // 12, b // 4, b // 2, b} - {0})

        @functools.partial(jax.checkpoint, static_argnums=0)  # the backward pass computes all but `states` again
        def advance(size: int, states: list[State], tokens_lb: jax.Array) -> list[State]:
            x_lbd = self.embedding[...][tokens_lb[:, :size]]
            new = []
            for layer, state in zip(self.layers, states, strict=True):
                state, x_lbd = layer(jax.tree.map(lambda s_bh: s_bh[:size], state), x_lbd)
                new.append(state)
            rest = lambda s_bh: jnp.broadcast_to(s_bh[-1:], (b - size, self.hidden))
            return jax.tree.map(lambda s_bh: jnp.concatenate([s_bh, rest(s_bh)]), new)

        def step(states: list[State], tokens_lb: jax.Array) -> tuple[list[State], None]:
            with_words = jnp.count_nonzero(tokens_lb[-1])
            enough = jnp.searchsorted(jnp.array(sizes[:-1]), with_words + 1)
            return lax.switch(enough, [functools.partial(advance, size) for size in sizes], states, tokens_lb), None

        zero = jnp.zeros((b, self.hidden), self.embedding.dtype)
        states, _ = lax.scan(step, [(zero, zero) for _ in self.layers], blocks_nlb)
        h_bh = states[-1][0]
        return jnp.zeros_like(h_bh[:, 0]).at[longest_first].set(self.head(h_bh)[:, 0])


def words(review: str) -> list[str]:
    """The words of a review as the authors take them, stop words dropped.

    Lower-cased, split on white space, and only then stripped of all that is neither a letter nor an underscore. So the
    tag `<br />` gives a word "br", and "me.<br" gives "mebr".
    """
    stripped = (re.sub(r"[\W\d]", "", word) for word in review.lower().split())
    return [word for word in stripped if word and word not in STOP_WORDS]


def load(data_dir: Path | None) -> tuple[list[str], np.ndarray]:
    """1,000 reviews, and whether each is positive, (1000,) int32; without `data_dir` the archive is downloaded."""
    tables = [] if data_dir is None else sorted(data_dir.glob("*.csv"))
    return read_table(tables[0]) if tables else read_archive(fetch({ARCHIVE: MD5}, (SOURCE,), data_dir)[ARCHIVE])


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """The first 1,000 reviews of Kaggle's "IMDB Dataset.csv", which the authors use."""
    try:
        frame = pd.read_csv(path, nrows=REVIEWS, dtype=str, keep_default_na=False)
    except ValueError as error:  # of a parser or of a decoder
        raise UserError(f"{path} must be a CSV file in UTF-8 ({error}); get it again") from error
    if [*frame] != ["review", "sentiment"] or not {*frame["sentiment"]} <= {"negative", "positive"}:
        raise UserError(f"{path} must have the columns review and sentiment, negative or positive; get it again")
    if len(frame) < REVIEWS:
        raise UserError(f"{path} must hold at least {REVIEWS:,} reviews, got {len(frame)}; get the whole file")
    return frame["review"].tolist(), (frame["sentiment"] == "positive").to_numpy(np.int32)


def read_archive(path: Path) -> tuple[list[str], np.ndarray]:
    """500 negative and 500 positive training reviews of the original archive, drawn once and for all."""
    with tarfile.open(path) as archive:
        members = [member for member in archive if re.fullmatch(r"aclImdb/train/(neg|pos)/.*", member.name)]
        files = {member.name: file.read() for member in members if (file := archive.extractfile(member))}
    rng, chosen = np.random.default_rng(0), []
    for part in ("/neg/", "/pos/"):
        chosen += rng.choice(sorted(name for name in files if part in name), REVIEWS // 2, replace=False).tolist()
    chosen = [chosen[i] for i in rng.permutation(REVIEWS)]
    return [files[name].decode() for name in chosen], np.array(["/pos/" in name for name in chosen], np.int32)


def numbered(reviews: Sequence[str]) -> np.ndarray:
    """The words of each review by number from 1 on, in the order of their first occurrence, then 0: int32."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(word, len(number) + 1) for word in words(review)] for review in reviews]
    return np.array([*itertools.zip_longest(*rows, fillvalue=0)], np.int32).T


@dataclasses.dataclass(frozen=True)
class Imdb(Task):
    """Delayed generalisation on IMDb: whether a review is positive, a random quarter of either kind for validation.

    The words that the model sees are the most frequent ones of the training reviews, so they depend on the split.
    The step of training is `step` in examples/harness/train.py.
    """

    thresholds = (0.75, 0.80)
    max_steps = 10_000

    vocabulary: int = 1000  # Words that the model sees, the most frequent ones; the others are dropped.
    length: int = 500  # Words of a review that the model sees, from the first on; a multiple of 20.
    validation_part: float = 0.25  # Part of the reviews that is kept for validation.
    batch_size: int = 50  # Reviews per batch.
    dim: int = 64  # Channels of the embedding.
    hidden: int = 256  # Channels of an LSTM's state.
    init_scale: float = 6.0  # Factor of all initial parameters: what delays generalisation here.
    epochs: int = 1  # Passes over the training reviews between two evaluations.
    data_dir: Path | None = None  # Folder with "IMDB Dataset.csv" of Kaggle or aclImdb_v1.tar.gz; None downloads that.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.length % BLOCK == 0, "length", f"a multiple of {BLOCK}", self.length)
        fits = 0.001 <= self.validation_part <= 0.999
        require(fits, "validation_part", "from 0.001 to 0.999", self.validation_part)

    @property
    def val_size(self) -> int:
        """Number of validation reviews."""
        return round(REVIEWS * self.validation_part)

    @property
    def train_size(self) -> int:
        """Number of training reviews."""
        return REVIEWS - self.val_size

    def model(self, key: jax.Array) -> Classifier:
        """The model, freshly initialised as PyTorch does."""
        return Classifier(self.vocabulary + 1, dim=self.dim, hidden=self.hidden, rngs=nnx.Rngs(params=key))

    def load(self) -> dict[str, np.ndarray]:
        """The words of the reviews, (reviews, most words), see `numbered`; and 1 for a positive review, (reviews,)."""
        reviews, labels = load(self.data_dir)
        return {"words": numbered(reviews), "labels": labels}

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """The numbers of the reviews for training and for validation, and the tokens of all reviews."""
        positive = int(shared["labels"].sum())
        val_positive = round(self.val_size * positive / len(shared["labels"]))
        train, val = [], []
        sizes = (self.val_size - val_positive, val_positive)
        for label, size, part_key in zip((0, 1), sizes, jax.random.split(key), strict=True):
            reviews = jax.random.permutation(part_key, jnp.asarray(np.flatnonzero(shared["labels"] == label)))
            val.append(reviews[:size])
            train.append(reviews[size:])
        parts = {"train": jnp.concatenate(train), "val": jnp.concatenate(val)}
        return parts | {"tokens": self.tokens(shared["words"], parts["train"])}

    def tokens(self, words: np.ndarray, train: jax.Array) -> jax.Array:
        """The reviews as the model sees them, (reviews, length) int32.

        Token k is the k-th most frequent word of the training reviews, of equally frequent ones that which occurs first
        in all reviews. A review longer than `length` is cut at its end, a shorter one is padded on the left with 0.
        """
        number = jnp.asarray(words)
        frequency = jnp.zeros(int(words.max()) + 1, jnp.int32).at[number[train]].add(1).at[0].set(0)
        frequency, frequent = lax.top_k(frequency, min(self.vocabulary, frequency.shape[0]))
        token_of = jnp.zeros(int(words.max()) + 1, jnp.int32)
        token_of = token_of.at[frequent].set(jnp.where(frequency > 0, 1 + jnp.arange(frequent.shape[0]), 0))
        tokens = token_of[number]
        place = jnp.cumsum(tokens > 0, axis=1) - 1
        first = self.length - jnp.minimum(jnp.count_nonzero(tokens, axis=1), self.length)
        place = jnp.where(tokens > 0, first[:, None] + place, self.length)  # from `length` on words are dropped
        review = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
        return jnp.zeros((tokens.shape[0], self.length), jnp.int32).at[review, place].set(tokens, mode="drop")

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Binary cross-entropy and accuracy of each review of a batch."""
        logits = self.with_params(params)(data["tokens"][batch["index"]])
        label = data["labels"][batch["index"]]
        loss = optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
        return {"loss": loss, "accuracy": ((logits > 0) == (label == 1)).astype(loss.dtype)}


def baseline(lr: LearningRate = 3e-4, weight_decay: WeightDecay = 1.0) -> Tx:
    """The paper's baseline: AdamW without a filter, gradients clipped."""
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(lr, weight_decay=weight_decay))


def paper(lr: LearningRate = 3e-4, weight_decay: WeightDecay = 10.0, alpha: Alpha = 0.98, lamb: Lamb = 2.0) -> Tx:
    """The paper's filter and weight decay: Grokfast-EMA before AdamW, gradients clipped first."""
    clip = optax.clip_by_global_norm(5.0)
    return optax.chain(clip, grokfast_ema(alpha, lamb), optax.adamw(lr, weight_decay=weight_decay))


METHODS = {
    "paper": paper,
    "decay-only": functools.partial(baseline, weight_decay=10.0),
    "filter-only": functools.partial(paper, weight_decay=1.0),
    "baseline": baseline,
}
EXPERIMENT = Experiment("imdb", Imdb(), METHODS, default="paper")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
