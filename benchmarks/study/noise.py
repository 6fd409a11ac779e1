"""How flat is training with noise, alone and behind filters? `python -m benchmarks.study.noise`.

Sparse parity with batches of 64: AdamW at a low learning rate, behind filters, and at the rates that these amount to,
which `benchmarks.study.raised` has found. Measured along each run is the sharpness of `benchmarks.study.edge`, of all
training points and in the coordinates of Adam's second moment of the gradients, which no filter has touched. Results
are appended; what is there is not trained again.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tqdm

from benchmarks import RESULTS, run_command
from examples.harness.tables import markdown

from . import contest, edge, raised, windows
from .cells import append, as_cell
from .contest import Job, missing
from .tables import MISSING, steps_and_failures, two_digits

OUT = RESULTS / "noise.jsonl"
LAMBS = (2.0, 5.0)
SEEDS = 8
CAP = raised.SETUPS["parity"].cap
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


class Group(NamedTuple):
    """Runs that differ in their seeds alone."""

    filter: str
    weight_decay: float  # of the runs behind the filter
    place: str  # "behind" the filter, or AdamW "alone" at the raised rate
    limit: float  # the sharpness from which on training is not stable
    unstable: bool  # because of the filter
    jobs: list[Job]


def groups(path: Path) -> Iterator[Group]:
    """Every filter with its control, at both decays, after AdamW itself; `path` has the raised rates."""
    cells = raised.frame(path, "parity")
    for (lr, decay), some in cells[cells["lamb"].isin(LAMBS)].groupby(["lr", "weight_decay"]):
        adamw = windows.limit("ema", math.nan, 0.0, lr * decay)
        base = raised.Setting("parity", lr, decay, "none", 0.0)
        yield Group("none", decay, "alone", adamw / lr, False, raised.controls(base, 1.0)[:SEEDS])
        for row in some.itertuples():
            one = base._replace(filter=row.filter, lamb=row.lamb)
            name, rate = f"{row.filter}, λ {row.lamb:g}", row.factor * lr
            yield Group(name, decay, "behind", row.limit / rate, row.limit < 2, raised.jobs(one)[:SEEDS])
            yield Group(name, decay, "alone", adamw / rate, False, raised.controls(one, row.factor)[:SEEDS])


def main(rates: Path = raised.OUT, out: Path = OUT) -> None:
    """Train what is missing.

    Args:
      rates: Results of python -m benchmarks.study.raised, which have the raised rates.
      out: File for the results.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    every = [group.jobs for group in groups(rates)]
    todo = missing((job for seed in zip(*every, strict=True) for job in seed), out)
    with tqdm.tqdm(total=len(todo), unit="run", disable=not todo) as bar:
        for one in todo:
            append(out, {"cell": one.cell, **edge.train(one, bar)}, base=None)
    print(table(out, rates))


def frame(path: Path, rates: Path) -> Frame:
    """A row for each group whose runs are there: the median of the steps and of the sharpness, and who fails."""
    stored, rows = contest.results(path), []
    for group in groups(rates):
        cells = [as_cell(job.cell) for job in group.jobs]
        if not stored.keys() >= set(cells):
            continue
        taken = np.array([stored[cell]["first_step"] or np.inf for cell in cells])
        sharp = np.median([edge.late(stored[cell]["sharpness"]) for cell in cells])
        found = {"steps": np.median(taken), "fail": int(np.isinf(taken).sum()), "seeds": len(taken), "sharpness": sharp}
        rows.append({key: value for key, value in group._asdict().items() if key != "jobs"} | found)
    return pd.DataFrame(rows)


def table(path: Path, rates: Path = raised.OUT) -> str:
    """A row for each filter, a column for each place and decay: steps and sharpness."""
    cells = frame(path, rates)
    rows: dict[str, dict[str, str]] = {}
    for cell in cells.itertuples():
        taken = steps_and_failures(cell.steps, cell.fail, cell.seeds, CAP)
        row = rows.setdefault(cell.filter, {"filter": cell.filter})
        row[f"decay {cell.weight_decay:g}: {cell.place}"] = f"{taken} [{two_digits(cell.sharpness)}]"
    return markdown(list(rows.values())) if rows else MISSING


if __name__ == "__main__":
    run_command(main, "benchmarks.study.noise")
