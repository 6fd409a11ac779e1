"""Two of our experiments against the same in PyTorch, in turn in one run: `python -m benchmarks.cost.vs_torch`.

Needs the extra "bench". Both sides start from the same weights and see the same batches; that the losses of their first
ten steps agree is checked before anything is timed. A chunk is what we train between two evaluations of all validation
examples: 10 steps of the mod-97 model, 250 of MNIST's.

- `ours`: the compiled harness.
- `torch`: eager PyTorch, `torch.optim.Adam` or `AdamW`, filters of the package pytorch_optimizer.

And for the mod-97 model

- `torch, frugal`: the same with the arithmetic of our model, which computes `x op` once for each x, and the last block
  at the last position only.
- `torch.compile`: `torch` with the model compiled, where that works; `torch.compile, frugal` likewise.
- `grokfast-pytorch`: `torch` with that package's AdamW, which has the EMA inside.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from benchmarks import RESULTS, run_command
from examples.harness.errors import UserError
from examples.harness.experiment import Run, find_experiment
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import Program, program
from examples.modular import Modular

from .timing import in_turn, in_words, ratios, spread, write

OUT = RESULTS / "vs_torch.json"
COMPILATIONS = 3
TOLERANCE = 1e-4  # of the losses of the first ten steps, relative where they are above 1

Chunk = Callable[[], float]  # trains one chunk; the validation accuracy after it


def ours(compiled: Program, run: Run, seed: int) -> Chunk:
    """A run of the harness."""
    records = evaluations(compiled, run.traced, jax.random.key(seed))
    return lambda: next(records).rows[0]["val_accuracy"]


def check_agreement(compiled: Program, run: Run, other: Any) -> float:
    """The largest difference of the losses of the first ten steps, of which `other` has none; they must agree."""
    key = jax.random.key(0)
    state = compiled.init(run.traced, key)
    _, metrics = compiled.advance(run.traced, key, *compiled.draw(key), state)
    other.chunk()
    losses, theirs = np.asarray(metrics["losses"])[:10], np.array(other.losses)[:10]
    difference = np.max(np.abs(losses - theirs) / np.maximum(1, np.abs(losses)))
    if not difference < TOLERANCE:
        raise RuntimeError(f"the two sides do not do the same: losses {losses} here, {theirs} in PyTorch")
    return float(difference)


def compile_seconds(compiled: Program, run: Run) -> float:
    """Seconds to trace and compile a run: those of its first chunk, less those of its second."""
    jax.clear_caches()
    chunk = ours(compiled, run, 0)
    times = [time.perf_counter()]
    for _ in range(2):
        chunk()
        times.append(time.perf_counter())
    return (times[1] - times[0]) - (times[2] - times[1])


def time_chunks(run: Run, rounds: int) -> dict[str, Any]:
    """Seconds to compile, and seconds per step, evaluation included, of each contender."""
    from .torch_twins import Trainer

    compiled, steps, numbers = program(run), run.task.steps, run.hyperparams
    compiling = spread([compile_seconds(compiled, run) for _ in range(COMPILATIONS)])
    options: dict[str, dict[str, bool]] = {"torch": {}}
    if isinstance(run.task, Modular):
        options |= {"torch, frugal": {"frugal": True}, "torch.compile": {"torch_compile": True}}
        options |= {"torch.compile, frugal": {"torch_compile": True, "frugal": True}}
        if "alpha" in numbers:
            options |= {"grokfast-pytorch": {"grokfast_pytorch": True}}
    contenders: dict[str, Chunk] = {"ours": ours(compiled, run, 0)}
    gflop, failed, difference = {}, {}, 0.0
    for side, option in options.items():
        trainer = Trainer(compiled, run, 0, **option)
        if side == "grokfast-pytorch":  # its decay is another
            trainer.chunk()
        elif "torch_compile" not in option:
            difference = max(difference, check_agreement(compiled, run, trainer))
            gflop[side] = trainer.forward_gflop()
        else:
            try:
                check_agreement(compiled, run, trainer)
            except Exception as error:  # whatever torch.compile lacks here, such as a C++ compiler
                failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                continue
        contenders[side] = trainer.chunk
    if "window_size" in numbers:  # its cost in PyTorch grows until the window is full
        for _ in range(numbers["window_size"] // steps):
            for chunk in contenders.values():
                chunk()
    seconds = in_turn(contenders, rounds)
    return {
        "first_losses_differ_by": difference,
        "compile_seconds": compiling,
        "forward_gflop": gflop,
        "seconds_a_step": {n: spread([v / steps for v in values]) for n, values in seconds.items()},
        "ratio_to_ours": {n: ratios(values, seconds["ours"]) for n, values in seconds.items()},
        "failed": failed,
    }


def time_to_95(method: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Steps and seconds to 95 % validation accuracy, evaluation included and compilation not, here and in PyTorch.

    A method whose optimizer PyTorch does not have is trained here alone.
    """
    from .torch_twins import Trainer

    setting = find_experiment("modular").run(method)
    compiled, steps = program(setting), setting.task.steps
    ours(compiled, setting, 0)()
    rows = []
    for seed in seeds:
        sides = {"ours": ours(compiled, setting, seed)}
        if method in ("adam", "ema", "ma"):
            sides["torch"] = Trainer(compiled, setting, seed).chunk
        for side, run in sides.items():
            start = time.perf_counter()
            chunks, accuracy = 0, 0.0
            while accuracy < 0.95 and chunks * steps < setting.max_steps:
                accuracy = run()
                chunks += 1
            row = {"method": method, "seed": seed, "side": side, "seconds": time.perf_counter() - start}
            rows.append({**row, "steps": chunks * steps, "reached": accuracy >= 0.95})
            print(rows[-1])
    return rows


def whole_runs(rows: list[dict[str, Any]]) -> str:
    """The runs to 95 %, and by method the seconds of PyTorch over ours: median and range of the seeds.

    Ours that PyTorch does not have are compared with the EMA there.
    """
    shown = [
        {name: row[name] for name in ("method", "seed", "side")}
        | {"steps to 95 %": f"{'' if row['reached'] else 'fails within '}{row['steps']:,}"}
        | {"seconds": f"{row['seconds']:.1f}"}
        for row in rows
    ]
    seconds = pd.DataFrame(rows).pivot(index=["method", "seed"], columns="side", values="seconds")
    in_torch = {method: times["torch"].dropna() for method, times in seconds.groupby("method", sort=False)}
    texts = []
    for method, times in seconds["ours"].groupby("method", sort=False):
        other = method if len(in_torch[method]) else "ema"
        found = (in_torch[other].droplevel("method") / times.droplevel("method")).dropna()
        if len(found):
            of = f"`{method}`" if other == method else f"`{method}`, the {str(other).upper()} in PyTorch"
            times_ours = f"{found.median():.1f} ({found.min():.1f} to {found.max():.1f})"
            texts.append(f"PyTorch took {times_ours} times as long as ours ({of}).")
    return f"{markdown(shown)}\n{' '.join(texts)}\n"


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    versions, cells, rows = result["versions"], result["epochs"], []
    for name, cell in cells.items():
        texts = {
            side: (in_words(seconds, ".1f", 1e3), in_words(cell["ratio_to_ours"][side], ".2f"))
            for side, seconds in cell["seconds_a_step"].items()
        } | {side: (f"does not run here: {why}", "") for side, why in cell["failed"].items()}
        rows += [{"run": name, "side": s, "ms per step": ms, "times ours": r} for s, (ms, r) in texts.items()]
    gflop = {name.partition(" ")[0]: cell["forward_gflop"] for name, cell in cells.items()}
    counts = [f"{side} {value:.2g} ({task})" for task, sides in gflop.items() for side, value in sides.items()]
    compiling = ", ".join(f"{cell['compile_seconds']['median']:.1f} s ({name})" for name, cell in cells.items())
    parts = [
        f"{result['device']}; jax {versions['jax']}, torch {versions['torch']}; {result['rounds']} rounds in turn; "
        "medians (quartiles). A step includes its share of the evaluation after each chunk.\n",
        markdown(rows),
        *([whole_runs(result["to_95"])] if result["to_95"] else []),
        f"GFLOP of the matrix products of a forward pass of one batch: {', '.join(counts)}. "
        "Ours has the arithmetic of `torch, frugal`.\n",
        f"Tracing and compiling, not counted above, median of {COMPILATIONS}: {compiling}.\n",
    ]
    return "\n".join(parts)


def main(
    runs: tuple[str, ...] = ("modular adam", "modular ema", "modular ma", "mnist paper"),
    rounds: int = 15,
    seeds: tuple[int, ...] = (0, 1, 2),
    data_dir: Path | None = None,
    out: Path = OUT,
) -> None:
    """Time the mod-97 and the MNIST experiment here and in PyTorch; the file is written after each part.

    Args:
      runs: Tasks and methods whose chunks are timed.
      rounds: Timed rounds; each contender trains one chunk per round.
      seeds: Seeds of the whole runs to 95 % validation accuracy, mod 97 by the EMA, the MA and fastest; may be none.
      data_dir: Folder with the four files of MNIST; None downloads them once.
      out: File for the results.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    result = {**provenance(), "rounds": rounds, "epochs": {}, "to_95": []}
    try:
        result["versions"] |= {name: version(name) for name in ("torch", "pytorch_optimizer", "grokfast-pytorch")}
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install -e '.[bench]'") from error
    for run in runs:
        name, _, method = run.partition(" ")
        experiment = find_experiment(name)
        task: Any = experiment.task
        if data_dir is not None and hasattr(task, "data_dir"):
            task = dataclasses.replace(task, data_dir=data_dir)
        result["epochs"][run] = time_chunks(experiment.run(method, task), rounds)
        write(out, result)
    for method in ("ema", "ma", "fastest"):
        result["to_95"] += time_to_95(method, seeds)
        write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.vs_torch")
