"""Runs of chains that are no presets: what part memory and the board share.

A chain is code, so what identifies a run is the chain's name, its numbers and the seed: a chain that is changed needs
another name, or its results must be deleted.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
import tqdm

from examples.harness.loop import evaluations, stack
from examples.harness.records import Row, best, is_finite, step_reached
from examples.harness.task import Task
from examples.harness.train import Program, TrainState, program

from .cells import Cell, append, as_cell, read
from .methods import THRESHOLD

Numbers = Mapping[str, float]


class Chain(NamedTuple):
    """An optimizer, and the task that it trains."""

    name: str
    make: Callable[..., optax.GradientTransformation]  # of its numbers by name, which may be traced
    task: Task


class Job(NamedTuple):
    """One run of a chain."""

    chain: Chain
    numbers: Numbers
    seed: int
    cap: int  # steps at most to the threshold
    after: int = 0  # evaluations for which it is followed after its first at the threshold

    @property
    def cell(self) -> dict[str, Any]:
        """What identifies the run."""
        return {"chain": self.chain.name, **self.numbers, "seed": self.seed, "cap": self.cap}


@functools.lru_cache(maxsize=32)
def program_of(chain: Chain, names: tuple[str, ...], runs: int) -> Program:
    """The compiled program of a chain."""
    make = lambda numbers: chain.make(**numbers)
    if runs == 1:
        return program(chain.task, make)
    numbers, key = dict.fromkeys(names, 0.0), jax.random.key(0)
    return program(chain.task, make, example=(stack([numbers] * runs), stack([key] * runs)))


def train(
    jobs: Sequence[Job], bar: tqdm.tqdm, measure: Callable[[TrainState], Any] | None = None
) -> list[dict[str, Any]]:
    """Train runs of one chain, vmapped if they are many, and return what they came to.

    `measure` makes a number for each run of the state at an evaluation; those of a run are its `measured`.
    """
    first = jobs[0]
    compiled = program_of(first.chain, tuple(first.numbers), len(jobs))
    numbers, keys = [dict(job.numbers) for job in jobs], [jax.random.key(job.seed) for job in jobs]
    hyper, key = (numbers[0], keys[0]) if len(jobs) == 1 else (stack(numbers), stack(keys))
    rows: list[list[Row]] = [[] for _ in jobs]
    measured: list[list[float]] = [[] for _ in jobs]
    done = [False] * len(jobs)
    for evaluation in evaluations(compiled, hyper, key):
        values = np.full(len(jobs), np.nan) if measure is None else np.atleast_1d(measure(evaluation.state))
        for i, (row, diverged_at) in enumerate(zip(evaluation.rows, evaluation.diverged_at, strict=True)):
            if not done[i]:
                rows[i].append(row)
                measured[i].append(float(f"{values[i]:.3g}"))
                reached = step_reached(rows[i], THRESHOLD)
                followed = reached is not None and sum(one["step"] > reached for one in rows[i]) >= jobs[i].after
                failed = reached is None and evaluation.step >= first.cap
                done[i] = followed or failed or diverged_at is not None
        if all(done):
            break
    bar.update(len(jobs))
    return [outcome(some) | ({"measured": m} if measure else {}) for some, m in zip(rows, measured, strict=True)]


def outcome(rows: Sequence[Row]) -> dict[str, Any]:
    """What is kept of a run."""
    finite = [row for row in rows if is_finite(row)]
    first = step_reached(rows, THRESHOLD)
    after = [row["val_accuracy"] >= THRESHOLD for row in rows if first is not None and row["step"] > first]
    followed = {"evaluations_after": len(after), "of_these_at_threshold": sum(after)} if after else {}
    return {
        "first_step": first,  # null: not reached
        "first_step_train": next((int(row["step"]) for row in rows if row["train_accuracy"] >= THRESHOLD), None),
        **followed,
        "finite": is_finite(rows[-1]),
        "best_val_accuracy": round(best(finite), 4) if finite else 0.0,
    }


def missing(jobs: Iterable[Job], path: Path) -> list[Job]:
    """What a file does not hold, or holds of a run that was followed for less long than the job asks for."""
    stored = results(path)
    return list({as_cell(job.cell): job for job in jobs if not _has(stored, job)}.values())


def train_missing(jobs: Iterable[Job], path: Path, group_size: int = 1) -> None:
    """Train what is missing in a file, and append each result as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = missing(jobs, path)
    with tqdm.tqdm(total=len(todo), unit="run", disable=not todo) as bar:
        for group in _groups(todo, group_size):
            bar.set_postfix_str(f"{group[0].chain.name} {dict(group[0].numbers)} seed {group[0].seed}")
            found = train(group, bar)
            append(path, *({"cell": job.cell, **one} for job, one in zip(group, found, strict=True)), base=None)


def _groups(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that one program can train together, in their order."""
    for _, same in itertools.groupby(jobs, lambda job: (job.chain, tuple(job.numbers), job.cap)):
        while group := list(itertools.islice(same, size)):
            yield group


def _has(stored: Mapping[Cell, Mapping[str, Any]], job: Job) -> bool:
    found = stored.get(as_cell(job.cell))
    if found is None or found["first_step"] is None:
        return found is not None
    return found.get("evaluations_after", 0) >= job.after or not found["finite"]


def results(path: Path) -> dict[Cell, dict[str, Any]]:
    """The results in a file by cell; of two of one run the later."""
    return {as_cell(line.result["cell"]): line.result for line in read(path, base=None)}


def frame(path: Path) -> pd.DataFrame:
    """The results in a file, a row for each run; `first_step` is infinite where it was not reached."""
    rows = [{**dict(cell), **{k: v for k, v in one.items() if k != "cell"}} for cell, one in results(path).items()]
    table = pd.DataFrame(rows)
    if len(table):
        steps = table[["first_step", "first_step_train"]].astype(float).fillna(np.inf)
        table = table.assign(**steps)
    return table
