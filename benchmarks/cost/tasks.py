"""Time of a training step of each experiment, with one thread and with all: `python -m benchmarks.cost.tasks`.

Each task trains its default method. Times include each step's share of the evaluation after the chunk, and no
compilation.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax

from benchmarks import RESULTS, Count, Names, OutFile, run_command
from examples.harness.experiment import find_experiment, task_names
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import program

from .timing import in_turn, in_words, spread, write

OUT = RESULTS / "tasks.json"
TASKS = tuple(task_names())


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """The row of a task, in a process with this number of threads."""
    run = find_experiment(name).run()
    records = evaluations(program(run), run.traced, jax.random.key(0))
    seconds = in_turn({name: lambda: next(records)}, rounds)[name]
    return {"task": name, "threads": threads, "seconds": spread(seconds / run.task.steps)}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        {"task": row["task"], "threads": row["threads"], "ms per step": in_words(row["seconds"], ".3g", 1e3)}
        for row in result["rows"]
    ]
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} chunks each, evaluation included; "
        f"medians (quartiles).\n\n{markdown(rows)}"
    )


def main(tasks: Names = TASKS, rounds: Count = 10, out: OutFile = OUT) -> None:
    """Time the experiments, in a fresh process for each number of threads.

    Args:
      tasks: Experiments: names that python -m examples lists, or importable modules that have an EXPERIMENT.
      rounds: Timed chunks of each task.
      out: File for the results.
    """
    for name in tasks:
        find_experiment(name)
    result = {**provenance(), "rounds": rounds, "rows": []}
    for threads in (1, os.cpu_count() or 1):
        os.environ["PJRT_NPROC"] = str(threads)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            result["rows"] += pool.map(functools.partial(measure, threads=threads, rounds=rounds), tasks)
    write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.tasks")
