"""Sentiment of 1,000 IMDb reviews, by a two-layer LSTM: `python -m examples.imdb`."""

import csv
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
from flax import nnx
from jax import lax

from examples.fast import padded_logits
from examples.harness.batches import Batch
from examples.harness.cli import main
from examples.harness.downloads import fetch
from examples.harness.errors import UserError, require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Lamb, LearningRate, Tx, WeightDecay
from examples.harness.task import Data, Task
from examples.harness.torch_init import linear, uniform
from grokfast_jax import grokfast_ema

ARCHIVE = "aclImdb_v1.tar.gz"  # the Large Movie Review Dataset of Maas et al. 2011
SOURCE = "https://ai.stanford.edu/~amaas/data/sentiment/"
MD5 = "md5:7c2ac02c03563afcf9b574c7e56c153a"
REVIEWS = 1000
SENTIMENTS = ("negative", "positive")

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
        """Logits of reviews being positive: (b,). Tokens are 0 for padding, on the left."""
        x_lbd = self.embedding[...][tokens_bl.T]
        for layer, zero in zip(self.layers, self.zero_states(tokens_bl.shape[0]), strict=True):
            _, x_lbd = layer(zero, x_lbd)
        return self.head(x_lbd[-1])[:, 0]

    def zero_states(self, b: int) -> list[State]:
        """The states of all layers before the first position."""
        zero = jnp.zeros((b, self.hidden), self.embedding.dtype)
        return [(zero, zero) for _ in self.layers]


def words(review: str) -> list[str]:
    """The words of a review as the authors take them, stop words dropped.

    Lower-cased, split on white space, and only then stripped of all that is neither a letter nor an underscore. So the
    tag `<br />` gives a word "br", and "me.<br" gives "mebr".
    """
    stripped = (re.sub(r"[\W\d]", "", word) for word in review.lower().split())
    return [word for word in stripped if word and word not in STOP_WORDS]


def load(data_dir: Path | None) -> tuple[list[str], np.ndarray]:
    """1,000 reviews, and whether each is positive, (1000,) int32.

    A CSV file with the columns review and sentiment (Kaggle's "IMDB Dataset.csv", which the authors use) gives its
    first 1,000; the original archive, packed or unpacked, gives 500 positive and 500 negative ones of its training
    half, drawn once and for all. Without `data_dir` the archive is downloaded.
    """
    if data_dir is None or (data_dir / ARCHIVE).exists():
        return read_original(fetch({ARCHIVE: MD5}, (SOURCE,), data_dir)[ARCHIVE])
    for folder in (data_dir, data_dir / "aclImdb"):
        if (folder / "train").is_dir():
            return read_original(folder)
    tables = sorted(data_dir.glob("*.csv"))
    if len(tables) != 1:
        raise UserError(
            f"{data_dir} must hold one CSV file such as Kaggle's 'IMDB Dataset.csv', or {ARCHIVE} "
            f"(from {SOURCE}{ARCHIVE}) or what it unpacks to; it holds {len(tables)} CSV files. "
            "Pass another --data-dir, or leave it out"
        )
    return read_table(tables[0])


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """The first 1,000 reviews of a CSV file, whose quoting must be right."""
    reviews, labels = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            if next(rows, None) != ["review", "sentiment"]:
                raise UserError(f"{path} must begin with the line review,sentiment; get it again")
            for review, sentiment in itertools.islice(rows, REVIEWS):
                labels.append(SENTIMENTS.index(sentiment))
                reviews.append(review)
    except (csv.Error, ValueError) as error:
        raise UserError(
            f"{path}, row {len(labels) + 1}: must be a review and {' or '.join(SENTIMENTS)}, quoted as CSV, in UTF-8 "
            f"({error}); mend the file, or get it again"
        ) from error
    if len(reviews) < REVIEWS:
        raise UserError(f"{path} must hold at least {REVIEWS:,} reviews, got {len(reviews)}; get the whole file")
    return reviews, np.array(labels, np.int32)


def read_original(path: Path) -> tuple[list[str], np.ndarray]:
    """500 negative and 500 positive reviews of the archive, or of the folder it unpacks to, in random order."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.glob("train/[np]*/*_*.txt")}
    else:
        with tarfile.open(path) as archive:
            members = [member for member in archive if re.fullmatch(r"aclImdb/train/(neg|pos)/.*", member.name)]
            files = {member.name: file.read() for member in members if (file := archive.extractfile(member))}
    rng, chosen = np.random.default_rng(0), []
    for part in ("/neg/", "/pos/"):
        names = sorted(name for name in files if part in name)
        if len(names) < REVIEWS // 2:
            raise UserError(
                f"{path} must hold at least {REVIEWS // 2} reviews in train{part}, got {len(names)}; "
                f"unpack {ARCHIVE} again"
            )
        chosen += rng.choice(names, REVIEWS // 2, replace=False).tolist()
    chosen = [chosen[i] for i in rng.permutation(REVIEWS)]
    try:
        reviews = [files[name].decode() for name in chosen]
    except UnicodeDecodeError as error:
        raise UserError(f"a review in {path} is no UTF-8 ({error}); unpack {ARCHIVE} again") from error
    return reviews, np.array(["/pos/" in name for name in chosen], np.int32)


def numbered(reviews: Sequence[str]) -> np.ndarray:
    """The words of each review by number from 1 on, in the order of their first occurrence, then 0: int32."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(word, len(number) + 1) for word in words(review)] for review in reviews]
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


@dataclasses.dataclass(frozen=True)
class Imdb(Task):
    """Delayed generalisation on IMDb: whether a review is positive, a random quarter of either kind for validation.

    The words that the model sees are the most frequent ones of the training reviews, so they depend on the split. The
    step of training is `step` in examples/harness/train.py.
    """

    thresholds = (0.75, 0.80)
    max_steps = 10_000

    vocabulary: int = 1000
    """Words that the model sees, the most frequent ones; the others are dropped."""
    length: int = 500
    """Words of a review that the model sees, from the first on; a multiple of 20."""
    validation_part: float = 0.25
    """Part of the reviews that is kept for validation."""
    batch_size: int = 50
    """Reviews per batch."""
    dim: int = 64
    """Channels of the embedding."""
    hidden: int = 256
    """Channels of an LSTM's state."""
    init_scale: float = 6.0
    """Factor of all initial parameters: what delays generalisation here."""
    epochs: int = 1
    """Passes over the training reviews between two evaluations."""
    data_dir: Path | None = None
    """Folder with Kaggle's "IMDB Dataset.csv", or with aclImdb_v1.tar.gz or what it unpacks to; None downloads that
    archive once."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        require(self.length % 20 == 0, "length", "a multiple of 20", self.length)
        least = 1 / REVIEWS
        allowed = f"from {least:g} to {1 - least:g}, for a review on either side"
        require(least <= self.validation_part <= 1 - least, "validation_part", allowed, self.validation_part)

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
        if not (table := numbered(reviews)).any():
            raise UserError(f"the reviews in {self.data_dir} have no word but stop words; get the file again")
        return {"words": table, "labels": labels}

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
        in all reviews. A review longer than `length` is cut at its end, a shorter one is padded on the left with 0. One
        without any of these words is padding throughout, and so is classified by what the model makes of that alone.
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
        # The same as self.with_params(params)(tokens), in a fraction of the time.
        logits = padded_logits(self.with_params(params), data["tokens"][batch["index"]])
        label = data["labels"][batch["index"]]
        loss = optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
        return {"loss": loss, "accuracy": ((logits > 0) == (label == 1)).astype(loss.dtype)}


def baseline(lr: LearningRate = 3e-4, weight_decay: WeightDecay = 1.0) -> Tx:
    """The paper's baseline: AdamW without a filter, gradients clipped."""
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adamw(lr, weight_decay=weight_decay))


def paper(lr: LearningRate = 3e-4, weight_decay: WeightDecay = 10.0, alpha: Alpha = 0.98, lamb: Lamb = 2.0) -> Tx:
    """The paper's filter and weight decay: Grokfast-EMA before AdamW, gradients clipped first."""
    return optax.chain(
        optax.clip_by_global_norm(5.0), grokfast_ema(alpha, lamb), optax.adamw(lr, weight_decay=weight_decay)
    )


METHODS = {
    "paper": paper,
    "decay-only": functools.partial(baseline, weight_decay=10.0),
    "filter-only": functools.partial(paper, weight_decay=1.0),
    "baseline": baseline,
}
EXPERIMENT = Experiment("imdb", Imdb(), METHODS, default="paper")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
