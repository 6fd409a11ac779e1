"""Weighted sums of filters: `parallel`, `amplify`, and the paper's Grokfast-EMA and Grokfast-MA."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._arrays import cast_like, next_step, widened
from ._checks import check_choice, check_number, check_state, check_transformation, number_at
from ._ema import Start, ema
from ._moving_average import Reduce, moving_average


class ParallelState(NamedTuple):
    """State of `parallel`."""

    branches: tuple[optax.OptState, ...]  # state of each transformation
    parallel_step: jax.Array  # () int32, updates so far, saturating; drives the schedules of the weights


class AmplifyState(NamedTuple):
    """State of `amplify`."""

    lowpass: optax.OptState  # state of the filter
    amplify_step: jax.Array  # () int32, updates so far, saturating; drives the schedules of lamb and fast


def parallel(
    *branches: tuple[optax.ScalarOrSchedule, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted sum of several transformations of the same gradients.

    .. math::
        y_t = \sum_i w_i \cdot f_i(g)_t

    This connects filters in parallel; `optax.chain(f, g)` connects them in series. Gradients narrower than float32 are
    widened to float32 for the transformations. The sum is rounded once, to the dtype of the gradients.

    Args:
      *branches: One or more pairs (weight, transformation). A weight is any finite number, a scalar array or a schedule
        of the update count. A transformation is any `optax.GradientTransformation`; `optax.identity()` adds the
        gradient itself. While a weight is exactly 0, infinities and NaN of its branch do not reach the sum.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Extra
      arguments go to each transformation. Its state is a `ParallelState`.

    Raises:
      ValueError: `branches` is empty, or a weight is not finite or not a scalar.
      TypeError: A branch is not a pair, its second part is not a gradient transformation, or its weight is not a
        number, array or schedule, or has a 16-bit dtype.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from grokfast_jax import ema, parallel
      >>> tx = parallel((1.0, optax.identity()), (-1.0, ema(0.5)))  # the gradient minus its slow part
      >>> state = tx.init(jnp.zeros(2))
      >>> out, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> out, state = tx.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)
      [1. 1.]

    References:
      Oppenheim and Schafer, *Discrete-Time Signal Processing*, 3rd ed., 2010, section 6.3.3.
    """
    if not branches:
        raise ValueError("branches must be one or more pairs (weight, transformation), got (); pass at least one")
    for i, branch in enumerate(branches):
        if isinstance(branch, optax.GradientTransformation) or not isinstance(branch, tuple | list) or len(branch) != 2:
            raise TypeError(
                f"branches[{i}] must be a pair (weight, transformation), got {branch!r}; pass e.g. (1.0, ema(0.98))"
            )
        check_transformation(f"branches[{i}][1]", branch[1])
        check_number(
            f"branches[{i}][0]",
            branch[0],
            allowed="a finite number or a schedule of finite numbers",
            cure="pass the weight first and the transformation second",
        )
    weights = [weight for weight, _ in branches]
    transformations = [optax.with_extra_args_support(tx) for _, tx in branches]

    def init_fn(params: optax.Params) -> Any:
        return ParallelState(tuple(tx.init(widened(params)) for tx in transformations), jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        check_state(state, ParallelState)
        if len(state.branches) != len(branches):
            raise ValueError(f"state must have {len(branches)} branches, got {len(state.branches)}; call init again")
        grads = widened(updates)
        outs, states = zip(
            *(
                tx.update(grads, branch, params, **extra_args)
                for tx, branch in zip(transformations, state.branches, strict=True)
            ),
            strict=True,
        )
        now = [number_at(f"branches[{i}][0]", weight, state.parallel_step) for i, weight in enumerate(weights)]

        def weighted_sum(g: jax.Array, *parts: Any) -> jax.Array:
            terms = [_weighted(weight.astype(g.dtype), part) for weight, part in zip(now, parts, strict=True)]
            return sum(terms[1:], start=terms[0])

        total = jax.tree.map(weighted_sum, grads, *outs)
        return cast_like(total, updates), ParallelState(states, next_step(state.parallel_step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weighted(weight: jax.Array, part: Any) -> jax.Array:
    """Return `weight * part`, but 0 where `weight` is 0 and `part` is not finite."""
    part = jnp.asarray(part, weight.dtype)
    # 0 times a finite part is not replaced, because the part is the derivative with respect to the weight.
    return jnp.where((weight == 0) & ~jnp.isfinite(part), 0, weight * part)


def amplify(
    lowpass: optax.GradientTransformation,
    lamb: optax.ScalarOrSchedule,
    *,
    fast: optax.ScalarOrSchedule = 1.0,
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Add the amplified slow part of the gradients to the gradients.

    .. math::
        \hat g_t = \mathrm{fast} \cdot g_t + \lambda \cdot \mathrm{lowpass}(g)_t

    Equivalent to `parallel((fast, optax.identity()), (lamb, lowpass))`. Chain it before an optimizer. Any gradient
    transformation can be the filter: `ema`, `moving_average`, `sosfilt`, a cascade of these in `optax.chain`, or
    `optax.ema`.

    Args:
      lowpass: The filter, an `optax.GradientTransformation` that maps the gradients to their slow part.
      lamb: Amplification :math:`\lambda` of the slow part: any finite number, a scalar array, or a schedule of the
        update count. The filter sees the gradients from the first update on, also while `lamb` is 0; a schedule that
        starts at 0 is the paper's two-stage variant. While `lamb` is 0, infinities and NaN in the filter do not reach
        the updates.
      fast: Weight of the gradient itself, in the same forms as `lamb`. 0 keeps only the slow part (the paper's "slow
        only" ablation).
      normalize: Divide by `fast + lamb`. This preserves the size of a constant gradient if the filter does: averages
        do, sums do not. If `fast` or `lamb` is a schedule, `fast + lamb` must not be 0 at any step, or the updates are
        not finite.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Extra
      arguments go to the filter. Its state is an `AmplifyState`.

    Raises:
      ValueError: `lamb` or `fast` is not finite or not a scalar, `normalize` is not a bool, or it is True while
        `fast + lamb` is 0.
      TypeError: `lowpass` is not a gradient transformation, or `lamb` or `fast` is not a number, array or schedule, or
        has a 16-bit dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import amplify, ema
      >>> tx = amplify(ema(0.5), lamb=2.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> out, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)  # g + 2 g
      [ 3. -6.]
      >>> out, state = tx.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)  # g + 2 (g_0 + g) / 2
      [ 7. -2.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, equation 5.
    """
    check_transformation("lowpass", lowpass)
    check_choice("normalize", normalize, (True, False))
    allowed = "a finite number or a schedule of finite numbers"
    check_number(
        "lamb", lamb, allowed=allowed, cure="the paper uses 2.0 for the EMA and 5.0 for the MA; 0.0 turns it off"
    )
    check_number("fast", fast, allowed=allowed, cure="1.0 keeps the gradient, 0.0 keeps only its slow part")
    known = [x for x in (fast, lamb) if not callable(x) and not isinstance(x, Tracer)]
    if normalize and len(known) == 2 and sum(np.asarray(x, jnp.result_type(float)) for x in known) == 0:
        raise ValueError(
            f"fast + lamb must not be 0 with normalize=True, got fast={fast!r} and lamb={lamb!r}; use normalize=False"
        )

    def weights(step: Any) -> tuple[jax.Array, jax.Array]:
        fast_now, lamb_now = number_at("fast", fast, step), number_at("lamb", lamb, step)
        if not normalize:
            return fast_now, lamb_now
        total = fast_now + lamb_now
        return fast_now / total, lamb_now / total

    both = parallel((lambda step: weights(step)[0], optax.identity()), (lambda step: weights(step)[1], lowpass))

    def init_fn(params: optax.Params) -> Any:
        state: Any = both.init(params)
        return AmplifyState(state.branches[1], state.parallel_step)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        check_state(state, AmplifyState)
        old = ParallelState((optax.EmptyState(), state.lowpass), state.amplify_step)
        new: Any
        amplified, new = both.update(updates, old, params, **extra_args)
        return amplified, AmplifyState(new.branches[1], new.parallel_step)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def grokfast_ema(
    alpha: optax.ScalarOrSchedule = 0.98,
    lamb: optax.ScalarOrSchedule = 2.0,
    *,
    fast: optax.ScalarOrSchedule = 1.0,
    normalize: bool = False,
    start: Start = "gradient",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grokfast-EMA: add `lamb` times the exponential moving average of the gradients to each gradient.

    .. math::
        \mu_t &= \alpha \mu_{t-1} + (1 - \alpha) g_t \\
        \hat g_t &= g_t + \lambda \mu_t

    Equivalent to `amplify(ema(alpha, ...), lamb, ...)`.

    Args:
      alpha: Weight of the past in the average, in [0, 1), or a schedule; see `ema`.
      lamb: Amplification :math:`\lambda` of the average, or a schedule; see `amplify`.
      fast: Weight of the gradient itself, or a schedule; see `amplify`.
      normalize: Divide by `fast + lamb`; see `amplify`.
      start: How the average starts; see `ema`.
      accumulator_dtype: Dtype of the average; see `ema`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: As in `ema` and `amplify`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from grokfast_jax import grokfast_ema
      >>> tx = optax.chain(grokfast_ema(alpha=0.5, lamb=2.0), optax.sgd(1.0))
      >>> state = tx.init(jnp.zeros(2))
      >>> out, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)
      [-3.  6.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, Algorithm 1.
    """
    return amplify(ema(alpha, start=start, accumulator_dtype=accumulator_dtype), lamb, fast=fast, normalize=normalize)


def grokfast_ma(
    window_size: int = 100,
    lamb: optax.ScalarOrSchedule = 5.0,
    *,
    filter_type: Reduce = "mean",
    warmup: bool = True,
    fast: optax.ScalarOrSchedule = 1.0,
    normalize: bool = False,
    stride: int | None = None,
    buffer_dtype: jax.typing.DTypeLike | None = None,
    window_axis: Literal[0, -1] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grokfast-MA: add `lamb` times the mean of the last `window_size` gradients to each gradient.

    .. math::
        \hat g_t = g_t + \lambda \frac{1}{w} \sum_{k=0}^{w-1} g_{t-k}

    Equivalent to `amplify(moving_average(window_size, ...), lamb, ...)`. Donate the state under jit; see the warning in
    `moving_average`.

    Args:
      window_size: Number w of gradients in the window; see `moving_average`.
      lamb: Amplification :math:`\lambda` of the mean, or a schedule; see `amplify`.
      filter_type: `"mean"` or `"sum"`. The authors' name for `reduce` of `moving_average`.
      warmup: True adds 0 until the window is full; see `moving_average`.
      fast: Weight of the gradient itself, or a schedule; see `amplify`.
      normalize: Divide by `fast + lamb`; see `amplify`. With `warmup=True`, this shrinks the gradients until the window
        is full. With `filter_type="sum"`, it does not preserve the size of a constant gradient.
      stride: Number of successive gradients per slot of the ring buffer; see `moving_average`.
      buffer_dtype: Dtype of the ring buffer; see `moving_average`.
      window_axis: Axis of the slots in the ring buffer, 0 or -1; see `moving_average`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError, TypeError: As in `moving_average` and `amplify`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from grokfast_jax import grokfast_ma
      >>> tx = optax.chain(grokfast_ma(window_size=2, lamb=5.0), optax.sgd(1.0))
      >>> state = tx.init(jnp.zeros(2))
      >>> out, state = tx.update(jnp.array([1.0, -2.0]), state)
      >>> out, state = tx.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)  # -(g + 5 (g_0 + g) / 2)
      [-13.   5.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, Algorithm 2.
    """
    check_choice("filter_type", filter_type, get_args(Reduce))
    lowpass = moving_average(
        window_size,
        reduce=filter_type,
        warmup=warmup,
        stride=stride,
        buffer_dtype=buffer_dtype,
        window_axis=window_axis,
    )
    return amplify(lowpass, lamb, fast=fast, normalize=normalize)
