"""Filters inside the wrappers of optax: masks, accumulation, injection and schedules work by composition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import grokfast_jax as gf

pytestmark = pytest.mark.usefixtures("lenient")  # the optimizers of optax promote dtypes

FILTERS = {
    "ema": gf.grokfast_ema,
    "ma": lambda lamb=5.0: gf.grokfast_ma(3, lamb),
    "lfilter": lambda lamb=1.0: gf.amplify(gf.lfilter([0.1], [1, -0.9]), lamb),
}


@pytest.fixture(params=FILTERS)
def make(request):
    return FILTERS[request.param]


def parameters():
    return {"w": jnp.arange(6.0).reshape(3, 2) / 6, "b": jnp.ones(2)}


def gradients(steps=8, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype), parameters())


def train(tx, grads, params=None):
    """Parameters after each step, and the last state."""
    params = parameters() if params is None else params

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), trajectory = lax.scan(step, (params, tx.init(params)), grads)
    return trajectory, state


def test_chain_before_adamw_under_jit(make):
    grads = gradients()
    trajectory, _ = jax.jit(lambda g: train(optax.chain(make(), optax.adamw(1e-2)), g))(grads)
    tx = make()
    amplified, _ = lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(parameters()), grads)[::-1]
    chex.assert_trees_all_close(trajectory, train(optax.adamw(1e-2), amplified)[0], rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_makes_them_state(make):
    tx = optax.inject_hyperparams(make)(lamb=0.0)
    state = tx.init(parameters())
    g = jax.tree.map(lambda g: g[0], gradients())
    update = jax.jit(tx.update)
    for _ in range(4):
        out, state = update(g, state, parameters())
        chex.assert_trees_all_close(out, g)
    compiled = update._cache_size()
    state.hyperparams["lamb"] += 2.0
    out, state = update(g, state, parameters())
    assert not np.allclose(out["w"], g["w"])
    assert update._cache_size() == compiled


def adamix(alpha, b2):
    return gf.scale_by_filtered_adam(gf.parallel((1.0, gf.ema(0.9, start="debiased")), (alpha, gf.ema(0.99))), b2=b2)


def test_inject_hyperparams_on_every_factory():
    grads = gradients()
    for factory, static, arguments in (
        (gf.grokfast_ema, (), {"alpha": 0.9, "lamb": 3.0}),
        (gf.grokfast_ma, ("window_size",), {"window_size": 3, "lamb": 3.0}),
        (gf.moving_average, ("window_size",), {"window_size": 3}),
        (gf.ema, (), {"alpha": lambda step: jnp.minimum(0.9, step / 10)}),
        (gf.lfilter, (), {"b": (0.1,), "a": (1.0, -0.9)}),
        (adamix, (), {"alpha": lambda step: jnp.minimum(5.0, step / 2), "b2": 0.9}),
        (gf.sosfilt, (), {"sos": np.array([[0.1, 0.0, 0.0, 1.0, -0.9, 0.0]])}),
    ):
        injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
        chex.assert_trees_all_close(
            jax.jit(lambda g, tx=injected: train(tx, g)[0])(grads), train(factory(**arguments), grads)[0], rtol=1e-5
        )


def test_window_size_under_inject_hyperparams_names_the_cure():
    tx = optax.inject_hyperparams(gf.grokfast_ma)(window_size=3)
    with pytest.raises(TypeError, match=r'window_size must .*static_args=\("window_size",\)'):
        tx.init(parameters())


def test_masked_leaves_the_rest_alone(make):
    grads = gradients()
    masked, state = train(optax.masked(make(), {"w": True, "b": False}), grads)
    chex.assert_trees_all_close(masked["w"], train(make(), grads)[0]["w"])
    chex.assert_trees_all_close(masked["b"], train(optax.identity(), grads)[0]["b"])
    assert not any(leaf.shape[-1:] == (2,) and leaf.ndim == 1 for leaf in jax.tree.leaves(state))


def test_multi_transform_filters_one_group(make):
    grads = gradients()
    tx = optax.multi_transform(
        {"filtered": optax.chain(make(), optax.adam(1e-2)), "plain": optax.adam(1e-2)}, {"w": "filtered", "b": "plain"}
    )
    trajectory, _ = train(tx, grads)
    chex.assert_trees_all_close(trajectory["w"], train(optax.chain(make(), optax.adam(1e-2)), grads)[0]["w"], rtol=1e-5)
    chex.assert_trees_all_close(trajectory["b"], train(optax.adam(1e-2), grads)[0]["b"], rtol=1e-5)


def test_multi_steps_around_the_chain_filters_the_accumulated_gradient(make):
    grads = gradients(8)
    tx = optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), every_k_schedule=2)
    trajectory, _ = train(tx, grads)
    pairs = jax.tree.map(lambda g: g.reshape(4, 2, *g.shape[1:]).mean(axis=1), grads)
    expected, _ = train(optax.chain(make(), optax.sgd(0.1)), pairs)
    chex.assert_trees_all_close(jax.tree.map(lambda p: p[1::2], trajectory), expected, rtol=1e-5, atol=1e-6)


def test_apply_if_finite_keeps_the_average_from_a_bad_step(make):
    grads = gradients(8)
    bad = jax.tree.map(lambda g: g.at[3].set(jnp.nan), grads)
    tx = optax.apply_if_finite(optax.chain(make(), optax.adamw(1e-2)), max_consecutive_errors=3)
    trajectory, state = train(tx, bad)
    assert state.total_notfinite == 1
    good = jax.tree.map(lambda g: jnp.delete(g, 3, axis=0), grads)
    expected, inner = train(optax.chain(make(), optax.adamw(1e-2)), good)
    chex.assert_trees_all_close(jax.tree.map(lambda p: jnp.delete(p, 3, axis=0), trajectory), expected, rtol=1e-5)
    chex.assert_trees_all_close(state.inner_state[0], inner[0], rtol=1e-5, atol=1e-6)


def test_coupled_weight_decay_as_in_the_paper():
    """PyTorch's Adam(weight_decay=...) adds the decay to its input, here the filtered gradient."""
    grads = gradients()
    tx = optax.chain(
        gf.grokfast_ema(0.9, 2.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_adam(0.9, 0.98),
        optax.scale_by_learning_rate(1e-2),
    )
    p, g = np.array(parameters()["b"], np.float64), np.asarray(grads["b"], np.float64)
    mu, m, v = g[0], 0.0, 0.0
    for t in range(1, len(g) + 1):
        mu = g[0] if t == 1 else 0.9 * mu + 0.1 * g[t - 1]
        d = g[t - 1] + 2 * mu + 0.1 * p
        m, v = 0.9 * m + 0.1 * d, 0.98 * v + 0.02 * d**2
        p = p - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
    np.testing.assert_allclose(train(tx, grads)[0]["b"][-1], p, rtol=1e-5)


def test_hyperparameters_vmap():
    grads = gradients()
    run = lambda alpha, lamb: train(gf.grokfast_ema(alpha, lamb), grads)[0]
    many = jax.jit(jax.vmap(run))(jnp.array([0.5, 0.9]), jnp.array([1.0, 4.0]))
    for i, (alpha, lamb) in enumerate([(0.5, 1.0), (0.9, 4.0)]):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], many), run(alpha, lamb), rtol=1e-5)


def test_a_filter_of_optax_can_be_amplified():
    grads = gradients()
    chex.assert_trees_all_close(
        train(gf.amplify(optax.ema(0.9), 2.0), grads)[0],
        train(gf.grokfast_ema(0.9, 2.0, start="debiased"), grads)[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_extra_arguments_reach_the_filter():
    def update(updates, state, params=None, *, gain, **_):
        return jax.tree.map(lambda u: gain * u, updates), state

    lowpass = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = gf.amplify(lowpass, 2.0)
    out, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), gain=3.0, unknown=None)
    np.testing.assert_array_equal(out, 7.0)


@pytest.mark.parametrize("tx", [gf.grokfast_ema(), gf.grokfast_ma(3), gf.amplify(gf.lfilter([0.5, 0.5]), 1.0)])
def test_tree_get_finds_every_field_of_our_states(tx):
    state = tx.init(jnp.zeros(2))
    chained = optax.chain(tx, optax.scale_by_adam()).init(jnp.zeros(2))
    for part in (state, state.lowpass):
        for field in part._fields:
            chex.assert_trees_all_equal(optax.tree_utils.tree_get(chained, field), getattr(part, field))


def test_tree_get_finds_our_state_in_a_chain():
    tx = optax.chain(gf.grokfast_ema(), optax.scale_by_adam())
    state = tx.init(parameters())
    assert optax.tree_utils.tree_get(state, "count") == 0
    chex.assert_trees_all_equal(optax.tree_utils.tree_get(state, "slow"), jax.tree.map(jnp.zeros_like, parameters()))
