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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import RESULTS, run_command
from examples.harness.errors import UserError
from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown

from . import contest, edge, raised, windows
from .cells import append, as_cell
from .contest import Job, missing
from .tables import MISSING, steps_and_failures, two_digits

OUT = RESULTS / "noise.jsonl"
LAMBS = (2.0, 5.0)
SEEDS = 8
CAP = raised.SETUPS["parity"].cap
FAILED = 1.25 * CAP  # where what most seeds do not reach is drawn
TITLE = "A stable filter flattens less than the rate that it amounts to, a short unstable window more"
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
    if not len(cells):
        return
    for (lr, decay), some in cells[cells["lamb"].isin(LAMBS)].groupby(["lr", "weight_decay"]):
        adamw = windows.limit("ema", math.nan, 0.0, lr * decay)
        base = raised.Setting("parity", lr, decay, "none", 0.0)
        yield Group("none", decay, "behind", adamw / lr, False, raised.controls(base, 1.0)[:SEEDS])
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
    every = [group.jobs for group in groups(rates)]
    if not every:
        raise UserError(f"--rates must be a file with results of python -m benchmarks.study.raised parity, got {rates}")
    out.parent.mkdir(parents=True, exist_ok=True)
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
    if not len(cells):
        return MISSING
    titles = {"behind": "behind it", "alone": "alone at the raised rate"}
    cells["title"] = [f"decay {cell.weight_decay:g}: {titles[cell.place]}" for cell in cells.itertuples()]
    rows: dict[str, dict[str, str]] = {}
    for cell in cells.itertuples():
        taken = steps_and_failures(cell.steps, cell.fail, cell.seeds, CAP)
        row = rows.setdefault(cell.filter, {"filter": cell.filter, **dict.fromkeys(cells["title"].unique(), "")})
        row[cell.title] = f"{taken} [{two_digits(cell.sharpness)}]"
    return markdown(list(rows.values()))


def picture(path: Path, rates: Path = raised.OUT) -> Figure:
    """Steps over the sharpness, a panel for each decay; hollow where the filter takes the stability away."""
    cells = frame(path, rates).replace(math.inf, FAILED)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    claim(figure, TITLE)
    decays = cells["weight_decay"].unique()
    colours = {name: GREY if name == "EMA" else f"C{i}" for i, name in enumerate(raised.FILTERS)}
    ticks = {500: "500", 1_000: "1,000", 2_000: "2,000", FAILED: "most fail"}
    panels = figure.subplots(1, len(decays), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (decay, some) in zip(panels, cells.groupby("weight_decay"), strict=True):
        alone = some[(some["place"] == "alone") | (some["filter"] == "none")].sort_values("sharpness")
        axes.plot(alone["sharpness"], alone["steps"], "-", color="black", linewidth=1, marker=".")
        for cell in some[(some["place"] == "behind") & (some["filter"] != "none")].itertuples():
            name, lamb = cell.filter.split(", λ ")
            hollow = {"markerfacecolor": "white"} if cell.unstable else {}
            axes.plot(cell.sharpness, cell.steps, "o", color=colours[name], markersize=8, **hollow)
            at = (cell.sharpness, cell.steps)
            axes.annotate(lamb, at, xytext=(6, -11), textcoords="offset points", color=colours[name])
        axes.set_title(f"decay {decay:g}", fontsize="large", loc="left")
        axes.set_xlabel("sharpness", fontsize="large")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
    panels[0].set_ylabel("steps to 95 %", fontsize="large")
    handles = [Line2D([], [], color="black", marker=".", label="AdamW alone")]
    handles += [Line2D([], [], color=c, marker="o", linestyle="", label=name) for name, c in colours.items()]
    handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="unstable"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, title="filter; numbers: λ")
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.noise")
