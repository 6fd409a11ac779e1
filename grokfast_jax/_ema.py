"""The exponential moving average as a low-pass filter."""

import operator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._arrays import aligned, cast_like, next_step, wide_dtype, widest_dtype, zeros
from ._checks import check_choice, check_float_dtype, check_number, check_state, check_updates, number_at

Start = Literal["gradient", "zero", "debiased"]


class EmaState(NamedTuple):
    """State of `ema`."""

    slow: optax.Updates  # mu, the average of the gradients, like params in accumulator_dtype
    ema_step: jax.Array  # () int32, updates so far, saturating; drives the start and the schedule of alpha
    mass: jax.Array | None  # () float, sum of the weights of the gradients so far; None unless start="debiased"


def ema(
    alpha: optax.ScalarOrSchedule,
    *,
    start: Start = "gradient",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the gradients: the filter of Grokfast-EMA.

    .. math::
        \mu_t = \alpha \mu_{t-1} + (1 - \alpha) g_t

    The updates are :math:`\mu_t`. The time constant of the filter is about :math:`1 / (1 - \alpha)` steps, and its
    half-power frequency is about :math:`(1 - \alpha) / (2 \pi)` cycles per step.

    Args:
      alpha: Weight of the past, in [0, 1): a number, a scalar array or a schedule of the update count (its values are
        not checked). 0 passes the gradient through and discards the past, also where that is not finite; a schedule
        that returns 1 keeps the average, whatever the gradient. 0.98 is the paper's value for modular arithmetic.
      start: How the average starts. `"gradient"`: at the first gradient, :math:`\mu_0 = g_0`, as in the authors' code;
        this gradient counts :math:`1 / (1 - \alpha)` times as much as a later one. `"zero"`: at 0, therefore
        :math:`\mu_0 = (1 - \alpha) g_0`. `"debiased"`: at 0, and divided by the sum of the weights so far, as in
        `optax.ema(alpha, debias=True)`; while this sum is 0, because a schedule starts at 1, the gradient passes
        through.
      accumulator_dtype: Dtype of the average. None uses the parameters' dtype, but at least float32, because a bfloat16
        average with `alpha` near 1 stops moving. Averages of complex parameters use the complex dtype of that width,
        at least complex64.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Its state
      is an `EmaState`, one array per parameter.

    Raises:
      ValueError: `alpha` is outside [0, 1) (before or after rounding to the default float dtype) or not a scalar, or
        `start` is unknown.
      TypeError: `alpha` is not a number, array or schedule, or has a 16-bit dtype (bfloat16 rounds 0.999 to 1), or
        `accumulator_dtype` is not a floating-point dtype of 8 to 64 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import ema
      >>> slow = ema(0.5)
      >>> state = slow.init(jnp.zeros(2))
      >>> out, state = slow.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)  # the first gradient
      [ 1. -2.]
      >>> out, state = slow.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)  # (g_0 + g) / 2
      [ 2. -1.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, Algorithm 1.
    """
    check_number(
        "alpha",
        alpha,
        allowed="a number in [0, 1), or a schedule of such numbers",
        low=0.0,
        high=1.0,
        cure="the paper uses 0.98; 0.0 passes the gradients through",
    )
    check_choice("start", start, get_args(Start))
    check_float_dtype("accumulator_dtype", accumulator_dtype)
    # The weight of the past is 0 at the start, too, but there the past is 0.
    is_positive = not callable(alpha) and not isinstance(alpha, Tracer) and float(alpha) > 0
    times = operator.mul if is_positive else _weighted

    def init_fn(params: optax.Params) -> Any:
        slow = zeros(params, accumulator_dtype)
        mass = jnp.zeros((), widest_dtype(slow)) if start == "debiased" else None
        return EmaState(slow, jnp.zeros((), jnp.int32), mass)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_state(state, EmaState)
        if (state.mass is not None) != (start == "debiased"):
            mass = "a mass" if start == "debiased" else "no mass"
            raise ValueError(f"state must have {mass} for start={start!r}, got {state.mass!r}; call init again")
        check_updates(updates, state.slow)
        keep, mass = number_at("alpha", alpha, state.ema_step), None
        if start == "gradient":
            keep = jnp.where(state.ema_step == 0, 0.0, keep)
        elif start == "debiased":
            # mu / mass is an average too, with alpha mass_{t-1} / mass_t in place of alpha.
            keep = keep.astype(state.mass.dtype)
            past = keep * state.mass
            mass = past + (1 - keep)
            keep = past / jnp.where(mass == 0, 1, mass)

        def average(g: Any, slow: jax.Array) -> jax.Array:
            # Algorithm 1: mu <- alpha mu + (1 - alpha) g. With 1 - alpha in the dtype of alpha, the two weights sum to
            # exactly 1, and the average of a constant gradient is that gradient.
            dtype = wide_dtype(slow)
            a = keep.astype(dtype)
            return (times(a, slow.astype(dtype)) + times(1 - a, aligned(g, slow, dtype))).astype(slow.dtype)

        slow = jax.tree.map(average, updates, state.slow)
        return cast_like(slow, updates), EmaState(slow, next_step(state.ema_step), mass)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weighted(weight: jax.Array, part: jax.Array) -> jax.Array:
    """Return `weight * part`, but 0 where `weight` is 0 and `part` is not finite."""
    # Replaced before the product, the sum of two of them compiles to the same rounding as without this.
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(part), 0, part)
