"""Does a filter widen the region of learning rates and weight decays that work?

Each method trains sparse parity at every pair of a grid of learning rates and weight decays, with seeds 0 to 31. A pair
works if at least 90 % of its seeds reach 95 % on fresh points. A method's region is the pairs that work. Its best pair
is chosen by seeds 0 to 15 and reported with seeds 16 to 31.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import pandas as pd
import scipy.stats

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples import parity
from examples.harness.methods import Method, Tx
from examples.harness.plots import BLUE, ORANGE
from grokfast_jax import grokfast_ema, grokfast_ma

TASK = parity.Parity()
SEEDS = 32
MAX_STEPS, LONG = 4_000, 20_000
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
        "AdamW without a filter": parity.adamw,
        "AdamW, β1 0.98": functools.partial(parity.adamw, b1=0.98),
        "AdamW with the EMA": parity.ema,
        "AdamW with the MA": parity.ma,
        "AdamW with the MA, λ 3": functools.partial(parity.ma, lamb=3.0),
    },
    "Muon": {"Muon without a filter": parity.muon, "Muon with the EMA": ema_muon, "Muon with the MA": ma_muon},
}


def runs(_results: Results) -> Iterator[Run]:
    """All methods at all pairs, the seeds of a pair trained at once; at a low rate, other momenta and longer."""
    for optimizer, (lrs, decays) in GRIDS.items():
        for method in METHODS[optimizer].values():
            yield from product(TASK, method, lr=lrs, weight_decay=decays, seed=range(SEEDS), **RULE)
    low = functools.partial(product, TASK, parity.adamw, lr=0.003, weight_decay=0.3, group_size=SEEDS)
    yield from low(b1=[0.0, 0.5, 0.8], seed=range(SEEDS), max_steps=MAX_STEPS)
    yield from low(b1=[0.0, 0.5, 0.8, 0.9, 0.98], seed=range(SEEDS), max_steps=LONG)


STUDY = Study("lr_wd_map", runs)


def by_pair(frame: Frame, method: Method) -> pd.DataFrame:
    """The steps of a method by pair and seed, infinite for a run that fails."""
    runs = views.runs_of(frame, method, free=["lr", "weight_decay"], **RULE)
    return runs.pivot(index=["lr", "weight_decay"], columns="seed", values="steps_to_95")


def works(steps: Frame) -> Any:
    """Whether enough of the seeds of each pair reach 95 %."""
    return np.isfinite(steps).mean(axis=1) >= ENOUGH


def more_pairs(steps: Frame, control: Frame) -> str:
    """How many pairs more than with a control work, and a 95 % interval.

    The interval is a bootstrap over the seeds, which all pairs and methods share.
    """

    def difference(seeds: np.ndarray) -> float:
        return float(works(steps.iloc[:, seeds]).sum() - works(control.iloc[:, seeds]).sum())

    seeds = np.arange(steps.shape[1])
    bootstrap = scipy.stats.bootstrap((seeds,), difference, vectorized=False, method="percentile", rng=0)
    return "{:+g} ({:+g} to {:+g})".format(difference(seeds), *bootstrap.confidence_interval)


def best_pair(steps: pd.DataFrame) -> tuple[Any, Frame]:
    """The pair with the lowest median (then mean) over the first half of the seeds, and its runs with the others."""
    half = steps.iloc[:, : SEEDS // 2]
    order = pd.DataFrame({"median": half.median(axis=1), "mean": half.clip(upper=MAX_STEPS).mean(axis=1)})
    pair: Any = order.sort_values(["median", "mean"]).index[0]
    return pair, steps.loc[pair].iloc[SEEDS // 2 :].rename("steps_to_95").reset_index()


@STUDY.table
def table(frame: Frame) -> Rows:
    """Each method with its best pair and its region, against the method without a filter."""
    for optimizer, methods in METHODS.items():
        control = by_pair(frame, next(iter(methods.values())))
        for label, method in methods.items():
            steps = by_pair(frame, method)
            (pair, at_best), (_, control_at_best) = best_pair(steps), best_pair(control)
            is_compared = label != f"{optimizer} without a filter"
            yield {
                "method": label,
                "best learning rate, weight decay": "{:g}, {:g}".format(*pair),
                "steps to 95 %": views.steps_and_failures(at_best["steps_to_95"], MAX_STEPS),
                "seeds with fewer : more steps": views.seed_counts(paired(at_best, control_at_best))
                if is_compared
                else "",
                "pairs that work": f"{works(steps).sum()} of {len(steps)}",
                "more pairs than without a filter": more_pairs(steps, control) if is_compared else "",
            }


@STUDY.figure(
    "The EMA and a larger β1 widen the region that works",
    width=8.4,
    height=5.4,
    columns=3,
    rows=2,
    sharex=True,
    sharey=True,
)
def figure(frame: Frame, panels: Any) -> None:
    """A map for AdamW with each filter: the share of the seeds that reach 95 % by learning rate and weight decay."""
    *maps, last = panels.flat
    for axes, (label, method) in zip(maps, METHODS["AdamW"].items(), strict=True):
        reach = np.isfinite(by_pair(frame, method)).mean(axis=1).unstack("lr").iloc[::-1]
        colours = "Oranges" if "with the" in label else "Greys" if "β1" in label else "Blues"
        views.share_map(axes, reach, reach >= ENOUGH, colours)
        axes.set_title(label, fontsize="large")
        axes.tick_params("x", rotation=60, labelbottom=axes in panels[1] or axes is panels[0, 2])
    last.set_axis_off()
    views.label(panels[0, 0], "", "weight decay")
    views.label(panels[1, 0], "learning rate", "weight decay")
    key = f"Numbers: % of {SEEDS} seeds that reach 95 %. Line: {100 * ENOUGH:g} % or more."
    last.figure.supxlabel(key, fontsize="large")


@STUDY.figure(
    "At a low rate AdamW groks sooner with the MA; tuned, AdamW alone is faster",
    width=10,
    height=4,
    columns=2,
    sharey=True,
)
def two_rates(frame: Frame, panels: Any) -> None:
    """The share of seeds that have reached 95 % over the steps, at one low learning rate and with each one tuned."""
    for name, method, colour, style in (
        ("AdamW without a filter", parity.adamw, BLUE, "-"),
        ("AdamW with the EMA", parity.ema, ORANGE, ":"),
        ("AdamW with the MA", parity.ma, ORANGE, "-"),
    ):
        steps = by_pair(frame, method)
        for axes, at_pair in zip(panels, (steps.loc[0.003, 0.3], best_pair(steps)[1]["steps_to_95"]), strict=True):
            reached = np.sort(at_pair[np.isfinite(at_pair)])
            shares = 100 * np.arange(len(reached) + 1) / len(at_pair)
            x, y = [0, *reached, MAX_STEPS], [*shares, shares[-1]]
            axes.step(x, y, where="post", color=colour, linestyle=style, linewidth=3, label=name)
    titles = ("learning rate 0.003, weight decay 0.3", "learning rate and decay tuned for each")
    for axes, title, end in zip(panels, titles, (MAX_STEPS, 1_000), strict=True):
        axes.set_title(title, fontsize="large", loc="left")
        axes.set(xlim=(0, end), ylim=(-2, 103), xticks=np.linspace(0, end, 5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        views.label(axes, "optimizer steps (sparse parity)", "% of seeds that reach 95 %" if axes is panels[0] else "")
    panels[0].legend(frameon=False, fontsize="large", loc="upper left")
