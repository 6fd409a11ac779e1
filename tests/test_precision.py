"""Narrow parameters and gradients: the averages stay wide, and an overflow does not reach them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from jax import lax

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
    """The state is, bit for bit, that of a filter which is given the same numbers in float32; what comes out is rounded
    to the dtype of the gradients twice: the slow part, then the sum."""
    grads = jnp.asarray(1 + 0.01 * np.random.default_rng(0).normal(size=(60, 3)), dtype)
    run = lambda grads: lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(grads[0]), grads)
    state, out = jax.jit(run)(grads)
    wide_state, wide_out = jax.jit(run)(grads.astype(jnp.float32))
    assert out.dtype == dtype
    chex.assert_trees_all_equal(state, wide_state)
    np.testing.assert_allclose(out.astype(float), wide_out, rtol=1.01 * float(jnp.finfo(dtype).eps))


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
