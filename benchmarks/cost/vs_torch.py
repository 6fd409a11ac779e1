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

import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np

from benchmarks import RESULTS, Count, DataDir, Names, OutFile, run_command
from examples.harness.errors import require
from examples.harness.experiment import Run, find_experiment
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.methods import Range
from examples.harness.tables import markdown
from examples.harness.train import Program, program
from examples.mnist import Mnist
from examples.modular import Modular

from .tasks import default_run
from .timing import in_turn, in_words, ratios, spread, versions, write

OUT = RESULTS / "vs_torch.json"
COMPILATIONS = 3
TOLERANCE = 1e-4  # of the losses of the first ten steps, relative where they are above 1
SIDES: dict[str, dict[str, bool]] = {  # of the mod-97 model; MNIST has the first alone
    "torch": {},
    "torch, frugal": {"frugal": True},
    "torch.compile": {"torch_compile": True},
    "torch.compile, frugal": {"torch_compile": True, "frugal": True},
    "grokfast-pytorch": {"grokfast_pytorch": True},
}

Seeds = Annotated[tuple[int, ...], Range("numbers of at least 0", lambda seeds: min(seeds, default=0) >= 0)]
Chunk = Callable[[], float]  # trains one chunk; the validation accuracy after it


def ours(compiled: Program, run: Run, seed: int) -> Chunk:
    """A run of the harness."""
    records = evaluations(compiled, run.traced, jax.random.key(seed))
    return lambda: next(records).rows[0]["val_accuracy"]


def check_agreement(compiled: Program, run: Run, other: Any) -> float:
    """The largest difference of the losses of the first ten steps, of which `other` has none; they must agree."""
    key = jax.random.key(0)
    _, metrics = compiled.advance(run.traced, key, *compiled.draw(key), compiled.init(run.traced, key))
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
    start = time.perf_counter()
    chunk()
    middle = time.perf_counter()
    chunk()
    return (middle - start) - (time.perf_counter() - middle)


def time_chunks(run: Run, rounds: int) -> dict[str, Any]:
    """Seconds to compile, and seconds per step, evaluation included, of each contender."""
    from .torch_twins import Trainer

    compiled, steps, numbers = program(run), run.task.steps, run.hyperparams
    compiling = spread([compile_seconds(compiled, run) for _ in range(COMPILATIONS)])
    contenders: dict[str, Chunk] = {"ours": ours(compiled, run, 0)}
    gflop, failed, differences = {}, {}, []
    for side, option in SIDES.items() if isinstance(run.task, Modular) else [("torch", {})]:
        if side == "grokfast-pytorch":
            if "alpha" in numbers:
                contenders[side] = Trainer(compiled, run, 0, **option).chunk  # its decay is another
            continue
        trainer = Trainer(compiled, run, 0, **option)
        try:
            differences.append(check_agreement(compiled, run, trainer))
        except Exception as error:  # whatever torch.compile lacks here, such as a C++ compiler
            if "torch_compile" not in option:
                raise
            failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if "torch_compile" not in option:
            gflop[side] = trainer.forward_gflop()
        contenders[side] = trainer.chunk
    for _ in range(numbers.get("window_size", 0) // steps):  # the cost in PyTorch grows until the window is full
        for chunk in contenders.values():
            chunk()
    seconds = in_turn(contenders, rounds)
    return {
        "first_losses_differ_by": max(differences),
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
            ends = range(steps, setting.max_steps + steps, steps)
            reached = next((step for step in ends if run() >= 0.95), None)
            row = {"method": method, "seed": seed, "side": side, "seconds": time.perf_counter() - start}
            rows.append({**row, "steps": reached or ends[-1], "reached": reached is not None})
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
    here, there = ({(r["method"], r["seed"]): r["seconds"] for r in rows if r["side"] == s} for s in ("ours", "torch"))
    texts = []
    for method in sorted({method for method, _ in here}):
        in_torch = method if any(method == name for name, _ in there) else "ema"
        found = [there[in_torch, seed] / seconds for (name, seed), seconds in here.items() if name == method]
        of = f"`{method}`" if in_torch == method else f"`{method}`, the EMA in PyTorch"
        times_ours = f"{np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
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
    runs: Names = ("modular adam", "modular ema", "modular ma", "mnist paper"),
    rounds: Count = 15,
    seeds: Seeds = (0, 1, 2),
    data_dir: DataDir = None,
    out: OutFile = OUT,
) -> None:
    """Time the mod-97 and the MNIST experiment here and in PyTorch; the file is written after each part.

    Args:
      runs: Tasks and methods whose chunks are timed.
      rounds: Timed rounds; each contender trains one chunk per round.
      seeds: Seeds of the whole runs to 95 % validation accuracy, mod 97 by the EMA, the MA and fastest; may be none.
      data_dir: Folder with the four files of MNIST; None downloads them once.
      out: File for the results.
    """
    chosen = {}
    for name in runs:
        task, _, method = name.partition(" ")
        chosen[name] = default_run(find_experiment(task), data_dir, method)
        require(isinstance(chosen[name].task, Modular | Mnist), "runs", "of modular or mnist", name)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    result = {**provenance(), "rounds": rounds, "epochs": {}, "to_95": []}
    result["versions"] |= versions(("torch", "pytorch_optimizer", "grokfast-pytorch"), "-e '.[bench]'")
    for name, run in chosen.items():
        result["epochs"][name] = time_chunks(run, rounds)
        write(out, result)
    for method in ("ema", "ma", "fastest"):
        result["to_95"] += time_to_95(method, seeds)
        write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.vs_torch")
