"""The modular-arithmetic experiment against the authors' PyTorch code, and its facts."""

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax import lax

from examples import modular
from examples.harness.engine import as_text
from examples.harness.methods import hyperparams
from examples.harness.train import TrainState, advance
from examples.modular import EXPERIMENT, METHODS, Modular

PAPER = [modular.adam, modular.ema, modular.ma]

pytestmark = pytest.mark.usefixtures("lenient")  # the optimizers of optax promote dtypes

HERE = Path(__file__).parent / "reference"
FULL = Path(__file__).parents[2] / "shared" / "reference"
full_size = pytest.mark.skipif(
    not FULL.exists(), reason="the full-size reference run (1.6 MB) is not part of the repository"
)


def from_torch(weights):
    """Our parameters, in float64, from weights under their PyTorch names."""
    w = {name: jnp.asarray(weights[name], jnp.float64) for name in weights}

    def linear(name):
        return {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

    def norm(name):
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def block(name):
        weight, bias = w[f"{name}.attn.in_proj_weight"].T, w[f"{name}.attn.in_proj_bias"]
        dim = weight.shape[0]
        return {
            "ln1": norm(f"{name}.ln_1"),
            "ln2": norm(f"{name}.ln_2"),
            "attention": {
                "query": {"kernel": weight[:, :dim], "bias": bias[:dim]},
                "key_value": {"kernel": weight[:, dim:], "bias": bias[dim:]},
                "out": linear(f"{name}.attn.out_proj"),
            },
            "up": linear(f"{name}.mlp.0"),
            "down": linear(f"{name}.mlp.2"),
        }

    return {
        "token": w["token_embeddings.weight"],
        "position": w["position_embeddings.weight"],
        "blocks": {i: block(f"layers.{i}") for i in range(2)},
        "ln": norm("ln_f"),
        "head": {"kernel": w["head.weight"].T},
    }


class Replay(Modular):
    """The task, trained on batches of pairs that stand in its data."""

    def batches(self, data, key):
        return {"index": data["index"], "weight": data["weight"]}


def train(task, tx, params, batches):
    """Losses and final parameters over batches of pair numbers, which are padded and weighted."""
    index = [np.pad(batch, (0, task.batch_size - len(batch))) for batch in batches]
    weight = [np.arange(task.batch_size) < len(batch) for batch in batches]
    data = {"index": jnp.array(index), "weight": jnp.array(weight, jnp.float64), "val": jnp.arange(task.batch_size)}
    run = jax.jit(functools.partial(advance, Replay(**dataclasses.asdict(task)), tx))
    state, metrics = run(jax.random.key(0), data, TrainState(params, tx.init(params), jnp.array(0)))
    return metrics["losses"], state.params


def logits(task, params, pairs):
    """The logits of the answers of pairs."""
    return jax.jit(task.logits)(params, pairs)


def norm(params):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params)))


@pytest.fixture
def tiny(x64):
    trajectory = json.loads((HERE / "tiny_trajectory.json").read_text())
    with np.load(HERE / "tiny_init.npz") as weights:
        return Modular(p=11, batch_size=16, dim=16, heads=2), from_torch(weights), trajectory


def test_tiny_model_has_the_authors_logits(tiny):
    task, params, trajectory = tiny
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(task.init, jax.random.key(0)))
    np.testing.assert_allclose(logits(task, params, jnp.arange(110)), trajectory["logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("i", [pytest.param(0, marks=pytest.mark.slow), 1, 2], ids=["none", "ema", "ma"])
def test_tiny_model_trains_as_the_authors_does(tiny, i):
    task, params, trajectory = tiny
    expected = trajectory["runs"][i]
    arguments = dict(expected["args"])
    assert arguments.pop("filter") == ["none", "ema", "ma"][i]
    tx = PAPER[i](**arguments)
    losses, params = train(task, tx, params, trajectory["batches"])
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(norm(params), expected["final_norm"], rtol=1e-7)
    np.testing.assert_allclose(params["head"]["kernel"][:, 0], expected["final_head_row0"], rtol=0, atol=1e-6)


@full_size
@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "ema"])
def test_full_model_trains_as_the_authors_does(name, x64):
    trajectory = json.loads((FULL / "mod97_trajectory.json").read_text())
    with np.load(FULL / "mod97_init_seed0.npz") as weights, np.load(FULL / "mod97_batches_seed0.npz") as batches:
        params = from_torch(weights)
        pairs = np.split(batches["indices"].astype(int), batches["offsets"][1:-1])
    task = Modular()
    np.testing.assert_allclose(
        logits(task, params, jnp.arange(16)), trajectory["logits_first_16_pairs"], rtol=0, atol=1e-9
    )
    method = {"none": modular.adam, "ema": modular.ema}[name]
    assert hyperparams(method)["weight_decay"] == trajectory[name]["config"]["weight_decay_l2_in_adam"]
    losses, params = train(task, method(), params, pairs)
    assert len(losses) == 60
    np.testing.assert_allclose(losses, trajectory[name]["losses"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(norm(params), trajectory[name]["final_param_l2"], rtol=1e-7)


def test_facts_of_the_task():
    task = Modular()
    assert (task.pairs, task.train_size, task.steps) == (9312, 4656, 10)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 422_784
    assert task.answer(jnp.array(96 * 50 + 2)) == 50 * 3 % 97


def test_initialisation_is_that_of_pytorch():
    task = Modular()
    params = jax.jit(task.init)(jax.random.key(0))
    for embedding in (params["token"], params["position"]):
        np.testing.assert_allclose(embedding.std(), 1.0, atol=0.05)
    block = params["blocks"][1]
    attention = block["attention"]
    for layer, bound in (
        (attention["query"], (6 / (4 * 128)) ** 0.5),
        (attention["key_value"], (6 / (4 * 128)) ** 0.5),
        (attention["out"], 128**-0.5),
        (block["up"], 128**-0.5),
        (block["down"], 512**-0.5),
        (params["head"], 128**-0.5),
    ):
        kernel = layer["kernel"]
        assert 0.99 * bound < jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)  # uniform
    for name in ("query", "key_value", "out"):
        assert not attention[name]["bias"].any()
    for layer, bound in ((block["up"], 128**-0.5), (block["down"], 512**-0.5)):
        assert 0.9 * bound < jnp.abs(layer["bias"]).max() <= bound
    assert "bias" not in params["head"]


def test_an_epoch_shows_every_training_pair_once():
    task = Modular()
    data = task.split({}, jax.random.key(0))
    assert sorted(np.concatenate([data["train"], data["val"]])) == list(range(9312))
    batches = task.batches(data, jax.random.key(1))
    assert batches["index"].shape == batches["weight"].shape == (10, 512)
    np.testing.assert_array_equal(batches["weight"].sum(axis=1), [512] * 9 + [48])
    shown = np.asarray(batches["index"])[np.asarray(batches["weight"]) == 1]
    np.testing.assert_array_equal(np.sort(shown), np.sort(data["train"]))
    again = task.batches(data, jax.random.key(2))
    assert not np.array_equal(batches["index"], again["index"])


@pytest.mark.parametrize(
    ("operation", "pairs", "check"),
    [
        ("multiplication", 13 * 12, lambda x, y, z: x * y % 13 == z),
        ("addition", 13 * 13, lambda x, y, z: (x + y) % 13 == z),
        ("subtraction", 13 * 13, lambda x, y, z: (x - y) % 13 == z),
        ("division", 13 * 12, lambda x, y, z: z * y % 13 == x),
    ],
)
def test_operations(operation, pairs, check):
    task = Modular(p=13, operation=operation)
    assert task.pairs == pairs
    pair = jnp.arange(pairs)
    x, y = map(np.asarray, task.operands(pair))
    z = np.asarray(task.answer(pair))
    assert len(set(zip(x, y, strict=True))) == pairs
    assert check(x, y, z).all()
    assert ((z >= 0) & (z < 13)).all()
    assert (0 in y) == (pairs == 169)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("operation", "depth"),
    [
        ("multiplication", 2),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (("addition", 1), ("subtraction", 3), ("division", 2))
        ),
    ],
)
def test_the_fast_form_gives_logits_and_gradients_of_the_plain_model(operation, depth):
    task = Modular(p=11, dim=16, heads=2, depth=depth, operation=operation)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / max(leaf.shape) ** 0.5)
    params = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
    tokens, answer = task.tokens(jnp.arange(task.pairs)), task.answer(jnp.arange(task.pairs))

    def with_gradients(form):
        def loss_fn(params):
            out = form(task.with_params(params))
            return jnp.sum(out**2), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
        return {"logits": out, "gradients": grads}

    fast = with_gradients(lambda model: model.last_logits(tokens, prefixes=11))
    plain = with_gradients(lambda model: model(tokens)[:, -1])
    chex.assert_trees_all_close(fast, plain, rtol=1e-10, atol=1e-10)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(plain["gradients"]["blocks"]))
    assert np.unique(np.asarray(plain["logits"]), axis=0).shape[0] == task.pairs

    batch = {"index": jnp.arange(task.pairs), "weight": jnp.ones(task.pairs)}
    metrics = jax.jit(task.metrics)(params, {}, batch)
    log_p = scipy.special.log_softmax(np.asarray(plain["logits"]), axis=-1)
    np.testing.assert_allclose(metrics["loss"], -log_p[np.arange(task.pairs), answer], rtol=0, atol=1e-10)
    np.testing.assert_array_equal(metrics["accuracy"], log_p.argmax(axis=-1) == answer)


def test_learning_rate_rises_from_zero():
    tx = modular.adam()
    params = {"w": jnp.ones(1)}
    step = lambda state, _: tx.update(params, state, params)[::-1]
    updates = jax.jit(lambda: lax.scan(step, tx.init(params), None, length=12)[1])()["w"][:, 0]
    # With a constant gradient Adam's step is the learning rate.
    np.testing.assert_allclose(updates, [-1e-3 * min(i / 10, 1) for i in range(12)], rtol=1e-3)


def test_methods_are_those_of_the_paper():
    assert EXPERIMENT.task == Modular()
    assert EXPERIMENT.default == "ema"
    assert (Modular.thresholds, Modular.stop_at, Modular.max_steps) == ((0.95,), 0.95, 5_000)
    expected = {
        "adam": {"weight_decay": 0.0},
        "ema": {"weight_decay": 0.005, "alpha": 0.98, "lamb": 2.0, "fast": 1.0},
        "ma": {"weight_decay": 0.01, "window_size": 100, "lamb": 5.0, "fast": 1.0},
        "two-stage": {"weight_decay": 0.01, "window_size": 100, "lamb": 5.0, "fast": 1.0, "start_step": 500},
        "slow-only": {"weight_decay": 0.01, "window_size": 100, "lamb": 5.0, "fast": 0.0, "start_step": 99},
    }
    for name, numbers in expected.items():
        assert hyperparams(METHODS[name]) == {"lr": 1e-3, **numbers}, name


def test_filters_have_controls_with_the_same_learning_rate():
    runs = {name: EXPERIMENT.run(name) for name in METHODS}
    assert len({as_text(run.key) for run in runs.values()}) == len(METHODS)
    for name, run in runs.items():
        assert run.hyperparams["lr"] == (0.06 if name == "fastest" else 1e-3)
    # A third of the EMA's decay and a sixth of the MA's: the share that is left if all of the gradient is amplified.
    ema, third = runs["ema"].hyperparams, runs["adam-third-decay"].hyperparams
    assert third["weight_decay"] == pytest.approx(ema["weight_decay"] / (ema["fast"] + ema["lamb"]), rel=3e-3)
    ma = runs["ma"].hyperparams
    assert third["weight_decay"] == pytest.approx(ma["weight_decay"] / (ma["fast"] + ma["lamb"]), rel=3e-3)
    for name in ("ema-adamw", "late-ema-adamw", "ma-adamw", "muon"):
        assert runs[name].hyperparams["weight_decay"] == runs["adamw"].hyperparams["weight_decay"] == 1.0


def test_fastest_orthogonalises_the_hidden_matrices_and_steps_less_far_elsewhere(monkeypatch):
    monkeypatch.setattr(modular, "warmup", optax.constant_schedule)
    tx, task = modular.fastest(weight_decay=0.0), Modular(dim=32, heads=2, depth=1)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    params, grads = (jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0))) for _ in range(2))
    updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params))()
    up, down = (updates["blocks"][0][name]["kernel"] for name in ("up", "down"))
    # 4 times as many outputs as inputs double the steps.
    assert np.median(np.linalg.svd(up, compute_uv=False)) == pytest.approx(2 * 0.06, rel=0.4)
    assert np.median(np.linalg.svd(down, compute_uv=False)) == pytest.approx(0.06, rel=0.4)
    sizes = {
        name: np.median(np.abs(u)) for name, u in (("token", updates["token"]), ("head", updates["head"]["kernel"]))
    }
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1  # of NAdam's first step, over the rate
    assert sizes["token"] == pytest.approx(first * 0.2 * 0.06, rel=1e-2)
    assert sizes["head"] == pytest.approx(first * 0.06 * 0.06, rel=1e-2)


GRADIENTS = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)


@pytest.fixture
def filtered(monkeypatch):
    """What the filter of a method makes of 700 random gradients."""
    for name in ("adam", "adamw"):
        monkeypatch.setattr(modular, name, lambda lr, weight_decay: optax.identity())

    def run(name):
        tx = METHODS[name]()
        step = lambda state, g: tx.update(g, state, g)[::-1]
        return jax.jit(lambda grads: lax.scan(step, tx.init(grads[0]), grads)[1])(jnp.asarray(GRADIENTS))

    return run


def test_two_stage_amplifies_from_step_500_on(filtered):
    two_stage, ma = filtered("two-stage"), filtered("ma")
    np.testing.assert_allclose(two_stage[:500], GRADIENTS[:500], rtol=1e-5)
    np.testing.assert_allclose(two_stage[500:], ma[500:], rtol=1e-5)
    assert not np.allclose(ma[100:500], GRADIENTS[100:500])


def test_slow_only_leaves_the_slow_part_alone_once_there_is_one(filtered):
    slow_only = filtered("slow-only")
    np.testing.assert_allclose(slow_only[:99], GRADIENTS[:99], rtol=1e-5)
    means = [5 * np.mean(GRADIENTS[i - 99 : i + 1], axis=0) for i in range(99, 700)]
    np.testing.assert_allclose(slow_only[99:], means, rtol=1e-3, atol=1e-5)


def test_the_late_ema_collects_from_the_first_step_on(filtered):
    late, early = filtered("late-ema-adamw"), filtered("ema-adamw")  # λ is 5 and 2
    np.testing.assert_allclose(late[:100], GRADIENTS[:100], rtol=1e-5)
    slow = (early - GRADIENTS)[100:] / 2
    np.testing.assert_allclose(late[100:], GRADIENTS[100:] + 5 * slow, rtol=1e-4, atol=1e-5)


def test_every_method_trains():
    gradient, params = {"w": jnp.array([1.0, -1.0, 0.5])}, {"w": jnp.ones(3)}

    @jax.jit
    def moves():
        found = {}
        for name, method in METHODS.items():
            tx = method(**hyperparams(method))
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(gradient, state, params)
            found[name] = updates["w"]
        return found

    for name, move in moves().items():
        assert np.isfinite(move).all(), name
        assert move[0] < 0, name
        assert move[1] > move[0], name
