"""The mod-97 experiment against the same in PyTorch, in turn in one run: `python -m benchmarks.cost.vs_torch`.

Needs the extra "bench". Both sides start from the same weights and see the same batches; that the losses of their first
ten steps agree is checked before anything is timed. A chunk is what we train between two evaluations of all validation
examples: 10 steps.

- `ours`: the compiled harness.
- `torch`: eager PyTorch, `torch.optim.Adam`, filters of the package pytorch_optimizer.
- `torch, frugal`: the same with the arithmetic of our model, which computes `x op` once for each x, and the last block
  at the last position only.
- `torch.compile`: `torch` with the model compiled; `torch.compile, frugal` likewise. Needs a C++ compiler.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import RESULTS, Count, OutFile, run_command
from examples.harness.experiment import Run
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import Program, program
from examples.modular import EXPERIMENT

from .timing import in_turn, in_words, spread, versions, write

OUT = RESULTS / "vs_torch.json"
SEEDS = (0, 1, 2)  # of the whole runs to 95 %
COMPILATIONS = 3
TOLERANCE = 1e-4  # of the losses of the first ten steps
SIDES: dict[str, dict[str, bool]] = {
    "torch": {},
    "torch, frugal": {"frugal": True},
    "torch.compile": {"torch_compile": True},
    "torch.compile, frugal": {"torch_compile": True, "frugal": True},
}

Chunk = Callable[[], float]  # trains one chunk; the validation accuracy after it


def ours(compiled: Program, run: Run, seed: int) -> Chunk:
    """A run of the harness."""
    records = evaluations(compiled, run.traced, jax.random.key(seed))
    return lambda: next(records).rows[0]["val_accuracy"]


def theirs(compiled: Program, run: Run, seed: int, **options: bool) -> Chunk:
    """The same run in PyTorch."""
    from .torch_twins import evaluations

    records = evaluations(compiled, run, seed, **options)
    return lambda: next(records)[0]


def check_agreement(compiled: Program, run: Run, **options: bool) -> None:
    """The losses of the first ten steps must be the same here and in PyTorch."""
    from .torch_twins import evaluations

    key = jax.random.key(0)
    _, metrics = compiled.advance(run.traced, key, *compiled.draw(key), compiled.init(run.traced, key))
    _, losses = next(evaluations(compiled, run, 0, **options))
    np.testing.assert_allclose(losses, metrics["losses"], rtol=TOLERANCE, atol=TOLERANCE)


def compile_seconds(compiled: Program, run: Run) -> float:
    """Seconds to trace and compile a run: those of its first chunk, less those of its second."""
    jax.clear_caches()
    chunk = ours(compiled, run, 0)
    start = time.perf_counter()
    chunk()
    middle = time.perf_counter()
    chunk()
    return (middle - start) - (time.perf_counter() - middle)


def time_chunks(run: Run, rounds: int) -> dict[str, Any]:
    """Seconds to compile, and seconds per step, evaluation included, of each contender."""
    compiled, steps = program(run), run.task.steps
    compiling = spread(np.array([compile_seconds(compiled, run) for _ in range(COMPILATIONS)]))
    contenders = {"ours": ours(compiled, run, 0)}
    for side, options in SIDES.items():
        check_agreement(compiled, run, **options)
        contenders[side] = theirs(compiled, run, 0, **options)
    for _ in range(run.hyperparams.get("window_size", 0) // steps):  # PyTorch's MA slows down until its window is full
        for chunk in contenders.values():
            chunk()
    seconds = in_turn(contenders, rounds)
    return {
        "compile_seconds": compiling,
        "seconds_a_step": {side: spread(times / steps) for side, times in seconds.items()},
        "ratio_to_ours": {side: spread(times / seconds["ours"]) for side, times in seconds.items()},
    }


def time_to_95(method: str) -> list[dict[str, Any]]:
    """Steps and seconds to 95 % validation accuracy, evaluation included and compilation not, here and in PyTorch."""
    run = EXPERIMENT.run(method)
    compiled, steps = program(run), run.task.steps
    ours(compiled, run, 0)()
    rows = []
    for seed in SEEDS:
        sides = {"ours": ours(compiled, run, seed), "torch": theirs(compiled, run, seed)}
        for side, chunk in sides.items():
            start = time.perf_counter()
            ends = range(steps, run.max_steps + steps, steps)
            reached = next((step for step in ends if chunk() >= 0.95), None)
            row = {"method": method, "seed": seed, "side": side, "steps": reached}
            rows.append(row | {"seconds": time.perf_counter() - start})
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown: chunks, then whole runs."""
    versions, epochs = result["versions"], result["epochs"]
    chunks = [
        {
            "run": name,
            "side": side,
            "ms per step": in_words(seconds, ".1f", 1e3),
            "times ours": in_words(epoch["ratio_to_ours"][side], ".2f"),
        }
        for name, epoch in epochs.items()
        for side, seconds in epoch["seconds_a_step"].items()
    ]
    runs = [
        {name: row[name] for name in ("method", "seed", "side")}
        | {"steps to 95 %": f"{row['steps']:,}" if row["steps"] else "fails", "seconds": f"{row['seconds']:.1f}"}
        for row in result["to_95"]
    ]
    compiling = ", ".join(f"{epoch['compile_seconds']['median']:.1f} s ({name})" for name, epoch in epochs.items())
    return (
        f"{result['device']}; jax {versions['jax']}, torch {versions['torch']}; {result['rounds']} rounds in turn; "
        "medians (quartiles). A step includes its share of the evaluation after each chunk.\n\n"
        f"{markdown(chunks)}\n{markdown(runs)}\n"
        f"Tracing and compiling, not counted above, median of {COMPILATIONS}: {compiling}.\n"
    )


def main(rounds: Count = 15, out: OutFile = OUT) -> None:
    """Time the mod-97 experiment here and in PyTorch; the file is written after each part.

    Args:
      rounds: Timed rounds; each contender trains one chunk per round.
      out: File for the results.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    result = {**provenance(), "rounds": rounds, "epochs": {}, "to_95": []}
    result["versions"] |= versions(("torch", "pytorch_optimizer"), "-e '.[bench]'")
    for method in ("adam", "ema", "ma"):
        result["epochs"][f"modular {method}"] = time_chunks(EXPERIMENT.run(method), rounds)
        write(out, result)
    for method in ("ema", "ma"):
        result["to_95"] += time_to_95(method)
        write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.vs_torch")
