"""Helpers for states: dtypes of at least 32 bits, zeros sharded like the parameters, and the update count."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def wide_dtype(x: Any) -> jnp.dtype:
    """Return the dtype for computations with an array or dtype `x`: the dtype of `x`, but at least float32."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
        return dtype
    return jnp.dtype(jnp.float32)


def widened(tree: Any) -> Any:
    """Cast the leaves of `tree` to the dtypes for computations with them; abstract leaves become zeros."""

    def widen(leaf: Any) -> jax.Array:
        cast = jnp.zeros_like if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray
        return cast(leaf, dtype=wide_dtype(leaf))

    return jax.tree.map(widen, tree)


def state_dtype(x: Any, requested: jax.typing.DTypeLike | None) -> jnp.dtype:
    """Return the dtype for sums over `x`: `requested` (made complex for complex `x`), or by default `wide_dtype(x)`."""
    if requested is None:
        return wide_dtype(x)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if jnp.dtype(requested).itemsize > 4 else jnp.complex64)
    return jnp.dtype(requested)


def widest_dtype(tree: Any) -> jnp.dtype:
    """Return the widest real dtype for computations with a leaf of `tree`, at least float32."""
    dtypes = [jnp.finfo(wide_dtype(leaf)).dtype for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def zeros(params: optax.Params, requested: jax.typing.DTypeLike | None) -> optax.Updates:
    """Return zeros with the shapes and shardings of `params`."""
    # `jnp.zeros(p.shape)` would lose the sharding.
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=state_dtype(p, requested)), params)


def stacked_zeros(
    params: optax.Params, length: int, requested: jax.typing.DTypeLike | None, axis: int = 0
) -> optax.Updates:
    """Return zeros like `params` with a new, unsharded axis of `length`: the first (`axis=0`) or last (`axis=-1`)."""

    def stack(zero: jax.Array) -> jax.Array:
        old_axes = tuple(range(1, zero.ndim + 1) if axis == 0 else range(zero.ndim))
        shape = (length, *zero.shape) if axis == 0 else (*zero.shape, length)
        return lax.broadcast_in_dim(zero, shape, old_axes)

    return jax.tree.map(stack, zeros(params, requested))


def cast_like(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    """Cast the leaves of `tree` to the dtypes of `like`; round to integers."""

    def cast(like_leaf: Any, leaf: jax.Array) -> jax.Array:
        dtype = jnp.result_type(like_leaf)
        return (jnp.round(leaf) if jnp.issubdtype(dtype, jnp.integer) else leaf).astype(dtype)

    return jax.tree.map(cast, like, tree)


def aligned(x: Any, like: Any, dtype: jnp.dtype) -> jax.Array:
    """Return `x` as an array of `dtype`, divided among explicit mesh axes as `like` is."""
    x, sharding = jnp.asarray(x, dtype), jax.typeof(like).sharding
    return x if jax.typeof(x).sharding.spec == sharding.spec else jax.sharding.reshard(x, sharding)


def unzip(like: optax.Updates, tree: Any, parts: int) -> list[Any]:
    """Split `tree`, which has a tuple of `parts` values in place of each leaf of `like`, into `parts` trees."""
    return [jax.tree.map(lambda _, leaf, k=k: leaf[k], like, tree) for k in range(parts)]


def next_step(step: jax.Array) -> jax.Array:
    """Return the update count after `step`, saturating at the largest int32."""
    return jnp.asarray(optax.safe_increment(step))
