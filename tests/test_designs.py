"""Low-pass designs of SciPy, of all orders and down to low cutoffs: accepted designs are accurate, all others raise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax import lax

import grokfast_jax as gf

FAMILIES = {
    "butter": scipy.signal.butter,
    "bessel": scipy.signal.bessel,
    "cheby1": lambda order, cutoff, **form: scipy.signal.cheby1(order, 1, cutoff, **form),
    "ellip": lambda order, cutoff, **form: scipy.signal.ellip(order, 1, 40, cutoff, **form),
}
DESIGNS = [
    (family, order, float(cutoff))
    for family in FAMILIES
    for order in range(1, 9)
    for cutoff in np.geomspace(0.4, 0.0005, 16)
]
STEPS = 1500
EXTENDED = np.finfo(np.longdouble).eps < 1e-18  # otherwise the expected outputs are float64, too
GRADIENTS = (0.3 + np.random.default_rng(0).normal(size=STEPS)).astype(np.float32)
TOLERANCE = 2e-2  # largest error of an accurate response, relative to the largest output


@functools.cache
def sections(design):
    family, order, cutoff = design
    return FAMILIES[family](order, cutoff, output="sos")


@functools.cache
def polynomials(design):
    family, order, cutoff = design
    return FAMILIES[family](order, cutoff, output="ba")


@functools.cache
def expected(start="zero"):
    """Return the outputs of SciPy in extended precision, one row per design.

    With a steady start, the output is the steady output plus the response to the difference from the first gradient.
    `scipy.signal.sosfilt_zi` works in float64, and would add an error of 2e-10.
    """
    g = GRADIENTS.astype(np.longdouble)
    rows = []
    for design in DESIGNS:
        sos = sections(design).astype(np.longdouble)
        gain = np.prod(sos[:, :3].sum(axis=1) / sos[:, 3:].sum(axis=1))
        first = g[0] if start == "gradient" else 0
        rows.append(scipy.signal.sosfilt(sos, g - first) + gain * first)
    return np.array(rows)


def relative_error(out, start, design=slice(None)):
    """Return the largest error over the steps, relative to the largest output."""
    want = expected(start)[design]
    with np.errstate(over="ignore", invalid="ignore"):
        error = abs(np.asarray(out).astype(want.dtype) - want).max(axis=-1) / abs(want).max(axis=-1)
    return np.where(np.isfinite(error), error, np.inf).astype(np.float64)


def run(tx, grads):
    return lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(grads[0]), grads)[1]


def errors(make, coefficients, dtype, start="zero"):
    """Return the error of each design, from one program with traced coefficients."""
    grads = jnp.asarray(GRADIENTS, dtype)
    return relative_error(jax.jit(jax.vmap(lambda c: run(make(c), grads)))(coefficients), start)


def padded(array, rows):
    """Append sections that pass their input through, up to `rows` sections."""
    return np.concatenate([array, np.tile([1.0, 0, 0, 1, 0, 0], (rows - len(array), 1))])


def raises(tx, dtype):
    try:
        jax.eval_shape(tx.init, jax.ShapeDtypeStruct((), dtype))
    except ValueError as error:
        return f"rounded to {dtype}" in str(error) and "use sosfilt" in str(error)
    return False


@pytest.mark.parametrize(("dtype", "least"), [("float32", 200), pytest.param("float64", 400, marks=pytest.mark.slow)])
def test_lfilter_is_accurate_or_raises(dtype, least, x64):
    ba = np.zeros((len(DESIGNS), 2, 9))
    for row, design in zip(ba, DESIGNS, strict=True):
        for coefficients, values in zip(row, polynomials(design), strict=True):
            coefficients[: len(values)] = values
    error = errors(lambda c: gf.lfilter(c[0], c[1]), jnp.asarray(ba), dtype)
    rejected = np.array([raises(gf.lfilter(*polynomials(design)), dtype) for design in DESIGNS])
    print(
        f"{dtype}: {(~rejected).sum()} accepted, largest error {error[~rejected].max():.1e}; "
        f"{rejected.sum()} rejected, of which {(error[rejected] > TOLERANCE).sum()} are inaccurate"
    )
    assert error[~rejected].max() < TOLERANCE
    assert (~rejected).sum() >= least
    # The coefficients above are traced. Constant coefficients must give the same.
    for i in np.flatnonzero(~rejected)[::40]:
        out = run(gf.lfilter(*polynomials(DESIGNS[i])), jnp.asarray(GRADIENTS, dtype))
        assert relative_error(out, "zero", i) < TOLERANCE


LIMITS = {"float32": 1e-5, "float64": 1e-12 if EXTENDED else 1e-9}


@pytest.mark.parametrize(
    ("dtype", "start"),
    [
        ("float32", "gradient"),
        ("float64", "zero"),
        pytest.param("float32", "zero", marks=pytest.mark.slow),
        pytest.param("float64", "gradient", marks=pytest.mark.slow),
    ],
)
def test_sosfilt_is_accurate_for_every_design(dtype, start, x64):
    limit = LIMITS[dtype]
    sos = jnp.asarray(np.array([padded(sections(design), 4) for design in DESIGNS]))
    error = errors(lambda c: gf.sosfilt(c, start=start), sos, dtype, start)
    print(f"{dtype}, start={start!r}: largest error {error.max():.1e}, of {DESIGNS[error.argmax()]}")
    assert error.max() < limit


@pytest.mark.slow
@pytest.mark.parametrize("start", ["zero", "gradient"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_sosfilt_is_accurate_for_sections_that_are_not_traced(dtype, start, x64):
    for i in range(0, len(DESIGNS), 25):
        out = run(gf.sosfilt(sections(DESIGNS[i]), start=start), jnp.asarray(GRADIENTS, dtype))
        assert relative_error(out, start, i) < LIMITS[dtype]


def test_sosfilt_in_float32_needs_no_float64_mode():
    for i in range(0, len(DESIGNS), 25):
        out = run(gf.sosfilt(sections(DESIGNS[i])), jnp.asarray(GRADIENTS))
        assert relative_error(out, "zero", i) < 1e-5


def test_sosfilt_of_tiny_gradients_does_not_underflow(x64):
    """SciPy puts the whole gain, here 1e-25, into the first section, and its output would underflow to 0."""
    sos = scipy.signal.butter(8, 0.0005, output="sos")
    g = 1e-15 * GRADIENTS
    want = scipy.signal.sosfilt(sos, g.astype(np.float64))
    for out in run(gf.sosfilt(sos), jnp.asarray(g)), jax.jit(lambda sos: run(gf.sosfilt(sos), jnp.asarray(g)))(sos):
        np.testing.assert_allclose(out, want, atol=1e-5 * abs(want).max())


def test_sosfilt_does_not_drift():
    """Take 300,000 float32 steps while the gradients shrink by a factor of a million."""
    steps, sos = 300_000, scipy.signal.butter(4, 0.02, output="sos")
    g = (10.0 ** (-6 * np.arange(steps) / steps) * np.random.default_rng(0).uniform(0.5, 1.5, size=steps)).astype(
        np.float32
    )
    out = np.asarray(jax.jit(lambda g: run(gf.sosfilt(sos), g))(g))
    np.testing.assert_allclose(out[-1000:], scipy.signal.sosfilt(sos, g.astype(np.float64))[-1000:], rtol=1e-5)


def test_the_check_covers_every_narrow_leaf_also_under_jit():
    tx = gf.lfilter(*scipy.signal.butter(2, 0.001))
    for params in ({"w": jnp.zeros(2)}, [jnp.zeros(2, jnp.bfloat16)], jnp.zeros(2, jnp.complex64)):
        for init in (tx.init, jax.jit(tx.init)):
            with pytest.raises(ValueError, match=r"rounded to float32, .*change it by 0.024; use sosfilt"):
                init(params)
    gf.lfilter(*scipy.signal.butter(2, 0.002)).init(jnp.zeros(2, jnp.complex64))


@pytest.mark.parametrize(
    ("b", "a"),
    [
        ([1.0], [1.0, -1.3, 0.3]),  # an integrator in float64; in float32 it leaks
        ([1.0, -1.0], [1.0, -1.3, 0.3]),
        ([1.0], [1.0, 1.0]),
        (scipy.signal.butter(8, 0.001)[0], scipy.signal.butter(8, 0.001)[1]),  # sums to 0 or nearly so
    ],
)
@pytest.mark.parametrize("start", ["zero", "gradient"])
def test_the_check_works_where_a_has_a_root_on_the_circle(b, a, start):
    with pytest.raises(ValueError, match=r"rounded to float32|a must not sum to 0 with start='gradient'"):
        gf.lfilter(b, a, start=start).init(jnp.zeros(2))


@pytest.mark.parametrize("cutoff", [[0.1, 0.101], [0.3, 0.3001], [0.9, 0.901]])
def test_the_check_covers_narrow_bands_at_any_frequency(cutoff):
    """The coefficients of these `a` do not sum to nearly 0."""
    with pytest.raises(ValueError, match="rounded to float32"):
        gf.lfilter(*scipy.signal.butter(3, cutoff, "bandpass")).init(jnp.zeros(2))


def test_coefficients_that_were_already_rounded_raise(x64):
    b, a = scipy.signal.butter(2, 0.001)
    for narrow in (np.float32, jnp.float32):
        with pytest.raises(ValueError, match=r"rounded to float32, .*use sosfilt"):
            gf.lfilter(b, jnp.asarray(a, narrow)).init(jnp.zeros(2, jnp.float64))
        with pytest.raises(ValueError, match=r"rounded to float32, .*pass the design in float64, as SciPy returns it"):
            gf.sosfilt(jnp.asarray([[*b, *a]], narrow))
    gf.sosfilt(np.float32(scipy.signal.butter(2, 0.1, output="sos")))


def test_lfilter_is_accurate_at_a_low_cutoff_in_float64(x64):
    slow = gf.lfilter(*scipy.signal.butter(2, 1e-4), start="gradient", accumulator_dtype="float64")
    np.testing.assert_allclose(run(slow, jnp.ones((100, 1), jnp.float32)), 1.0, rtol=1e-6)
