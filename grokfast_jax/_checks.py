"""Checks of arguments: each message gives the name, what is allowed, the value and the cure."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_number(
    name: str, value: Any, *, allowed: str, cure: str, low: float = -math.inf, high: float = math.inf
) -> None:
    """Raise unless `value` is a finite real scalar in [low, high), a tracer of one, or a schedule."""
    if callable(value):
        return
    message = f"{name} must be {allowed}, got {value!r}; {cure}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise TypeError(message)
    dtype = jnp.result_type(value)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(message)
    if np.shape(value) != ():
        raise ValueError(message)
    if not isinstance(value, Tracer) and not (math.isfinite(value) and low <= value < high):
        raise ValueError(message)


def check_int(name: str, value: Any, *, cure: str, low: int = 1) -> None:
    """Raise unless `value` is a Python (or NumPy) int of at least `low`, which is 0 or 1."""
    allowed = "a positive int" if low else "an int of at least 0"
    if isinstance(value, jax.Array):
        cure = f'pass a Python int; under optax.inject_hyperparams name it in static_args=("{name}",)'
    message = f"{name} must be {allowed}, got {value!r}; {cure}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(message)
    if value < low:
        raise ValueError(message)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}; choose one of these")


def check_float_dtype(name: str, value: Any) -> None:
    """Raise unless `value` is None or names a real floating-point dtype."""
    if value is None:
        return
    message = f"{name} must be a real floating-point dtype or None, got {value!r}; pass e.g. jnp.float32"
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(message) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message)
