"""Any causal linear filter over the steps."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._arrays import cast_like, next_step, wide_dtype, zeros
from ._checks import check_choice, check_float_dtype

Start = Literal["zero", "gradient"]
Coefficients = Sequence[float] | np.ndarray | jax.Array


class LfilterState(NamedTuple):
    """State of `lfilter`."""

    delays: tuple[optax.Updates, ...]  # z_1, ..., z_order, the filter's memory, each like params
    lfilter_step: jax.Array  # () int32, updates so far, saturating; 0 marks the first gradient


def lfilter(
    b: Coefficients,
    a: Coefficients = (1.0,),
    *,
    start: Start = "zero",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Linear filter of the gradients over the steps, with the meaning of `scipy.signal.lfilter`.

    .. math::
        a_0 y_t = b_0 g_t + b_1 g_{t-1} + \dots + b_M g_{t-M} - a_1 y_{t-1} - \dots - a_N y_{t-N}

    evaluated in direct form II transposed, so it holds max(M, N) arrays per parameter. Designs of `scipy.signal`
    (`butter`, `bessel`, `firwin`, ...) drop in. In float32 split a high order into sections and chain them:
    `optax.chain(*(lfilter(s[:3], s[3:]) for s in scipy.signal.butter(6, 0.02, output="sos")))`; for 16-bit gradients
    inside `amplify`, which hands them over in float32: what passes between the sections may be very small. A low cutoff
    needs more than float32 (for `butter(2, ...)` below about 0.002): `jax_enable_x64`, with
    `accumulator_dtype="float64"` where the parameters are narrower.

    Args:
      b: Numerator coefficients, one or more numbers or a 1-D array (which may be traced).
      a: Denominator coefficients likewise; `a[0]` must not be 0. The default makes a finite impulse response.
      start: What the filter has seen before the first gradient. `"zero"`: zeros. `"gradient"`: that gradient for
        ever, so that the response to it is steady (`scipy.signal.lfilter_zi` times the first gradient).
      accumulator_dtype: Dtype of the filter's memory. None keeps the parameters' dtype, but at least float32. For
        complex parameters, the complex dtype of that width, at least complex64.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates have the shapes and dtypes of the gradients. Its state
      is an `LfilterState`.

    Raises:
      ValueError: `b` or `a` is empty, not 1-D or not finite, `a[0]` is 0, `start` is unknown, or `a` sums to nearly 0
        with `start="gradient"` (such a filter has no steady state, or is a high order in need of splitting). In `init`:
        rounding `a` to the dtype of the memory can change the response to a constant by more than 1 %.
      TypeError: `b` or `a` holds something else than real numbers, or `accumulator_dtype` is no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import lfilter
      >>> difference = lfilter([1.0, -1.0])
      >>> state = difference.init(jnp.zeros(2))
      >>> out, state = difference.update(jnp.array([1.0, 2.0]), state)
      >>> out, state = difference.update(jnp.array([5.0, 2.0]), state)
      >>> print(out)
      [4. 0.]

    References:
      Oppenheim and Schafer, *Discrete-Time Signal Processing*, 3rd ed., 2010, section 6.3.
    """
    b_array, a_array = _coefficients("b", b), _coefficients("a", a)
    traced = isinstance(b_array, Tracer) or isinstance(a_array, Tracer)
    if not isinstance(a_array, Tracer) and a_array[0] == 0:
        raise ValueError(f"a[0] must not be 0, got a = {a!r}; drop the leading zeros (and advance b by as many steps)")
    check_choice("start", start, get_args(Start))
    check_float_dtype("accumulator_dtype", accumulator_dtype)

    xp = jnp if traced else np
    order = max(len(b_array), len(a_array)) - 1
    numerator = xp.pad(b_array / a_array[0], (0, order + 1 - len(b_array)))
    denominator = xp.pad(a_array / a_array[0], (0, order + 1 - len(a_array)))
    steady = xp.zeros(order)
    if start == "gradient":
        if not traced and abs(denominator.sum()) <= 1e-14 * abs(denominator).sum():
            raise ValueError(
                f"a must not sum to (nearly) 0 with start='gradient', got a = {a!r}; such a filter has no steady "
                "state, use start='zero', or split a high order into second-order sections and chain them"
            )
        gain = numerator.sum() / denominator.sum()
        steady = xp.cumsum((numerator - gain * denominator)[:0:-1])[::-1]

    def init_fn(params: optax.Params) -> Any:
        # Trees, not an axis: so every leaf fits the sharding and the partition metadata of its parameter.
        delays = tuple(zeros(params, accumulator_dtype) for _ in range(order))
        if not traced and order:
            for dtype in {jnp.finfo(wide_dtype(leaf)).dtype for leaf in jax.tree.leaves(delays[0])}:
                _check_rounding(denominator, dtype)
        return LfilterState(delays, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args

        def advance(g: Any, *delays: jax.Array) -> tuple[jax.Array, ...]:
            dtype = wide_dtype(delays[0] if delays else g)
            b, a, z0 = (xp.asarray(x, dtype) for x in (numerator, denominator, steady))
            g = jnp.asarray(g, dtype)
            z = [delay.astype(dtype) for delay in delays]
            if start == "gradient":
                z = [jnp.where(state.lfilter_step == 0, z0[k] * g, z[k]) for k in range(order)]
            # y = b_0 g + z_1, then z_k <- b_k g - a_k y + z_{k+1}
            total = [b[k] * g + z_k for k, z_k in enumerate([*z, jnp.zeros_like(g)])]
            y = total[0]
            # Beyond the last a_k there is no feedback, not one of 0 times y: a non-finite y would stay for ever.
            z = [total_k - a[k] * y if k < len(a_array) else total_k for k, total_k in enumerate(total)]
            return y, *(z_k.astype(delay.dtype) for z_k, delay in zip(z[1:], delays, strict=True))

        leaves = jax.tree.map(advance, updates, *state.delays)
        slow, *delays = (jax.tree.map(lambda g, leaf, k=k: leaf[k], updates, leaves) for k in range(order + 1))
        return cast_like(slow, updates), LfilterState(tuple(delays), next_step(state.lfilter_step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_rounding(a: Any, dtype: np.dtype) -> None:
    """Raise if rounding the denominator `a` to `dtype` can change the response to a constant by more than 1 %."""
    total, size = abs(a.sum()), abs(a).sum()
    if total <= 1e-14 * size:  # no response to a constant: it grows without end
        return
    change = float(jnp.finfo(dtype).eps) / 2 * size / total
    if change > 0.01:
        raise ValueError(
            f"a must not sum to nearly 0 for {dtype}, got {a.tolist()} (over a[0]), whose rounding can change the "
            f"response to a constant by {change:.0%}; split a high order into second-order sections and chain them, "
            'or, for a low cutoff, enable jax_enable_x64 and pass accumulator_dtype="float64"'
        )


def _coefficients(name: str, values: Any) -> Any:
    """`values` as a 1-D float array, of JAX if any of them is traced, else of NumPy in float64."""
    message = f"{name} must be one or more finite real numbers, got {values!r}; pass e.g. {name}=(1.0,)"
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))
    try:
        array = jnp.asarray(values) if traced else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(message) from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(message)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(message)
    array = array.astype(float)
    if not traced and not np.isfinite(array).all():
        raise ValueError(message)
    return array
