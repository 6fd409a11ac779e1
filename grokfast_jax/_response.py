"""The response of a gradient transformation, measured."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ._checks import check_int, check_number, check_transformation

SETTLE = 10_000
LENGTH = 10_000


def impulse_response(tx: optax.GradientTransformation, length: int, *, settle: int | None = None) -> jax.Array:
    """Impulse response of a linear gradient transformation, measured.

    A scalar parameter is fed zeros, then a single gradient of 1, then zeros again. Its updates from the 1 on are the
    response. It describes `tx` fully if `tx` is linear and, its start being over, does not change over the steps:
    filters, `amplify` and SGD (with momentum, Nesterov's too) are so; the sign and learning rate of an optimizer are
    part of it.

    Args:
      tx: The gradient transformation.
      length: Number of steps to measure, a positive int.
      settle: Number of zero gradients before the impulse, an int of at least 0. So many steps are to be enough for the
        start of a filter to be over: one for `start="gradient"`, `window_size` for `warmup`, some time constants for
        `start="debiased"`. None is 10,000, too few for a longer window; 0 shows the start instead.

    Returns:
      An array of shape (length,), in the default float dtype.

    Raises:
      TypeError: `tx` is no gradient transformation, or `length` or `settle` no int.
      ValueError: `length` is not positive or `settle` is negative.

    Example:
      >>> from grokfast_jax import ema, impulse_response
      >>> print(impulse_response(ema(0.5), 3))
      [0.5   0.25  0.125]
      >>> print(impulse_response(ema(0.5), 3, settle=0))  # the first gradient starts the average
      [1.   0.5  0.25]
    """
    check_transformation("tx", tx)
    check_int("length", length, cure="pass the number of steps to measure")
    settle = SETTLE if settle is None else settle
    check_int("settle", settle, low=0, cure="use settle=0 to measure from the first step on")
    params = jnp.zeros((), float)
    gradients = jnp.zeros(settle + length, float).at[settle].set(1.0)

    def step(state: optax.OptState, gradient: jax.Array) -> tuple[optax.OptState, jax.Array]:
        update, state = tx.update(gradient, state, params)
        return state, jnp.asarray(update)

    return lax.scan(step, tx.init(params), gradients)[1][settle:]


def frequency_response(
    tx: optax.GradientTransformation,
    length: int,
    *,
    frequencies: jax.typing.ArrayLike | None = None,
    settle: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Frequency response of a linear gradient transformation, measured.

    .. math::
        H(f) = \sum_{k=0}^{n-1} h_k e^{-2 \pi i f k}

    with h the impulse response over n = `length` steps, which should have died out by then.

    Args:
      tx: The gradient transformation.
      length: Number n of steps of the impulse response to measure, a positive int.
      frequencies: 1-D array of frequencies f in cycles per step, of which 0.5 is the fastest there is. None takes the
        n // 2 + 1 frequencies of a real Fourier transform, from 0 to 0.5.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      The frequencies, in cycles per step, and the complex response at each: two 1-D arrays of the same length.

    Raises:
      TypeError, ValueError: As `impulse_response` does; and if `frequencies` holds something else than real numbers
        (TypeError) or is not 1-D (ValueError).

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import frequency_response, moving_average
      >>> f, response = frequency_response(moving_average(2), 4)
      >>> print(f)
      [0.   0.25 0.5 ]
      >>> print(jnp.abs(response).round(3))  # passes a constant, stops what alternates
      [1.    0.707 0.   ]
    """
    h = impulse_response(tx, length, settle=settle)
    f = np.fft.rfftfreq(length) if frequencies is None else _frequencies(frequencies)
    angle = 2 * np.pi * np.outer(f, np.arange(length))
    cos, sin = jnp.asarray(np.cos(angle), h.dtype), jnp.asarray(np.sin(angle), h.dtype)
    return jnp.asarray(f, h.dtype), lax.complex(cos @ h, -sin @ h)


def dc_gain(tx: optax.GradientTransformation, length: int | None = None, *, settle: int | None = None) -> jax.Array:
    r"""Gain of a constant gradient, measured.

    .. math::
        Q(1) = \sum_{k=0}^{n-1} h_k

    with h the impulse response over n = `length` steps, which must have died out by then: after the window of a moving
    average, or some ten time constants of an average or filter.

    Args:
      tx: The gradient transformation; see `impulse_response`.
      length: Number n of steps of the impulse response to measure, a positive int. None is 10,000, enough for an EMA
        with `alpha` up to 0.999.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype.

    Raises:
      TypeError, ValueError: As `impulse_response` does.

    Example:
      >>> from grokfast_jax import dc_gain, ema, grokfast_ma
      >>> print(dc_gain(ema(0.5)).round(3), dc_gain(grokfast_ma(8, lamb=5.0)))
      1.0 6.0
    """
    return impulse_response(tx, LENGTH if length is None else length, settle=settle).sum()


def mean_age(tx: optax.GradientTransformation, length: int | None = None, *, settle: int | None = None) -> jax.Array:
    r"""Mean age, in steps, of the gradients in the update, measured.

    .. math::
        \frac{\sum_{k=0}^{n-1} k h_k}{\sum_{k=0}^{n-1} h_k}

    with h the impulse response over n = `length` steps, which must have died out by then, as for `dc_gain`. It is the
    group delay at frequency 0: a slow trend comes out so many steps late. An EMA has :math:`\alpha / (1 - \alpha)`, a
    moving average of w gradients :math:`(w - 1) / 2`, and ages in a chain add up.

    Args:
      tx: The gradient transformation; see `impulse_response`.
      length: Number n of steps of the impulse response to measure; see `dc_gain`.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype. NaN if the gain of a constant is 0 to within the rounding of its sum,
      n eps :math:`\sum |h_k|`: what stops a constant has no mean age.

    Raises:
      TypeError, ValueError: As `impulse_response` does.

    Example:
      >>> from grokfast_jax import mean_age, moving_average
      >>> print(mean_age(moving_average(9)))
      4.0
    """
    h = impulse_response(tx, LENGTH if length is None else length, settle=settle)
    gain = h.sum()
    is_zero = jnp.abs(gain) <= _rounding(h)
    age = (jnp.arange(h.size, dtype=h.dtype) * h).sum() / jnp.where(is_zero, 1, gain)
    return jnp.where(is_zero, jnp.nan, age)


def stability_limit(
    tx: optax.GradientTransformation,
    length: int | None = None,
    *,
    decay: jax.typing.ArrayLike = 0.0,
    settle: int | None = None,
) -> jax.Array:
    r"""Learning rate times curvature up to which gradient descent is stable, measured.

    .. math::
        x_{t+1} = (1 - d) x_t - s \sum_{k=0}^{n-1} h_k x_{t-k}

    is descent through `tx` on a parabola, with s the product of learning rate and curvature, d = `decay`, and h the
    impulse response over n = `length` steps, which must have died out by then, as for `dc_gain`. It converges for s up
    to the smallest positive one at which a root of :math:`z - 1 + d + s H(z)` is on the unit circle, which is found on
    a grid of 16 n frequencies.

    Without decay the gradients themselves have the limit 2, an EMA :math:`2 (1 + \alpha) / (1 - \alpha)`, and a moving
    average of w gradients :math:`2 w \sin^2(\pi / 2w)`. So an EMA bears a larger learning rate than no filter, and a
    window a smaller one. An optimizer that is blind to the scale of its input divides by the gain, so compare limits
    times `dc_gain`. Adam's first moment is a filter, too: `optax.chain(tx, ema(0.9))`.

    Args:
      tx: The gradient transformation, without learning rate and sign; see `impulse_response`.
      length: Number n of steps of the impulse response to measure; see `dc_gain`.
      decay: Learning rate times decoupled weight decay, in [0, 1).
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype. Without decay it is 0 if the gain of a constant is not positive, but
      for rounding: no s is stable then.

    Raises:
      TypeError: `decay` is no real scalar; and as `impulse_response` does.
      ValueError: `decay` is not in [0, 1); and as `impulse_response` does.

    Example:
      >>> from grokfast_jax import ema, moving_average, stability_limit
      >>> for lowpass in ema(0.8), moving_average(9):  # of one mean age
      ...     print(f"{stability_limit(lowpass):.2f}")
      18.00
      0.54
    """
    cure = "pass learning rate times weight decay, or leave it out"
    check_number("decay", decay, allowed="a number in [0, 1)", cure=cure, low=0, high=1, schedule=False)
    h = impulse_response(tx, LENGTH if length is None else length, settle=settle)
    points = 16 * h.size
    angle = 2 * np.pi * np.arange(1, points // 2 + 1) / points
    decay = jnp.asarray(decay, h.dtype)
    real, imag = (jnp.asarray(part, h.dtype) for part in (1 - np.cos(angle), -np.sin(angle)))
    loop = jnp.fft.rfft(h, points)[1:] / lax.complex(real - decay, imag)  # 1 / s, where it is real
    real, imag = loop.real, loop.imag
    crosses = (imag[:-1] > 0) != (imag[1:] > 0)
    along = jnp.where(crosses, imag[:-1] / jnp.where(crosses, imag[:-1] - imag[1:], 1), 0)
    at = jnp.where(crosses, real[:-1] + along * (real[1:] - real[:-1]), 0)
    slowest = jnp.where(decay > 0, -h.sum() / decay, jnp.where(h.sum() > _rounding(h), 0, jnp.inf))
    # At the slowest and at the fastest frequency it is real.
    return 1 / jnp.maximum(jnp.maximum(at.max(), real[-1]), slowest)


def _rounding(h: jax.Array) -> jax.Array:
    """What rounding may add to the sum of a response."""
    return h.size * jnp.finfo(h.dtype).eps * jnp.abs(h).sum()


def _frequencies(values: Any) -> np.ndarray:
    """`values` as a 1-D array of NumPy in float64."""
    message = "frequencies must be a 1-D array of real numbers, got {}; pass e.g. jnp.linspace(0, 0.5, 100)"
    try:
        f = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(message.format(repr(values))) from error
    if f.ndim != 1:
        raise ValueError(message.format(f"shape {f.shape}"))
    return f
