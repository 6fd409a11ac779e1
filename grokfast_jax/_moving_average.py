"""The windowed moving average as a low-pass filter, at O(1) cost per step."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._arrays import aligned, cast_like, stacked_zeros, unzip, zeros
from ._checks import check_choice, check_float_dtype, check_int, check_state, check_updates

Reduce = Literal["mean", "sum"]


class MovingAverageState(NamedTuple):
    """State of `moving_average`. A slot of the ring buffer holds the sum of `stride` successive gradients."""

    # Ring buffer of the window and of the slot that has just left it: (window_size // stride + 1, *shape), or with the
    # slots on the last axis. For a buffer_dtype below 32 bits: unsigned integers with the bits of that dtype.
    ring: optax.Updates
    window: optax.Updates  # sum of the window, like params
    fresh: optax.Updates  # sum of the gradients since slot 1 of the ring was begun, like params
    partial: optax.Updates | None  # sum of the gradients in the unfinished slot, like params; None for stride 1
    # () int32 in [0, window_size + stride), the place of the next gradient in the ring. The one key names the arguments
    # that determine what the ring holds, so that the state of other arguments has another structure.
    position: dict[str, jax.Array]
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

    The cost per step does not depend on the window size. Each step writes one slot of a ring buffer (the ring), reads
    one slot, and updates two running sums. One sum restarts with each turn of the ring, and replaces the other sum at
    the end of the turn. Rounding errors and non-finite gradients therefore last for at most two windows. After a
    gradient of size S has left the window, the error of the mean is at most about eps S / 2 for one more window. In
    float32 with S = 1e7, this is 0.6.

    Args:
      window_size: Number w of gradients in the window, a positive int. 1 passes the gradients through; the paper uses
        100.
      reduce: `"mean"`, or `"sum"` for the sum over the window (`filter_type="sum"` in the authors' code).
      warmup: True returns zeros for the first w - 1 gradients; False reduces over the gradients seen so far.
      stride: Number of successive gradients that share one slot of the ring, which divides the memory of the ring by
        `stride`. It must divide `window_size`. All gradients of a slot leave the window together. The window therefore
        contains between w - stride + 1 and w gradients, and the mean is over these. None means 1, the exact window.
      buffer_dtype: Dtype of the ring. None uses the parameters' dtype, but at least float32. A narrower dtype rounds
        each slot once; the sums stay in at least float32 and do not drift. Prefer bfloat16: float16 rounds values below
        3e-8 to 0, and slots above 65,504 to infinity. The state stores a dtype below 32 bits as unsigned integers, and
        the derivative through these is 0. The ring of complex parameters has the complex dtype of that width, at least
        complex64.
      window_axis: Axis of the slots in the ring: 0 (the first axis, the faster choice) or -1 (the last axis).
        Parameters with Flax partition metadata need -1, because the metadata names the leading axes, and with 0 would
        shard the slots. None means 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates have the shapes and dtypes of the gradients. Its state
      is a `MovingAverageState`: window_size / stride + 3 arrays per parameter, and one more if `stride` is above 1.

    Warning:
      Donate the state under jit (`donate_argnums`). Otherwise XLA copies the whole ring at each step, into new memory,
      which is far slower than the update.

    Raises:
      ValueError: `window_size` or `stride` is not positive, their sum is not below 2**31, `stride` does not divide
        `window_size`, `warmup` is not a bool, or `reduce` or `window_axis` is unknown.
        In `update`: the state comes from another `window_size`, `stride`, `window_axis` or `buffer_dtype` below 32
        bits. The ring of a state from another `buffer_dtype` of at least 32 bits keeps its dtype.
      TypeError: `window_size` or `stride` is not an int, or `buffer_dtype` is not a floating-point dtype of 8 to 64
        bits.

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
    check_choice("warmup", warmup, (True, False))
    check_float_dtype("buffer_dtype", buffer_dtype)

    axis = window_axis or 0
    layout = f"window_size={w}, stride={s}, window_axis={axis}"
    slots = w // s  # in the window; the ring has one more
    # To update one slot of a bfloat16 array, XLA's CPU compiler converts the whole array to float32 and back. It does
    # not convert integers, and therefore a narrow ring stores the bits of its dtype as integers.
    slot_dtype = ring_dtype = None if buffer_dtype is None else jnp.dtype(buffer_dtype)
    if slot_dtype is not None and slot_dtype.itemsize < 4:
        ring_dtype = jnp.dtype(f"uint{8 * slot_dtype.itemsize}")
        layout += f", buffer_dtype={slot_dtype}"

    def to_slot(total: jax.Array, ring: jax.Array) -> jax.Array:
        """Convert the sum of a slot to the form stored in the ring."""
        if jnp.issubdtype(ring.dtype, jnp.unsignedinteger):
            return lax.bitcast_convert_type(total.astype(slot_dtype), ring.dtype)
        return total.astype(ring.dtype)

    def from_slot(slot: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Convert a slot of the ring to a sum of dtype `dtype`."""
        if slot_dtype is not None and jnp.issubdtype(slot.dtype, jnp.unsignedinteger):
            slot = lax.bitcast_convert_type(slot, slot_dtype)
        return slot.astype(dtype)

    def init_fn(params: optax.Params) -> Any:
        return MovingAverageState(
            ring=stacked_zeros(params, slots + 1, ring_dtype, axis),
            window=zeros(params, None),
            fresh=zeros(params, None),
            partial=zeros(params, None) if s > 1 else None,
            position={layout: jnp.zeros((), jnp.int32)},
            fill=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_state(state, MovingAverageState)
        if set(state.position) != {layout}:
            found = "; ".join(state.position)
            raise ValueError(
                f"state must come from moving_average({layout}), got moving_average({found}); call init again"
            )
        check_updates(updates, state.window)
        place = jnp.asarray(state.position[layout])
        slot, phase = place // s, place % s
        slot_begins, slot_ends = phase == 0, phase == s - 1
        # A turn of the ring begins with slot 1. In its last slot, `fresh` is therefore the sum of the window, without
        # the rounding errors of earlier turns. If the window has one slot, this is true at every step.
        turn_begins = slot_begins & (slot <= 1)
        turn_ends = (slot == slots) | (slots == 1)
        fill = jnp.minimum(state.fill + 1, w)
        full = fill == w
        held = jnp.where(full, w - s + 1 + phase, fill)  # gradients in the window
        scale = 1.0 / held.astype(float) if reduce == "mean" else jnp.ones((), float)

        def advance(
            g: Any, ring: jax.Array, window: jax.Array, fresh: jax.Array, *partial: jax.Array
        ) -> tuple[jax.Array, ...]:
            g = aligned(g, window, window.dtype)
            total = partial[0] + g if partial else g
            stored = to_slot(total, ring)
            # Add the value stored in the ring, which may be rounded: the same value is subtracted later.
            added = from_slot(stored, window.dtype)
            if partial:
                added = jnp.where(slot_ends, added - partial[0], g)

            # Write first, then read: XLA updates an array in place only if nothing reads its old value. This is why the
            # ring has one more slot, for the gradients that leave the window.
            ring = lax.dynamic_update_index_in_dim(ring, stored, slot, axis)
            leaving = lax.dynamic_index_in_dim(ring, (slot + 1) % (slots + 1), axis, keepdims=False)
            removed = jnp.where(slot_begins, from_slot(leaving, window.dtype), 0)
            fresh = jnp.where(turn_begins, 0, fresh) + added
            # Subtract first: one rounding at the size of `window` instead of two, which matters after a spike.
            window = jnp.where(turn_ends, fresh, window + (added - removed))

            slow = scale.astype(window.dtype) * window
            if warmup:
                slow = jnp.where(full, slow, 0)
            return slow, ring, window, fresh, *(jnp.where(slot_ends, 0, total) for _ in partial)

        partial = () if s == 1 else (state.partial,)
        leaves = jax.tree.map(advance, updates, state.ring, state.window, state.fresh, *partial)
        slow, ring, window, fresh, *partial = unzip(updates, leaves, 4 + len(partial))
        position = {layout: (place + 1) % (w + s)}
        new_state = MovingAverageState(ring, window, fresh, partial[0] if partial else None, position, fill)
        return cast_like(slow, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
