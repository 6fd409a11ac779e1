"""Sentiment of 1,000 IMDb reviews, by a two-layer LSTM: `python -m examples.imdb`."""

import csv
import dataclasses
import functools
import re
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from .harness.batches import Batch, in_batches, shuffled_epochs, steps_per_epoch
from .harness.config import RunConfig
from .harness.errors import UserError, plain_errors
from .harness.files import fetch
from .harness.optimizers import Optimizer
from .harness.run import main
from .harness.torch_init import linear, uniform

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

    def __call__(self, tokens_bl: jax.Array, block: int = 20) -> jax.Array:
        """Logits of reviews being positive: (b,). Tokens are 0 for padding, on the left; `block` divides their length.

        Most positions are padding, and reviews of which only padding was seen so far share one state. So the positions
        are gone through block by block, the longest reviews first, and a block is computed for the reviews that have
        words there and one more, which stands for all the rest. Static shapes allow a few numbers of reviews.
        """
        b = tokens_bl.shape[0]
        longest_first = jnp.argsort(-jnp.count_nonzero(tokens_bl, axis=1))
        blocks_nlb = tokens_bl[longest_first].T.reshape(-1, block, b)
        sizes = sorted({1, b // 12, b // 4, b // 2, b} - {0})

        # Kept for the backward pass: the states between the blocks. The rest is computed again.
        @functools.partial(jax.checkpoint, static_argnums=0)
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
        return jnp.zeros_like(zero[:, 0]).at[longest_first].set(self.head(states[-1][0])[:, 0])


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
        return read_archive(fetch({ARCHIVE: MD5}, (SOURCE,), data_dir)[ARCHIVE])
    for folder in (data_dir, data_dir / "aclImdb"):
        if (folder / "train").is_dir():
            return read_folder(folder)
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
    cure = "mend the file, or get it again"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, None)
            if header != ["review", "sentiment"]:
                raise UserError(f"{path} must begin with the line review,sentiment, got {header}; {cure}")
            for row in rows:
                where = f"{path}, row {len(reviews) + 1} (line {rows.line_num})"
                if len(row) != 2:
                    raise UserError(f"{where}: must have 2 fields, review and sentiment, got {len(row)}; {cure}")
                if row[1] not in SENTIMENTS:
                    raise UserError(f"{where}: sentiment must be {' or '.join(SENTIMENTS)}, got {row[1]!r}; {cure}")
                reviews.append(row[0])
                labels.append(SENTIMENTS.index(row[1]))
                if len(reviews) == REVIEWS:
                    return reviews, np.array(labels, np.int32)
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path}, row {len(reviews) + 1} (line {rows.line_num})"
            raise UserError(f"{where}: is no CSV in UTF-8 ({error}); {cure}") from error
    raise UserError(f"{path} must hold at least {REVIEWS:,} reviews, got {len(reviews)}; get the whole file")


def read_folder(folder: Path) -> tuple[list[str], np.ndarray]:
    """1,000 reviews of the unpacked archive."""
    names = [path.relative_to(folder).as_posix() for path in folder.glob("train/*/*.txt")]
    chosen, labels = choose(names, folder)
    reviews = []
    for name in chosen:
        try:
            reviews.append((folder / name).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / name} is no UTF-8 ({error}); unpack {ARCHIVE} again") from error
    return reviews, labels


def read_archive(path: Path) -> tuple[list[str], np.ndarray]:
    """1,000 reviews of the archive."""
    with tarfile.open(path) as archive:
        members = {member.name.removeprefix("aclImdb/"): member for member in archive if member.isfile()}
        chosen, labels = choose(members, path)
        texts = {}
        for name in sorted(chosen, key=lambda name: members[name].offset):  # a gzip file is read forwards
            file = archive.extractfile(members[name])
            assert file is not None
            texts[name] = file.read().decode("utf-8")
    return [texts[name] for name in chosen], labels


def choose(names: Iterable[str], source: Path) -> tuple[list[str], np.ndarray]:
    """500 positive and 500 negative reviews in random order, the same ones in the archive and unpacked."""
    reviews: dict[str, list[str]] = {"neg": [], "pos": []}
    for name in sorted(names):
        if match := re.fullmatch(r"train/(neg|pos)/\d+_\d+\.txt", name):
            reviews[match[1]].append(name)
    rng = np.random.default_rng(0)
    chosen: list[tuple[str, int]] = []
    for label, (part, candidates) in enumerate(reviews.items()):
        if len(candidates) < REVIEWS // 2:
            raise UserError(
                f"{source} must hold at least {REVIEWS // 2} reviews in train/{part}, got {len(candidates)}; "
                f"unpack {ARCHIVE} again"
            )
        chosen += [(name, label) for name in rng.choice(candidates, REVIEWS // 2, replace=False).tolist()]
    order = rng.permutation(REVIEWS)
    return [chosen[i][0] for i in order], np.array([chosen[i][1] for i in order], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Imdb:
    """Task: whether a review is positive, a random quarter of either kind being kept for validation.

    The words that the model sees are the most frequent ones of the training reviews, so they depend on the split.
    """

    words: np.ndarray  # (reviews, most words) int32, each review's words by number from 1 on, then 0
    labels: np.ndarray  # (reviews,) int32, 1 for a positive review
    vocabulary: int = 1000  # words the model sees; the others are dropped
    length: int = 500
    validation_part: float = 0.25
    batch_size: int = 50
    dim: int = 64
    hidden: int = 256
    init_scale: float = 6.0
    epochs: int = 1  # between two evaluations

    @classmethod
    def of(cls, reviews: Sequence[str], labels: np.ndarray, **options: Any) -> "Imdb":
        """The task of these reviews."""
        number: dict[str, int] = {}
        numbered = [[number.setdefault(word, len(number) + 1) for word in words(review)] for review in reviews]
        table = np.zeros((len(reviews), max(map(len, numbered))), np.int32)
        for row, review in zip(table, numbered, strict=True):
            row[: len(review)] = review
        return cls(table, labels, **options)

    @property
    def val_reviews(self) -> tuple[int, int]:
        """How many negative and positive reviews are kept for validation."""
        positive = int(self.labels.sum())
        total = round(len(self.labels) * self.validation_part)
        from_positive = round(total * positive / len(self.labels))
        return total - from_positive, from_positive

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations."""
        return self.epochs * steps_per_epoch(len(self.labels) - sum(self.val_reviews), self.batch_size)

    def model(self, key: jax.Array) -> Classifier:
        """The model, freshly initialised as PyTorch does."""
        return Classifier(self.vocabulary + 1, dim=self.dim, hidden=self.hidden, rngs=nnx.Rngs(params=key))

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[Classifier]:
        """The model without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, all scaled up: what delays generalisation here."""
        return jax.tree.map(lambda p: self.init_scale * p, nnx.to_pure_dict(nnx.state(self.model(key))))

    def split(self, key: jax.Array) -> dict[str, jax.Array]:
        """Tokens and labels of all reviews; the numbers of those for training and of those for validation."""
        train, val = [], []
        for label, size, part_key in zip((0, 1), self.val_reviews, jax.random.split(key), strict=True):
            reviews = jax.random.permutation(part_key, jnp.asarray(np.flatnonzero(self.labels == label)))
            val.append(reviews[:size])
            train.append(reviews[size:])
        data = {"labels": jnp.asarray(self.labels), "train": jnp.concatenate(train), "val": jnp.concatenate(val)}
        return data | {"tokens": self.tokens(data["train"])}

    def tokens(self, train: jax.Array) -> jax.Array:
        """The reviews as the model sees them, (reviews, length) int32.

        Token k is the k-th most frequent word of the training reviews, of equally frequent ones that which occurs first
        in all reviews. A review longer than `length` is cut at its end, a shorter one is padded on the left with 0. One
        without any of these words is padding throughout, and so is classified by what the model makes of that alone.
        """
        number = jnp.asarray(self.words)
        frequency = jnp.zeros(int(self.words.max()) + 1, jnp.int32).at[number[train]].add(1).at[0].set(0)
        frequency, frequent = lax.top_k(frequency, min(self.vocabulary, frequency.shape[0]))
        token_of = jnp.zeros(int(self.words.max()) + 1, jnp.int32)
        token_of = token_of.at[frequent].set(jnp.where(frequency > 0, 1 + jnp.arange(frequent.shape[0]), 0))
        tokens = token_of[number]
        place = jnp.cumsum(tokens > 0, axis=1) - 1
        first = self.length - jnp.minimum(jnp.count_nonzero(tokens, axis=1), self.length)
        place = jnp.where(tokens > 0, first[:, None] + place, self.length)  # from `length` on words are dropped
        review = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
        return jnp.zeros((tokens.shape[0], self.length), jnp.int32).at[review, place].set(tokens, mode="drop")

    def batches(self, data: dict[str, jax.Array], key: jax.Array) -> Batch:
        """Epochs of shuffled training reviews."""
        return shuffled_epochs(key, data["train"], self.batch_size, self.epochs)

    def validation(self, data: dict[str, jax.Array]) -> Batch:
        """The validation reviews."""
        return in_batches(data["val"], self.batch_size)

    def measure(self, params: Any, data: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """Sums of binary cross-entropy and correct answers over a batch."""
        logits = nnx.merge(self.graphdef, params)(data["tokens"][batch["index"]])
        label = data["labels"][batch["index"]]
        loss = optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
        correct = ((logits > 0) == (label == 1)).astype(loss.dtype)
        weight = batch["weight"].astype(loss.dtype)
        return {"count": weight.sum(), "loss": weight @ loss, "accuracy": weight @ correct}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Delayed generalisation on IMDb."""

    clip_norm: float | None = 5.0
    """Scale gradients down to this global norm before the filter; None for no clipping."""
    optimizer: Optimizer = "adamw"
    """adam has coupled L2, the decay being added to the filtered gradient; the others have decoupled weight decay."""
    lr: float = 3e-4
    """Learning rate."""
    weight_decay: float = 10.0
    """Weight decay."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises from 0; 0 for none."""
    stop_at: float | None = None
    """Stop when the validation accuracy reaches this; None to use the whole budget."""
    data_dir: Path | None = None
    """Folder with Kaggle's "IMDB Dataset.csv", or with aclImdb_v1.tar.gz or what it unpacks to; None downloads that
    archive once."""

    def task(self) -> Imdb:
        """The task of this run: 1,000 reviews."""
        return Imdb.of(*load(self.data_dir))


THRESHOLDS = (0.75, 0.80)  # validation accuracies whose first crossing is reported

PRESETS = {
    # The paper's two runs, and what tells the effect of the filter from that of the weight decay
    "baseline": Config(filter="none", weight_decay=1.0),
    "filter-only": Config(weight_decay=1.0),
    "decay-only": Config(filter="none"),
    "paper": Config(),
}

if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main("imdb", PRESETS, default="paper")))
