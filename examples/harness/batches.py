"""Batches of static shape."""

from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp


class Batch(TypedDict):
    """Numbers of examples, and weights that are 0 where a short batch is padded."""

    index: jax.Array  # (..., batch_size) int32
    weight: jax.Array  # (..., batch_size) float32
    dropout: NotRequired[jax.Array]  # (...,) a key for each batch that is trained on, where the model has dropout


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches in a pass over the examples, the last of which may be short."""
    return -(-examples // batch_size)


def in_batches(examples: jax.Array, batch_size: int) -> Batch:
    """One pass over `examples` (1-D) in their order, the last batch padded: (steps, batch_size)."""
    n = examples.shape[0]
    shape = (steps_per_epoch(n, batch_size), batch_size)
    padding = shape[0] * shape[1] - n
    index = jnp.pad(examples, (0, padding))
    weight = jnp.pad(jnp.ones(n, jnp.float32), (0, padding))
    return Batch(index=index.reshape(shape), weight=weight.reshape(shape))


def shuffled(key: jax.Array, examples: jax.Array, batch_size: int) -> Batch:
    """One pass over `examples` (1-D) in random order, the last batch padded: (steps, batch_size)."""
    return in_batches(jax.random.permutation(key, examples), batch_size)


def shuffled_epochs(key: jax.Array, examples: jax.Array, batch_size: int, epochs: int) -> Batch:
    """So many passes over `examples` (1-D), each in a random order of its own: (epochs * steps, batch_size)."""
    passes = jax.vmap(lambda key: shuffled(key, examples, batch_size))(jax.random.split(key, epochs))
    return jax.tree.map(lambda x: x.reshape(-1, batch_size), passes)
