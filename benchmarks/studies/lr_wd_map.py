"""Does a filter widen the region of learning rates and weight decays that work?

Each method trains sparse parity at every pair of a grid of learning rates and weight decays, with seeds 0 to 31. A pair
works if at least 90 % of its seeds reach 95 % on fresh points. A method's region is the pairs that work. Its best pair
is chosen by seeds 0 to 15 and reported with seeds 16 to 31. Beside the grid, each method trains at one pair for more
steps, and four of them train on parity of five bits out of fifty.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks import views
from benchmarks.study import Study
from examples import parity
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Method, Tx
from examples.harness.plots import ORANGE
from examples.harness.tables import markdown
from grokfast_jax import grokfast_ema, grokfast_ma

TASK = parity.Parity()
SEEDS = 32
MAX_STEPS = 4_000
ENOUGH = 0.9  # share of the seeds that must reach 95 % for a pair to work
RULE = {"max_steps": MAX_STEPS, "group_size": SEEDS}


def ema_muon(lr: float = 0.03, weight_decay: float = 0.1, lamb: float = 2.0, fast: float = 1.0) -> Tx:
    """Grokfast-EMA, debiased, before Muon."""
    return optax.chain(grokfast_ema(0.98, lamb, fast=fast, start="debiased"), parity.muon(lr, weight_decay))


def ma_muon(
    lr: float = 0.03, weight_decay: float = 0.1, window_size: int = 100, lamb: float = 5.0, fast: float = 1.0
) -> Tx:
    """Grokfast-MA before Muon."""
    return optax.chain(grokfast_ma(window_size, lamb, fast=fast), parity.muon(lr, weight_decay))


# By optimizer: learning rates and weight decays; AdamW's are wide enough to hold the regions of its methods.
GRIDS = {
    "AdamW": ([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
    "Muon": ([0.01, 0.03, 0.1, 0.3], [0.01, 0.03, 0.1, 0.3]),
}
# By optimizer: the method without a filter, then the methods that are compared with it.
METHODS: dict[str, dict[str, Method]] = {
    "AdamW": {
        "AdamW, no filter": parity.adamw,
        "AdamW, no filter, β1 0.98": functools.partial(parity.adamw, b1=0.98),
        "EMA before AdamW": parity.ema,
        "MA before AdamW": parity.ma,
        "MA, λ 3, before AdamW": functools.partial(parity.ma, lamb=3.0),
    },
    "Muon": {"Muon, no filter": parity.muon, "EMA before Muon": ema_muon, "MA before Muon": ma_muon},
}
ONE_PAIR: dict[str, Method] = {
    **{label: METHODS["AdamW"][label] for label in list(METHODS["AdamW"])[:4]},
    "AdamW, no filter, ten times the rate": functools.partial(parity.adamw, lr=0.03),
    **METHODS["Muon"],
}


def runs(results: Results) -> Iterator[Run]:
    """All methods at all pairs, the seeds of a pair trained at once; then the methods at one pair."""
    del results
    for optimizer, (lrs, decays) in GRIDS.items():
        for method in METHODS[optimizer].values():
            yield from product(TASK, method, lr=lrs, weight_decay=decays, seed=range(SEEDS), **RULE)
    for method in ONE_PAIR.values():
        yield from product(TASK, method, seed=range(16), max_steps=5_000, group_size=16)
    five_bits = functools.partial(product, parity.Parity(n=50, k=5), seed=range(4), max_steps=20_000)
    yield from five_bits(parity.adamw, lr=[0.003, 0.03], group_size=8)
    yield from five_bits(parity.ma, group_size=4)
    yield from five_bits(parity.muon, weight_decay=0.3, group_size=4)


STUDY = Study("lr_wd_map", runs)


def by_pair(frame: pd.DataFrame, column: str = "steps_to_95") -> dict[str, dict[str, pd.DataFrame]]:
    """By optimizer and method, the steps by pair and seed, infinite for a run that fails; of grids without a gap."""
    return {
        optimizer: {
            label: runs.pivot_table(column, ["lr", "weight_decay"], "seed")
            for label, method in methods.items()
            if len(runs := views.runs_of(frame, method, free=["lr", "weight_decay"], **RULE))
            == math.prod(map(len, GRIDS[optimizer])) * SEEDS
        }
        for optimizer, methods in METHODS.items()
    }


def works(steps: np.ndarray) -> np.ndarray:
    """Whether enough of the seeds (the last axis) of each pair reach 95 %."""
    return np.isfinite(steps).mean(axis=-1) >= ENOUGH


def region_size(steps: pd.DataFrame, control: pd.DataFrame | None = None) -> tuple[float, float, float]:
    """How many pairs work with a method, or how many more than with its control, and a 95 % interval.

    The interval is a bootstrap over the seeds, which all pairs and methods share.
    """

    def size(seeds: np.ndarray, axis: int = -1) -> np.ndarray:
        del axis  # always the last
        sizes = [
            works(one.to_numpy()[:, seeds]).sum(axis=0, dtype=float) for one in (steps, control) if one is not None
        ]
        return sizes[0] - sum(sizes[1:])

    seeds = np.arange(steps.shape[1])
    low, high = scipy.stats.bootstrap((seeds,), size, method="percentile", rng=0).confidence_interval
    return float(size(seeds)), float(low), float(high)


def best_pair(steps: pd.DataFrame) -> tuple[Any, np.ndarray]:
    """The pair with the lowest median (then mean) over the first half of the seeds, and its steps with the others."""
    half = steps.iloc[:, : SEEDS // 2]
    order = pd.DataFrame({"median": half.median(axis=1), "mean": half.clip(upper=MAX_STEPS).mean(axis=1)})
    pair = order.sort_values(["median", "mean"]).index[0]
    return pair, steps.loc[pair].to_numpy()[SEEDS // 2 :]


@STUDY.table
def table(frame: pd.DataFrame) -> str:
    """Each method with its best pair and its region."""
    rows = []
    for optimizer, methods in by_pair(frame).items():
        control = methods.get(next(iter(METHODS[optimizer]), ""))
        for label, steps in methods.items():
            pair, at_best = best_pair(steps)
            more = "" if control is None or control is steps else region_size(steps, control)
            rows.append(
                {
                    "method": label,
                    "best rate, decay": "{:g}, {:g}".format(*pair),
                    "steps to 95 %, median (interval)": views.median_and_interval(at_best, MAX_STEPS),
                    "fail": f"{np.isinf(at_best).sum()} of {len(at_best)}",
                    "pairs that work": "{:g} ({:g} to {:g}) of {}".format(*region_size(steps), len(steps)),
                    "more than without a filter": more and "{:+g} ({:+g} to {:+g})".format(*more),
                    "runs that reach 95 %": f"{np.isfinite(steps.to_numpy()).mean():.0%}",
                }
            )
    return markdown(rows)


@STUDY.table
def rates(frame: pd.DataFrame) -> str:
    """Each method at each learning rate, with the best weight decay there; a table for each optimizer."""

    def cell(steps: pd.DataFrame) -> str:
        (_, decay), at_best = best_pair(steps)
        failed = int(np.isinf(at_best).sum())
        median = views.format_steps(float(np.median(at_best)), MAX_STEPS)
        text = f"{median} (decay {decay:g}" + f"; {failed} fail" * bool(failed) + ")"
        return text if failed < len(at_best) else "all fail"

    tables = []
    for optimizer, methods in by_pair(frame).items():
        rows = [
            {"learning rate": f"{lr:g}"} | {label: cell(steps.loc[[lr]]) for label, steps in methods.items()}
            for lr in GRIDS[optimizer][0]
        ]
        tables += [markdown(rows)] * bool(methods)
    return views.joined(*tables)


@STUDY.table
def one_pair(frame: pd.DataFrame) -> str:
    """Each method at one learning rate and weight decay, for up to 5,000 steps."""
    groups = {label: views.runs_of(frame, method, max_steps=5_000, n=TASK.n) for label, method in ONE_PAIR.items()}
    columns = {"steps to 95 %": ("steps_to_95", 1, ",.0f"), "best val. accuracy (%)": ("best_val_accuracy", 100, ".1f")}
    return views.ranges(groups, columns)


@STUDY.figure(
    "A larger β1 widens the region where AdamW works; the hole of the MA nearly closes with λ 3",
    **{"width": 13, "height": 7, "rows": 2, "columns": 5},
)
def figure(frame: pd.DataFrame, panels: Any) -> None:
    """A map per method: the share of the seeds that reach 95 % by learning rate and weight decay."""
    steps, fit_steps = by_pair(frame), by_pair(frame, "fit_steps")
    for row, (optimizer, methods) in zip(panels, METHODS.items(), strict=True):
        for axes, label in itertools.zip_longest(row, methods):
            axes.set_visible(label is not None)
            axes.set_title(label, fontsize="large")
            if label in steps[optimizer]:
                draw_map(axes, steps[optimizer][label], fit_steps[optimizer][label])
    marks = "outlined: 90 % or more; crosses: most do not fit even their training points"
    panels[0, 0].figure.supxlabel(f"learning rate\n% of seeds that reach 95 %; {marks}", fontsize="large")
    panels[0, 0].figure.supylabel("weight decay", fontsize="large")


def draw_map(axes: Axes, steps: pd.DataFrame, fit_steps: pd.DataFrame) -> None:
    """A number for every pair, or a cross where no seed reaches 95 % and most do not fit their training points."""
    reach, fit = (np.isfinite(one).mean(axis=1).unstack("lr").iloc[::-1] for one in (steps, fit_steps))
    axes.imshow(reach, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (y, x), share in np.ndenumerate(reach):
        colour = "black" if share > 0.5 else "white"
        if share == 0 and fit.iloc[y, x] < 0.5:
            axes.plot(x, y, "x", color=colour, markersize=6)
        else:
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour)
        if share >= ENOUGH:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2))
    axes.set_xticks(range(reach.shape[1]), [f"{lr:g}" for lr in reach.columns], rotation=45)
    axes.set_yticks(range(reach.shape[0]), [f"{decay:g}" for decay in reach.index])
    axes.grid(visible=False)
