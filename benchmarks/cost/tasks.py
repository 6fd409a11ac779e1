"""Time of a training step of each experiment, with one thread and with all: `python -m benchmarks.cost.tasks`.

Each task trains its default method. Times include each step's share of the evaluation after the chunk, and no
compilation. Operations are XLA's count for one step without evaluation. A task that finds no data is left out.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import jax

from benchmarks import RESULTS, Count, Counts, DataDir, Names, OutFile, run_command
from examples.harness.errors import UserError
from examples.harness.experiment import Experiment, Run, find_experiment, task_names
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import Program, keys, program, step

from .timing import in_turn, in_words, spread, write

OUT = RESULTS / "tasks.json"
TASKS = tuple(task_names())
THREADS = (1, os.cpu_count() or 1)


def default_run(experiment: Experiment, data_dir: Path | None, method: str | None = None) -> Run:
    """The run of a method, with the data files in a folder or in its subfolder of the task's name."""
    task: Any = experiment.task
    if data_dir is not None and hasattr(task, "data_dir"):
        folder = data_dir / experiment.name
        task = dataclasses.replace(task, data_dir=folder if folder.is_dir() else data_dir)
    return experiment.run(method, task)


def flop_per_step(run: Run, compiled: Program) -> float | None:
    """Operations of one training step, by XLA's count; None if the step has a loop, which XLA counts as one turn."""
    key = jax.random.key(0)
    data = {name: array for part in compiled.draw(key) for name, array in part.items()}
    batch = jax.tree.map(lambda x: x[0], run.task.batches(data, keys(key).batch))
    state = compiled.init(run.traced, key)
    one = jax.jit(functools.partial(step, run.task, run.make_tx(run.traced)))
    traced = one.trace(data, (state.params, state.opt_state), batch)
    if re.search(r"\b(scan|while)\[", str(traced.jaxpr)):
        return None
    cost: Any = traced.lower().compile().cost_analysis()
    return float(cost["flops"])


def measure(name: str, threads: int, rounds: int, data_dir: Path | None) -> dict[str, Any]:
    """The row of a task, in a process that has so many threads."""
    run, row = default_run(find_experiment(name), data_dir), {"task": name, "threads": threads}
    try:
        compiled = program(run)
    except UserError as error:
        return row | {"left_out": str(error).splitlines()[0]}
    records = evaluations(compiled, run.traced, jax.random.key(0))
    seconds = in_turn({name: lambda: next(records)}, rounds)[name]
    row["seconds"] = spread([value / run.task.steps for value in seconds])
    flop = flop_per_step(run, compiled)
    return row if flop is None else row | {"gflop": flop / 1e9}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for row in result["rows"]:
        texts = {"GFLOP per step": "", "ms per step": f"left out: {row.get('left_out')}", "GFLOP/s": ""}
        if "seconds" in row:
            texts["ms per step"] = in_words(row["seconds"], ".3g", 1e3)
        if "gflop" in row:
            texts["GFLOP per step"] = f"{row['gflop']:.3g}"
            texts["GFLOP/s"] = f"{row['gflop'] / row['seconds']['median']:.3g}"
        rows.append({"task": row["task"], "threads": row["threads"], **texts})
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} chunks each, evaluation included; "
        f"medians (quartiles).\n\n{markdown(rows)}"
    )


def main(
    tasks: Names = TASKS, threads: Counts = THREADS, rounds: Count = 10, data_dir: DataDir = None, out: OutFile = OUT
) -> None:
    """Time the experiments, in a fresh process for each number of threads.

    Args:
      tasks: Experiments: names that python -m examples lists, or importable modules that have an EXPERIMENT.
      threads: Numbers of threads of XLA's CPU client.
      rounds: Timed chunks of each task.
      data_dir: Folder that holds the data files, those of a task in the subfolder of its name if there is one; None
        downloads them once.
      out: File for the results.
    """
    for name in tasks:
        find_experiment(name)
    rows = []
    for count in threads:
        os.environ["PJRT_NPROC"] = str(count)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.map(functools.partial(measure, threads=count, rounds=rounds, data_dir=data_dir), tasks)
    result = {**provenance(), "rounds": rounds, "rows": rows}
    write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.tasks")
