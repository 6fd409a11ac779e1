"""The sparse parity experiment: its facts, its points, its loss, and that it is learned as the quick start says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import quickstart
from examples.harness.engine import Results, product
from examples.harness.errors import UsageError
from examples.harness.methods import hyperparams
from examples.parity import METHODS, Parity, adamw

pytestmark = pytest.mark.usefixtures("lenient")


def test_facts_of_the_task():
    task = Parity()
    params = jax.jit(task.init)(jax.random.key(0))
    hidden, out = params["layers"].values()
    assert jax.tree.map(jnp.shape, hidden) == {"kernel": (40, 256), "bias": (256,)}
    assert jax.tree.map(jnp.shape, out) == {"kernel": (256, 1), "bias": (1,)}
    for layer, fan_in in ((hidden, 40), (out, 256)):
        for leaf in layer.values():
            assert jnp.abs(leaf).max() <= fan_in**-0.5
        assert jnp.std(layer["kernel"]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    data = jax.jit(lambda key: task.split({}, key))(jax.random.key(1))
    batches = jax.jit(task.batches)(data, jax.random.key(2))
    assert batches["index"].shape == (50, 64) == batches["weight"].shape
    assert set(np.unique(batches["index"])) <= set(range(1000))
    assert (batches["weight"] == 1).all()
    validation = task.validation(data)
    assert validation["weight"].sum() == 2000
    shown = validation["index"][validation["weight"] > 0]
    np.testing.assert_array_equal(shown, np.arange(1000, 3000))


def test_a_label_is_the_product_of_the_first_k_bits_and_the_seed_draws_the_points():
    split = jax.jit(lambda key: Parity(n=7, k=4).split({}, key))
    one, other = (split(jax.random.key(seed)) for seed in (0, 1))
    x = np.asarray(one["x"])
    assert x.shape == (3000, 7)
    assert set(np.unique(x)) == {-1, 1}
    assert abs(x.mean()) < 0.02
    np.testing.assert_array_equal(one["y"], x[:, 0] * x[:, 1] * x[:, 2] * x[:, 3])
    assert not np.array_equal(x, other["x"])


def test_loss_and_accuracy_by_hand():
    task = Parity(n=5, width=8, points=20, fresh_points=10, batch_size=10)
    params = jax.jit(task.init)(jax.random.key(0))
    data = jax.jit(lambda key: task.split({}, key))(jax.random.key(1))
    batch = jax.tree.map(lambda leaf: leaf[0], task.validation(data))
    metrics = task.metrics(params, data, batch)
    x, y = (np.asarray(data[name], np.float64)[20:] for name in "xy")
    first, last = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["layers"].values()
    logit = (np.maximum(x @ first["kernel"] + first["bias"], 0) @ last["kernel"] + last["bias"])[:, 0]
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(-y * logit)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], np.sign(logit) == y)
    assert 0 < metrics["accuracy"].sum() < 10  # else a constant would pass


def test_more_bits_in_the_product_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"--k must be at most --n \(3\), got 4"):
        Parity(n=3, k=4)


def ends_of(tx, steps=5):
    """Parameters after some steps."""
    params, grads = {"w": jnp.array([[1.0, -2.0, 3.0]] * 2)}, {"w": jnp.array([[0.1, 0.2, -0.3], [0.3, 0.1, 0.1]])}
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(jax.tree.map(lambda grad, step=step: grad * step, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params["w"]


def test_the_quick_start_has_the_same_optimizers():
    pairs = {"adamw": quickstart.ALONE, "ma": quickstart.FILTERED, "adamw-tuned": quickstart.TUNED}
    for name, label in pairs.items():
        method = METHODS[name]
        np.testing.assert_allclose(ends_of(method()), ends_of(quickstart.METHODS[label]), rtol=1e-6)


def test_methods_share_the_learning_rate_but_for_the_tuned_ones():
    assert (Parity.thresholds, Parity.max_steps, Parity.stop_at) == ((0.95,), 5_000, 0.95)
    numbers = {name: hyperparams(method) for name, method in METHODS.items()}
    assert {name: (one["lr"], one["weight_decay"]) for name, one in numbers.items()} == {
        "ma": (0.003, 0.3),
        "ema": (0.003, 0.3),
        "adamw": (0.003, 0.3),
        "adamw-tuned": (0.03, 0.3),
        "adamw-b1-0.98": (0.003, 0.3),
        "muon": (0.03, 0.1),
    }
    assert [numbers[name]["b1"] for name in ("adamw", "adamw-b1-0.98")] == [0.9, 0.98]


def test_the_ema_is_debiased():
    first = optax.tree_utils.tree_get  # of the state after one step
    grad, params = jnp.ones(2), jnp.ones(2)
    tx = METHODS["ema"](alpha=0.5, lamb=1.0)
    _, state = tx.update(grad, tx.init(params), params)
    _, state = tx.update(jnp.zeros(2), state, params)
    # Debiased, the mean of 1 and 0 is 1/3: the second moment is that of 2 and 1/3.
    np.testing.assert_allclose(first(state, "nu"), 0.001 * (0.999 * 2**2 + (1 / 3) ** 2), rtol=1e-5)


def test_a_tuned_learning_rate_reaches_95_percent_and_a_small_one_fits_the_training_points_alone(tmp_path):
    runs = product(Parity(), adamw, lr=[0.03, 0.003], seed=range(2), max_steps=800, stop_at=None, group_size=4)
    results = Results(tmp_path / "r.jsonl", trains=True, keep_curves=True).of(runs)
    for row in results.itertuples():
        if row.lr == 0.03:
            assert row.steps_to_95 <= 500
        else:
            assert row.curve["train_accuracy"][-1] > 0.99
            assert row.curve["val_accuracy"][-1] < 0.7
