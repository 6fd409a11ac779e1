"""The sparse parity experiment: its facts, its points, its loss, and that it is learned as the quick start says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import quickstart
from examples.harness.errors import UsageError
from examples.harness.optimizers import make_tx
from examples.harness.sweep import train_all
from examples.parity import PRESETS, Parity

pytestmark = pytest.mark.usefixtures("lenient")


def test_facts_of_the_task():
    task = Parity()
    params = task.init(jax.random.key(0))
    shapes = {"hidden": {"kernel": (40, 256), "bias": (256,)}, "out": {"kernel": (256, 1), "bias": (1,)}}
    assert jax.tree.map(jnp.shape, params) == shapes
    for layer, fan_in in (("hidden", 40), ("out", 256)):
        for leaf in params[layer].values():
            assert jnp.abs(leaf).max() <= fan_in**-0.5
        assert jnp.std(params[layer]["kernel"]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    data = task.split({}, jax.random.key(1))
    batches = task.batches(data, jax.random.key(2))
    assert batches["index"].shape == (50, 64) == batches["weight"].shape
    assert set(np.unique(batches["index"])) <= set(range(1000))
    assert (batches["weight"] == 1).all()
    validation = task.validation(data)
    assert validation["weight"].sum() == 2000
    shown = validation["index"][validation["weight"] > 0]
    np.testing.assert_array_equal(shown, np.arange(1000, 3000))


def test_a_label_is_the_product_of_the_first_k_bits_and_the_seed_draws_the_points():
    one, other = (Parity(n=7, k=4).split({}, jax.random.key(seed)) for seed in (0, 1))
    x = np.asarray(one["x"])
    assert x.shape == (3000, 7)
    assert set(np.unique(x)) == {-1, 1}
    assert abs(x.mean()) < 0.02
    np.testing.assert_array_equal(one["y"], x[:, 0] * x[:, 1] * x[:, 2] * x[:, 3])
    assert not np.array_equal(x, other["x"])


def test_loss_and_accuracy_by_hand():
    task = Parity(n=5, width=8, points=20, fresh_points=10, batch_size=10)
    params, data = task.init(jax.random.key(0)), task.split({}, jax.random.key(1))
    batch = jax.tree.map(lambda leaf: leaf[0], task.validation(data))
    metrics = task.metrics(params, data, batch)
    x, y = (np.asarray(data[name], np.float64)[20:] for name in "xy")
    first, last = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[name]) for name in ("hidden", "out"))
    logit = (np.maximum(x @ first["kernel"] + first["bias"], 0) @ last["kernel"] + last["bias"])[:, 0]
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(-y * logit)), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], np.sign(logit) == y)
    assert 0 < metrics["accuracy"].sum() < 10  # else a constant would pass


def test_more_bits_in_the_product_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"--k must be at most --n \(3\), got 4"):
        Parity(n=3, k=4)


def test_the_quick_start_has_the_same_optimizers():
    params, grads = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.1, 0.2, -0.3])
    pairs = {"adamw": quickstart.ALONE, "ma+adamw": quickstart.FILTERED, "adamw-tuned": quickstart.TUNED}
    for name, label in pairs.items():
        ends = []
        for tx in (make_tx(PRESETS[name].config.hyper), quickstart.METHODS[label]):
            state, p = tx.init(params), params
            for step in range(5):
                updates, state = tx.update(grads * step, state, p)
                p = optax.apply_updates(p, updates)
            ends.append(p)
        np.testing.assert_allclose(*ends, rtol=1e-6)


def test_a_tuned_learning_rate_reaches_95_percent_and_a_small_one_fits_the_training_points_alone():
    configs = [
        PRESETS[name].config.replace(seed=seed, budget=800) for name in ("adamw-tuned", "adamw") for seed in (0, 1)
    ]
    last = {trained.number: trained.rows[-1] for trained in train_all(configs, group_size=4)}
    for number in (0, 1):
        assert last[number]["val_accuracy"] >= 0.95
        assert last[number]["step"] <= 500
    for number in (2, 3):
        assert last[number]["train_accuracy"] > 0.99
        assert last[number]["val_accuracy"] < 0.7
