"""What choices of the examples' harness save on this machine: `python -m benchmarks.cost.choices`.

Each choice is timed against what would be done without it, in turn, in several fresh processes: a slow program can be
slow by where its arrays happen to lie. Evaluation is included, and compilation is that of the first chunk.
"""

import concurrent.futures
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax

from benchmarks import RESULTS, run_command
from examples.harness import optimizers, train
from examples.harness.config import find_experiment
from examples.harness.files import provenance
from examples.harness.loop import Evaluation, evaluations
from examples.harness.tables import markdown, median_and_range

from .timing import in_turn, write

OUT = RESULTS / "choices.json"


class Choice(NamedTuple):
    """A choice, and a run that it matters to."""

    text: str
    without: Callable[[], AbstractContextManager[Any]]  # in which a run is built as it would be without the choice
    run: str  # task and preset


def flattened() -> AbstractContextManager[Any]:
    """The whole chain on one long vector."""
    return mock.patch.object(train, "make_tx", lambda hyper: optax.flatten(optimizers.make_tx(hyper)))


def separate_matrices() -> AbstractContextManager[Any]:
    """optax's Muon on each matrix."""
    return mock.patch.object(optimizers, "stacked_muon", optax.contrib.muon)


CHOICES = (
    Choice("arrays as they are, not `optax.flatten`", flattened, "mnist paper"),
    Choice("Muon on arrays of one shape as one", separate_matrices, "modular muon"),
    Choice("Muon on arrays of one shape as one", separate_matrices, "modular fastest"),
)


def first_chunk(run: str, data_dir: Path | None) -> tuple[float, Iterator[Evaluation]]:
    """Seconds of the first chunk of a run, compilation included, and the rest of it."""
    task, preset = run.split()
    config = find_experiment(task).preset(preset)
    if "data_dir" in config.flat():
        config = config.replace(data_dir=data_dir)
    compiled = train.program(config.task, train.make_tx)
    records = evaluations(compiled, config.hyper, jax.random.key(0))
    start = time.perf_counter()
    next(records)
    return time.perf_counter() - start, records


def measure(rounds: int, data_dir: Path | None) -> list[dict[str, float]]:
    """For each choice the seconds of the first chunk and of a later step, with it and without, in this process."""
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    rows = []
    for choice in CHOICES:
        runs, row = {}, {}
        for side, setting in (("with", contextlib.nullcontext), ("without", choice.without)):
            with setting():
                row[f"first_chunk_{side}"], runs[side] = first_chunk(choice.run, data_dir)
        steps = find_experiment(choice.run.split()[0]).base.task.steps
        seconds = in_turn({side: lambda records=records: next(records) for side, records in runs.items()}, rounds)
        rows.append(row | {f"step_{side}": float(np.median(values)) / steps for side, values in seconds.items()})
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for choice, processes in zip(CHOICES, zip(*result["processes"], strict=True), strict=True):
        row = {"choice": choice.text, "run": choice.run}
        for title, name, form in (("ms per step", "step", ".3g"), ("s of the first chunk", "first_chunk", ".2g")):
            for side in ("with", "without"):
                seconds = np.array([one[f"{name}_{side}"] for one in processes])
                row[f"{title} {side}"] = median_and_range(seconds * (1e3 if name == "step" else 1), form)
        rows.append(row)
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {len(result['processes'])} processes, "
        f"{result['rounds']} chunks of each in turn; median and range of the processes' medians.\n\n{markdown(rows)}"
    )


def main(processes: int = 5, rounds: int = 5, data_dir: Path | None = None, out: Path = OUT) -> None:
    """Time each choice of the harness against its absence.

    Args:
      processes: Fresh processes, one after the other.
      rounds: Timed chunks of each run in a process.
      data_dir: Folder with the four files of MNIST; None downloads them once.
      out: File for the results.
    """
    found = []
    for _ in range(processes):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, rounds, data_dir).result())
    result = {**provenance(), "rounds": rounds, "processes": found}
    write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.choices")
