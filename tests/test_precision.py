"""Narrow parameters and gradients: averages stay wide, and an overflow does not reach them."""

import re

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
    """The state equals, bit for bit, the state for the same gradients in float32; the output is rounded once."""
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
    for g, expected in ((3, 9), (4, 11), (8, 20)):  # the last is 19.5
        out, state = tx.update(jnp.array(g), state)
        assert out == expected
        assert out.dtype == jnp.int32


NARROWED = {
    "alpha": (gf.grokfast_ema, {"alpha": 0.999}),
    "lamb": (gf.grokfast_ema, {"alpha": jnp.float32(0.9), "lamb": 0.1}),
    "fast": (lambda fast: gf.amplify(gf.ema(0.9), 2.0, fast=fast), {"fast": 0.1}),
    "scheduled lamb": (lambda lamb: gf.amplify(gf.ema(0.9), lamb), {"lamb": optax.constant_schedule(0.1)}),
    "a": (lambda a: gf.lfilter([0.001], a), {"a": np.array([1.0, -0.999])}),
    "b": (gf.lfilter, {"b": np.array([0.1, 0.2])}),
    "sos": (gf.sosfilt, {"sos": butter(2, 0.1, output="sos")}),
    "branches[0][0]": (lambda weight: gf.parallel((weight, gf.ema(0.9))), {"weight": 0.1}),
    "b2": (lambda b2: gf.scale_by_filtered_adam(gf.ema(0.9), b2=b2), {"b2": 0.999}),
    "eps": (lambda eps: gf.scale_by_filtered_adam(gf.ema(0.9), eps=eps), {"eps": 1e-8}),
}


@pytest.mark.parametrize("name", NARROWED)
def test_injected_hyperparameters_are_not_rounded_to_narrow_parameters(name, lenient):
    """optax casts injected numbers to the dtype of the parameters, which rounds 0.999 to 1: an error names the cure."""
    factory, arguments = NARROWED[name]
    params, g = jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    tx = optax.inject_hyperparams(factory)(**arguments)
    name = re.escape(name.removeprefix("scheduled "))
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(
            TypeError, match=rf"(?s)^{name} must have a dtype of at least 32 bits.*hyperparam_dtype=jnp.float32"
        ):
            init(params)
    tx = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(**arguments)
    expected = factory(**arguments)
    state, expected_state = tx.init(params), expected.init(params)
    for gradient in (0 * g, g, g):
        out, state = jax.jit(tx.update)(gradient, state)
        expected_out, expected_state = expected.update(gradient, expected_state)
        np.testing.assert_allclose(out.astype(float), expected_out.astype(float), rtol=1e-2)
    chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (jnp.asarray(0.999, jnp.bfloat16), TypeError, "must have a dtype of at least 32 bits"),
        (
            jnp.full(1, 0.9),
            ValueError,
            r"must be a real scalar at every step, got .*0\.9.*; return one from the schedule",
        ),
        (0.9j, ValueError, r"must be a real scalar at every step, got 0\.9j; return one"),
    ],
)
def test_a_schedule_of_other_than_wide_real_scalars_raises(value, error, message):
    schedule = lambda step: value
    for name, tx in (
        ("alpha", gf.ema(schedule)),
        ("lamb", gf.amplify(gf.ema(0.9), schedule)),
        ("fast", gf.amplify(gf.ema(0.9), 1.0, fast=schedule)),
        (r"branches\[1\]\[0\]", gf.parallel((1.0, gf.ema(0.9)), (schedule, gf.ema(0.9)))),
        ("b2", gf.scale_by_filtered_adam(gf.ema(0.9), b2=schedule)),
    ):
        with pytest.raises(error, match=rf"^{name} {message}"):
            tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def test_bfloat16_training_accumulates_in_float32(tx, lenient):
    """bfloat16 parameters under AdamW: dtypes do not change, and the average is over the gradients that occurred."""
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
    """Dynamic loss scaling: a step that overflows changes only the scale; the other steps equal steps in float32."""
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


def test_an_overflow_stays_in_an_average_without_apply_if_finite():
    """`apply_if_finite` must wrap the whole chain: after the filter, it is too late."""
    guarded_too_late = optax.chain(gf.grokfast_ema(), optax.apply_if_finite(optax.sgd(1.0), 10))
    state = guarded_too_late.init(jnp.ones(2))
    for g in (1.0, jnp.inf, 1.0):
        updates, state = guarded_too_late.update(jnp.full(2, g), state)
    assert not np.isfinite(state[0].lowpass.slow).any()
    assert not updates.any()
