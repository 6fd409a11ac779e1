"""The IMDb experiment: its model, its preprocessing, its files, and what happens when they are damaged."""

import collections
import csv
import functools
import hashlib
import io
import tarfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from examples import imdb
from examples.harness import downloads
from examples.harness.engine import product
from examples.harness.errors import UsageError, UserError
from examples.harness.loop import evaluations
from examples.harness.train import program
from examples.imdb import LSTM, STOP_WORDS, Classifier, Imdb, load, numbered, words

pytestmark = pytest.mark.usefixtures("lenient")

DATA = Path(__file__).parents[2] / "shared" / "data" / "imdb"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the reviews (1 MB) are not part of the repository")
RNG = np.random.default_rng(0)

# Six reviews, whose preprocessing is worked out by hand below
REVIEWS = (
    "A GOOD film.<br />Good 2 see!",  # good filmbr good see
    "Bad, BAD film... don't see it",  # bad bad film dont see
    "good_2 Good see 1999",  # good_ good see
    "The it was",  # nothing but stop words
    "bad<br /><br />bad br",  # badbr br br: "bad<br", "/><br", "/>bad", "br" are badbr, br, bad, br
    "Film good",  # film good
)


def test_words_by_hand():
    assert [words(review) for review in REVIEWS] == [
        ["good", "filmbr", "good", "see"],
        ["bad", "bad", "film", "dont", "see"],
        ["good_", "good", "see"],
        [],
        ["badbr", "br", "bad", "br"],
        ["film", "good"],
    ]
    assert words("  Ünïcode—dash\u00a0space '' 42 ") == ["ünïcodedash", "space"]
    assert len(STOP_WORDS) == 153  # NLTK's 179, less 26 with an apostrophe
    assert {"i", "wouldn", "t"} < STOP_WORDS


class Short(Imdb):
    """Reviews shorter than the blocks of the model allow."""

    def __post_init__(self):
        pass


def test_tokens_by_hand():
    table = numbered(REVIEWS)
    np.testing.assert_array_equal(table[:2], [[1, 2, 1, 3, 0], [4, 4, 5, 6, 3]])
    tokens_of = lambda length, train: jax.jit(functools.partial(Short(vocabulary=4, length=length).tokens, table))(
        train
    )
    # Counts over the first five: good 3, see 3, bad 3, br 2, all others 1; ties go to the word that occurs first.
    tokens = tokens_of(5, jnp.arange(5))
    good, see, bad, br = 1, 2, 3, 4
    np.testing.assert_array_equal(
        tokens,
        [
            [0, 0, good, good, see],
            [0, 0, bad, bad, see],
            [0, 0, 0, good, see],
            [0, 0, 0, 0, 0],
            [0, 0, br, bad, br],
            [0, 0, 0, 0, good],
        ],
    )
    # A long review keeps its beginning. Of the first two, good, see and bad occur twice, and filmbr is the first word
    # of those that occur once.
    short = tokens_of(2, jnp.arange(2))
    np.testing.assert_array_equal(short[:3], [[1, 4], [3, 3], [1, 2]])
    # Words that no training review has are dropped, even where there is room for them.
    few = np.asarray(tokens_of(5, jnp.array([5])))
    np.testing.assert_array_equal(few[[0, 5]], [[0, 0, 0, 1, 1], [0, 0, 0, 2, 1]])


@needs_data
def test_the_real_reviews():
    """Against the steps of the authors' preprocessing, one after the other."""
    reviews, labels = load(DATA)
    assert (len(reviews), labels.sum(), labels.dtype) == (1000, 501, np.int32)
    assert reviews[0].startswith("One of the other reviewers has mentioned that")
    task = Imdb(data_dir=DATA)
    shared = task.load()
    np.testing.assert_array_equal(shared["labels"], labels)
    data = jax.jit(functools.partial(task.split, shared))(jax.random.key(3))
    lists = [words(review) for review in reviews]
    counts = collections.Counter(word for i in np.asarray(data["train"]) for word in lists[i])
    first = {word: i for i, word in enumerate(dict.fromkeys(word for review in lists for word in review))}
    ranked = sorted(counts, key=lambda word: (-counts[word], first[word]))
    assert ranked[:3] == ["br", "movie", "film"]
    token = {word: i + 1 for i, word in enumerate(ranked[:1000])}
    for review, row in zip(lists, np.asarray(data["tokens"]), strict=True):
        kept = [token[word] for word in review if word in token][:500]
        np.testing.assert_array_equal(row, [0] * (500 - len(kept)) + kept)


def test_the_split_is_stratified_and_follows_the_key():
    labels = np.r_[np.ones(501), np.zeros(499)].astype(np.int32)[RNG.permutation(1000)]
    task = Imdb(length=20)
    shared = {"words": numbered([f"word{'abcde'[i % 5]}" for i in range(1000)]), "labels": labels}
    split, make_batches = jax.jit(functools.partial(task.split, shared)), jax.jit(task.batches)
    splits = [split(jax.random.key(seed)) for seed in (0, 0, 1)]
    for data in splits:
        assert (data["train"].shape, data["val"].shape) == ((750,), (250,))
        np.testing.assert_array_equal(np.sort(np.r_[data["train"], data["val"]]), np.arange(1000))
        assert (labels[data["train"]].sum(), labels[data["val"]].sum()) == (376, 125)
    np.testing.assert_array_equal(splits[0]["val"], splits[1]["val"])
    assert set(splits[0]["val"].tolist()) != set(splits[2]["val"].tolist())
    assert (task.train_size, task.val_size, task.steps) == (750, 250, 15)
    batches = make_batches(splits[0], jax.random.key(1))
    assert batches["index"].shape == (15, 50)
    np.testing.assert_array_equal(np.sort(batches["index"].ravel()), np.sort(splits[0]["train"]))
    assert not np.array_equal(batches["index"], make_batches(splits[0], jax.random.key(2))["index"])
    validation = task.validation(splits[0])
    assert (validation["index"].shape, validation["weight"].sum()) == ((5, 50), 250)


def test_facts_of_the_model():
    params = jax.device_get(jax.jit(Imdb().init)(jax.random.key(0)))
    # PyTorch's Embedding, two LSTM layers with two biases each, Linear
    layers = [4 * 256 * (inputs + 256) + 2 * 4 * 256 for inputs in (64, 256)]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1001 * 64 + sum(layers) + 256 + 1 == 920_385
    np.testing.assert_allclose(params["embedding"].std(), 6, rtol=0.02)
    bounded = [*(leaf for layer in params["layers"].values() for leaf in layer.values()), *params["head"].values()]
    assert len(bounded) == 8
    for leaf in bounded:
        assert np.abs(leaf).max() <= 6 / 16
        if leaf.size > 1:
            assert np.abs(leaf).max() > 0.95 * 6 / 16
            np.testing.assert_allclose(leaf.std(), 6 / 16 / 3**0.5, rtol=0.1)


def reference(params, tokens):
    """The classifier by PyTorch's equations, review by review and position by position, in float64."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    logits = []
    for review in tokens:
        x_ld = params["embedding"][review]
        for layer in params["layers"].values():
            h = c = np.zeros(layer["recurrent"].shape[0])
            outputs = []
            for x in x_ld:
                i, f, g, o = np.split(
                    x @ layer["input"] + layer["biases"][0] + h @ layer["recurrent"] + layer["biases"][1], 4
                )
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                outputs.append(h)
            x_ld = np.array(outputs)
        logits.append(x_ld[-1] @ params["head"]["kernel"][:, 0] + params["head"]["bias"][0])
    return np.array(logits)


@functools.cache
def tiny():
    """A tiny model in float64, and tokens of 12 reviews: one empty, one without padding, the others of any length."""
    with jax.enable_x64(True):
        model = Classifier(9, dim=3, hidden=4, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        params = jax.tree.map(lambda p: 2.0 * p.astype(jnp.float64), nnx.to_pure_dict(state))
        rng = np.random.default_rng(1)
        tokens = rng.integers(1, 9, (12, 24))
        for review, length in zip(tokens, [0, 24, *rng.integers(1, 20, 10)], strict=True):
            review[: 24 - length] = 0
        return graphdef, params, jnp.asarray(tokens)


def plain(model, tokens_bl):
    """The classifier over all reviews and positions at once."""
    x_lbd, zero = model.embedding[...][tokens_bl.T], jnp.zeros((len(tokens_bl), model.hidden), model.embedding.dtype)
    for layer in model.layers:
        _, x_lbd = layer((zero, zero), x_lbd)
    return model.head(x_lbd[-1])[:, 0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("reviews", "block"), [(slice(0, 12), 6), (slice(0, 1), 24), (slice(1, 3), 1)])
def test_the_model_follows_pytorchs_equations_and_in_gradients_the_plain_form(reviews, block, monkeypatch):
    monkeypatch.setattr(imdb, "BLOCK", block)
    graphdef, params, tokens = tiny()
    tokens = tokens[reviews]

    def with_gradients(form):
        def loss_fn(params):
            logits = form(nnx.merge(graphdef, params), tokens)
            return jnp.sin(logits).sum(), logits

        return jax.jit(jax.grad(loss_fn, has_aux=True))(params)

    (gradients, logits), (wanted, plain_logits) = with_gradients(Classifier.__call__), with_gradients(plain)
    assert logits.dtype == plain_logits.dtype == jnp.float64
    expected = reference(jax.tree.map(np.asarray, params), np.asarray(tokens))
    np.testing.assert_allclose(plain_logits, expected, rtol=1e-12)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-10, atol=1e-12)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(wanted))


def test_a_layer_is_flaxs_lstm():
    layer = LSTM(3, 5, rngs=nnx.Rngs(0))
    cell = nnx.LSTMCell(3, 5, rngs=nnx.Rngs(1))
    parts = (jnp.split(w, 4, axis=-1) for w in (layer.input[...], layer.recurrent[...], layer.biases[...].sum(axis=0)))
    inputs, recurrents = (cell.ii, cell.if_, cell.ig, cell.io), (cell.hi, cell.hf, cell.hg, cell.ho)
    for of_input, of_state, kernel, recurrent, bias in zip(inputs, recurrents, *parts, strict=True):
        of_input.kernel[...], of_state.kernel[...], of_state.bias[...] = kernel, recurrent, bias
    x_lbd = jnp.asarray(RNG.normal(size=(7, 2, 3)), jnp.float32)
    zero = jnp.zeros((2, 5))
    (h, c), outputs = layer((zero, zero), x_lbd)
    carry = (zero, zero)  # Flax keeps the cell state first
    for x_bd, output in zip(x_lbd, outputs, strict=True):
        carry, wanted = cell(carry, x_bd)
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((c, h), carry, rtol=1e-5, atol=1e-6)


@pytest.fixture
def small(monkeypatch):
    """A task on 80 reviews that are positive if they say "good", and negative if they say "bad"."""
    reviews = [f"{' '.join(RNG.choice(['film', 'plot', 'star'], i % 7))} {('bad', 'good')[i % 2]}" for i in range(80)]
    monkeypatch.setattr(imdb, "REVIEWS", 80)
    monkeypatch.setattr(imdb, "load", lambda _: (reviews, np.arange(80, dtype=np.int32) % 2))
    return Imdb(vocabulary=10, length=20, batch_size=6, dim=4, hidden=8, epochs=8)


@pytest.mark.parametrize("part", [0.0, 0.0009, 0.9991, 1.0, float("nan")])
def test_a_split_has_a_review_on_either_side(part):
    with pytest.raises(UsageError, match=r"--validation-part must be from 0\.001 to 0\.999"):
        Imdb(validation_part=part)
    assert (Imdb(validation_part=0.001).val_size, Imdb(validation_part=0.999).train_size) == (1, 1)


def test_loss_and_accuracy_by_hand(small):
    shared = small.load()
    params = jax.jit(small.init)(jax.random.key(0))
    data = {**shared, **jax.jit(functools.partial(small.split, shared))(jax.random.key(0))}
    batch = jax.tree.map(lambda leaf: leaf[-1], small.validation(data))
    assert batch["weight"].tolist() == [1.0] * 2 + [0.0] * 4
    metrics = jax.jit(small.metrics)(params, data, batch)
    index = batch["index"]
    logits = reference(jax.tree.map(lambda p: np.asarray(p, np.float64), params), np.asarray(data["tokens"][index]))
    sign = 2 * shared["labels"][index] - 1
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(-sign * logits)), rtol=1e-4)
    np.testing.assert_array_equal(metrics["accuracy"], sign * logits > 0)


@pytest.mark.slow
def test_training_learns_and_is_reproducible(small):
    (run,) = product(small, imdb.paper, lr=0.02, weight_decay=0.1)
    compiled = program(run)
    ends = []
    for seed in (0, 0, 1):
        records = evaluations(compiled, run.traced, jax.random.key(seed))
        (row,) = next(records).rows
        losses = [row["train_loss"]]
        evaluation = next(records)
        (row,) = evaluation.rows
        assert row["val_accuracy"] > 0.9
        ends.append((*losses, row["train_loss"], np.asarray(evaluation.state.params["embedding"])))
    assert ends[0][:2] == ends[1][:2] != ends[2][:2]
    np.testing.assert_array_equal(ends[0][2], ends[1][2])


def test_the_best_of_many_batches_is_as_far_above_the_accuracy_as_the_readme_tells():
    """The highest accuracy of 10,000 random batches of 50 out of 250 reviews, the median of it."""

    def median_best(correct, batches):
        # P(highest <= k) is the hypergeometric P(one <= k) to the power of the number of batches.
        highest = scipy.stats.hypergeom(250, correct, 50).cdf(np.arange(51)) ** batches
        return np.argmax(highest >= 0.5) / 50

    rng = np.random.default_rng(0)
    for correct in (150, 173):
        drawn = rng.hypergeometric(correct, 250 - correct, 50, size=(400, 1000)).max(axis=1) / 50
        assert median_best(correct, 1000) == np.median(drawn)
    assert [median_best(correct, 10_000) for correct in (150, 168, 173)] == [0.82, 0.88, 0.90]


def table(rows=1000, header="review,sentiment"):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        (f'Number {i}, "quoted"', ("negative", "positive")[i % 2]) for i in range(rows)
    )
    return f"{header}\n{file.getvalue()}"


def test_a_csv_file_is_read(tmp_path):
    (tmp_path / "IMDB Dataset.csv").write_text(table(1003), encoding="utf-8-sig")
    reviews, labels = load(tmp_path)
    assert len(reviews) == 1000
    assert reviews[999] == 'Number 999, "quoted"'
    np.testing.assert_array_equal(labels, np.arange(1000) % 2)


def swap(line, new):
    """A table with another line, the header being line 1."""
    lines = table().splitlines(keepends=True)
    lines[line - 1] = new
    return "".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"d\.csv must be a CSV file in UTF-8 \(No columns"),
        (swap(1, "text,label\n"), r"d\.csv must have the columns review and sentiment, negative or positive; get"),
        (swap(4, "no sentiment\n"), r"d\.csv must have the columns review and sentiment, negative or positive"),
        (swap(4, "a,b,positive\n"), r"d\.csv must be a CSV file in UTF-8 \(.*Expected 2 fields"),
        (swap(7, "\n"), r"d\.csv must hold at least 1,000 reviews, got 999; get the whole file"),
        (swap(4, "fine,neutral\n"), r"d\.csv must have the columns review and sentiment, negative or positive"),
        (swap(1001, '"never closed,positive\n'), r"d\.csv must be a CSV file in UTF-8 \(.*EOF inside string"),
        (swap(4, "caf\n").replace(b"caf", b"caf\xe9"), r"d\.csv must be a CSV file in UTF-8 \(.*can't decode"),
        (table(999).encode(), r"d\.csv must hold at least 1,000 reviews, got 999; get the whole file"),
    ],
    ids=["empty", "header", "one field", "three", "blank line", "sentiment", "unclosed", "latin-1", "short"],
)
def test_a_damaged_csv_file_is_named(tmp_path, content, message):
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_folder_without_reviews_says_what_is_missing(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"aclImdb_v1.tar.gz is missing; put it there \(from https"):
            load(folder)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of the original's kind, and its hash in place of the true one."""
    folder = tmp_path / "unpacked"
    for part, kinds in (("train", ("neg", "pos", "unsup")), ("test", ("neg", "pos"))):
        for kind in kinds:
            (folder / "aclImdb" / part / kind).mkdir(parents=True)
            for i in range(503 if part == "train" else 2):
                (folder / "aclImdb" / part / kind / f"{i}_{i % 10}.txt").write_text(f"{part} {kind} {i}")
    (folder / "aclImdb" / "train" / "labeledBow.feat").write_text("0 1:2")
    path = tmp_path / imdb.ARCHIVE
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        file.add(folder / "aclImdb", "aclImdb")
    monkeypatch.setattr(imdb, "MD5", "md5:" + hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_the_archive_gives_half_of_either_kind(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.pooch, "retrieve", lambda *_, **__: str(archive))
    downloaded, (reviews, labels) = load(None), load(tmp_path)
    assert reviews == downloaded[0]
    np.testing.assert_array_equal(labels, downloaded[1])
    assert (len(set(reviews)), labels.sum(), labels.dtype) == (1000, 500, np.int32)
    assert {(review.split()[0], review.split()[1] == "pos") for review in reviews} == {
        ("train", True),
        ("train", False),
    }
    np.testing.assert_array_equal(labels, ["pos" in review for review in reviews])
    assert 200 < labels[:500].sum() < 300  # in random order


def test_a_damaged_archive_is_told(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"aclImdb_v1.tar.gz is damaged \(its hash is not .*get it again from https"):
        load(tmp_path)
