"""Checks of arguments: each message gives the name, what is allowed, the value and the cure."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    if isinstance(value, Tracer):
        return
    if not (math.isfinite(value) and low <= value < high):
        raise ValueError(message)
    used_in = jnp.result_type(float)
    with np.errstate(over="ignore"):
        used = float(np.asarray(value, used_in))
    if not (math.isfinite(used) and low <= used < high):
        raise ValueError(f"{message} (in {used_in} this is {used})")


def check_not_narrow(name: str, value: Any) -> None:
    """Raise if `value` is an array, traced or not, of a floating-point dtype of less than 32 bits."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
        raise TypeError(
            f"{name} must have a dtype of at least 32 bits, got {value!r}, which rounds what is near 1; "
            "under optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"
        )


def check_int(name: str, value: Any, *, cure: str, low: int = 1) -> None:
    """Raise unless `value` is a Python (or NumPy) int of at least `low`, which is 0 or 1."""
    allowed = "a positive int" if low else "an int of at least 0"
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
    """Raise unless `value` is None or names a real floating-point dtype."""
    if value is None:
        return
    cure = _cure(name, value, "pass e.g. jnp.float32")
    message = f"{name} must be a real floating-point dtype or None, got {value!r}; {cure}"
    if isinstance(value, jax.Array):
        raise TypeError(message)
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(message) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message)


def check_transformation(name: str, value: Any) -> None:
    """Raise unless `value` is a gradient transformation."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {value!r}; pass a filter such as ema(0.98)"
        )


def _cure(name: str, value: Any, otherwise: str) -> str:
    """What helps against a bad value of a static argument, which `optax.inject_hyperparams` may have made an array."""
    if isinstance(value, jax.Array):
        return f'pass no array; under optax.inject_hyperparams name it in static_args=("{name}",)'
    return otherwise
