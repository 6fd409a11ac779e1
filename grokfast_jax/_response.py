"""Measurements of the response of a gradient transformation."""

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
    """Measure the impulse response of a linear gradient transformation.

    The gradients of a scalar parameter are zeros, then a single 1, then zeros again. The updates from the 1 on are the
    response. It describes `tx` completely if `tx` is linear and, after its start, does not change over the steps.
    Examples are filters, `amplify`, and SGD with or without momentum or Nesterov momentum. The response of an optimizer
    includes its sign and learning rate.

    Args:
      tx: The gradient transformation.
      length: Number of steps to measure, a positive int.
      settle: Number of zero gradients before the impulse, an int of at least 0. The start of a filter must end within
        these steps. `start="gradient"` needs one step, `warmup` needs `window_size`, and `start="debiased"` needs a few
        time constants. None means 10,000; pass more for a longer window. 0 measures the start itself.

    Returns:
      An array of shape (length,), in the default float dtype.

    Raises:
      TypeError: `tx` is not a gradient transformation, or `length` or `settle` is not an int.
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
    r"""Measure the frequency response of a linear gradient transformation.

    .. math::
        H(f) = \sum_{k=0}^{n-1} h_k e^{-2 \pi i f k}

    with h the impulse response, which must be close to 0 after n = `length` steps.

    Args:
      tx: The gradient transformation.
      length: Number n of steps of the impulse response to measure, a positive int.
      frequencies: 1-D array of frequencies f in cycles per step, up to 0.5. None means the n // 2 + 1 frequencies of a
        real Fourier transform, from 0 to 0.5.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      The frequencies, in cycles per step, and the complex response at each: two 1-D arrays of the same length.

    Raises:
      TypeError: `frequencies` does not consist of real numbers; and as in `impulse_response`.
      ValueError: `frequencies` is not 1-D; and as in `impulse_response`.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import frequency_response, moving_average
      >>> f, response = frequency_response(moving_average(2), 4)
      >>> print(f)
      [0.   0.25 0.5 ]
      >>> print(jnp.abs(response).round(3))  # 1 for a constant, 0 for alternating gradients
      [1.    0.707 0.   ]
    """
    h = impulse_response(tx, length, settle=settle)
    if frequencies is None:
        return jnp.asarray(np.fft.rfftfreq(length), h.dtype), jnp.fft.rfft(h)
    f = _frequencies(frequencies)
    angle = 2 * np.pi * np.outer(f, np.arange(length))
    cos, sin = jnp.asarray(np.cos(angle), h.dtype), jnp.asarray(np.sin(angle), h.dtype)
    return jnp.asarray(f, h.dtype), lax.complex(cos @ h, -sin @ h)


def dc_gain(tx: optax.GradientTransformation, length: int | None = None, *, settle: int | None = None) -> jax.Array:
    r"""Measure the gain of a constant gradient.

    .. math::
        Q(1) = \sum_{k=0}^{n-1} h_k

    with h the impulse response, which must be close to 0 after n = `length` steps. A moving average needs the length of
    its window; an EMA or another filter needs about ten time constants.

    Args:
      tx: The gradient transformation; see `impulse_response`.
      length: Number n of steps of the impulse response to measure, a positive int. None means 10,000, enough for an
        EMA with `alpha` up to 0.999.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype.

    Raises:
      TypeError, ValueError: As in `impulse_response`.

    Example:
      >>> from grokfast_jax import dc_gain, ema, grokfast_ma
      >>> print(dc_gain(ema(0.5)).round(3), dc_gain(grokfast_ma(8, lamb=5.0)))
      1.0 6.0
    """
    return impulse_response(tx, LENGTH if length is None else length, settle=settle).sum()


def mean_age(tx: optax.GradientTransformation, length: int | None = None, *, settle: int | None = None) -> jax.Array:
    r"""Measure the mean age of the gradients in an update, in steps.

    .. math::
        \frac{\sum_{k=0}^{n-1} k h_k}{\sum_{k=0}^{n-1} h_k}

    with h the impulse response, which must be close to 0 after n = `length` steps, as for `dc_gain`. The mean age is
    the group delay at frequency 0: the number of steps by which the output lags a slow trend. It is
    :math:`\alpha / (1 - \alpha)` for an EMA and :math:`(w - 1) / 2` for a moving average of w gradients. The ages of
    filters in a chain add up.

    Args:
      tx: The gradient transformation; see `impulse_response`.
      length: Number n of steps of the impulse response to measure; see `dc_gain`.
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype. NaN if the gain of a constant is 0, up to a rounding error of
      eps :math:`\sum (k + 1) |h_k|`: the mean age is then undefined.

    Raises:
      TypeError, ValueError: As in `impulse_response`.

    Example:
      >>> from grokfast_jax import mean_age, moving_average
      >>> print(mean_age(moving_average(9)))
      4.0
    """
    h = impulse_response(tx, LENGTH if length is None else length, settle=settle)
    gain = _gain(h)
    age = (jnp.arange(h.size, dtype=h.dtype) * h).sum() / jnp.where(gain == 0, 1, gain)
    return jnp.where(gain == 0, jnp.nan, age)


def stability_limit(
    tx: optax.GradientTransformation,
    length: int | None = None,
    *,
    decay: jax.typing.ArrayLike = 0.0,
    settle: int | None = None,
) -> jax.Array:
    r"""Measure the largest product of learning rate and curvature at which gradient descent is stable.

    .. math::
        x_{t+1} = (1 - d) x_t - s \sum_{k=0}^{n-1} h_k x_{t-k}

    is gradient descent with `tx` on a parabola, with s the product of learning rate and curvature, d = `decay`, and h
    the impulse response, which must be close to 0 after n = `length` steps, as for `dc_gain`. Descent converges for s
    below the smallest positive value at which a root of :math:`z - 1 + d + s H(z)` is on the unit circle. A grid of
    256 n frequencies locates this value to a relative error below 1e-4.

    Without decay, the limit is 2 for the gradients themselves, :math:`2 (1 + \alpha) / (1 - \alpha)` for an EMA, and
    :math:`2 w \sin^2(\pi / 2w)` for a moving average of w gradients. An EMA therefore tolerates a larger learning rate
    than unfiltered gradients, and a moving average of more than two gradients a smaller one. For an optimizer that is
    invariant to the scale of the gradients, compare limits times `dc_gain`. Adam's first moment is a filter too:
    measure `optax.chain(tx, ema(0.9))`.

    Args:
      tx: The gradient transformation, without learning rate and sign; see `impulse_response`.
      length: Number n of steps of the impulse response to measure; see `dc_gain`.
      decay: Learning rate times decoupled weight decay, in [0, 1).
      settle: Number of zero gradients before the impulse; see `impulse_response`.

    Returns:
      A scalar array, in the default float dtype. Without decay, it is 0 if the gain of a constant is not above rounding
      error: descent is then unstable for every positive s.

    Raises:
      TypeError: `decay` is not a real number; and as in `impulse_response`.
      ValueError: `decay` is not a scalar in [0, 1); and as in `impulse_response`.

    Example:
      >>> from grokfast_jax import ema, moving_average, stability_limit
      >>> for lowpass in ema(0.8), moving_average(9):  # both have a mean age of 4 steps
      ...     print(f"{stability_limit(lowpass):.2f}")
      18.00
      0.54
    """
    cure = "pass learning rate times weight decay, or omit decay"
    check_number("decay", decay, allowed="a number in [0, 1)", cure=cure, low=0, high=1, schedule=False)
    h = impulse_response(tx, LENGTH if length is None else length, settle=settle)
    points = 32 * h.size
    slope = jnp.fft.rfft(jnp.arange(h.size, dtype=h.dtype) * h, points) * (-2j * np.pi / points)  # of H, per point
    response = _refined(jnp.fft.rfft(h, points), slope)
    half = jnp.arange(1, response.size + 1, dtype=h.dtype) * (np.pi / 2 / response.size)  # z = exp(2i half)
    sin, cos, decay = jnp.sin(half), jnp.cos(half), jnp.asarray(decay, h.dtype)
    loop = response / lax.complex(2 * sin * sin - decay, -2 * sin * cos)  # 1 / s where it is real
    real, imag = loop.real, loop.imag
    crosses = (imag[:-1] > 0) != (imag[1:] > 0)
    along = jnp.where(crosses, imag[:-1] / jnp.where(crosses, imag[:-1] - imag[1:], 1), 0)
    at = jnp.where(crosses, real[:-1] + along * (real[1:] - real[:-1]), 0)
    # `loop` is real at the lowest and at the highest frequency. Without decay, it is infinite at the lowest.
    gain, decays = _gain(h), decay > 0
    slowest = jnp.where(decays, -gain / jnp.where(decays, decay, 1), 0)
    is_unstable = ~decays & (gain <= 0)
    inverse = jnp.maximum(jnp.maximum(at.max(), real[-1]), slowest)
    return jnp.where(is_unstable, 0, 1 / jnp.where(is_unstable, 1, inverse))


def _refined(y: jax.Array, slope: jax.Array) -> jax.Array:
    """Interpolate by cubic polynomials with the slopes of `y`: 16 values per interval, the last at its end."""
    t = (jnp.arange(1, 17) / 16).astype(y.dtype)[None, :]
    rise = (y[1:] - y[:-1])[:, None]
    bend = (slope[:-1, None] - rise) * (1 - t) - (slope[1:, None] - rise) * t
    return (y[:-1, None] + t * (rise + (1 - t) * bend)).ravel()


def _gain(h: jax.Array) -> jax.Array:
    """Return the sum of `h`, but 0 if rounding alone can have given it: `h[k]` is rounded in k + 1 steps."""
    rounding = jnp.finfo(h.dtype).eps * (jnp.arange(1, h.size + 1, dtype=h.dtype) * jnp.abs(h)).sum()
    return jnp.where(jnp.abs(h.sum()) <= rounding, 0, h.sum())


def _frequencies(values: Any) -> np.ndarray:
    """Return `values` as a 1-D NumPy array in float64."""
    message = "frequencies must be a 1-D array of real numbers, got {}; pass e.g. jnp.linspace(0, 0.5, 100)"
    try:
        f = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(message.format(repr(values))) from error
    if not (jnp.issubdtype(f.dtype, jnp.floating) or jnp.issubdtype(f.dtype, jnp.integer)):
        raise TypeError(message.format(repr(values)))
    if f.ndim != 1:
        raise ValueError(message.format(f"shape {f.shape}"))
    return f.astype(np.float64)
