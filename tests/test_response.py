"""Measured responses against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal

import grokfast_jax as gf

K = np.arange(40)
SETTLE = LENGTH = 2_000  # long enough for the filters of the tables; other tests use the longer defaults
BUTTER = scipy.signal.butter(2, 0.3)
SOS = scipy.signal.butter(6, 0.1, output="sos")


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (gf.ema(0.9), 0.1 * 0.9**K),
        (gf.ema(0.9, start="zero"), 0.1 * 0.9**K),
        (gf.ema(0.9, start="debiased"), 0.1 * 0.9**K),
        (gf.moving_average(8), (K < 8) / 8),
        (gf.moving_average(8, reduce="sum"), 1.0 * (K < 8)),
        (gf.grokfast_ema(0.9, 3.0), (K == 0) + 3 * 0.1 * 0.9**K),
        (gf.grokfast_ma(8, 5.0), (K == 0) + 5 / 8 * (K < 8)),
        (gf.grokfast_ma(), (K == 0) + 5 / 100),
        (optax.chain(gf.ema(0.9), gf.ema(0.9)), 0.01 * (K + 1) * 0.9**K),
        (gf.lfilter(*BUTTER), scipy.signal.lfilter(*BUTTER, K == 0)),
        (gf.sosfilt(SOS), scipy.signal.sosfilt(SOS, K == 0)),
        (gf.parallel((2.0, optax.identity()), (3.0, gf.ema(0.9))), 2.0 * (K == 0) + 0.3 * 0.9**K),
        (optax.sgd(0.5), -0.5 * (K == 0)),
        (optax.sgd(0.5, momentum=0.9), -0.5 * 0.9**K),
        (optax.sgd(0.5, momentum=0.9, nesterov=True), -0.5 * ((K == 0) + 0.9 ** (K + 1))),
    ],
)
def test_impulse_response(tx, expected):
    h = gf.impulse_response(tx, len(K), settle=SETTLE)
    assert h.shape == (len(K),)
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(h, expected, atol=1e-6)


def test_settle_shows_the_start():
    np.testing.assert_allclose(gf.impulse_response(gf.ema(0.9), len(K), settle=0), 0.9**K, rtol=1e-5)
    np.testing.assert_allclose(gf.impulse_response(gf.moving_average(8), len(K)), (K < 8) / 8, rtol=1e-6)
    assert gf.impulse_response(gf.moving_average(8), 5, settle=0).sum() == 0  # the window is never full


NESTEROV = gf.parallel((1 - 0.95, optax.identity()), (0.95, gf.ema(0.95, start="debiased")))
B, A = BUTTER


@pytest.mark.parametrize(
    ("tx", "gain", "age"),
    [
        (optax.identity(), 1, 0),
        (gf.ema(0.9), 1, 9),
        (gf.ema(0.98, start="debiased"), 1, 49),
        (gf.moving_average(100), 1, 49.5),
        (gf.moving_average(8, reduce="sum"), 8, 3.5),
        (optax.chain(gf.ema(0.9), gf.moving_average(8)), 1, 9 + 3.5),
        (gf.grokfast_ema(0.98, 2.0), 3, 49 * 2 / 3),
        (gf.grokfast_ma(100, 5.0), 6, 49.5 * 5 / 6),
        (NESTEROV, 1, 0.95 * 19),
        (gf.lfilter(B, A), 1, K[:3] @ A / A.sum() * -1 + K[:3] @ B / B.sum()),
        (gf.sosfilt(SOS), 1, scipy.signal.group_delay(scipy.signal.butter(6, 0.1), [1e-6])[1][0]),
        (optax.sgd(0.5, momentum=0.9), -5, 9),
    ],
)
def test_gain_and_age_equal_their_closed_forms(tx, gain, age):
    np.testing.assert_allclose(gf.dc_gain(tx, LENGTH, settle=SETTLE), gain, rtol=1e-4)
    np.testing.assert_allclose(gf.mean_age(tx, LENGTH, settle=SETTLE), age, rtol=1e-4)


@pytest.mark.parametrize(
    "highpass", [gf.lfilter([1.0, -1.0]), gf.parallel((1.0, optax.identity()), (-1.0, gf.ema(0.9)))]
)
def test_mean_age_is_nan_if_the_gain_is_0(highpass):
    np.testing.assert_allclose(gf.dc_gain(highpass), 0, atol=1e-5)
    assert np.isnan(gf.mean_age(highpass))


SMALL_GAIN = gf.parallel((1.0, optax.identity()), (-0.999, gf.ema(0.9)))  # 0.001, far above rounding


def test_mean_age_at_a_small_gain():
    assert gf.mean_age(SMALL_GAIN) == pytest.approx(-0.999 * 9 / 0.001, rel=1e-3)


@pytest.mark.parametrize(
    ("tx", "limit"),
    [
        (optax.identity(), 2),
        (gf.ema(0.8), 18),
        (gf.ema(0.98, start="debiased"), 198),
        (optax.trace(0.9), 3.8),  # the heavy ball
        (gf.moving_average(2), 2),
        (gf.moving_average(9), 18 * np.sin(np.pi / 18) ** 2),
        (gf.moving_average(100), 200 * np.sin(np.pi / 200) ** 2),
        (gf.moving_average(9, reduce="sum"), 2 * np.sin(np.pi / 18) ** 2),
        (gf.grokfast_ema(0.98, 2.0), 2 / (1 + 2 * 0.02 / 1.98)),  # at the fastest frequency
        (optax.scale(-1.0), 0),
        (gf.lfilter([1.0, -1.0]), 0),
        (gf.parallel((1.0, optax.identity()), (-1.0, gf.ema(0.9))), 0),
        (SMALL_GAIN, 2 / (1 - 0.999 * 0.1 / 1.9)),
    ],
)
def test_stability_limit_equals_its_closed_form(tx, limit):
    assert gf.stability_limit(tx, LENGTH, settle=SETTLE) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize(
    "tx",
    [
        gf.grokfast_ma(20, 3.0),
        gf.grokfast_ma(20, 10.0),
        gf.lfilter(*BUTTER),
        optax.chain(gf.moving_average(3), gf.moving_average(5)),
        gf.parallel((0.3, optax.identity()), (0.7, gf.ema(0.9))),
    ],
)
@pytest.mark.parametrize("decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.02])
def test_descent_converges_up_to_the_stability_limit(tx, decay, x64):
    h = np.asarray(gf.impulse_response(tx, 200, settle=SETTLE))
    limit = float(gf.stability_limit(tx, 200, decay=decay, settle=SETTLE))

    def largest_root(s):
        polynomial = np.concatenate([[1.0], s * h])  # z - 1 + d + s H(z), times a power of z
        polynomial[1] -= 1.0 - decay
        return np.abs(np.roots(polynomial)).max()

    assert largest_root(0.99 * limit) < 1 < largest_root(1.01 * limit)


@pytest.mark.parametrize("length", [1, 4, 100])
def test_stability_limit_of_a_delay_as_long_as_the_response(length):
    delay = gf.lfilter([0.0] * (length - 1) + [1.0])
    limit = gf.stability_limit(delay, length, settle=0)
    assert limit == pytest.approx(2 * np.sin(np.pi / (4 * length - 2)), rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_stability_limit_equals_that_of_a_dense_grid(decay, x64):
    h = np.random.default_rng(0).normal(size=(100, 8)) + 0.3
    of = jax.jit(jax.vmap(lambda h: gf.stability_limit(gf.lfilter(h), 8, decay=decay, settle=0)))
    points = 2**15
    loop = np.fft.rfft(h, points)[:, 1:] / (1 - decay - np.exp(2j * np.pi * np.arange(1, points // 2 + 1) / points))
    left, right = loop[:, :-2], loop[:, 1:-1]
    crossing = (left.real * right.imag - right.real * left.imag) / (right.imag - left.imag)
    crosses = np.signbit(left.imag) != np.signbit(right.imag)
    inverse = np.maximum((crosses * crossing).max(axis=1), loop.real[:, -1])
    gain = h.sum(axis=1)
    want = 1 / np.maximum(inverse, -gain / decay) if decay else (gain > 0) / inverse
    np.testing.assert_allclose(of(h), want, rtol=1e-4)


def test_decay_moves_the_stability_limit():
    assert gf.stability_limit(optax.identity(), decay=0.1) == pytest.approx(1.9, rel=1e-4)
    assert gf.stability_limit(optax.scale(-1.0), decay=0.1) == pytest.approx(0.1, rel=1e-4)
    limit = jax.jit(lambda decay: gf.stability_limit(gf.ema(0.8), 400, decay=decay))
    assert limit(0.1) == pytest.approx(9 * 1.9, rel=1e-4)  # where H = 1 / 9


def test_window_of_the_paper_is_past_the_lamb_that_keeps_it_stable():
    at = lambda lamb: float(gf.stability_limit(gf.grokfast_ma(100, lamb)) * (1 + lamb))
    assert at(4.5) > 2 > 0.2 > at(4.7)  # Re(1 + λ sin(2x) / 2x) stays positive for λ < 4.603
    assert at(5.0) == pytest.approx(0.127, abs=1e-3)


def test_gain_and_age_show_a_response_that_is_cut_off():
    np.testing.assert_allclose(gf.dc_gain(gf.moving_average(8), 4), 0.5, rtol=1e-6)
    np.testing.assert_allclose(gf.mean_age(gf.moving_average(8), 4), 1.5, rtol=1e-6)
    np.testing.assert_allclose(gf.dc_gain(gf.ema(0.5), 50, settle=0), 2, rtol=1e-6)  # the first gradient counts twofold


def test_frequency_response_equals_scipy():
    f = np.linspace(0, 0.5, 50)
    for tx, (b, a) in (
        (gf.ema(0.9), ([0.1], [1, -0.9])),
        (gf.moving_average(8), ([1 / 8] * 8, [1])),
        (gf.lfilter(*BUTTER), BUTTER),
    ):
        frequencies, response = gf.frequency_response(tx, 400, frequencies=f)
        np.testing.assert_allclose(frequencies, f, rtol=1e-6)
        np.testing.assert_allclose(response, scipy.signal.freqz(b, a, 2 * np.pi * f)[1], atol=1e-5)


def test_a_long_response_needs_no_matrix():
    frequencies, response = gf.frequency_response(gf.ema(0.99), 100_000)
    expected = 0.01 / (1 - 0.99 * np.exp(-2j * np.pi * np.asarray(frequencies, np.float64)))
    np.testing.assert_allclose(response, expected, atol=1e-5)


def test_default_frequencies_are_those_of_a_real_fourier_transform():
    for length in (1, 2, 7, 8):
        h = gf.impulse_response(gf.moving_average(2), length, settle=2)
        frequencies, response = gf.frequency_response(gf.moving_average(2), length, settle=2)
        np.testing.assert_allclose(frequencies, np.fft.rfftfreq(length))
        np.testing.assert_allclose(response, np.fft.rfft(h), atol=1e-6)


SGDS = [
    pytest.param(optax.sgd(0.5), marks=pytest.mark.slow, id="plain"),
    pytest.param(optax.sgd(0.5, momentum=0.9), marks=pytest.mark.slow, id="momentum"),
    pytest.param(optax.sgd(0.5, momentum=0.9, nesterov=True), id="nesterov"),
]
LOWPASSES = {
    "ema": gf.ema(0.9, start="zero"),
    "mean": gf.lfilter(np.ones(8) / 8),
    "butterworth": gf.lfilter(*BUTTER),
    "sections": gf.sosfilt(SOS),
}


def filtered_before_and_after(lowpass, optimizer):
    """Return the updates of 60 steps, with the gradients filtered, and with the updates of the optimizer filtered."""
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    rng = np.random.default_rng(0)
    gradients = [{name: jnp.asarray(rng.normal(size=p.shape)) for name, p in params.items()} for _ in range(60)]
    both = []
    for parts in ([gf.amplify(lowpass, 2.0), optimizer], [optimizer, gf.amplify(lowpass, 2.0)]):
        tx = optax.chain(*parts)
        state, updates = tx.init(params), []
        for g in gradients:
            update, state = tx.update(g, state, params)
            updates.append(np.concatenate([np.ravel(x) for x in update.values()]))
        both.append(np.array(updates))
    return both


@pytest.mark.parametrize("lowpass", LOWPASSES.values(), ids=LOWPASSES)
@pytest.mark.parametrize("sgd", SGDS)
def test_filtering_the_gradients_of_sgd_is_filtering_its_updates(lowpass, sgd, x64):
    """Theorem A.1 of the paper: filter and optimizer are linear, invariant in time, and start at rest."""
    before, after = filtered_before_and_after(lowpass, sgd)
    np.testing.assert_allclose(before, after, rtol=1e-12, atol=1e-13)
    assert np.abs(before).max() > 1


@pytest.mark.parametrize("lowpass", LOWPASSES.values(), ids=LOWPASSES)
def test_filtering_the_gradients_of_adam_is_not(lowpass, x64, lenient):
    before, after = filtered_before_and_after(lowpass, optax.adam(0.5))
    assert np.abs(before - after).max() > 0.1


DIFFERENTIABLE = {
    "ema": (gf.ema, 0.8),
    "ema debiased": (lambda alpha: gf.ema(alpha, start="debiased"), 0.8),
    "ema of 0": (gf.ema, 0.0),
    "amplify normalize": (lambda lamb: gf.amplify(gf.moving_average(5), lamb, normalize=True), 2.0),
    "parallel": (lambda weight: gf.parallel((weight, optax.identity()), (1.0, gf.ema(0.5))), 0.0),
    "lfilter": (lambda a: gf.lfilter([0.2], jnp.stack([jnp.ones(()), a]), start="gradient"), -0.8),
    "sosfilt": (lambda scale: gf.sosfilt(jnp.array(SOS).at[:, 0].multiply(scale), start="gradient"), 1.0),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_of_measurements(name, x64):
    make, at = DIFFERENTIABLE[name]

    def measured(x):
        tx, how = make(x), {"length": 90, "settle": 6}
        _, response = gf.frequency_response(tx, **how, frequencies=[0.0, 0.1, 0.5])
        limits = [gf.stability_limit(tx, **how, decay=decay) for decay in (0.0, 0.02)]
        numbers = jnp.stack([gf.dc_gain(tx, **how), gf.mean_age(tx, **how), *limits])
        return jnp.concatenate([gf.impulse_response(tx, 4, settle=6), response.real, response.imag, numbers])

    step = 1e-5
    points = at + step * np.arange(3)  # to one side, because alpha starts at 0
    by_points = lambda points: jax.jvp(jax.vmap(measured), (points,), (jnp.ones(3),))
    values, forward = jax.jit(by_points)(points)
    reverse = jax.jit(jax.jacrev(measured))(at)
    np.testing.assert_allclose(reverse, forward[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(reverse, np.array([-3.0, 4.0, -1.0]) @ values / (2 * step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("measure", "derivative"), [(gf.mean_age, 25), (gf.stability_limit, 100)])
def test_derivatives_use_no_infinities(measure, derivative):
    with jax.debug_nans(True), jax.debug_infs(True):
        by_alpha = jax.grad(lambda alpha: measure(gf.ema(alpha), 100, settle=2))
        assert by_alpha(0.8) == pytest.approx(derivative, rel=1e-4)


def test_derivative_of_the_stability_limit_by_decay():
    by_decay = jax.grad(lambda decay: gf.stability_limit(optax.identity(), 4, decay=decay))
    np.testing.assert_allclose([by_decay(0.0), by_decay(0.1)], -1.0, rtol=1e-5)
