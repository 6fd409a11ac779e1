"""The filters against the authors' code and against independent implementations in NumPy and SciPy."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import grokfast_jax as gf

VECTORS = json.loads((Path(__file__).parent / "reference" / "recurrence_vectors.json").read_text())


def run(tx, grads):
    """Return the outputs of `tx` for gradients with a leading axis of steps, from one scan."""

    def step(state, g):
        out, state = tx.update(g, state)
        return state, out

    return lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], grads)), grads)[1]


@pytest.mark.parametrize("row", VECTORS, ids=lambda row: f"{row['filter']} {row['args']}")
def test_recurrence_equals_the_authors_code(row, x64):
    tx = {"ema": gf.grokfast_ema, "ma": gf.grokfast_ma}[row["filter"]](**row["args"])
    grads, expected = (
        [np.array([step[leaf] for step in row[key]]) for leaf in range(len(row[key][0]))]
        for key in ("gradients", "filtered")
    )
    outs = run(tx, [jnp.asarray(g) for g in grads])
    assert len(outs) == len(expected) == 2
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)


def windowed(grads, window_size, stride=1, warmup=True, reduce="mean"):
    """Return the moving average by its definition, over the last window_size // stride slots, in float64."""
    outs = []
    for step in range(len(grads)):
        first = (step // stride + 1) * stride - window_size
        held = grads[max(first, 0) : step + 1]
        total = held.sum(axis=0) if reduce == "sum" else held.mean(axis=0)
        outs.append(np.zeros_like(total) if warmup and step + 1 < window_size else total)
    return np.array(outs)


dtypes = st.sampled_from(["float64", "float32", "bfloat16", "complex64"])
trees = st.recursive(
    st.tuples(st.lists(st.integers(1, 3), max_size=2).map(tuple), dtypes),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from("ab"), children, max_size=2),
    max_leaves=3,
)
is_leaf = lambda x: isinstance(x, tuple)


@given(
    tree=trees,
    slots=st.integers(1, 6),
    stride=st.integers(1, 3),
    steps=st.integers(1, 25),
    warmup=st.booleans(),
    reduce=st.sampled_from(["mean", "sum"]),
    axis=st.sampled_from([None, 0, -1]),
    seed=st.integers(0, 999),
)
def test_moving_average_equals_its_definition(tree, slots, stride, steps, warmup, reduce, axis, seed):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        shape, dtype = leaf
        g = rng.normal(size=(steps, *shape))
        return jnp.asarray(g + 1j * rng.normal(size=g.shape) if dtype == "complex64" else g, dtype)

    with jax.enable_x64(True):
        grads = jax.tree.map(draw, [tree, ((2,), "float32")], is_leaf=is_leaf)
        tx = gf.moving_average(
            slots * stride, stride=stride, warmup=warmup, reduce=reduce, buffer_dtype=None, window_axis=axis
        )
        outs = run(tx, grads)

    def check(out, g):
        assert out.dtype == g.dtype
        tolerance = {"float64": 1e-12, "float32": 1e-5, "complex64": 1e-5, "bfloat16": 8e-3}[g.dtype.name]
        exact = np.asarray(g, np.complex128 if g.dtype == jnp.complex64 else np.float64)
        want = windowed(exact, slots * stride, stride, warmup, reduce)
        np.testing.assert_allclose(np.asarray(out, want.dtype), want, rtol=tolerance, atol=5 * tolerance)

    jax.tree.map(check, outs, grads)


@functools.partial(jax.jit, static_argnames="start")
def run_ema(alpha, lamb, g, start):
    return run(gf.grokfast_ema(alpha, lamb, start=start), g)


@given(
    alpha=st.floats(0, 0.999),
    lamb=st.floats(-10, 10),
    start=st.sampled_from(["gradient", "zero", "debiased"]),
    seed=st.integers(0, 999),
)
def test_ema_equals_its_definition(alpha, lamb, start, seed):
    g = np.random.default_rng(seed).normal(size=(30, 2))
    mu = np.zeros(2)
    want = []
    for step, gradient in enumerate(g):
        mu = gradient if start == "gradient" and step == 0 else alpha * mu + (1 - alpha) * gradient
        want.append(gradient + lamb * (mu / (1 - alpha ** (step + 1)) if start == "debiased" else mu))
    with jax.enable_x64(True):
        np.testing.assert_allclose(run_ema(alpha, lamb, jnp.asarray(g), start), want, atol=1e-11)


def test_debiased_ema_equals_that_of_optax(lenient):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    np.testing.assert_allclose(run(gf.ema(0.98, start="debiased"), g), run(optax.ema(0.98), g), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        run(gf.ema(0.98, start="zero"), g), run(optax.ema(0.98, debias=False), g), rtol=2e-6, atol=1e-6
    )


DESIGNS = {
    "butterworth": scipy.signal.butter(3, 0.2),
    "bessel": scipy.signal.bessel(2, 0.1),
    "fir": (scipy.signal.firwin(9, 0.2), (1.0,)),
    "all-pole": ([0.25], [2.0, -1.0, 0.2]),
    "gain": ([3.0], [2.0]),
}


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("start", ["zero", "gradient"])
def test_lfilter_equals_scipy(name, start, x64):
    b, a = DESIGNS[name]
    g = np.random.default_rng(0).normal(size=(60, 2))
    order = max(len(b), len(a)) - 1
    zi = np.zeros((order, 2))
    if start == "gradient" and order:
        zi = scipy.signal.lfilter_zi(b, a)[:, None] * g[0]
    want = scipy.signal.lfilter(b, a, g, axis=0, zi=zi)[0]
    np.testing.assert_allclose(run(gf.lfilter(b, a, start=start), jnp.asarray(g)), want, atol=1e-12)


@pytest.mark.parametrize("coefficients", [[1.0, -1.0], [1.0, -2.0, 1.0], [1.0, -1.5, 0.5]])
def test_lfilter_accepts_integrators(coefficients):
    g = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
    want = scipy.signal.lfilter([1.0], coefficients, g.astype(np.float64), axis=0)
    # An integrator also sums the 500 rounding errors of 6e-8, and a second integrator sums these sums.
    np.testing.assert_allclose(
        run(gf.lfilter([1.0], coefficients), jnp.asarray(g)), want, atol=2e-4 * np.abs(want).max()
    )


def test_lfilter_accepts_traced_coefficients():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(30, 2)), jnp.float32)
    b, a = jnp.array([0.1, 0.2]), jnp.array([2.0, -1.0, 0.25])
    for start in ("zero", "gradient"):
        traced = jax.jit(lambda b, a, start=start: run(gf.lfilter(b, a, start=start), g))(b, a)
        np.testing.assert_allclose(traced, run(gf.lfilter(b, a, start=start), g), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.98])
def test_ema_from_zero_is_a_first_order_lfilter(alpha, x64):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)))
    np.testing.assert_allclose(
        run(gf.ema(alpha, start="zero"), g), run(gf.lfilter([1 - alpha], [1, -alpha]), g), atol=1e-14
    )


@pytest.mark.parametrize("warmup", [True, False])
def test_moving_average_without_stride_is_a_fir_lfilter_once_full(warmup, x64):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)))
    slow, fir = run(gf.moving_average(7, warmup=warmup), g), run(gf.lfilter([1 / 7] * 7), g)
    np.testing.assert_allclose(slow[6:], fir[6:], atol=1e-14)


@pytest.mark.parametrize(
    "tx",
    [
        gf.amplify(gf.ema(0.9), 0.0),
        gf.amplify(gf.moving_average(5), 0),
        gf.ema(0.0),
        gf.moving_average(1),
        gf.lfilter([1.0]),
        gf.amplify(optax.identity(), 3.0, normalize=True),
    ],
    ids=["lamb 0 ema", "lamb 0 ma", "alpha 0", "window 1", "gain 1", "normalize"],
)
def test_trivial_filters_are_the_identity(tx):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)) * 10.0 ** np.arange(20, 0, -1)[:, None], jnp.float32)
    np.testing.assert_array_max_ulp(np.asarray(run(tx, g)), np.asarray(g), maxulp=1)


def test_a_constant_gradient_is_its_own_slow_part():
    g = jnp.full((2000, 2), 0.7, jnp.float32)
    filters = [gf.ema(alpha) for alpha in (0.5, 0.98, 0.9999)] + [
        gf.moving_average(100),
        gf.moving_average(100, stride=10),
        gf.lfilter(*scipy.signal.butter(2, 0.05), start="gradient"),
    ]
    for tx in filters:
        np.testing.assert_allclose(run(tx, g)[-1], g[-1], rtol=2e-6)
        np.testing.assert_allclose(run(gf.amplify(tx, 5.0, normalize=True), g)[-1], g[-1], rtol=2e-6)


def test_bfloat16_gradients_keep_a_slow_average_moving():
    # A bfloat16 accumulator stops moving: its resolution of 2^-8 is coarser than 1 - alpha.
    g = jnp.concatenate([jnp.zeros((1, 1), jnp.bfloat16), jnp.ones((8_000, 1), jnp.bfloat16)])
    assert run(gf.ema(0.999), g)[-1] == 1
    assert run(gf.ema(0.999, accumulator_dtype=jnp.bfloat16), g)[-1] < 0.7


def test_a_schedule_sees_the_number_of_earlier_updates():
    g = jnp.ones((4, 1))
    np.testing.assert_array_equal(run(gf.amplify(optax.identity(), lambda step: step), g)[:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(run(gf.amplify(optax.identity(), 0.0, fast=lambda n: n), g)[:, 0], [0, 1, 2, 3])
    alpha = lambda step: jnp.where(step < 2, 0.0, 0.5)
    slow = run(gf.ema(alpha, start="zero"), jnp.array([4.0, 2.0, 0.0, 0.0]))
    np.testing.assert_array_equal(slow, [4, 2, 1, 0.5])


def test_two_stages_collect_from_the_first_step_on():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)
    one = run(gf.grokfast_ma(3, 5.0), g)
    two = run(gf.grokfast_ma(3, lambda step: jnp.where(step < 6, 0.0, 5.0)), g)
    np.testing.assert_array_equal(two[:6], g[:6])
    np.testing.assert_allclose(two[6:], one[6:], rtol=1e-6)


@pytest.mark.parametrize("stride", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_moving_average_does_not_drift(stride):
    """Take a million float32 steps while the gradients shrink by a factor of a million.

    The relative error of the last slow part is about 1e-7. A plain running sum, which only adds new gradients and
    subtracts expired ones, ends with a relative error of 2.4 on the same gradients.
    """
    steps, window = 1_000_000, 100
    scale = 10.0 ** (-6 * np.arange(steps) / steps)
    grads = (scale[:, None] * np.random.default_rng(0).uniform(0.5, 1.5, size=(steps, 4))).astype(np.float32)
    tx = gf.moving_average(window, stride=stride)

    def step(carry, g):
        out, state = tx.update(g, carry[0])
        return (state, out), None

    last = jax.jit(lambda g: lax.scan(step, (tx.init(g[0]), g[0]), g)[0][1])(grads)
    np.testing.assert_allclose(last, grads[-window:].astype(np.float64).mean(axis=0), rtol=1e-5)


def test_moving_average_forgets_non_finite_gradients_after_two_windows():
    g = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    g[9] = np.inf
    slow = run(gf.moving_average(5), jnp.asarray(g))
    assert not np.isfinite(slow[9]).any()
    np.testing.assert_allclose(slow[19:], windowed(g[10:].astype(np.float64), 5)[9:], atol=1e-6)


@pytest.mark.parametrize(("stride", "limit"), [(1, 1.01), (5, 1.4)])
def test_a_spike_leaves_a_rounding_error_for_one_window(stride, limit):
    """At most w + 1 roundings at the size of the spike reach the sum, each at most eps / 2; strides add a few."""
    size, window, steps, columns = 1e7, 100, 500, 100
    g = np.random.default_rng(0).normal(size=(steps, columns)).astype(np.float32)
    spikes = 100 + 2 * np.arange(columns)
    g[spikes, np.arange(columns)] = size
    slow = np.asarray(run(gf.moving_average(window, stride=stride), jnp.asarray(g)), np.float64)
    error = abs(slow - windowed(g.astype(np.float64), window, stride))
    since = np.arange(steps)[:, None] - spikes  # steps since the spike
    bound = limit * np.finfo(np.float32).eps / 2 * size
    off = error[(since >= window) & (since < 2 * window + stride)]
    assert off.max() < bound
    assert np.median(off) < bound / 20
    assert error[since >= 2 * window + stride].max() < 1e-5


def nan_after(steps, length=8):
    return jnp.where(jnp.arange(length)[:, None] == steps, jnp.array([jnp.nan, jnp.inf]), jnp.ones((length, 2)))


def test_a_weight_of_0_keeps_non_finite_values_out():
    """A two-stage run survives a bad step before the filter is switched on."""
    g = nan_after(2)
    lamb = lambda step: jnp.where(step < 6, 0.0, 5.0)
    out = run(gf.amplify(gf.ema(0.9), lamb), g)
    np.testing.assert_array_equal(out[:6], g[:6])
    assert not np.isfinite(out[6:]).any()
    np.testing.assert_array_equal(run(gf.amplify(gf.ema(0.9), 0.0), g), g)
    # With fast=0 the non-finite gradient itself stays out, and later leaves the window.
    out = run(gf.amplify(gf.moving_average(2, warmup=False), 3.0, fast=0.0), g)
    assert np.isfinite(out).all(axis=1).tolist() == [True, True, False, False, False, True, True, True]
    np.testing.assert_array_equal(run(gf.parallel((0.0, gf.ema(0.9)), (2.0, optax.identity())), g), 2 * g)
    np.testing.assert_array_equal(run(gf.parallel((0.0, gf.ema(0.9))), g.astype(jnp.complex64)), jnp.zeros_like(g))


RESET = [0.9, 0.9, 0.9, 0.0, 0.9, 1.0, 0.9, 0.9]


@pytest.mark.parametrize("start", ["gradient", "zero", "debiased"])
def test_an_alpha_of_exactly_0_or_1_keeps_non_finite_values_out(start):
    g = nan_after(2)
    out = run(gf.ema(0.0, start=start), g)
    np.testing.assert_array_equal(out, g)
    np.testing.assert_array_equal(jax.jit(lambda alpha: run(gf.ema(alpha, start=start), g))(0.0), g)
    out = run(gf.ema(lambda step: jnp.array(RESET)[step], start=start), g)
    assert np.isfinite(out).all(axis=1).tolist() == [True, True, False, True, True, True, True, True]
    np.testing.assert_allclose(out[3:], g[3:])
    out = run(gf.ema(lambda step: jnp.array(RESET)[step], start=start), nan_after(5))
    np.testing.assert_array_equal(out[5], out[4])
    assert np.isfinite(out).all()


def test_a_b2_of_0_discards_non_finite_squares():
    for b2 in (0.0, optax.constant_schedule(0.0)):
        out = run(gf.scale_by_filtered_adam(optax.identity(), b2=b2, eps=0.0), nan_after(2))
        np.testing.assert_array_equal(out[3:], 1.0)


def test_a_debiased_average_starts_when_its_alpha_falls_below_1():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)), jnp.float32)
    out = run(gf.ema(lambda step: jnp.where(step < 3, 1.0, 0.9), start="debiased"), g)
    np.testing.assert_array_equal(out[:3], g[:3])  # as for every alpha below 1 at its first gradient
    np.testing.assert_allclose(out[3:], run(gf.ema(0.9, start="debiased"), g[3:]), rtol=1e-6)


def test_weights_of_0_have_derivatives_and_vmap():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    last = lambda lamb, fast, g: run(gf.amplify(gf.ema(0.5), lamb, fast=fast), g)[-1].sum()
    by_lamb, by_fast, by_g = jax.grad(last, argnums=(0, 1, 2))(0.0, 0.0, g)
    np.testing.assert_allclose(by_lamb, run(gf.ema(0.5), g)[-1].sum(), rtol=1e-6)
    np.testing.assert_allclose(by_fast, g[-1].sum(), rtol=1e-6)
    np.testing.assert_array_equal(by_g, jnp.zeros_like(g))
    by_g = jax.grad(last, argnums=2)(0.0, 1.0, nan_after(2))
    np.testing.assert_array_equal(by_g[-1], 1.0)
    assert np.isfinite(by_g).all()
    many = jax.vmap(lambda lamb: run(gf.amplify(gf.ema(0.5), lamb), nan_after(2))[-1])(jnp.array([0.0, 1.0]))
    assert np.isfinite(many).all(axis=1).tolist() == [True, False]


LOWPASSES = {"ema": gf.ema(0.9), "moving_average": gf.moving_average(4)}


@functools.cache
def run_both(lowpass, normalize):
    """Return a function that runs `amplify` and `parallel` with traced weights: all examples share one program."""

    def both(fast, lamb, weight, weight_of_slow, g):
        amplified = gf.amplify(LOWPASSES[lowpass], lamb, fast=fast, normalize=normalize)
        summed = gf.parallel((weight, optax.identity()), (weight_of_slow, LOWPASSES[lowpass]))
        return run(amplified, g), run(summed, g)

    return jax.jit(both)


@given(
    fast=st.floats(-5, 5, width=32), lamb=st.floats(-5, 5, width=32), normalize=st.booleans(), seed=st.integers(0, 999)
)
def test_amplify_is_parallel(fast, lamb, normalize, seed):
    total = np.float32(fast) + np.float32(lamb)
    if normalize and abs(total) < 0.1:
        normalize = False
    weights = (fast / total, lamb / total) if normalize else (fast, lamb)
    g = jnp.asarray(np.random.default_rng(seed).normal(size=(10, 3)), jnp.float32)
    for lowpass in LOWPASSES:
        amplified, summed = run_both(lowpass, normalize)(fast, lamb, *weights, g)
        np.testing.assert_allclose(amplified, summed, rtol=2e-6, atol=2e-6)
        if not normalize:
            np.testing.assert_array_equal(amplified, summed)


def test_a_finite_impulse_response_forgets_non_finite_gradients():
    g = np.ones((8, 1), np.float32)
    g[2] = np.inf
    b = [0.5, 0.25, 0.25]
    np.testing.assert_array_equal(run(gf.lfilter(b), jnp.asarray(g))[:, 0], scipy.signal.lfilter(b, 1, g[:, 0]))


def test_saturated_counters_do_not_stop_the_filter():
    """The ring still turns, and the average still moves, when an int32 counter has reached its end."""
    end = jnp.array(jnp.iinfo(jnp.int32).max)
    g = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)), jnp.float32)
    ma = gf.moving_average(5)
    state, update = ma.init(g[0]), jax.jit(ma.update)
    for step in range(300):
        assert int(state.fill) == min(step, 5)
        assert [int(place) for place in state.position.values()] == [step % 6]
        _, state = update(g[0], state)
    tx = gf.grokfast_ema(0.5, lambda step: jnp.where(step > 0, 1.0, 0.0))
    state = tx.init(g[0])
    state = state._replace(amplify_step=end, lowpass=state.lowpass._replace(ema_step=end))
    for gradient in g:
        mu = state.lowpass.slow
        out, state = tx.update(gradient, state)
        assert state.amplify_step == state.lowpass.ema_step == end
        np.testing.assert_allclose(out, gradient + 0.5 * mu + 0.5 * gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e5m2"])
def test_narrow_ring_rounds_once_and_does_not_drift(dtype):
    g = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    slow = run(gf.moving_average(10, buffer_dtype=dtype), jnp.asarray(g))
    rounded = np.asarray(jnp.asarray(g).astype(dtype), np.float64)
    np.testing.assert_allclose(slow[-20:], windowed(rounded[-30:], 10)[-20:], atol=1e-6)


def test_moving_average_is_updated_in_place(lenient, usual_options):
    """No copy of the ring or of a sum: a donated update needs less temporary memory than a hundredth of one array."""
    params = jax.ShapeDtypeStruct((4_000_000,), jnp.float32)
    tx = optax.chain(gf.grokfast_ma(100), optax.adamw(1e-3))
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
    memory = update.compile(usual_options).memory_analysis()
    array = 4_000_000 * 4
    assert memory.alias_size_in_bytes >= (101 + 2 + 2) * array
    assert memory.temp_size_in_bytes < 0.01 * array


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asserts the bytes that XLA's CPU compiler moves")
@pytest.mark.parametrize(
    "dtype", [None, "bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float8_e4m3fn"))]
)
def test_the_cost_of_a_step_does_not_depend_on_the_window(dtype, lenient, usual_options):
    """A donated update moves the same number of bytes with windows of 5 and of 500, also with a narrow ring."""

    def moved(window_size):
        params = jax.ShapeDtypeStruct((10_000,), jnp.float32)
        tx = gf.moving_average(window_size, buffer_dtype=dtype)
        update = jax.jit(tx.update, donate_argnums=1).lower(params, jax.eval_shape(tx.init, params))
        return update.compile(usual_options).cost_analysis()["bytes accessed"]

    assert moved(500) == pytest.approx(moved(5), rel=0.01)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asserts the bytes that XLA's CPU compiler moves")
def test_a_filter_in_adams_first_moment_moves_what_adam_moves(lenient, usual_options):
    """In the first moment, an EMA costs what AdamW costs, and gradient + EMA what NAdamW costs."""

    def moved(*transformations):
        tx = optax.chain(*transformations, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))
        params = jax.ShapeDtypeStruct((100_000,), jnp.float32)
        step = lambda params, state, grads: optax.apply_updates(params, tx.update(grads, state, params)[0])
        update = lambda params, state, grads: (step(params, state, grads), tx.update(grads, state, params)[1])
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params)
        return lowered.compile(usual_options).cost_analysis()["bytes accessed"]

    kernel = gf.parallel((1.0, optax.identity()), (2.0, gf.ema(0.98)))
    adam, nadam = moved(optax.scale_by_adam()), moved(optax.scale_by_adam(nesterov=True))
    assert moved(gf.scale_by_filtered_adam(gf.ema(0.9))) <= 1.01 * adam
    assert moved(gf.scale_by_filtered_adam(kernel)) <= 1.01 * nadam
    assert moved(gf.grokfast_ema(), optax.scale_by_adam()) > 1.2 * nadam


def test_vmapped_training_slices_the_ring(usual_options):
    """With `init` inside the vmapped function the position is not batched, and writes to the ring are not scatters."""
    run_all = jax.vmap(lambda g, lamb: run(gf.grokfast_ma(4, lamb), g))
    compiled = jax.jit(run_all).lower(jnp.zeros((3, 10, 2)), jnp.zeros(3)).compile(usual_options).as_text()
    assert "dynamic-update-slice(" in compiled
    assert "scatter(" not in compiled
    assert "gather(" not in compiled
