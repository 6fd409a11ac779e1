"""The character GPT: its model against plain NumPy, its windows of text, its file, its presets."""

import dataclasses
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from examples import resume, shakespeare
from examples.harness.cli import main
from examples.harness.errors import UserError
from examples.harness.methods import hyperparams
from examples.harness.train import program
from examples.shakespeare import EXPERIMENT, METHODS, Shakespeare, train_part

pytestmark = pytest.mark.usefixtures("lenient")

DATA = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare"
RNG = np.random.default_rng(0)
SHAPE = {"layers": 2, "heads": 2, "width": 12, "context": 8, "dropout": 0.0, "batch_size": 3}
ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEXT = ALPHABET + "".join(RNG.choice(list(ALPHABET), 600 - len(ALPHABET)))
SHARED = {"text": np.array([ALPHABET.index(character) for character in TEXT], np.uint8)}


def task(**changes):
    """A small task; its text are 600 random characters."""
    return Shakespeare(**(SHAPE | changes))


def data_of(t):
    """All its arrays."""
    return jax.tree.map(jnp.asarray, {**SHARED, **t.split(SHARED, jax.random.key(0))})


def perturbed(params):
    """Parameters off their initial values, so that a LayerNorm left out or swapped shows."""
    return jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * RNG.normal(size=p.shape), params)


def numpy_logits(params, heads, text_l):
    """The logits of one window, position by position."""

    def layer_norm(x, scale):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale

    def gelu(x):
        return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2

    stream = [params["character"][c] + params["position"][i] for i, c in enumerate(text_l)]
    for k in range(len(params["blocks"])):
        block = params["blocks"][k]
        qkv = [layer_norm(x, block["ln1"]["scale"]) @ block["qkv"]["kernel"] for x in stream]
        q, k, v = (np.array([np.split(row, 3)[i] for row in qkv]) for i in range(3))
        head = q.shape[1] // heads
        for i in range(len(stream)):
            taken = np.zeros(q.shape[1])
            for part in (slice(head * h, head * (h + 1)) for h in range(heads)):
                weights = scipy.special.softmax(k[: i + 1, part] @ q[i, part] / np.sqrt(head))
                taken[part] = weights @ v[: i + 1, part]
            x = stream[i] + taken @ block["out"]["kernel"]
            hidden = gelu(layer_norm(x, block["ln2"]["scale"]) @ block["up"]["kernel"])
            stream[i] = x + hidden @ block["down"]["kernel"]
    return np.array([params["character"] @ layer_norm(x, params["ln"]["scale"]) for x in stream])


def test_the_model_is_that_of_numpy(x64):
    t = task()
    params = perturbed(t.init(jax.random.key(0)))
    text_bl = RNG.integers(0, 65, (3, 7))
    logits = jax.jit(lambda p: t.with_params(p)(jnp.asarray(text_bl)))(params)
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, [numpy_logits(params, 2, text_l) for text_l in text_bl], atol=1e-11)


def test_a_position_depends_on_itself_and_those_before_it():
    # The position embedding is added to that of the character: the gradients by the two are the same.
    t = task()
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), perturbed(t.init(jax.random.key(0))))
    text = jnp.arange(8)[None]

    def logits(position):
        return t.with_params({**params, "position": position})(text)[0]

    gradients = jnp.abs(jax.jit(jax.jacfwd(logits))(params["position"])).sum(axis=(1, 3))  # of logits i by embedding j
    np.testing.assert_array_equal(gradients > 0, np.tril(np.ones((8, 8), bool)))


def test_loss_by_hand(x64):
    # Every target is the character after its position.
    t = task()
    params = perturbed(t.init(jax.random.key(0)))
    batch = {"index": jnp.array([0, 531, 591], jnp.int32), "weight": jnp.array([1.0, 1.0, 0.0])}
    metrics = t.metrics(jax.tree.map(jnp.asarray, params), data_of(t), batch)
    expected = []
    for first in (0, 531, 591):
        window = [ALPHABET.index(c) for c in TEXT[first : first + 9]]
        log_p = scipy.special.log_softmax(numpy_logits(params, 2, window[:-1]), axis=1)
        expected.append(-np.mean([log_p[i, c] for i, c in enumerate(window[1:])]))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)


def test_windows_stay_on_their_side():
    t = task(eval_every=4000)
    data = data_of(t)
    assert "".join(ALPHABET[k] for k in data["text"]) == TEXT
    assert (t.steps, train_part(600)) == (4000, 540)
    batches = t.batches(data, jax.random.key(1))
    assert batches["index"].shape == batches["weight"].shape == (4000, 3)
    assert (batches["weight"] == 1).all()
    # A window and its last target: 9 characters, of which the last may be number 539. All firsts occur.
    np.testing.assert_array_equal(np.unique(batches["index"]), np.arange(540 - 9 + 1))
    validation = t.validation(data)
    first = validation["index"][validation["weight"] == 1]
    assert first.shape == (60,)
    assert (first.min(), first.max()) == (540, 600 - 9)


def test_dropout_has_a_key_a_step_and_is_off_in_validation():
    t = task(dropout=0.5)
    data, params = data_of(t), t.init(jax.random.key(0))
    batches, validation = t.batches(data, jax.random.key(1)), t.validation(data)
    assert len(np.unique(jax.random.key_data(batches["dropout"]), axis=0)) == t.steps
    assert "dropout" not in validation
    metrics = jax.jit(t.metrics)
    batch = {**jax.tree.map(lambda x: x[0], batches), "index": validation["index"][0]}
    one, again = (metrics(params, data, batch)["loss"].sum() for _ in range(2))
    other = metrics(params, data, batch | {"dropout": batches["dropout"][1]})["loss"].sum()
    assert one == again != other
    without = dataclasses.replace(t, dropout=0.0)
    kept = metrics(params, data, jax.tree.map(lambda x: x[0], validation))["loss"]
    np.testing.assert_allclose(kept, jax.jit(without.metrics)(params, data, batch)["loss"], rtol=1e-6)
    assert abs(kept.sum() - one) > 1e-4


def test_initialisation_is_that_of_gpt_2():
    t = task(layers=3, width=128, context=64)
    params = t.init(jax.random.key(0))
    assert params["character"].std() == pytest.approx(0.02, rel=0.05)
    assert params["position"].std() == pytest.approx(0.02, rel=0.05)
    for k in range(3):
        block = params["blocks"][k]
        assert {(name, part) for name, layer in block.items() for part in layer} == {
            *((name, "scale") for name in ("ln1", "ln2")),
            *((name, "kernel") for name in ("qkv", "out", "up", "down")),
        }
        for name, std in {"qkv": 0.02, "up": 0.02, "out": 0.02 / 6**0.5, "down": 0.02 / 6**0.5}.items():
            assert block[name]["kernel"].std() == pytest.approx(std, rel=0.03), name
        assert (block["ln1"]["scale"] == 1).all()


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small input.txt, and its hash in place of the true one."""
    text = TEXT.encode()
    (tmp_path / "input.txt").write_bytes(text)
    monkeypatch.setattr(shakespeare, "FILES", {"input.txt": hashlib.sha256(text).hexdigest()})
    return tmp_path


def test_a_run_is_trained_and_its_folder_found_again(data_dir, capsys):
    sizes = ("--layers", "1", "--heads", "1", "--width", "4", "--context", "8", "--dropout", "0.1")
    folder = data_dir / "run"
    flags = (*sizes, "--data-dir", str(data_dir), "--out", str(folder), "--max-steps", "20")
    assert main(EXPERIMENT, ["baseline", *flags]) == 0
    assert "The best validation loss was 4." in capsys.readouterr().out
    assert [line.split(",")[0] for line in (folder / "metrics.csv").read_text().split()] == ["step", "10", "20"]
    # The folder of the data comes back as a path.
    _, run, _ = resume.parse([str(folder)])
    task = Shakespeare(layers=1, heads=1, width=4, context=8, dropout=0.1, data_dir=data_dir)
    assert run == EXPERIMENT.run("baseline", task, max_steps=20)
    _, run, _ = resume.parse([str(folder), "--data-dir", "moved"])
    assert run.task == dataclasses.replace(task, data_dir=Path("moved"))
    assert run.key == EXPERIMENT.run("baseline", task, max_steps=20).key


def test_a_missing_or_damaged_file_is_named(data_dir):
    np.testing.assert_array_equal(Shakespeare(data_dir=data_dir).load()["text"], SHARED["text"])
    (data_dir / "input.txt").write_bytes(b"First Citizen:")
    with pytest.raises(UserError, match=r"input.txt is damaged \(its hash is not .*get it again from http"):
        Shakespeare(data_dir=data_dir).load()
    (data_dir / "input.txt").unlink()
    with pytest.raises(UserError, match=r"input.txt is missing; put it there \(from http"):
        Shakespeare(data_dir=data_dir).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers must be from 1 to 100,000,000, got 0"),
        ({"batch_size": 0}, "--batch-size must be from 1 to 100,000,000, got 0"),
        ({"heads": 3}, r"--width must be a multiple of --heads \(3\), got 64"),
        ({"context": 200_000}, "--context must be at most 100,000, .* got 200000"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"stop_at": 0.0}, r"--stop-at must be in \(0, inf\], or None, got 0.0"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        EXPERIMENT.run(task=Shakespeare(**changes)) if "stop_at" not in changes else EXPERIMENT.run(**changes)


def test_methods():
    assert (Shakespeare.metric, Shakespeare.max_steps, Shakespeare.stop_at) == ("loss", 1_500, None)
    numbers = {name: hyperparams(method) for name, method in METHODS.items()}
    assert list(numbers) == ["ema", "baseline", "late-ema", "empty-ema", "empty-ema-mean", "tripled"]
    for name, one in numbers.items():
        assert (one["lr"], one["weight_decay"]) == (1e-3, 0.1)
        assert one.get("alpha", 0.98) == 0.98
        assert one.get("start_step", 1_000) == 1_000
        assert ("start_step" in one) == (name not in ("ema", "baseline"))
    assert [numbers[name]["lamb"] for name in ("ema", "late-ema", "empty-ema")] == [2.0] * 3
    mean = numbers["empty-ema-mean"]
    assert mean["fast"] + mean["lamb"] == 1  # in the steady state it changes no gradient
    assert mean["lamb"] / mean["fast"] == pytest.approx(2.0)
    assert numbers["tripled"]["factor"] == 1 + numbers["ema"]["lamb"]


def test_a_filter_switched_on_late_has_collected_or_is_empty(monkeypatch):
    monkeypatch.setattr(shakespeare, "baseline", lambda lr, weight_decay: optax.identity())
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)), jnp.float32)

    def updates(name, first=0, **numbers):
        tx = METHODS[name](**numbers)
        step = lambda state, g: tx.update(g, state, g)[::-1]
        return jax.jit(lambda: jax.lax.scan(step, tx.init(grads[0]), grads[first:])[1])()

    always, since_20 = updates("ema", lamb=3.0, alpha=0.9), updates("ema", 20, lamb=3.0, alpha=0.9)
    for name, expected in (("late-ema", always[20:]), ("empty-ema", since_20)):
        found = updates(name, lamb=3.0, alpha=0.9, start_step=20)
        np.testing.assert_array_equal(found[:20], grads[:20])
        np.testing.assert_allclose(found[20:], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(always[20:], since_20)
    np.testing.assert_allclose(updates("tripled", start_step=20)[20:], 3 * grads[20:], rtol=1e-6)
    np.testing.assert_array_equal(updates("tripled", start_step=20)[:20], grads[:20])
    # Over 3, the mean has the weights of the EMA.
    mean = updates("empty-ema-mean", start_step=0)
    np.testing.assert_allclose(3 * mean, updates("ema"), rtol=1e-5, atol=1e-6)


def test_nanogpts_betas_and_a_warmup_of_100_steps():
    params, grad = jnp.ones(1), jnp.ones(1)
    tx = shakespeare.baseline(weight_decay=0.0)
    step = lambda state, _: tx.update(grad, state, params)[::-1]
    state, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(params), None, length=120))()
    np.testing.assert_allclose(updates[:, 0], [-1e-3 * min(i / 100, 1) for i in range(120)], rtol=1e-3)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu"), 1 - 0.9**120, rtol=1e-4)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "nu"), 1 - 0.99**120, rtol=1e-4)


# Characters and positions; LayerNorms; four matrices of 3, 1, 4 and 4 squares a block
SMALL, LARGE = (65 + 64) * 64 + 9 * 64 + 4 * 12 * 64**2, (65 + 256) * 384 + 13 * 384 + 6 * 12 * 384**2


NANOGPT = {"layers": 6, "heads": 6, "width": 384, "context": 256, "dropout": 0.2, "batch_size": 64}


@pytest.mark.parametrize(("shape", "size", "count"), [({}, SMALL, 205_440), (NANOGPT, LARGE, 10_745_088)])
@pytest.mark.skipif(not DATA.exists(), reason="tiny Shakespeare (1.1 MB) is not part of the repository")
def test_facts_of_the_task(shape, size, count):
    run = EXPERIMENT.run("late-ema", Shakespeare(**shape, data_dir=DATA))
    hyper, key = run.traced, jax.random.key(0)
    text = (DATA / "input.txt").read_text()
    assert (len(text), "".join(sorted(set(text))), train_part(len(text))) == (1_115_394, ALPHABET, 1_003_854)
    compiled = program(run)
    shared, own = compiled.draw(key)
    assert "".join(ALPHABET[k] for k in shared["text"][:15]) == "First Citizen:\n"
    state = jax.eval_shape(compiled.init, hyper, key)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == size == count
    new_state, metrics = jax.eval_shape(compiled.advance, hyper, key, shared, own, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert set(metrics) == {"train_loss", "val_loss", "losses"}


@pytest.mark.skipif(not DATA.exists(), reason="tiny Shakespeare (1.1 MB) is not part of the repository")
def test_real_text_is_learned():
    small = {"layers": 1, "heads": 2, "width": 32, "context": 16, "batch_size": 16}
    run = EXPERIMENT.run("ema", Shakespeare(**small, data_dir=DATA), lr=1e-2)
    compiled, hyper, key = program(run), run.traced, jax.random.key(0)
    (shared, own), state, losses = compiled.draw(key), compiled.init(hyper, key), []
    for _ in range(10):
        state, metrics = compiled.advance(hyper, key, shared, own, state)
        losses += metrics["losses"].tolist()
    assert losses[0] == pytest.approx(math.log(65), rel=0.02)
    frequencies = np.unique(shared["text"], return_counts=True)[1] / len(shared["text"])
    assert metrics["val_loss"] < scipy.special.entr(frequencies).sum() - 0.1  # better than guessing by frequency
