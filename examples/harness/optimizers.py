"""Parts of optimizers that the methods of several tasks use."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def warmup(lr: jax.typing.ArrayLike, steps: int = 10) -> optax.Schedule:
    """A learning rate that rises linearly from 0 over the first steps; the paper's takes ten."""
    return lambda step: lr * optax.linear_schedule(0.0, 1.0, steps)(step)


def from_step(first: int, weight: jax.typing.ArrayLike, before: float = 0.0) -> optax.Schedule:
    """A weight that is `before` until an update, counted from 0."""
    return lambda step: jnp.where(jnp.asarray(step) >= first, weight, before)


def stacked_muon(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """optax.contrib.muon, with arrays of one shape as one: fewer and larger products, which are faster on a CPU."""

    def stack(tree: Any) -> dict[str, jax.Array]:
        arrays: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            arrays.setdefault(str(leaf.shape), []).append(leaf)
        return {shape: jnp.stack(leaves) for shape, leaves in arrays.items()}

    def matrices(stacks: dict[str, Any]) -> dict[str, Any]:  # which optax masks, too
        dimensions = optax.contrib.MuonDimensionNumbers(1, 2)
        return {shape: dimensions if getattr(stack, "ndim", 0) == 3 else None for shape, stack in stacks.items()}

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        stacks, state = tx.update(stack(updates), state, stack(params))
        arrays = {shape: iter(stack) for shape, stack in stacks.items()}
        return jax.tree.map(lambda leaf: next(arrays[str(leaf.shape)]), updates), state

    muon: Any = optax.contrib.muon
    tx = muon(learning_rate, muon_weight_dimension_numbers=matrices, **options)
    return optax.GradientTransformation(lambda params: tx.init(stack(params)), update)
