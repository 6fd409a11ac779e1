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
GRIDS = {  # by optimizer, wide enough to hold the regions of all its methods: learning rates, weight decays
    "adamw": ((0.001, 0.003, 0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0, 3.0)),
    "muon": ((0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3, 1.0)),
}
# By optimizer: the method without a filter, then what is compared with it, as the pictures call them
METHODS = {
    "adamw": {
        "adamw": "AdamW, no filter",
        "adamw-b1-0.98": "AdamW, no filter, β1 0.98",
        "ema+adamw": "EMA before AdamW",
        "ma+adamw": "MA before AdamW",
    },
    "muon": {"muon": "Muon, no filter", "ema+muon": "EMA before Muon", "ma+muon": "MA before Muon"},
}
NAMES = [name for names in METHODS.values() for name in names]


def grid(method: str) -> dict[tuple[float, float], Config]:
    """The configuration, with seed 0, of every pair of learning rate and weight decay of a method."""
    config = PRESETS[method].config.replace(budget=CAP, stop_at=THRESHOLD)
    pairs = itertools.product(*GRIDS[config.optimization.optimizer])
    return {(rate, decay): config.replace(lr=rate, weight_decay=decay) for rate, decay in pairs}


def first_step(rows: Sequence[Row], part: str) -> int | None:
    """The first step at which a run is at the threshold on its training (`train`) or fresh (`val`) points."""
    return step_reached([{"step": row["step"], "val_accuracy": row[f"{part}_accuracy"]} for row in rows], THRESHOLD)


def main(methods: tuple[str, ...] = tuple(NAMES), out: Path = OUT) -> None:
    """Train what is missing of the grids of some methods, the seeds of a pair at once in one vmapped program.

    Args:
      methods: Presets of examples.parity, of those that the study has a grid for.
      out: File for the results, a line a pair. Its cell is that of seed 0; its lists have a place for each seed.
    """
    check_among("--methods", methods, NAMES)
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
    for method in NAMES:
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

    def count(seeds: np.ndarray, axis: int = -1) -> np.ndarray:
        del axis  # always the last
        first, second = (
            works(taken.to_numpy()[:, seeds]).sum(axis=0) for taken in (one, one if other is None else other)
        )
        return first if other is None else first - second

    seeds = np.arange(one.shape[1])
    found = scipy.stats.bootstrap((seeds,), count, method="percentile", random_state=np.random.default_rng(0))
    return float(count(seeds)), *map(float, found.confidence_interval)


def best_pair(taken: pd.DataFrame) -> tuple[float, float]:
    """The pair with the lowest median over the first half of the seeds; if several have it, that of the lowest mean."""
    half = taken.iloc[:, : taken.shape[1] // 2]
    order = pd.DataFrame({"median": half.median(axis=1), "mean": half.clip(upper=CAP).mean(axis=1)})
    return order.sort_values(["median", "mean"]).index[0]


def reported(taken: pd.DataFrame, pair: tuple[float, float]) -> dict[str, str]:
    """What a pair came to with the other half of the seeds, as cells of a table."""
    first = taken.loc[pair].to_numpy()[taken.shape[1] // 2 :]
    low, high = interval(first)
    median = f"{steps(float(np.median(first)), CAP)} ({steps(low, CAP)} to {steps(high, CAP)})"
    return {"steps to 95 %, median (95 % interval)": median, "fail": f"{np.isinf(first).sum()} of {len(first)}"}


def table(path: Path) -> str:
    """Every method with its best pair and its region, then the best decay of every learning rate."""
    taken, rows = load(path), []
    for optimizer, names in METHODS.items():
        for name in names:
            if {name, optimizer} <= taken.keys():
                rate, decay = best_pair(taken[name])
                count, low, high = region(taken[name])
                more, least, most = region(taken[name], taken[optimizer])
                rows.append(
                    {"method": f"`{name}`", "best rate, decay": f"{rate:g}, {decay:g}"}
                    | reported(taken[name], (rate, decay))
                    | {
                        f"pairs of {len(taken[name])} that work (95 % interval)": f"{count:g} ({low:g} to {high:g})",
                        f"more than `{optimizer}`": f"{more:+g} ({least:+g} to {most:+g})" if name != optimizer else "",
                    }
                )
    return joined(*(markdown(rows) for rows in (rows,) if rows)) or MISSING


def picture(path: Path) -> Figure:
    """A map for each method: the share of seeds that reach 95 % by rate and decay, pairs that work outlined."""
    taken = load(path)
    shown = [{name: title for name, title in names.items() if name in taken} for names in METHODS.values()]
    shown = [names for names in shown if names]
    columns = max(map(len, shown))
    figure = Figure(figsize=(2.7 * columns + 0.8, 2.9 * len(shown)), layout="constrained")
    every = figure.subplots(len(shown), columns, squeeze=False)
    for names, row in zip(shown, every, strict=True):
        for axes, (name, title) in itertools.zip_longest(row, names.items(), fillvalue=(None, None)):
            axes.set_axis_off() if name is None else heat_map(axes, taken[name], title)
    return figure


def heat_map(axes: Axes, taken: pd.DataFrame, title: str) -> Any:
    """One map."""


if __name__ == "__main__":
    run_command(main, "benchmarks.study.region")
