"""Methods: functions of their hyperparameters that return an optax transformation.

A hyperparameter annotated `float` is a number that may be traced: runs that differ in such numbers alone share one
compiled program, and a sweep may vmap over them. All others (int, str, bool, `Static`) are constants of the program.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import optax

from .errors import UsageError, require

Method = Callable[..., optax.GradientTransformation]


class Range(NamedTuple):
    """The values that an annotated argument may have, and what it is where the docstring does not say."""

    allowed: str
    contains: Callable[[Any], bool]
    about: str = ""


def _at_least_0(value: Any) -> bool:
    return 0 <= value < math.inf


STATIC = "static"
Static = Annotated[float, STATIC]  # a number that is a constant of the compiled program
LearningRate = Annotated[float, Range("a finite number of at least 0", _at_least_0, "Learning rate")]
WeightDecay = Annotated[float, Range("a finite number of at least 0", _at_least_0, "Weight decay")]
Alpha = Annotated[float, Range("in [0, 1)", lambda x: 0 <= x < 1, "Weight of the past in the EMA")]
Lamb = Annotated[float, Range("a finite number", math.isfinite, "Amplification of the slow part of the gradients")]
Momentum = Annotated[Static, Range("in [0, 1)", lambda x: 0 <= x < 1, "Decay rate of the first moment")]
Fast = Annotated[float, Range("a finite number", math.isfinite, "Weight of the gradient itself")]
Window = Annotated[int, Range("at least 1", lambda x: x >= 1, "Gradients in the moving average")]
StartStep = Annotated[int, Range("at least 0", lambda x: x >= 0, "Step from which the slow part is amplified")]
Tx = optax.GradientTransformation


def parameters(method: Method) -> Mapping[str, inspect.Parameter]:
    """The hyperparameters of a method, or of a `functools.partial` of one, by name."""
    return inspect.signature(method, eval_str=True).parameters


def base(method: Method) -> Any:
    """The function itself, without the arguments that a `functools.partial` gives it."""
    if getattr(method, "args", ()):
        raise TypeError(f"functools.partial of {method.func.__name__} must give its hyperparameters by name")  # type: ignore
    return getattr(method, "func", method)


def ranges(annotation: Any) -> list[Range]:
    """The ranges in an annotation."""
    return [one for one in getattr(annotation, "__metadata__", ()) if isinstance(one, Range)]


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """A value as Python's int or float; UsageError if that changes it."""
    try:
        number = kind(value)
    except (OverflowError, TypeError, ValueError):
        number = None
    is_same = number is not None and bool(number == value or value != value)
    require(is_same, name, "a whole number" if kind is int else "a number", value)
    return number  # type: ignore


def hyperparams(method: Method, **given: Any) -> dict[str, Any]:
    """All hyperparameters of a method by name, by default its own; UsageError if it does not take a name or a value."""
    known = parameters(method)
    if unknown := given.keys() - known.keys():
        raise UsageError(f"{base(method).__name__} takes {', '.join(known)}, got {', '.join(sorted(unknown))}")
    values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    for name, value in values.items():
        annotation = known[name].annotation
        if value is inspect.Parameter.empty:
            raise UsageError(f"{base(method).__name__} needs a value of {name}")
        if (kind := getattr(annotation, "__origin__", annotation)) in (int, float):
            values[name] = _number(name, value, kind)
        for limit in ranges(annotation):
            require(limit.contains(values[name]), name, limit.allowed, values[name])
    try:
        method(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return values


def split(method: Method, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters that may be traced, and the static ones."""
    annotations = {name: parameter.annotation for name, parameter in parameters(method).items()}
    is_static = lambda kind: STATIC in getattr(kind, "__metadata__", ())
    is_traced = lambda kind: getattr(kind, "__origin__", kind) is float and not is_static(kind)
    traced = {name: value for name, value in values.items() if is_traced(annotations[name])}
    return traced, {name: value for name, value in values.items() if name not in traced}
