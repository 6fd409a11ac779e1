"""The windowed moving average as a low-pass filter, in O(1) a step."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._arrays import cast_like, stacked_zeros, zeros
from ._checks import check_choice, check_float_dtype, check_int

Reduce = Literal["mean", "sum"]


class MovingAverageState(NamedTuple):
    """State of `moving_average`. A slot of the ring holds the sum of `stride` successive gradients."""

    # The window and the slot that left it: (window_size // stride + 1, *shape), or (*shape, ...). Narrower than 32 bits
    # it is of unsigned integers with the bits of `buffer_dtype`.
    ring: optax.Updates
    window: optax.Updates  # sum of the window, like params
    fresh: optax.Updates  # sum since slot 1 of the ring was begun, like params
    partial: optax.Updates | None  # sum of the gradients in the slot that is being filled; None for stride 1
    position: jax.Array  # () int32 in [0, window_size + stride), the place of the next gradient in the ring
    fill: jax.Array  # () int32, gradients seen so far, saturating at window_size


def moving_average(
    window_size: int,
    *,
    reduce: Reduce = "mean",
    warmup: bool = True,
    stride: int | None = None,
    buffer_dtype: jax.typing.DTypeLike | None = None,
    window_axis: Literal[0, -1] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moving average of the last `window_size` gradients: the filter of Grokfast-MA.

    .. math::
        y_t = \frac{1}{w} \sum_{k=0}^{w-1} g_{t-k}

    The cost of a step does not depend on the window: one slot of a ring is written, one is read, and two running sums
    are kept. One of them starts anew in every turn of the ring and at its end replaces the other, so rounding errors
    (and non-finite gradients) are forgotten after two windows at most.

    Args:
      window_size: Number w of gradients in the window, a positive int. 1 passes the gradients through; the paper uses
        100.
      reduce: `"mean"`, or `"sum"` for the sum of the window (`filter_type="sum"` of the authors' code).
      warmup: True gives zero until w gradients are there; False reduces over those that are.
      stride: Sum so many successive gradients in one slot of the ring, which divides its memory by as much; must
        divide `window_size`. A slot leaves the window as a whole, so the window then really holds between
        w - stride + 1 and w gradients; the mean is over those that it holds. None is 1, the exact window.
      buffer_dtype: Dtype of the ring. None keeps the parameters' dtype, but at least float32. A narrower one rounds
        every gradient (or slot) once; the sums stay in at least float32 and never drift. Prefer bfloat16: float16 makes
        0 of what is below 3e-8 and infinity of a slot above 65,504. The state then holds the bits, as unsigned
        integers, through which no derivative passes. For complex parameters, the complex dtype of that width, at least
        complex64.
      window_axis: Where the ring has its window axis: 0, the first and fast one, or -1, the last one. Parameters with
        Flax partition metadata need -1: the metadata names leading axes, and would shard the window at 0. None is 0.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose updates have the shapes and dtypes of the gradients. Its state
      is a `MovingAverageState`, window_size / stride + 3 arrays per parameter (and one more with a stride). Donate it
      under jit, or XLA copies the ring at each step.

    Raises:
      ValueError: `window_size` or `stride` is not positive, their sum is not below 2**31, `stride` does not divide
        `window_size`, or `reduce` or `window_axis` is unknown.
      TypeError: `window_size` or `stride` is no int, `warmup` no bool, or `buffer_dtype` no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from grokfast_jax import moving_average
      >>> slow = moving_average(2)
      >>> state = slow.init(jnp.zeros(2))
      >>> out, state = slow.update(jnp.array([1.0, -2.0]), state)
      >>> print(out)  # the window is not full yet
      [0. 0.]
      >>> out, state = slow.update(jnp.array([3.0, 0.0]), state)
      >>> print(out)
      [ 2. -1.]

    References:
      Lee, Kang, Kim and Lee, `Grokfast: Accelerated Grokking by Amplifying Slow Gradients
      <https://arxiv.org/abs/2405.20233>`_, 2024, Algorithm 2.
    """
    check_int("window_size", window_size, cure="use optax.identity() for no filter")
    stride = 1 if stride is None else stride
    check_int("stride", stride, cure="use stride=1 for the exact window")
    w, s = int(window_size), int(stride)
    if w % s:
        raise ValueError(
            f"stride must divide window_size, got stride={s} and window_size={w}; use stride=1 for the exact window"
        )
    if w + s >= 2**31:
        raise ValueError(f"window_size + stride must be below 2**31, got {w} + {s}; use a smaller window_size")
    check_choice("reduce", reduce, get_args(Reduce))
    check_choice("window_axis", window_axis, (0, -1, None))
    if not isinstance(warmup, bool):
        raise TypeError(f"warmup must be True or False, got {warmup!r}; pass a bool")
    check_float_dtype("buffer_dtype", buffer_dtype)

    axis = window_axis or 0
    slots = w // s  # of the window; the ring has one more
    # XLA's CPU compiler converts a whole bfloat16 array to float32 and back when one slot of it is updated; bits it
    # leaves in place.
    slot_dtype = ring_dtype = None if buffer_dtype is None else jnp.dtype(buffer_dtype)
    if slot_dtype is not None and slot_dtype.itemsize < 4:
        ring_dtype = jnp.dtype(f"uint{8 * slot_dtype.itemsize}")

    def stored(slot: jax.Array, ring: jax.Array) -> jax.Array:
        """A slot as the ring holds it."""
        if jnp.issubdtype(ring.dtype, jnp.unsignedinteger):
            return lax.bitcast_convert_type(slot.astype(slot_dtype), ring.dtype)
        return slot.astype(ring.dtype)

    def loaded(slot: jax.Array, window: jax.Array) -> jax.Array:
        """A slot of the ring as it is summed."""
        if slot_dtype is not None and jnp.issubdtype(slot.dtype, jnp.unsignedinteger):
            slot = lax.bitcast_convert_type(slot, slot_dtype)
        return slot.astype(window.dtype)

    def init_fn(params: optax.Params) -> Any:
        return MovingAverageState(
            ring=stacked_zeros(params, slots + 1, ring_dtype, axis),
            window=zeros(params, None),
            fresh=zeros(params, None),
            partial=zeros(params, None) if s > 1 else None,
            position=jnp.zeros((), jnp.int32),
            fill=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        place = jnp.asarray(state.position)
        slot, phase = place // s, place % s
        slot_done = phase == s - 1
        grads = jax.tree.map(lambda g, window: jnp.asarray(g, window.dtype), updates, state.window)
        total = grads if state.partial is None else jax.tree.map(jnp.add, state.partial, grads)
        # The slot as the ring holds it: what is added to the sums now is what leaves them later.
        rounded = jax.tree.map(stored, total, state.ring)
        added = jax.tree.map(loaded, rounded, state.window)
        if state.partial is not None:
            added = jax.tree.map(
                lambda r, partial, g: jnp.where(slot_done, r - partial, g), added, state.partial, grads
            )

        # XLA updates an array in place if nothing but its new value is read, so each is written first and then read:
        # the ring too, which is why it keeps the slot that leaves the window.
        ring = jax.tree.map(
            lambda ring, r: lax.dynamic_update_index_in_dim(ring, r, slot, axis % ring.ndim), state.ring, rounded
        )
        leaving = jax.tree.map(
            lambda ring: lax.dynamic_index_in_dim(ring, (slot + 1) % (slots + 1), axis % ring.ndim, keepdims=False),
            ring,
        )
        starts = (phase == 0) & (slot <= 1)
        fresh = jax.tree.map(lambda fresh, a: jnp.where(starts, 0, fresh) + a, state.fresh, added)
        # In the last slot of the ring `fresh` is the sum of the window, free of all that came before; in a window of
        # one slot it always is.
        whole = (slot == slots) | (slots == 1)
        window = jax.tree.map(
            lambda window, fresh, a, leaving: jnp.where(
                whole, fresh, window + (a - jnp.where(phase == 0, loaded(leaving, window), 0))
            ),
            state.window,
            fresh,
            added,
            leaving,
        )

        fill = jnp.minimum(state.fill + 1, w)
        full = fill == w
        held = jnp.where(full, w - s + 1 + phase, fill)
        scale = 1.0 / held.astype(float) if reduce == "mean" else jnp.ones((), float)
        slow = jax.tree.map(lambda window: scale.astype(window.dtype) * window, window)
        if warmup:
            slow = jax.tree.map(lambda slow: jnp.where(full, slow, 0), slow)

        partial = None if s == 1 else jax.tree.map(lambda total: jnp.where(slot_done, 0, total), total)
        position = (place + 1) % (w + s)
        new_state = MovingAverageState(ring, window, fresh, partial, position, fill)
        return cast_like(slow, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
