"""Does a filter widen the region of learning rates and weight decays that work? `python -m benchmarks.study.region`.

Sparse parity, by each method, at every pair of a grid, with seeds 0 to 31. A pair works if at least 90 % of its seeds
reach 95 % on fresh points. The share of the grid whose pairs work is the method's region.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import tqdm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import RESULTS, run_command
from examples.harness.config import Config
from examples.harness.records import Row, step_reached
from examples.harness.sweep import train_group
from examples.harness.tables import markdown
from examples.parity import PRESETS

from .cells import PARITY, append, as_cell, differences, read
from .methods import THRESHOLD, check_among
from .statistics import interval
from .tables import MISSING, joined, steps

OUT = RESULTS / "region.jsonl"
SEEDS = 32  # the best pair is chosen with the first half, and reported with the other
CAP = 4_000
ENOUGH = 0.9  # share of the seeds that must reach the threshold for a pair to work
GRIDS = {  # by optimizer: learning rates, weight decays; AdamW's are wide enough to hold the regions of its methods
    "adamw": ((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "muon": ((0.01, 0.03, 0.1, 0.3), (0.01, 0.03, 0.1, 0.3)),
}
# By optimizer: the method without a filter, then what is compared with it, as the pictures call them
METHODS = {
    "adamw": {
        "adamw": "AdamW, no filter",
        "adamw-b1-0.98": "AdamW, no filter, β1 0.98",
        "ema+adamw": "EMA before AdamW",
        "ma+adamw": "MA before AdamW",
        "ma+adamw-lamb-3": "MA, λ 3, before AdamW",
    },
    "muon": {"muon": "Muon, no filter", "ema+muon": "EMA before Muon", "ma+muon": "MA before Muon"},
}
TITLES = {name: title for names in METHODS.values() for name, title in names.items()}


def grid(method: str) -> dict[tuple[float, float], Config]:
    """The configuration, with seed 0, of every pair of learning rate and weight decay of a method."""
    config = PRESETS[method].config.replace(budget=CAP, stop_at=THRESHOLD)
    pairs = itertools.product(*GRIDS[config.optimization.optimizer])
    return {(rate, decay): config.replace(lr=rate, weight_decay=decay) for rate, decay in pairs}


def first_step(rows: Sequence[Row], part: str) -> int | None:
    """The first step at which a run is at the threshold on its training (`train`) or fresh (`val`) points."""
    return step_reached([{"step": row["step"], "val_accuracy": row[f"{part}_accuracy"]} for row in rows], THRESHOLD)


def main(methods: tuple[str, ...] = tuple(TITLES), out: Path = OUT) -> None:
    """Train what is missing of the grids of some methods, the seeds of a pair at once in one vmapped program.

    Args:
      methods: Presets of examples.parity, of those that the study has a grid for.
      out: File for the results, a line a pair. Its cell is that of seed 0; its lists have a place for each seed.
    """
    check_among("--methods", methods, TITLES)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {as_cell(line.result["cell"]) for line in read(out, PARITY)}
    todo = [c for name in methods for c in grid(name).values() if as_cell(differences(c, PARITY)) not in known]
    with tqdm.tqdm(total=len(todo) * SEEDS * CAP, unit="step") as bar:
        for config in todo:
            runs = train_group([config.replace(seed=seed) for seed in range(SEEDS)], bar)
            reached = {
                name: [first_step(rows, part) for rows in runs]
                for name, part in (("first_step", "val"), ("first_step_train", "train"))
            }
            append(out, {"cell": differences(config, PARITY), **reached}, base=PARITY)


def load(path: Path, name: str = "first_step") -> dict[str, pd.DataFrame]:
    """For each method whose grid is whole, steps to 95 % by pair and seed, infinite for a run that fails."""
    stored = {as_cell(line.result["cell"]): line.result for line in read(path, PARITY)}
    found = {}
    for method in TITLES:
        results = {pair: stored.get(as_cell(differences(one, PARITY))) for pair, one in grid(method).items()}
        if all(results.values()):
            frame = pd.DataFrame({pair: result[name] for pair, result in results.items() if result}).T
            found[method] = frame.rename_axis(["lr", "weight_decay"]).astype(float).fillna(math.inf)
    return found


def works(taken: np.ndarray) -> np.ndarray:
    """Whether enough of the seeds (the last axis) of each pair reach the threshold."""
    return np.isfinite(taken).mean(axis=-1) >= ENOUGH


def region(one: pd.DataFrame, other: pd.DataFrame | None = None) -> tuple[float, float, float]:
    """How many pairs work with a method, or how many more than with another; and the ends of a 95 % interval.

    The interval is a bootstrap over the seeds, which all pairs and methods share.
    """

    def working(taken: pd.DataFrame, seeds: np.ndarray) -> np.ndarray:
        return works(taken.to_numpy()[:, seeds]).sum(axis=0, dtype=float)

    def count(seeds: np.ndarray, axis: int = -1) -> np.ndarray:
        del axis  # always the last
        return working(one, seeds) if other is None else working(one, seeds) - working(other, seeds)

    seeds = np.arange(one.shape[1])
    low, high = scipy.stats.bootstrap((seeds,), count, method="percentile", rng=0).confidence_interval
    return float(count(seeds)), float(low), float(high)


def best_pair(taken: pd.DataFrame) -> Any:
    """The pair with the lowest median over the first half of the seeds; if several have it, that of the lowest mean."""
    half = taken.iloc[:, : SEEDS // 2]
    order = pd.DataFrame({"median": half.median(axis=1), "mean": half.clip(upper=CAP).mean(axis=1)})
    return order.sort_values(["median", "mean"]).index[0]


def other_half(taken: pd.DataFrame, pair: Any) -> np.ndarray:
    """The steps of a pair with the seeds by which it was not chosen."""
    return taken.loc[pair].to_numpy()[SEEDS // 2 :]


def methods_table(taken: dict[str, pd.DataFrame]) -> str:
    """Every method with its best pair and its region; empty if there is none."""
    rows = []
    for optimizer, names in METHODS.items():
        for name in [name for name in names if {name, optimizer} <= taken.keys()]:
            one, pair = taken[name], best_pair(taken[name])
            first = other_half(one, pair)
            low, high = interval(first)
            more = "{:+g} ({:+g} to {:+g})".format(*region(one, taken[optimizer]))
            rows.append(
                {
                    "method": f"`{name}`",
                    "best rate, decay": "{:g}, {:g}".format(*pair),
                    "steps to 95 %, median (interval)": f"{median(first)} ({steps(low, CAP)} to {steps(high, CAP)})",
                    "fail": f"{np.isinf(first).sum()} of {len(first)}",
                    "pairs that work": "{:g} ({:g} to {:g}) of {}".format(*region(one), len(one)),
                    "more than without a filter": more if name != optimizer else "",
                    "runs that reach 95 %": f"{np.isfinite(one.to_numpy()).mean():.0%}",
                }
            )
    return markdown(rows) if rows else ""


def median(first: np.ndarray) -> str:
    """The median of numbers of steps in words."""
    return steps(float(np.median(first)), CAP)


def rates_table(taken: dict[str, pd.DataFrame], optimizer: str) -> str:
    """What each method comes to if the learning rate is given, with the best decay; empty if there is none."""
    rows = []
    for rate in GRIDS[optimizer][0]:
        row = {"learning rate": f"{rate:g}"}
        for name in (name for name in METHODS[optimizer] if name in taken):
            at_rate = taken[name].xs(rate, level="lr", drop_level=False)
            first = other_half(at_rate, pair := best_pair(at_rate))
            failed = int(np.isinf(first).sum())
            text = f"{median(first)} (decay {pair[1]:g}" + f"; {failed} fail" * (failed > 0) + ")"
            row[f"`{name}`"] = text if failed < len(first) else "all fail"
        rows.append(row)
    return markdown(rows) if len(rows[0]) > 1 else ""


def table(path: Path) -> str:
    """Every method with its best pair and its region, then what it comes to at each learning rate."""
    taken = load(path)
    return joined(methods_table(taken), *(rates_table(taken, optimizer) for optimizer in METHODS)) or MISSING


def picture(path: Path) -> Figure:
    """A map for each method over rate and decay: what share of the seeds reaches 95 %; pairs that work are outlined.

    An optimizer of which but one method is measured is left out: there is nothing to compare.
    """
    taken, fitted = load(path), load(path, "first_step_train")
    measured = ([name for name in names if name in taken] for names in METHODS.values())
    shown = [names for names in measured if len(names) > 1]
    columns = max(map(len, shown), default=1)
    figure = Figure(figsize=(2.6 * columns, 3 * len(shown) + 0.8), layout="constrained")
    for i, names in enumerate(shown):
        for j, name in enumerate(names, 1):
            axes = figure.add_subplot(len(shown), columns, i * columns + j)
            heat_map(axes, taken[name], fitted[name])
            axes.set_title(TITLES[name], fontsize="medium")
    figure.supxlabel("learning rate", fontsize="medium")
    figure.supylabel("weight decay", fontsize="medium")
    figure.suptitle(
        "A larger β1 widens the region where AdamW works; the hole of the MA nearly closes with λ 3\n"
        "% of seeds that reach 95 %; outlined: 90 % or more; crosses: most do not even fit their training points",
        fontsize="medium",
    )
    return figure


def heat_map(axes: Axes, taken: pd.DataFrame, fitted: pd.DataFrame) -> None:
    """The map of a method: a number for every pair, or a cross where no seed reaches 95 % and most do not even fit."""
    reach, fit = (np.isfinite(one).mean(axis=1).unstack("lr").iloc[::-1] for one in (taken, fitted))
    axes.imshow(reach, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(reach):
        colour = "black" if share > 0.5 else "white"
        if share == 0 and fit.iloc[y, x] < 0.5:
            axes.plot(x, y, "x", color=colour, markersize=5)
        else:
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="small", color=colour)
        if share >= ENOUGH:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2))
    axes.set_xticks(range(reach.shape[1]), [f"{rate:g}" for rate in reach.columns], fontsize="small", rotation=45)
    axes.set_yticks(range(reach.shape[0]), [f"{decay:g}" for decay in reach.index], fontsize="small")


if __name__ == "__main__":
    run_command(main, "benchmarks.study.region")
