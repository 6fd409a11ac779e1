"""Adam with any filter in place of the first moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._arrays import cast_like, widened
from ._checks import check_number, check_state, check_transformation, number_at
from ._ema import EmaState, ema


class FilteredAdamState(NamedTuple):
    """State of `scale_by_filtered_adam`."""

    lowpass: optax.OptState  # state of the filter
    nu: optax.Updates  # v, the debiased average of |g|^2, shaped like params, real and at least float32
    nu_mass: jax.Array  # () float, sum of the weights in nu so far
    filtered_adam_step: jax.Array  # () int32, updates so far, saturating; drives the schedule of b2


def scale_by_filtered_adam(
    lowpass: optax.GradientTransformation,
    *,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale by Adam's rule, with a low-pass filter in place of the first moment.

    .. math::
        \hat g_t = \frac{\mathrm{lowpass}(g)_t}{\sqrt{v_t + \bar\varepsilon} + \varepsilon}

    with v the debiased average of :math:`|g|^2`, as in `optax.scale_by_adam`. Here v averages the raw gradients; in
    `optax.chain(amplify(...), optax.scale_by_adam())`, v averages the filtered gradients.

    Some filters give known optimizers. Adam: `ema(b1, start="debiased")`. AdEMAMix:
    `parallel((1, ema(b1, start="debiased")), (alpha, ema(b3, start="zero")))`.

    Args:
      lowpass: The filter, an `optax.GradientTransformation` that maps the gradients to their slow part.
      b2: Weight of the past in the average of :math:`|g|^2`, in [0, 1): a number, a scalar array or a schedule of the
        update count (its values are not checked).
      eps: Term :math:`\varepsilon` outside the root, a number of at least 0.
      eps_root: Term :math:`\bar\varepsilon` inside the root, a number of at least 0. A positive value
        keeps derivatives through the update finite.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Extra
      arguments go to the filter. Its state is a `FilteredAdamState`, one array per parameter in addition to the
      filter's state.

    Raises:
      ValueError: `b2` is outside [0, 1) (before or after rounding to the default float dtype), `eps` or `eps_root` is
        negative or not finite, or one of the three is not a scalar.
      TypeError: `lowpass` is not a gradient transformation, `b2` is not a number, array or schedule, `eps` or
        `eps_root` is not a number or array, or one of the three has a 16-bit dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import ema, scale_by_filtered_adam
      >>> tx = scale_by_filtered_adam(ema(0.5, start="zero"), b2=0.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> out, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)  # (g / 2) / |g|
      [ 0.5 -0.5]
      >>> out, state = tx.update(jnp.array([4.0, -2.0]), state)
      >>> print(out)  # (g_0 / 4 + g / 2) / |g|
      [ 0.5625 -0.75  ]

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
      Pagliardini, Ablin and Grangier, `The AdEMAMix Optimizer: Better, Faster, Older
      <https://arxiv.org/abs/2409.03137>`_, 2024.
    """
    check_transformation("lowpass", lowpass)
    check_number(
        "b2",
        b2,
        allowed="a number in [0, 1), or a schedule of such numbers",
        low=0.0,
        high=1.0,
        cure="the usual value is 0.999",
    )
    for name, value, cure in (("eps", eps, "the usual value is 1e-8"), ("eps_root", eps_root, "the usual value is 0")):
        check_number(name, value, allowed="a finite number of at least 0", low=0.0, cure=cure, schedule=False)
    first_moment = optax.with_extra_args_support(lowpass)
    second_moment = ema((lambda step: number_at("b2", b2, step)) if callable(b2) else b2, start="debiased")

    def init_fn(params: optax.Params) -> Any:
        params = widened(params)
        squares: Any = second_moment.init(jax.tree.map(jnp.real, params))
        return FilteredAdamState(first_moment.init(params), squares.slow, squares.mass, squares.ema_step)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        check_state(state, FilteredAdamState)
        grads = widened(updates)
        slow, lowpass_state = first_moment.update(grads, state.lowpass, params, **extra_args)
        squares = jax.tree.map(lambda g: jnp.real(jnp.conj(g) * g), grads)
        old: Any = EmaState(state.nu, state.filtered_adam_step, state.nu_mass)
        new: Any
        v, new = second_moment.update(squares, old)

        def scaled(g: jax.Array, slow: Any, v: jax.Array) -> jax.Array:
            size = jnp.sqrt(v + jnp.asarray(eps_root, v.dtype)) + jnp.asarray(eps, v.dtype)
            return jnp.asarray(slow, g.dtype) / size.astype(g.dtype)

        out = jax.tree.map(scaled, grads, slow, v)
        return cast_like(out, updates), FilteredAdamState(lowpass_state, new.slow, new.mass, new.ema_step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
