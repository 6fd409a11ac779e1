"""Causal linear filters over the steps, with the meaning of `scipy.signal`."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._arrays import aligned, cast_like, next_step, unzip, wide_dtype, zeros
from ._checks import check_choice, check_float_dtype, check_not_narrow, check_state, check_updates

Start = Literal["zero", "gradient"]
Coefficients = Sequence[float] | np.ndarray | jax.Array
Sections = Sequence[Sequence[float]] | np.ndarray | jax.Array

LARGEST_CHANGE = 0.01  # of the response, caused by rounding the coefficients


class LfilterState(NamedTuple):
    """State of `lfilter`."""

    delays: tuple[optax.Updates, ...]  # z_1, ..., z_order, the memory of the filter, each like params
    lfilter_step: jax.Array  # () int32, updates so far, saturating; 0 marks the first gradient


class SosfiltState(NamedTuple):
    """State of `sosfilt`."""

    delays: tuple[optax.Updates, ...]  # w_1 and w_2 of each section in turn, the memory of the filter, each like params
    sosfilt_step: jax.Array  # () int32, updates so far, saturating; 0 marks the first gradient


def lfilter(
    b: Coefficients,
    a: Coefficients = (1.0,),
    *,
    start: Start = "zero",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Linear filter of the gradients over the steps, with the meaning of `scipy.signal.lfilter`.

    .. math::
        a_0 y_t = \sum_{k=0}^M b_k g_{t-k} - \sum_{k=1}^N a_k y_{t-k}

    in direct form II transposed, which stores max(M, N) arrays per parameter. Use `sosfilt` for designs above order 2
    and for low cutoffs. Rounding `a` moves its roots, and the closer together the roots are, the farther they move.
    `init` raises an error if this can change the response by more than 1 %.

    Args:
      b: Numerator coefficients, one or more numbers or a 1-D array (which may be traced).
      a: Denominator coefficients, in the same forms; `a[0]` must not be 0. The default gives a finite impulse response;
        `(1, -1)` gives a running sum.
      start: Input of the filter before the first gradient. `"zero"`: zeros. `"gradient"`: the first gradient at every
        step, which makes the response to it steady (`scipy.signal.lfilter_zi` times the first gradient).
      accumulator_dtype: Dtype of the memory of the filter. None uses the parameters' dtype, but at least float32. A
        narrower dtype rounds the memory at each step; `init` does not check the effect. The memory for complex
        parameters has the complex dtype of that width, at least complex64.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Its state
      is an `LfilterState`.

    Raises:
      ValueError: `b` or `a` is empty, not 1-D or not finite, `a[0]` is 0, `start` is unknown, or `a` sums to 0 with
        `start="gradient"` (such a filter has no steady state). In `init`: rounding the coefficients to the dtype of the
        memory can change the response at some frequency by more than 1 % of its largest value. Traced coefficients are
        not checked. NumPy arrays and Python numbers are checked, also under `jit`.
      TypeError: `b` or `a` does not consist of real numbers of at least 32 bits, or `accumulator_dtype` is not a
        floating-point dtype of 8 to 64 bits.

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
    (b_array, b_dtype), (a_array, a_dtype) = _coefficients("b", b), _coefficients("a", a)
    traced = isinstance(b_array, Tracer) or isinstance(a_array, Tracer)
    if not isinstance(a_array, Tracer) and a_array[0] == 0:
        raise ValueError(
            f"a[0] must not be 0, got a = {a!r}; drop the leading zeros (and advance b by the same number)"
        )
    check_choice("start", start, get_args(Start))
    check_float_dtype("accumulator_dtype", accumulator_dtype)

    xp = jnp if traced else np
    order = max(len(b_array), len(a_array)) - 1
    numerator = xp.pad(b_array / a_array[0], (0, order + 1 - len(b_array)))
    denominator = xp.pad(a_array / a_array[0], (0, order + 1 - len(a_array)))
    steady = xp.zeros(order)
    if start == "gradient":
        if not traced and denominator.sum() == 0:
            raise ValueError(
                f"a must not sum to 0 with start='gradient', got a = {a!r}; such a filter has no steady state, use "
                "start='zero'"
            )
        gain = numerator.sum() / denominator.sum()
        steady = xp.cumsum((numerator - gain * denominator)[:0:-1])[::-1]

    def init_fn(params: optax.Params) -> Any:
        # Trees instead of a new axis: each leaf then fits the sharding and the partition metadata of its parameter.
        delays = tuple(zeros(params, accumulator_dtype) for _ in range(order))
        if not traced and order:
            used = {jnp.finfo(wide_dtype(leaf)).dtype for leaf in jax.tree.leaves(delays[0])}
            _check_rounding(
                numerator,
                denominator,
                used | {b_dtype, a_dtype},
                "use sosfilt, for a design of scipy.signal with output='sos'",
            )
        return LfilterState(delays, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_state(state, LfilterState)
        _check_delays(state.delays, order, updates)

        def advance(g: Any, *delays: jax.Array) -> tuple[jax.Array, ...]:
            dtype = wide_dtype(delays[0] if delays else g)
            b, a, z0 = (xp.asarray(x, dtype) for x in (numerator, denominator, steady))
            g = aligned(g, delays[0] if delays else g, dtype)
            z = [delay.astype(dtype) for delay in delays]
            if start == "gradient":
                z = [jnp.where(state.lfilter_step == 0, z0[k] * g, z[k]) for k in range(order)]
            # y = b_0 g + z_1, then z_k <- b_k g - a_k y + z_{k+1}
            total = [b[k] * g + z_k for k, z_k in enumerate([*z, jnp.zeros_like(g)])]
            y = total[0]
            # Skip the feedback beyond the last a_k: 0 times a non-finite y would never leave the memory.
            z = [total_k - a[k] * y if k < len(a_array) else total_k for k, total_k in enumerate(total)]
            return y, *(z_k.astype(delay.dtype) for z_k, delay in zip(z[1:], delays, strict=True))

        slow, *delays = unzip(updates, jax.tree.map(advance, updates, *state.delays), order + 1)
        return cast_like(slow, updates), LfilterState(tuple(delays), next_step(state.lfilter_step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sosfilt(
    sos: Sections,
    *,
    start: Start = "zero",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Linear filter of the gradients in second-order sections, with the meaning of `scipy.signal.sosfilt`.

    Each row :math:`b_0, b_1, b_2, a_0, a_1, a_2` of `sos` is a filter of order 2. The output of each section is the
    input of the next:

    .. math::
        a_0 y_t = \sum_{k=0}^2 b_k g_{t-k} - \sum_{k=1}^2 a_k y_{t-k}

    Use it for any design of `scipy.signal` (`butter`, `bessel`, `cheby1`, `ellip`, ... with `output="sos"`). The
    coefficients are stored relative to a double pole at 1. Designs of high order and low cutoff made in float64
    therefore stay accurate in float32. At order 8, the error relative to the largest output is 3e-6 for a cutoff of
    0.001, and 4e-5 for 0.0001. The filter stores 2 arrays per section and parameter.

    Args:
      sos: Sections, an array of shape (sections, 6), which may be traced. Pass designs in float64, as SciPy returns
        them: rounding to float32 loses low cutoffs, and a traced array is not checked.
      start: Input of the filter before the first gradient. `"zero"`: zeros. `"gradient"`: the first gradient at every
        step, which makes the response to it steady (`scipy.signal.sosfilt_zi` times the first gradient).
      accumulator_dtype: Dtype of the memory of the filter. None uses the parameters' dtype, but at least float32. The
        memory for complex parameters has the complex dtype of that width, at least complex64.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Its state
      is a `SosfiltState`.

    Raises:
      ValueError: `sos` is not of shape (sections, 6) or not finite, an `a_0` is 0, `start` is unknown, or the `a` of a
        section sum to 0 with `start="gradient"` (such a filter has no steady state). Or `sos` has dtype float32, and
        rounding to it can have changed the response of a section by more than 1 %.
      TypeError: `sos` does not consist of real numbers of at least 32 bits, or `accumulator_dtype` is not a
        floating-point dtype of 8 to 64 bits.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import sosfilt
      >>> average = sosfilt([[0.5, 0.0, 0.0, 1.0, -0.5, 0.0]])  # ema(0.5, start="zero")
      >>> state = average.init(jnp.zeros(2))
      >>> out, state = average.update(jnp.array([1.0, -2.0]), state)
      >>> out, state = average.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)
      [ 1.75 -0.5 ]

    References:
      Middleton and Goodwin, "Improved finite word length characteristics in digital control using delta operators",
      *IEEE Transactions on Automatic Control*, 1986.
    """
    array, dtype = _coefficients("sos", sos, shape=(None, 6))
    traced = isinstance(array, Tracer)
    if not traced and not array[:, 3].all():
        raise ValueError(f"a_0, column 3 of sos, must not be 0, got {sos!r}; divide each section by its a_0")
    check_choice("start", start, get_args(Start))
    check_float_dtype("accumulator_dtype", accumulator_dtype)
    array = array / array[:, 3:4]
    if not traced and jnp.finfo(dtype).bits < 64:
        for section in array:
            _check_rounding(section[:3], section[3:], {dtype}, "pass the design in float64, as SciPy returns it")
    xp = jnp if traced else np

    # With d = z - 1, a section is (b_0 d^2 + b_1' d + b_2') / (d^2 + a_1' d + a_2'). Rounding then acts on distances
    # from 1.
    b0, b1, b2, _, a1, a2 = array.T
    numerators = xp.stack([b0, 2 * b0 + b1, b0 + b1 + b2], axis=1)
    denominators = xp.stack([xp.ones_like(a1), 2 + a1, 1 + a1 + a2], axis=1)
    # Distribute the gain. SciPy puts all of it into the first section, and its output underflows at low cutoffs.
    gain = abs(numerators).max(axis=1, keepdims=True)
    gain = xp.where(gain.all(), gain, 1.0)  # unless a section is 0
    numerators = numerators * (xp.exp(xp.log(gain).mean()) / gain)
    steady = xp.zeros((len(array), 2))
    if start == "gradient":
        if not traced and not denominators[:, 2].all():
            raise ValueError(
                f"the a of each section of sos must not sum to 0 with start='gradient', got {sos!r}; such a filter has "
                "no steady state, use start='zero'"
            )
        gains = numerators[:, 2] / denominators[:, 2]
        inputs = xp.cumprod(xp.concatenate([xp.ones(1), gains[:-1]]))  # input of each section, per unit of gradient
        steady = inputs[:, None] * (gains[:, None] * denominators - numerators)[:, :2]

    def init_fn(params: optax.Params) -> Any:
        delays = tuple(zeros(params, accumulator_dtype) for _ in range(2 * len(array)))
        return SosfiltState(delays, jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_state(state, SosfiltState)
        _check_delays(state.delays, 2 * len(array), updates)

        def advance(g: Any, *delays: jax.Array) -> tuple[jax.Array, ...]:
            dtype = wide_dtype(delays[0])
            b, a, w0 = (xp.asarray(x, dtype) for x in (numerators, denominators, steady))
            g = aligned(g, delays[0], dtype)
            w = [delay.astype(dtype) for delay in delays]
            if start == "gradient":
                w = [jnp.where(state.sosfilt_step == 0, w0[k // 2, k % 2] * g, w[k]) for k in range(len(w))]
            y = g
            for k in range(len(array)):
                x, w1, w2 = y, w[2 * k], w[2 * k + 1]
                # y = b_0 x + w_1, then d w_1 = b_1' x - a_1' y + w_2 and d w_2 = b_2' x - a_2' y
                y = b[k, 0] * x + w1
                w[2 * k : 2 * k + 2] = w1 + (b[k, 1] * x - a[k, 1] * y + w2), w2 + (b[k, 2] * x - a[k, 2] * y)
            return y, *(w_k.astype(delay.dtype) for w_k, delay in zip(w, delays, strict=True))

        slow, *delays = unzip(updates, jax.tree.map(advance, updates, *state.delays), 2 * len(array) + 1)
        return cast_like(slow, updates), SosfiltState(tuple(delays), next_step(state.sosfilt_step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_rounding(b: Any, a: Any, dtypes: set[Any], cure: str) -> None:
    """Raise if rounding the coefficients to one of `dtypes` can change the response by more than LARGEST_CHANGE."""
    dtype = max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)
    change = _rounding_change(b, a, dtype)
    if not change <= LARGEST_CHANGE:  # also raises for NaN
        raise ValueError(
            f"b and a, rounded to {dtype}, must change the response by at most {LARGEST_CHANGE} of its largest value, "
            f"got b = {b.tolist()}, a = {a.tolist()} (over a[0]), which can change it by {change:.2g}; {cure}"
        )


def _rounding_change(b: Any, a: Any, dtype: Any) -> float:
    r"""Return a bound of the change of the response B / A at any frequency, relative to its largest value.

    Rounding changes each coefficient by a factor of at most 1 + u, with u half the epsilon of `dtype`. On the unit
    circle, |dB| <= u sum |b| and |dA| <= u sum |a|, and to first order |d(B / A)| <= (|dB| + |B / A| |dA|) / |A|. If
    this bound is below 1, then |dA| < |A|, and by Rouché's theorem no pole crosses the circle. |A| is sampled.
    """
    # An integrator: divide out a root that is exactly 1 before and after rounding.
    while len(a) > 1 and math.fsum(a) == 0 and math.fsum(a.astype(dtype).astype(np.float64)) == 0:
        a = np.cumsum(a)[:-1]
    # |A| is smallest near the angle of a root, in a range of angles as wide as the distance of the root to the circle.
    roots = np.roots(a)
    near = np.angle(roots) + np.outer(np.linspace(-3, 3, 25), abs(1 - abs(roots)))
    z = np.exp(-1j * np.concatenate([np.linspace(0, np.pi, 129), near.ravel()]))
    size = abs(np.polyval(a[::-1], z))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        largest = (abs(np.polyval(b[::-1], z)) / size).max() or 1.0
        return float(jnp.finfo(dtype).eps) / 2 * (abs(a).sum() + abs(b).sum() / largest) / size.min()


def _check_delays(delays: Sequence[optax.Updates], expected: int, updates: optax.Updates) -> None:
    """Raise unless there are `expected` delays, each with the structure and shapes of `updates`."""
    if len(delays) != expected:
        raise ValueError(
            f"state must have {expected} delays, got {len(delays)}; call init again for other coefficients"
        )
    for delay in delays:
        check_updates(updates, delay)


def _coefficients(name: str, values: Any, shape: tuple[int | None, ...] = (None,)) -> tuple[Any, np.dtype]:
    """Return `values` as a float array (of JAX if one is traced, else of NumPy in float64) and their original dtype."""
    example = "(1.0,)" if len(shape) == 1 else 'scipy.signal.butter(4, 0.02, output="sos")'
    kind = "one or more finite real numbers" if len(shape) == 1 else "finite real numbers of shape (sections, 6)"
    message = f"{name} must be {kind}, got {values!r}; pass e.g. {name}={example}"
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))
    try:
        array = jnp.asarray(values) if traced else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(message) from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(message)
    check_not_narrow(name, array)
    if array.ndim != len(shape) or array.size == 0 or array.shape[1:] != shape[1:]:
        raise ValueError(message)
    dtype = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else np.dtype(np.float64)
    array = array.astype(float)
    if not traced and not np.isfinite(array).all():
        raise ValueError(message)
    return array, np.dtype(dtype)
