"""The tests that optax ships for its own transformations, pointed at ours.

    python -m pytest -W ignore tests/long/optax_own.py

They are private modules of optax, which may change with any release, so they are not part of the suite. Their tables of
optimizers are arguments of absl's `parameterized` decorators, so these are wrapped while the modules are imported: our
tables take the place of optax's, everything else stays as it is. No file of optax is copied.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import optax
import pytest
from absl.testing import parameterized
from optax import contrib

import grokfast_jax as gf

# Optimizers that the tests of optax.contrib find by name; each is to reach the minimum of their functions.
OPTIMIZERS = {
    "grokfast_ema_adam": lambda learning_rate: optax.chain(gf.grokfast_ema(), optax.adam(learning_rate)),
    # The paper's lamb=5.0 never settles in Rosenbrock's valley at this learning rate: the mean is too late for it.
    "grokfast_ma_adam": lambda learning_rate: optax.chain(gf.grokfast_ma(20, lamb=1.0), optax.adam(learning_rate)),
    "lfilter_adam": lambda learning_rate: optax.chain(
        gf.amplify(gf.lfilter([0.1], [1.0, -0.9]), 1.0), optax.adam(learning_rate)
    ),
}
TRANSFORMATIONS = {
    "ema": (gf.ema, {"alpha": 0.9}),
    "ema_debiased": (gf.ema, {"alpha": 0.9, "start": "debiased"}),
    "moving_average": (gf.moving_average, {"window_size": 3}),
    "moving_average_stride": (gf.moving_average, {"window_size": 4, "stride": 2, "window_axis": -1}),
    "lfilter": (gf.lfilter, {"b": (0.1,), "a": (1.0, -0.9)}),
    "grokfast_ema": (gf.grokfast_ema, {}),
    "grokfast_ma": (gf.grokfast_ma, {"window_size": 3}),
}


def is_table(argument: Any) -> bool:
    """Whether this is a table of optimizers rather than another list of values."""
    rows = list(argument) if isinstance(argument, list | tuple | type({}.items())) else []
    return bool(rows) and all(isinstance(row, dict) and "opt_name" in row for row in rows)


@contextmanager
def our_tables() -> Iterator[None]:
    """Within, absl's decorators give a test our rows in place of optax's."""
    product, named = parameterized.product, parameterized.named_parameters
    ours = [
        {"opt_name": name, "opt_kwargs": {"learning_rate": 1e-2}, "wrapper_name": None, "wrapper_kwargs": None}
        for name in OPTIMIZERS
    ]

    def our_product(*tables: Any, **values: Any) -> Any:
        return product(*(ours if is_table(table) else table for table in tables), **values)

    def our_named(*rows: Any) -> Any:
        table = list(rows[0]) if len(rows) == 1 else list(rows)
        if all(isinstance(row[1], optax.GradientTransformation) for row in table):
            return named(*((name, make(**kwargs)) for name, (make, kwargs) in TRANSFORMATIONS.items()))
        if all(callable(row[1]) for row in table):
            return named(*((name, make, kwargs) for name, (make, kwargs) in TRANSFORMATIONS.items()))
        return named(*rows)

    with (
        mock.patch.object(parameterized, "product", our_product),
        mock.patch.object(parameterized, "named_parameters", our_named),
    ):
        yield


with our_tables():
    ContribTest = importlib.import_module("optax.contrib._common_test").ContribTest
    Float64Test = importlib.import_module("optax._src.float64_test").Float64Test
    ShardingTest = importlib.import_module("optax._src.sharding_test").ShardingTest


@pytest.fixture(autouse=True)
def as_optax_runs_them(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's usual promotion, our optimizers among those of optax.contrib, and no skip since "0.10" < "0.7" as text."""
    for name, factory in OPTIMIZERS.items():
        monkeypatch.setattr(contrib, name, factory, raising=False)
    monkeypatch.setattr(jax, "__version__", "9")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
