"""The exponential moving average as a low-pass filter."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from ._arrays import cast_like, next_step, wide_dtype, widest_dtype, zeros
from ._checks import check_choice, check_float_dtype, check_number, check_state, check_updates, number_at

Start = Literal["gradient", "zero", "debiased"]


class EmaState(NamedTuple):
    """State of `ema`."""

    slow: optax.Updates  # mu, the average of the gradients so far, like params in accumulator_dtype
    ema_step: jax.Array  # () int32, updates so far, saturating; drives the start and the schedule of alpha
    mass: jax.Array | None  # () float, weights of the gradients so far, summed; None unless start="debiased"


def ema(
    alpha: optax.ScalarOrSchedule,
    *,
    start: Start = "gradient",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the gradients: the filter of Grokfast-EMA.

    .. math::
        \mu_t = \alpha \mu_{t-1} + (1 - \alpha) g_t

    The update that comes out is :math:`\mu_t`. Its time constant is about :math:`1 / (1 - \alpha)` steps, its
    half-power frequency about :math:`(1 - \alpha) / (2 \pi)` cycles per step.

    Args:
      alpha: Weight of the past, in [0, 1): a number, a scalar array or a schedule of the update count, whose values are
        not checked. 0 passes the gradient through; 0.98 is the paper's value for modular arithmetic.
      start: What the average holds before the first gradient. `"gradient"`: that gradient, so :math:`\mu_0 = g_0`,
        as the authors' code does; it then weighs :math:`1 / (1 - \alpha)` times as much as if it had come later.
        `"zero"`: nothing, so :math:`\mu_0 = (1 - \alpha) g_0`. `"debiased"`: nothing, and the average is divided by
        the weights it has seen, as `optax.ema(alpha, debias=True)` does.
      accumulator_dtype: Dtype the average is kept in. None keeps the parameters' dtype, but at least float32: in
        bfloat16 an average with `alpha` near 1 stops moving. For complex parameters, the complex dtype of that width,
        at least complex64.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates have the shapes and dtypes of the gradients. Its state
      is an `EmaState`, one array per parameter.

    Raises:
      ValueError: `alpha` is a number outside [0, 1), also after rounding to the default float dtype, or an array that
        is no scalar, or `start` is unknown.
      TypeError: `alpha` is no number, array or schedule, or is of a 16-bit dtype (in which 0.999 is 1), or
        `accumulator_dtype` is no floating-point dtype of 8 to 64 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import ema
      >>> slow = ema(0.5)
      >>> state = slow.init(jnp.zeros(2))
      >>> out, state = slow.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)  # the first gradient
      [ 1. -2.]
      >>> out, state = slow.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)  # half the past, half the present
      [ 2. -1.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, Algorithm 1.
    """
    check_number(
        "alpha",
        alpha,
        allowed="a number in [0, 1), or a schedule of such",
        low=0.0,
        high=1.0,
        cure="the paper uses 0.98; 0.0 passes the gradients through",
    )
    check_choice("start", start, get_args(Start))
    check_float_dtype("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> Any:
        slow = zeros(params, accumulator_dtype)
        mass = jnp.zeros((), widest_dtype(slow)) if start == "debiased" else None
        return EmaState(slow, jnp.zeros((), jnp.int32), mass)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_state(state, EmaState)
        check_updates(updates, state.slow)
        keep, mass = number_at("alpha", alpha, state.ema_step), None
        if start == "gradient":
            keep = jnp.where(state.ema_step == 0, 0.0, keep)
        elif start == "debiased":
            if state.mass is None:
                raise ValueError("state must have a mass for start='debiased', got None; init the state again")
            # mu / mass is itself an average, one that keeps alpha mass_{t-1} / mass_t of its past.
            keep = keep.astype(state.mass.dtype)
            past = keep * state.mass
            mass = past + (1 - keep)
            keep = past / mass

        def average(g: Any, slow: jax.Array) -> jax.Array:
            # Algorithm 1: mu <- alpha mu + (1 - alpha) g. With 1 - alpha taken in the dtype of alpha the two weights
            # sum to exactly 1, so a constant gradient has itself as its average.
            dtype = wide_dtype(slow)
            a = keep.astype(dtype)
            return (a * slow.astype(dtype) + (1 - a) * jnp.asarray(g, dtype)).astype(slow.dtype)

        slow = jax.tree.map(average, updates, state.slow)
        return cast_like(slow, updates), EmaState(slow, next_step(state.ema_step), mass)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
