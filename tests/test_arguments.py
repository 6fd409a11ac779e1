"""Bad arguments fail at construction. The message gives the name, the allowed values, the value and the cure."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grokfast_jax as gf

BAD = [
    (lambda: gf.ema(1.0), ValueError, r"alpha must be a number in \[0, 1\).* got 1.0; .*0.98"),
    (lambda: gf.ema(-0.1), ValueError, r"alpha must .* got -0.1; "),
    (lambda: gf.ema(float("nan")), ValueError, r"alpha must .* got nan; "),
    (lambda: gf.ema(np.float32(1.5)), ValueError, r"alpha must .* got .*1.5.*; "),
    (lambda: gf.ema(jnp.array(1.5)), ValueError, r"alpha must .*1.5.*; "),
    (lambda: gf.ema(jnp.array([0.5, 0.6])), ValueError, r"alpha must .*; "),
    (
        lambda: gf.ema(0.99999999),
        ValueError,
        r"alpha must .* got 0.99999999; .* \(in float32 this is 1.0\)",
    ),
    (lambda: gf.grokfast_ema(lamb=1e39), ValueError, r"lamb must .* got 1e\+39; .* \(in float32 this is inf\)"),
    (lambda: gf.ema(jnp.array(0.5, jnp.float16)), TypeError, r"alpha must have a dtype of at least 32 bits, got "),
    (lambda: gf.ema("0.9"), TypeError, r"alpha must .* got '0.9'; "),
    (lambda: gf.ema(True), TypeError, r"alpha must .* got True; "),
    (lambda: gf.ema(None), TypeError, r"alpha must .* got None; "),
    (lambda: gf.ema(0.5j), TypeError, r"alpha must .* got 0.5j; "),
    (lambda: gf.ema(jnp.array(True)), TypeError, r"alpha must "),
    (
        lambda: gf.ema(0.9, start="zeros"),
        ValueError,
        r"start must be one of 'gradient', 'zero', .* got 'zeros'; choose",
    ),
    (lambda: gf.ema(0.9, start=["zero"]), ValueError, r"start must be one of .* got \['zero'\]"),
    (
        lambda: gf.ema(0.9, accumulator_dtype=jnp.int32),
        TypeError,
        r"accumulator_dtype must .* got .*int32.*; pass e.g.",
    ),
    (
        lambda: gf.ema(0.9, accumulator_dtype="float33"),
        TypeError,
        r"accumulator_dtype must .* got 'float33'; pass e.g.",
    ),
    (lambda: gf.grokfast_ema(alpha=2), ValueError, r"alpha must .* got 2; "),
    (lambda: gf.grokfast_ema(lamb="2"), TypeError, r"lamb must be a finite number .* got '2'; "),
    (lambda: gf.grokfast_ema(lamb=float("inf")), ValueError, r"lamb must be a finite number .* got inf; "),
    (lambda: gf.grokfast_ema(start="debias"), ValueError, r"start must be one of .* got 'debias'"),
    (lambda: gf.moving_average(0), ValueError, r"window_size must be a positive int, got 0; use optax.identity\(\)"),
    (lambda: gf.moving_average(-3), ValueError, r"window_size must be a positive int, got -3; "),
    (lambda: gf.moving_average(2.5), TypeError, r"window_size must be a positive int, got 2.5; "),
    (lambda: gf.moving_average(100.0), TypeError, r"window_size must be .* got 100.0; pass int\(window_size\)"),
    (
        lambda: gf.grokfast_ma(optax.constant_schedule(100)),
        TypeError,
        r"window_size must be .*; window_size cannot change during training; pass one int",
    ),
    (lambda: gf.moving_average(True), TypeError, r"window_size must be a positive int, got True; "),
    (lambda: gf.moving_average(jnp.array(3)), TypeError, r"window_size must be .*static_args=\(\"window_size\",\)"),
    (
        lambda: gf.moving_average(6, stride=4),
        ValueError,
        r"stride must divide window_size, got stride=4 and window_size=6; ",
    ),
    (lambda: gf.moving_average(6, stride=12), ValueError, r"stride must divide window_size, got stride=12"),
    (lambda: gf.moving_average(6, stride=0), ValueError, r"stride must be a positive int, got 0; use stride=1"),
    (lambda: gf.moving_average(6, stride=1.5), TypeError, r"stride must be a positive int, got 1.5; "),
    (lambda: gf.moving_average(2**31, stride=2**30), ValueError, r"window_size \+ stride must be below 2\*\*31, got "),
    (lambda: gf.moving_average(6, reduce="max"), ValueError, r"reduce must be one of 'mean', 'sum', got 'max'; choose"),
    (lambda: gf.moving_average(6, warmup=1), ValueError, r"warmup must be one of True, False, got 1; "),
    (lambda: gf.moving_average(6, window_axis=1), ValueError, r"window_axis must be one of 0, -1, None, got 1; choose"),
    (
        lambda: gf.moving_average(6, window_axis=jnp.array(-1)),
        ValueError,
        r"window_axis must .*static_args=\(\"window_axis",
    ),
    (lambda: gf.moving_average(6, window_axis=False), ValueError, r"window_axis must be one of .* got False"),
    (lambda: gf.moving_average(6, buffer_dtype="int8"), TypeError, r"buffer_dtype must .* got 'int8'; "),
    (lambda: gf.grokfast_ma(0), ValueError, r"window_size must be a positive int, got 0; "),
    (lambda: gf.grokfast_ma(lamb=None), TypeError, r"lamb must be a finite number .* got None; "),
    (
        lambda: gf.grokfast_ma(filter_type="median"),
        ValueError,
        r"filter_type must be one of 'mean', 'sum', got 'median'",
    ),
    (lambda: gf.lfilter([]), ValueError, r"b must be one or more finite real numbers, got \[\]; "),
    (lambda: gf.lfilter(1.0), ValueError, r"b must be one or more finite real numbers, got 1.0; pass e.g. b="),
    (lambda: gf.lfilter([[1.0]]), ValueError, r"b must be "),
    (lambda: gf.lfilter([1.0, float("nan")]), ValueError, r"b must be .*nan"),
    (lambda: gf.lfilter(None), TypeError, r"b must be .* got None; "),
    (lambda: gf.lfilter(["x"]), TypeError, r"b must be .*'x'"),
    (lambda: gf.lfilter([1.0], []), ValueError, r"a must be one or more finite real numbers, got \[\]; pass e.g. a="),
    (lambda: gf.lfilter([1.0], [0.0, 1.0]), ValueError, r"a\[0\] must not be 0, got a = \[0.0, 1.0\]; drop"),
    (lambda: gf.lfilter([1.0], [1j]), TypeError, r"a must be "),
    (lambda: gf.lfilter([1.0], [1.0, [2.0]]), TypeError, r"a must be "),
    (lambda: gf.lfilter([1.0], [1.0, -1.0], start="gradient"), ValueError, r"a must not sum to .* use start='zero'"),
    (
        lambda: gf.lfilter([1.0], start="debiased"),
        ValueError,
        r"start must be one of 'zero', 'gradient', got 'debiased'",
    ),
    (
        lambda: gf.sosfilt([]),
        ValueError,
        r"sos must be finite real numbers of shape \(sections, 6\), got \[\]; pass e.g.",
    ),
    (lambda: gf.sosfilt([1.0, 0, 0, 1, 0, 0]), ValueError, r"sos must be .* of shape \(sections, 6\), got \[1.0, "),
    (lambda: gf.sosfilt([[1.0, 0, 0, 1, 0]]), ValueError, r"sos must be .* of shape \(sections, 6\), got "),
    (lambda: gf.sosfilt([[1.0, 0, 0, 1, 0, float("inf")]]), ValueError, r"sos must be finite real numbers .*inf"),
    (lambda: gf.sosfilt([[1.0, 0, 0, 1, 0, 1j]]), TypeError, r"sos must be "),
    (lambda: gf.sosfilt([[1.0, 0, 0, 0, 1, 0]]), ValueError, r"a_0, column 3 of sos, must not be 0, got .*; divide"),
    (
        lambda: gf.sosfilt([[1.0, 0, 0, 1, -1, 0]], start="gradient"),
        ValueError,
        r"must not sum to 0 .* use start='zero'",
    ),
    (
        lambda: gf.sosfilt([[1.0, 0, 0, 1, 0, 0]], start="debiased"),
        ValueError,
        r"start must be one of 'zero', 'gradient'",
    ),
    (lambda: gf.amplify(0.98, 2.0), TypeError, r"lowpass must be an optax.GradientTransformation, got 0.98; pass"),
    (lambda: gf.amplify(gf.ema, 2.0), TypeError, r"lowpass must be an optax.GradientTransformation"),
    (lambda: gf.amplify(gf.ema(0.9), np.float16(2.0)), TypeError, r"lamb must have a dtype of at least 32 bits, got "),
    (lambda: gf.lfilter(np.ones(2, np.float16)), TypeError, r"b must have a dtype of at least 32 bits, got "),
    (lambda: gf.lfilter([1.0], jnp.ones(2, jnp.bfloat16)), TypeError, r"a must have a dtype of at least 32 bits, got "),
    (lambda: gf.sosfilt(jnp.ones((1, 6), jnp.bfloat16)), TypeError, r"sos must have a dtype of at least 32 bits, got "),
    (lambda: gf.parallel(), ValueError, r"branches must be one or more pairs .*, got \(\); pass at least one"),
    (lambda: gf.parallel(gf.ema(0.9)), TypeError, r"branches\[0\] must be a pair \(weight, transformation\), got Grad"),
    (lambda: gf.parallel((1.0, gf.ema(0.9)), 2.0), TypeError, r"branches\[1\] must be a pair .* got 2.0; pass e.g."),
    (lambda: gf.parallel((gf.ema(0.9), 1.0)), TypeError, r"branches\[0\]\[1\] must be an optax.Grad.* got 1.0; pass"),
    (lambda: gf.parallel(("1", gf.ema(0.9))), TypeError, r"branches\[0\]\[0\] must be a finite number .* got '1'; "),
    (
        lambda: gf.parallel((np.inf, gf.ema(0.9))),
        ValueError,
        r"branches\[0\]\[0\] must be a finite number .* got inf; ",
    ),
    (lambda: gf.scale_by_filtered_adam(0.9), TypeError, r"lowpass must be an optax.GradientTransformation, got 0.9; "),
    (
        lambda: gf.scale_by_filtered_adam(gf.ema(0.9), b2=1.0),
        ValueError,
        r"b2 must be a number in \[0, 1\), .* got 1.0; ",
    ),
    (
        lambda: gf.scale_by_filtered_adam(gf.ema(0.9), eps=-1.0),
        ValueError,
        r"eps must be a finite number .* got -1.0; ",
    ),
    (
        lambda: gf.scale_by_filtered_adam(gf.ema(0.9), eps=lambda _: 1.0),
        TypeError,
        r"eps must be a finite number .*; the",
    ),
    (lambda: gf.scale_by_filtered_adam(gf.ema(0.9), eps_root="0"), TypeError, r"eps_root must be .* got '0'; "),
    (lambda: gf.amplify(gf.ema(0.9), 2.0, fast="0"), TypeError, r"fast must be a finite number .* got '0'; "),
    (
        lambda: gf.amplify(gf.ema(0.9), 2.0, normalize="yes"),
        ValueError,
        r"normalize must be one of True, False, got 'yes'; ",
    ),
    (
        lambda: gf.amplify(gf.ema(0.9), -1.0, normalize=True),
        ValueError,
        r"fast \+ lamb must not be 0 .* normalize=False",
    ),
    (lambda: gf.amplify(gf.ema(0.9), 1e-9 - 1, normalize=True), ValueError, r"fast \+ lamb must not be 0"),
    (lambda: gf.impulse_response(0.98, 5), TypeError, r"tx must be an optax.GradientTransformation, got 0.98; pass"),
    (lambda: gf.impulse_response(gf.ema(0.9), 0), ValueError, r"length must be a positive int, got 0; pass"),
    (
        lambda: gf.impulse_response(gf.ema(0.9), 5, settle=0.0),
        TypeError,
        r"settle must be an int of at least 0, got 0.0; ",
    ),
    (lambda: gf.impulse_response(gf.ema(0.9), 5, settle=-1), ValueError, r"settle must be .* got -1; use settle=0"),
    (lambda: gf.dc_gain(0.98), TypeError, r"tx must be an optax.GradientTransformation, got 0.98; pass"),
    (lambda: gf.mean_age(gf.ema(0.9), 0), ValueError, r"length must be a positive int, got 0; pass"),
    (lambda: gf.stability_limit(gf.ema(0.9), 0), ValueError, r"length must be a positive int, got 0; pass"),
    (
        lambda: gf.stability_limit(gf.ema(0.9), decay=1.0),
        ValueError,
        r"decay must be a number in \[0, 1\), got 1.0; pass",
    ),
    (
        lambda: gf.stability_limit(gf.ema(0.9), decay="no"),
        TypeError,
        r"decay must be a number in \[0, 1\), got 'no'; pass",
    ),
    (lambda: gf.frequency_response(gf.ema(0.9), 5, frequencies=0.1), ValueError, r"frequencies must be a 1-D array"),
    (lambda: gf.frequency_response(gf.ema(0.9), 5, frequencies=["0.1"]), TypeError, r"frequencies must .* real"),
    (lambda: gf.frequency_response(gf.ema(0.9), 5, frequencies=[0.1 + 0.2j]), TypeError, r"frequencies must .* real"),
    (lambda: gf.frequency_response(gf.ema(0.9), 5, frequencies=[True]), TypeError, r"frequencies must .* real"),
    (lambda: gf.grokfast_ema(lamb=10**400), ValueError, r"lamb must be a finite"),
    (lambda: gf.frequency_response(gf.ema(0.9), 5, frequencies=["x"]), TypeError, r"frequencies must .* got \['x'\]; "),
]


@pytest.mark.parametrize(("construct", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_name_the_cure(construct, error, message):
    with pytest.raises(error, match=message):
        construct()


def test_a_schedule_that_returns_nothing_is_named():
    tx = gf.grokfast_ema(lamb=lambda step: None)
    with pytest.raises(ValueError, match="lamb must be a real scalar at every step, got None; return one"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_tracers_and_schedules_pass():
    @jax.jit
    def out(alpha, lamb, fast, g):
        tx = gf.amplify(gf.ema(alpha), lamb, fast=fast, normalize=True)
        return tx.update(g, tx.init(g))[0]

    # Out of range, but not known at construction.
    np.testing.assert_allclose(out(1.5, 3.0, 1.0, jnp.ones(2)), 1.0)
    gf.amplify(gf.ema(optax.constant_schedule(2.0)), optax.constant_schedule(float("nan")))


def test_arrays_are_checked_under_jit():
    alpha = jnp.array(0.5)

    def out(alpha, g):
        tx = gf.grokfast_ema(alpha, lamb=jnp.array(2), fast=np.float32(1.0))
        return tx.update(g, tx.init(g))[0]

    np.testing.assert_array_equal(jax.jit(lambda g: out(alpha, g))(jnp.ones(2)), 3.0)
    bad = jnp.array(1.5)
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\)"):
        jax.jit(lambda g: out(bad, g))(jnp.ones(2))


def test_numpy_ints_are_ints():
    tx = gf.moving_average(np.int64(4), stride=np.int32(2))
    assert tx.init(jnp.zeros(3)).ring.shape == (3, 3)
    tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))


@pytest.mark.parametrize("number", [0, 0.5, np.float32(0.5), np.array(0.5), jnp.array(0.5), jnp.array(0)])
def test_any_real_scalar_is_a_number(number):
    tx = gf.amplify(gf.ema(number), number, fast=number)
    expected = gf.amplify(gf.ema(float(number)), float(number), fast=float(number))
    g = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], expected.update(g, expected.init(g))[0])


SCRIPT = """
import sys, jax, optax
before = set(sys.modules)
import grokfast_jax
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_only_the_library_beyond_jax_and_optax():
    loaded = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout.split()
    assert "grokfast_jax" in loaded
    assert all(name.partition(".")[0] == "grokfast_jax" for name in loaded)
