"""Settings of all tests and doctests: strict dtypes and ranks, and fast compilation."""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import jax.experimental
import pytest

# Most of the time of the tests is compilation. These options of XLA compile several times faster, to slower code. A
# later version of XLA may not know them, and would abort.
OPTIONS = {  # name: (value for the tests, default of XLA)
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_use_fusion_emitters": (False, True),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ >= (0, 11):
    OPTIONS.clear()
# An XLA_FLAGS in the environment takes precedence. `XLA_FLAGS= python -m pytest` compiles with the defaults of XLA.
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={str(value).lower()}" for name, (value, _) in OPTIONS.items()))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# `python -m pytest --hypothesis-profile=thorough` draws more examples.
hypothesis.settings.register_profile("fast", max_examples=5, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=40, deadline=None)
hypothesis.settings.load_profile("fast")

if not hasattr(jax, "enable_x64"):  # jax < 0.8
    jax.enable_x64 = jax.experimental.enable_x64


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit mode within a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def lenient() -> Iterator[None]:
    """The usual dtype promotion of JAX, for tests with transformations of optax that need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def usual_options() -> dict[str, int]:
    """Return the default options of XLA, for `Lowered.compile` in tests that assert HLO, bytes or memory."""
    return {name: default for name, (_, default) in OPTIONS.items()}


PROGRAMS: dict[Any, Any] = {}


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Reuse, in runs and sweeps of a module, the programs that earlier tests compiled; they are pure functions."""
    from examples.harness import engine, runner, train  # tests of the library alone run without what these need

    def program(run: Any, *, devices: int = 1, precision: train.Precision = "float32") -> train.Program:
        key = run.program_key, devices, precision
        if key not in PROGRAMS:
            PROGRAMS[key] = train.program(run, devices=devices, precision=precision)
        return PROGRAMS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "program", program)
        patch.setattr(engine, "program", program)
        yield
