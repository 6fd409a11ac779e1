"""Strict settings for all tests and doctests: our own code must not promote, broadcast or warn by accident."""

import gc
from collections.abc import Iterator

import jax
import jax.experimental
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if not hasattr(jax, "enable_x64"):  # jax < 0.8
    jax.enable_x64 = jax.experimental.enable_x64


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit mode within a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def lenient() -> Iterator[None]:
    """JAX's usual dtype promotion, for tests that run transformations of optax which need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect, after the test, the futures that Orbax drops when it fails: a later test would be blamed for them."""
    yield
    gc.collect()
