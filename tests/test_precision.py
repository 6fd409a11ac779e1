"""Narrow parameters and gradients: the averages stay wide, and an overflow does not reach them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from jax import lax
from scipy.signal import butter

import grokfast_jax as gf

FILTERS = {
    "ema": gf.grokfast_ema(0.98, 2.0),
    "ma": gf.grokfast_ma(8, 5.0, stride=4),
}


@pytest.fixture(params=FILTERS)
def tx(request):
    return FILTERS[request.param]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_are_averaged_as_wide_ones(dtype, tx):
    """State and output are, bit for bit, those of a filter which is given the same numbers in float32, the output being
    rounded to the dtype of the gradients once."""
    grads = jnp.asarray(1 + 0.01 * np.random.default_rng(0).normal(size=(60, 3)), dtype)
    run = lambda grads: lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(grads[0]), grads)
    state, out = jax.jit(run)(grads)
    wide_state, wide_out = jax.jit(run)(grads.astype(jnp.float32))
    chex.assert_trees_all_equal(state, wide_state)
    chex.assert_trees_all_equal(out, wide_out.astype(dtype))


@pytest.mark.parametrize(
    ("tx", "g", "expected"),
    [
        (gf.grokfast_ma(100, 0.01, filter_type="sum"), 1000.0, 2000.0),  # the sum of the window is 100,000
        (gf.amplify(gf.sosfilt(butter(6, 0.02, output="sos")), 1.0), 0.01, 0.02),
        (gf.amplify(optax.ema(0.5, debias=False), 1000.0), 2.0**-24, 1001 * 2.0**-24),
    ],
)
def test_slow_parts_beyond_the_range_of_float16_are_amplified(tx, g, expected, lenient):
    grads = jnp.full(1000, g, jnp.float16)
    out = jax.jit(lambda grads: lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(grads[0]), grads)[1])(
        grads
    )
    np.testing.assert_allclose(out[-1].astype(float), expected, rtol=2e-3)


def test_integers_are_rounded_once():
    tx = gf.grokfast_ema(0.5, 2.0)
    state = tx.init(jnp.array(0))
    for g, expected in ((3, 9), (4, 11), (8, 19)):  # the last is 19.5
        out, state = tx.update(jnp.array(g), state)
        assert out == expected
        assert out.dtype == jnp.int32


def test_injected_hyperparameters_are_not_rounded_to_narrow_parameters(lenient):
    """optax gives injected numbers the dtype of the first parameter, in which 0.999 is 1: refused, and told how to."""
    params, g = jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    make = optax.inject_hyperparams(gf.grokfast_ema)
    for init in (make(alpha=0.999).init, jax.jit(make(alpha=0.999).init)):
        with pytest.raises(
            TypeError, match=r"alpha must have a dtype of at least 32 bits.*hyperparam_dtype=jnp.float32"
        ):
            init(params)
    tx = optax.inject_hyperparams(gf.grokfast_ema, hyperparam_dtype=jnp.float32)(alpha=0.999)
    state = jax.jit(tx.init)(params)
    for gradient in (0 * g, g, g):
        _, state = jax.jit(tx.update)(gradient, state)
    np.testing.assert_allclose(state.inner_state.lowpass.slow, 1 - 0.999**2, rtol=1e-3)


def test_bfloat16_training_accumulates_in_float32(tx, lenient):
    """bfloat16 parameters under AdamW: dtypes stay, and the average is that of the gradients that were there."""
    chain = optax.chain(tx, optax.adamw(1e-2, mu_dtype=jnp.float32))
    target = jnp.asarray(np.random.default_rng(0).normal(size=(4,)), jnp.bfloat16)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum((p - target) ** 2))(params)
        updates, state = chain.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), grads

    params = jnp.zeros(4, jnp.bfloat16)
    state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, chain.init(params))
    (params, state), grads = jax.jit(lambda carry: lax.scan(step, carry, length=60))((params, state))
    assert params.dtype == grads.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0]) if leaf.ndim} == {"float32"}
    expected, _ = lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(params), grads)
    chex.assert_trees_all_close(state[0], expected, rtol=1e-5, atol=1e-6)


def test_an_overflow_in_float16_leaves_the_filter_untouched(tx, lenient):
    """Dynamic loss scaling: steps that overflow change nothing but the scale; the others are those of float32."""
    chain = optax.apply_if_finite(optax.chain(tx, optax.adamw(1e-3)), max_consecutive_errors=1_000_000)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 5)), jnp.float16)

    def loss(params, x):
        return (params.astype(jnp.float16) @ x) ** 2

    @jax.jit
    def step(params, state, scale, x):
        scale, finite, _, grads = scale.value_and_grad(loss)(params, x)
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state, scale, finite, grads

    params, scale = jnp.ones(5), DynamicScale(scale=jnp.float32(2.0**20), growth_interval=6)
    state = chain.init(params)
    kept, skipped = [], 0
    for x_t in x:
        before = params, state.inner_state
        params, state, scale, finite, grads = step(params, state, scale, x_t)
        if finite:
            kept.append(grads)
        else:
            skipped += 1
            chex.assert_trees_all_equal((params, state.inner_state), before)
    assert skipped == state.total_notfinite
    assert 3 < skipped < 20
    expected, _ = lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(params), jnp.stack(kept))
    chex.assert_trees_all_close(state.inner_state[0], expected, rtol=1e-5, atol=1e-5)


def test_without_the_guard_an_overflow_stays_in_an_average():
    """Why the guard goes around the whole chain: inside it, the filter has taken the overflow already."""
    guarded_too_late = optax.chain(gf.grokfast_ema(), optax.apply_if_finite(optax.sgd(1.0), 10))
    state = guarded_too_late.init(jnp.ones(2))
    for g in (1.0, jnp.inf, 1.0):
        updates, state = guarded_too_late.update(jnp.full(2, g), state)
    assert not np.isfinite(state[0].lowpass.slow).any()
    assert not updates.any()
