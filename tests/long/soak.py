"""A million updates of every transformation under random gradients: `python -m tests.long.soak`.

The gradients are float32, bfloat16, float16 and complex64, their size jumps by up to four orders of magnitude, and
bursts of NaN and infinities strike them behind `optax.apply_if_finite`. After each chunk of updates (one `lax.scan`)
the state is serialised, read back and put on the device again, and the last update is compared with an independent
reference in float64 that never saw the bad steps. At the end nothing may have drifted, leaked or been compiled again.
Takes half an hour or more on a CPU.
"""

import dataclasses
import gc
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.signal
import tqdm
import tyro
from flax import serialization
from jax import lax

import grokfast_jax as gf
from examples.harness.files import provenance, write_whole

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "soak.json"
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16", "complex64")
# Largest error of an update, in units of the largest gradient of its chunk times the gain of the transformation. In
# 16 bits updates are rounded when they go out, amplified ones twice.
LIMITS = {"float32": 2e-6, "complex64": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
GROWTH_MIB = 32.0  # of the process, after the first chunks


class Reference(Protocol):
    """The slow part, computed in float64 or complex128 by the definition of the filter."""

    def feed(self, g: np.ndarray) -> np.ndarray:
        """Take further gradients (steps, n) and give the slow part after the last of them (n,)."""
        ...


class Linear:
    """A linear recurrence, by `scipy.signal.lfilter`; `steady`: as if the first gradient had always been there."""

    def __init__(self, b: Any, a: Any, steady: bool = False):
        self.b, self.a, self.steady = b, a, steady
        self.z: Any = None

    def series(self, g: np.ndarray) -> np.ndarray:
        """The slow part after each gradient."""
        if self.z is None:
            order = max(len(self.b), len(self.a)) - 1
            start = scipy.signal.lfilter_zi(self.b, self.a) if self.steady else np.zeros(order)
            self.z = start[:, None] * g[0]
        y, self.z = scipy.signal.lfilter(self.b, self.a, g, axis=0, zi=self.z)
        return y

    def feed(self, g: np.ndarray) -> np.ndarray:
        """See `Reference`."""
        return self.series(g)[-1]


class Ema(Linear):
    """The EMA; debiased, it is divided by the weights of what it has seen."""

    def __init__(self, alpha: float, start: str = "gradient"):
        alpha = float(np.float32(alpha))  # what the transformation is given; over 1,000 steps the difference shows
        super().__init__([1 - alpha], [1, -alpha], steady=start == "gradient")
        self.alpha = alpha if start == "debiased" else 0.0
        self.step = 0

    def feed(self, g: np.ndarray) -> np.ndarray:
        """See `Reference`."""
        self.step += len(g)
        return self.series(g)[-1] / (1 - self.alpha**self.step)


class Cascade:
    """One recurrence after another."""

    def __init__(self, *stages: Linear):
        self.stages = stages

    def feed(self, g: np.ndarray) -> np.ndarray:
        """See `Reference`."""
        for stage in self.stages:
            g = stage.series(g)
        return g[-1]


class Window:
    """The mean of the gradients in the window, each rounded to a dtype; see `stride` of `moving_average`."""

    def __init__(self, window: int, stride: int = 1, dtype: str | None = None):
        self.window, self.stride, self.dtype = window, stride, dtype
        self.held, self.step = np.zeros((0, 0)), 0

    def feed(self, g: np.ndarray) -> np.ndarray:
        """See `Reference`."""
        if self.dtype is not None and not np.iscomplexobj(g):
            g = g.astype(jnp.dtype(self.dtype)).astype(np.float64)
        self.step += len(g)
        self.held = np.concatenate([self.held, g])[-self.window :] if self.held.size else g[-self.window :]
        size = self.window - self.stride + 1 + (self.step - 1) % self.stride
        return self.held[-size:].mean(axis=0)


class Case(NamedTuple):
    """A transformation, what it should make of its gradients, and the weights of gradient and slow part in that."""

    make: Callable[[], optax.GradientTransformation]
    reference: Callable[[], Reference]
    fast: float = 0.0
    lamb: float = 1.0


BUTTER: Any = scipy.signal.butter(2, 0.05)
SECTIONS: Any = scipy.signal.butter(6, 0.02, output="sos")
LATE = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(5.0)], [500])
CASES = {
    "ema": Case(lambda: gf.ema(0.98), lambda: Ema(0.98)),
    "ema slow": Case(lambda: gf.ema(0.999, start="zero"), lambda: Ema(0.999, "zero")),
    "ema debiased": Case(lambda: gf.ema(0.98, start="debiased"), lambda: Ema(0.98, "debiased")),
    "moving_average": Case(lambda: gf.moving_average(100), lambda: Window(100)),
    "moving_average stride": Case(lambda: gf.moving_average(100, stride=10), lambda: Window(100, 10)),
    "moving_average sum": Case(lambda: gf.moving_average(100, reduce="sum"), lambda: Window(100), lamb=100.0),
    "moving_average bfloat16 ring": Case(
        lambda: gf.moving_average(100, buffer_dtype="bfloat16"), lambda: Window(100, dtype="bfloat16")
    ),
    "moving_average last axis": Case(lambda: gf.moving_average(97, window_axis=-1), lambda: Window(97)),
    "lfilter": Case(lambda: gf.lfilter(*BUTTER), lambda: Linear(*BUTTER)),
    "lfilter from the gradient": Case(
        lambda: gf.lfilter(*BUTTER, start="gradient"), lambda: Linear(*BUTTER, steady=True)
    ),
    "sosfilt": Case(lambda: gf.sosfilt(SECTIONS), lambda: Cascade(*(Linear(s[:3], s[3:]) for s in SECTIONS))),
    "sosfilt from the gradient": Case(
        lambda: gf.sosfilt(SECTIONS, start="gradient"),
        lambda: Cascade(*(Linear(s[:3], s[3:], steady=True) for s in SECTIONS)),
    ),
    "parallel": Case(
        lambda: gf.parallel((0.1, optax.identity()), (0.9, gf.ema(0.9, start="debiased"))),
        lambda: Ema(0.9, "debiased"),
        fast=0.1,
        lamb=0.9,
    ),
    "amplify cascade": Case(
        lambda: gf.amplify(optax.chain(gf.ema(0.9), gf.ema(0.98)), 2.0),
        lambda: Cascade(Ema(0.9), Ema(0.98)),
        fast=1.0,
        lamb=2.0,
    ),
    "amplify late": Case(lambda: gf.amplify(gf.ema(0.98), LATE), lambda: Ema(0.98), fast=1.0, lamb=5.0),
    "grokfast_ema": Case(gf.grokfast_ema, lambda: Ema(0.98), fast=1.0, lamb=2.0),
    "grokfast_ma": Case(gf.grokfast_ma, lambda: Window(100), fast=1.0, lamb=5.0),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A million updates of every transformation under random gradients."""

    updates: int = 1_000_000
    """Updates of each transformation, a multiple of `chunk`."""
    chunk: int = 10_000
    """Updates between two checkpoints, at least 1,000, after which all windows are full and all schedules done."""
    cases: tuple[str, ...] = tuple(CASES)
    """Transformations to run."""
    seed: int = 0
    """Seed of the gradients."""


def draw(rng: np.random.Generator, steps: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients of `steps` updates, one leaf per dtype, and which of the updates are free of NaN and infinities."""
    size = 10 ** rng.uniform(-3, 1)
    grads = {}
    for dtype in DTYPES:
        g = size * (0.3 + rng.normal(size=(steps, 3)))
        if dtype == "complex64":
            g = g + 1j * size * rng.normal(size=g.shape)
        grads[dtype] = g.astype(jnp.dtype(dtype))
    good = np.ones(steps, bool)
    for start in rng.integers(0, steps, size=steps // 500):
        rows = slice(start, min(start + rng.geometric(0.1), steps - 1))  # the last update is compared
        good[rows] = False
        grads[str(rng.choice(DTYPES))][rows, rng.integers(3)] = rng.choice([np.nan, np.inf, -np.inf])
    return grads, good


def resident_mib() -> float:
    """Memory of the process; its peak where the system does not tell what it is now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


def soak(name: str, arguments: Arguments, bar: tqdm.tqdm) -> dict[str, Any]:
    """Run one case; the figures that came out."""
    case = CASES[name]
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=10**9)
    references = {dtype: case.reference() for dtype in DTYPES}
    rng = np.random.default_rng(arguments.seed)
    params = {dtype: jnp.zeros(3, dtype) for dtype in DTYPES}

    @jax.jit
    def run(state: optax.OptState, grads: Any) -> tuple[optax.OptState, Any]:
        def step(carry: Any, g: Any) -> tuple[Any, None]:
            updates, state = tx.update(g, carry[0], params)
            return (state, updates), None

        return lax.scan(step, (state, params), grads)[0]

    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    state: Any = tx.init(params)
    errors = dict.fromkeys(DTYPES, 0.0)
    memory, arrays, bad = [], [], 0
    for i in range(arguments.updates // arguments.chunk):
        if i == 1:
            jax.monitoring.register_event_duration_secs_listener(listen)
        grads, good = draw(rng, arguments.chunk)
        bad += int((~good).sum())
        state, updates = run(state, grads)
        for dtype, reference in references.items():
            wide = np.complex128 if dtype == "complex64" else np.float64
            g = grads[dtype][good].astype(wide)
            expected = case.fast * g[-1] + case.lamb * reference.feed(g)
            scale = max((case.fast + case.lamb) * np.abs(g).max(), np.abs(expected).max())
            error = np.abs(np.asarray(updates[dtype]).astype(wide) - expected).max() / scale
            errors[dtype] = max(errors[dtype], float(error)) if np.isfinite(error) else float("inf")
        restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
        state = jax.tree.map(jnp.asarray, restored)
        gc.collect()
        memory.append(resident_mib())
        arrays.append(len(jax.live_arrays()))
        bar.update(arguments.chunk)
    jax.monitoring.unregister_event_duration_listener(listen)
    settled = min(len(memory) - 1, max(1, len(memory) // 10))
    return {
        "largest_error": {dtype: float(f"{error:.3g}") for dtype, error in errors.items()},
        "non_finite_updates": bad,
        "non_finite_updates_counted": int(state.total_notfinite),
        "compilations_after_the_first_chunk": len(compiled),
        "live_arrays": [min(arrays[1:]), max(arrays[1:])],
        "resident_mib": [round(memory[0], 1), round(memory[settled], 1), round(memory[-1], 1)],
        "resident_growth_mib": round(memory[-1] - memory[settled], 1),
    }


def faults(figures: dict[str, Any]) -> list[str]:
    """What of the figures of a case must not be."""
    found = [
        f"error {error} in {dtype}, limit {LIMITS[dtype]}"
        for dtype, error in figures["largest_error"].items()
        if not error <= LIMITS[dtype]
    ]
    if figures["non_finite_updates"] != figures["non_finite_updates_counted"]:
        found.append("non-finite updates were miscounted")
    if figures["compilations_after_the_first_chunk"]:
        found.append("compiled again")
    if figures["live_arrays"][0] != figures["live_arrays"][1]:
        found.append("the number of live arrays changes")
    if figures["resident_growth_mib"] > GROWTH_MIB:
        found.append(f"the process grew by {figures['resident_growth_mib']} MiB")
    return found


def main(arguments: Arguments) -> None:
    """Soak, write what came out, and fail if anything is at fault."""
    with tqdm.tqdm(total=arguments.updates * len(arguments.cases), unit="update", mininterval=10) as bar:
        results = {name: soak(name, arguments, bar) for name in arguments.cases}
    problems = {name: found for name, figures in results.items() if (found := faults(figures))}
    result = {**dataclasses.asdict(arguments), **provenance(), "limits": LIMITS, "faults": problems, "results": results}
    write_whole(OUT, json.dumps(result, indent=1) + "\n")
    print(f"{len(results)} transformations, {arguments.updates:,} updates each: {problems or 'no faults'}; {OUT}")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m tests.long.soak"))
