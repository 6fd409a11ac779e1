"""Checks of arguments. Each message gives the name, the allowed values, the value and the cure."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def check_number(
    name: str,
    value: Any,
    *,
    allowed: str,
    cure: str,
    low: float = -math.inf,
    high: float = math.inf,
    schedule: bool = True,
) -> None:
    """Raise unless `value` is a finite real scalar in [low, high), a tracer of one, or (if allowed) a schedule."""
    if callable(value) and schedule:
        return
    message = f"{name} must be {allowed}, got {value!r}; {cure}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(message)
    dtype = jnp.result_type(value)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(message)
    check_not_narrow(name, value)
    if np.shape(value) != ():
        raise ValueError(message)
    if isinstance(value, Tracer):
        return
    try:
        value = float(value)  # under jit, comparing a JAX array gives a tracer
    except OverflowError as error:  # a Python int beyond float64
        raise ValueError(message) from error
    if not (math.isfinite(value) and low <= value < high):
        raise ValueError(message)
    used_in = jnp.result_type(float)
    with np.errstate(over="ignore"):
        used = float(np.asarray(value, used_in))
    if not (math.isfinite(used) and low <= used < high):
        raise ValueError(f"{message} (in {used_in} this is {used})")


def check_not_narrow(name: str, value: Any) -> None:
    """Raise if `value` is an array (traced or not) of a floating-point dtype below 32 bits."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} must have a dtype of at least 32 bits, got {value!r}, which rounds numbers near 1; "
            "under optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"
        )


def number_at(name: str, value: Any, step: Any) -> jax.Array:
    """Return `value`, or its value at `step` if it is a schedule, in the default float dtype."""
    if callable(value):
        value = value(step)
        check_not_narrow(name, value)
        is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
        if not is_number or np.shape(value) != () or jnp.iscomplexobj(value):
            raise ValueError(f"{name} must be a real scalar at every step, got {value!r}; return one from the schedule")
    return jnp.asarray(value, float)


def check_int(name: str, value: Any, *, cure: str, low: int = 1) -> None:
    """Raise unless `value` is a Python or NumPy int of at least `low`, which must be 0 or 1."""
    allowed = "a positive int" if low else "an int of at least 0"
    if callable(value):
        cure = f"{name} cannot change during training; pass one int"
    elif isinstance(value, float) and value.is_integer():
        cure = f"pass int({name})"
    message = f"{name} must be {allowed}, got {value!r}; {_cure(name, value, cure)}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(message)
    if value < low:
        raise ValueError(message)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        cure = _cure(name, value, "choose one of these")
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}; {cure}")


def check_float_dtype(name: str, value: Any) -> None:
    """Raise unless `value` is None or a real floating-point dtype that can store a running sum."""
    if value is None:
        return
    message = (
        f"{name} must be None or a real floating-point dtype of 8 to 64 bits with a zero and a sign, "
        f"got {value!r}; pass e.g. jnp.float32"
    )
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(message) from error
    # float8_e8m0fnu stores only powers of two.
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.name == "float8_e8m0fnu":
        raise TypeError(message)
    if not 8 <= jnp.finfo(dtype).bits <= 64:
        raise TypeError(message)


def check_transformation(name: str, value: Any) -> None:
    """Raise unless `value` is a gradient transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {value!r}; pass a filter such as ema(0.98)"
        )


def check_state(state: Any, expected: type) -> None:
    """Raise unless `state` is an instance of `expected`."""
    if not isinstance(state, expected):
        raise TypeError(
            f"state must be the {expected.__name__} that init returned, got a {type(state).__name__}; "
            "pass the latest state of this transformation"
        )


def check_updates(updates: optax.Updates, like: optax.Updates) -> None:
    """Raise unless `updates` have the structure and shapes of `like`, part of a state, and are complex where it is."""
    cure = "call init again for other parameters"
    structures = jax.tree.structure(like), jax.tree.structure(updates)
    if structures[0] != structures[1]:
        raise ValueError(
            f"updates must have the structure of the parameters passed to init, {structures[0]}, "
            f"got {structures[1]}; {cure}"
        )
    for (path, like_leaf), leaf in zip(
        jax.tree_util.tree_flatten_with_path(like)[0], jax.tree.leaves(updates), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(like_leaf):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} must have the shape of the parameter passed to init, "
                f"{jnp.shape(like_leaf)}, got {jnp.shape(leaf)}; {cure}"
            )
        if jnp.iscomplexobj(leaf) != jnp.iscomplexobj(like_leaf):
            kind = "complex" if jnp.iscomplexobj(like_leaf) else "real"
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} must be {kind} like the parameter passed to init, "
                f"got dtype {jnp.result_type(leaf)}; cast the gradient, or {cure}"
            )


def _cure(name: str, value: Any, otherwise: str) -> str:
    """Return the cure for a bad static argument, which `optax.inject_hyperparams` may have converted to an array."""
    if isinstance(value, jax.Array):
        return f'pass a Python value, not an array; under optax.inject_hyperparams name it in static_args=("{name}",)'
    return otherwise
