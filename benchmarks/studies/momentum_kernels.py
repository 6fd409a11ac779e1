"""Which momentum kernel reaches 95 % in the fewest steps, and in which place of an optimizer?

A momentum kernel is a low-pass filter of the gradients. Seven shapes with dc gain 1 are compared at four mean ages (in
steps) on sparse parity, each at five learning rates in three places: before AdamW without a first moment, in place of
AdamW's first moment, and in place of Muon's momentum. The tables relate the steps to the mean age of a kernel, to the
weight of its newest gradient, and to its stability limit.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import scipy.signal
import scipy.stats
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from benchmarks import views
from benchmarks.study import Study
from examples.harness import plots
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Static, Tx
from examples.harness.optimizers import stacked_muon, warmup
from examples.harness.tables import markdown
from examples.parity import Parity
from grokfast_jax import ema, impulse_response, moving_average, parallel, scale_by_filtered_adam, sosfilt
from grokfast_jax import stability_limit as limit_of

CAP = 2_000  # steps
KERNEL = ["place", "shape", "age"]
LAYOUT = {"width": 11, "height": 4.4, "columns": 3, "sharey": True}
TIGHT = {"columnspacing": 1.2, "handletextpad": 0.1}  # a legend of eight kernels


def debiased_ema(age: float) -> Tx:
    """The EMA of a mean age."""
    return ema(age / (1 + age), start="debiased")


def nesterov_ema(age: float) -> Tx:
    """Nesterov's form of the EMA; its mean age is β² / (1 - β)."""
    beta = (math.sqrt(age**2 + 4 * age) - age) / 2
    return parallel((1 - beta, optax.identity()), (beta, ema(beta, start="debiased")))


def butterworth(age: float) -> Tx:
    """The Butterworth filter of second order; its mean age is the group delay at frequency 0."""
    cutoff = 2 / math.pi * math.atan(1 / (math.sqrt(2) * age))
    return sosfilt(np.asarray(scipy.signal.butter(2, cutoff, output="sos")))


def window(size: float) -> Tx:
    """A moving average that divides by its size from the first step on."""
    return moving_average(round(size), warmup=False)


SHAPES: dict[str, Callable[[float], Tx]] = {  # kernels by mean age
    "none": lambda age: optax.identity(),
    "EMA": debiased_ema,
    "Nesterov EMA": nesterov_ema,
    "two EMAs": lambda age: parallel((0.5, debiased_ema(age / 4)), (0.5, debiased_ema(7 * age / 4))),
    "gradient + 2 EMA": lambda age: parallel((1 / 3, optax.identity()), (2 / 3, debiased_ema(1.5 * age))),
    "MA": lambda age: window(2 * age + 1),
    "triangular": lambda age: optax.chain(window(age + 1), window(age + 1)),
    "Butterworth": butterworth,
}
COLOURS = dict(zip(SHAPES, (plots.GREY, *plots.COLOURS[:5], "#56B4E9", "black"), strict=True))
KERNELS = [("none", 0.0), *itertools.product([*SHAPES][1:], (1.0, 4.0, 16.0, 64.0))]
PLACES = {  # weight decay and learning rates
    "before AdamW": (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    "in AdamW": (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    "in Muon": (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}


def momentum_kernel(lr: float, weight_decay: float, place: str, shape: str, age: Static) -> Tx:
    """AdamW or Muon with a momentum kernel. Muon updates vectors by AdamW with its own first moment."""
    schedule, kernel = warmup(lr), SHAPES[shape](age)
    if place == "in Muon":
        matrices = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
        decays = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
        return optax.chain(optax.masked(kernel, matrices), stacked_muon(schedule, beta=0.0, adam_b2=0.98, **decays))
    before = optax.chain(kernel, optax.scale_by_adam(b1=0.0, b2=0.98))
    adam = before if place == "before AdamW" else scale_by_filtered_adam(kernel, b2=0.98)
    return optax.chain(adam, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule))


def group_size(place: str, shape: str, lr: float) -> int:
    """How many runs were trained at once: in some places two learning rates were added later."""
    if place == "before AdamW" or (place, shape) == ("in AdamW", "Butterworth"):
        return 16 if lr in (0.02, 0.05) else 24
    return 40


def runs(results: Results) -> Iterator[Run]:
    """Every kernel in every place at every learning rate, with eight seeds."""
    del results
    for (place, (decay, rates)), (shape, age) in itertools.product(PLACES.items(), KERNELS):
        for lr in rates:
            setting = {"lr": lr, "weight_decay": decay, "place": place, "shape": shape, "age": age, "seed": range(8)}
            how = {"max_steps": CAP, "group_size": group_size(place, shape, lr)}
            yield from product(Parity(), momentum_kernel, **setting, **how)


STUDY = Study("momentum_kernels", runs)


@functools.cache
def newest_weight(shape: str, age: float) -> float:
    """The weight that a kernel gives the newest gradient."""
    return float(impulse_response(SHAPES[shape](age), 1)[0])


@functools.cache
def stability_limit(shape: str, age: float) -> float:
    """The stability limit of a kernel; without momentum it is 2."""
    return float(limit_of(SHAPES[shape](age), 4_096))


def medians(frame: pd.DataFrame) -> Any:
    """Median steps and failures per kernel, place and learning rate, with the kernel's limit and newest weight."""
    steps = frame.groupby([*KERNEL, "lr"], sort=False)["steps_to_95"]
    cells = steps.agg(steps="median", fail=lambda column: np.isinf(column).sum(), seeds="size").reset_index()
    kernels = list(zip(cells["shape"], cells["age"], strict=True))
    numbers = {"limit": stability_limit, "newest": newest_weight}
    return cells.assign(**{name: [of(*kernel) for kernel in kernels] for name, of in numbers.items()})


def at_best_rate(cells: Any) -> Any:
    """Every kernel in every place at the learning rate with the fewest steps.

    `safe` counts the learning rates at which every seed reaches 95 %; `largest` is the largest one at which the median
    seed does, 0 if there is none.
    """
    groups = [cells[name] for name in KERNEL]
    works = cells["lr"].where(np.isfinite(cells["steps"]), 0.0).groupby(groups)
    safe = (cells["fail"] == 0).groupby(groups)
    cells = cells.assign(safe=safe.transform("sum"), largest=works.transform("max"))
    return cells.sort_values(["steps", "fail"], kind="stable").drop_duplicates(KERNEL)


def rank_correlation(values: Any, others: Any) -> str:
    """Spearman's rank correlation; infinite values rank last."""
    found: Any = scipy.stats.spearmanr(values, others)
    return f"{found.statistic:.2f}"


def explained_share(cells: Any, *columns: str) -> str:
    """The share of the variance of the logarithm of the steps between groups of equal columns."""
    log = np.log(cells["steps"])
    within = log - log.groupby([cells[name] for name in columns]).transform("mean")
    return f"{1 - within.var() / log.var():.0%}"


@STUDY.table
def table(frame: pd.DataFrame) -> str:
    """Every kernel in every place at its best learning rate."""
    rows = []
    for row in at_best_rate(medians(frame)).itertuples():
        cells = {"place": row.place, "kernel": f"{row.shape}, age {row.age:g}" if row.age else row.shape}
        cells |= {"stability limit": views.two_digits(row.limit), "best learning rate": f"{row.lr:g}"}
        cells |= {"steps to 95 %, median": views.format_steps(row.steps, CAP), "fail": f"{row.fail} of {row.seeds}"}
        rows.append(cells | {"learning rates without failure": f"{row.safe} of {len(PLACES[row.place][1])}"})
    return markdown(rows)


@STUDY.table
def explained(frame: pd.DataFrame) -> str:
    """By place, how much of the steps the learning rate, the mean age and the newest weight explain.

    Shares are over several kernels of one age, at learning rates at which all of them work; rank correlations are
    over all kernels at their best learning rates.
    """
    rows, cells = [], medians(frame)
    same_age = cells.groupby(["place", "age", "lr"])["steps"]
    shared = cells[np.isfinite(same_age.transform("max")) & (same_age.transform("size") > 1)]
    for place, best in at_best_rate(cells).groupby("place"):
        used = shared[shared["place"] == place]
        row = {"place": place, "kernels": len(best), "learning rate explains": explained_share(used, "lr")}
        row["with mean age"] = explained_share(used, "lr", "age")
        row["rank correlation with mean age"] = rank_correlation(best["age"], best["steps"])
        rows.append(row | {"rank correlation with newest weight": rank_correlation(best["newest"], best["steps"])})
    return markdown(rows)


@STUDY.table
def largest_rates(frame: pd.DataFrame) -> str:
    """By place, whether the largest learning rate that works follows the stability limit."""
    rows = []
    for place, best in at_best_rate(medians(frame)).groupby("place"):
        works = best["largest"] >= best["largest"][best["shape"] == "none"].max()
        low, high = best["limit"] < stability_limit("none", 0.0), best["limit"] > stability_limit("none", 0.0)
        row = {"place": place}
        row["kernels with a limit below 2 that work at the largest rate without a kernel"] = (
            f"{works[low].sum()} of {low.sum()}"
        )
        row["kernels with a limit above 2 that do"] = f"{works[high].sum()} of {high.sum()}"
        correlation = rank_correlation(best["limit"][low], best["largest"][low])
        rows.append(row | {"below 2: rank correlation of limit and largest rate": correlation})
    return markdown(rows)


@STUDY.table
def fastest(frame: pd.DataFrame) -> str:
    """By place and learning rate, the limits of the kernels with the fewest steps, or up to a tenth more."""
    rows = []
    for (place, lr), cells in medians(frame).groupby(["place", "lr"]):
        fast = cells[(cells["steps"] <= 1.1 * cells["steps"].min()) & np.isfinite(cells["steps"])]
        if len(fast):
            limits = dict.fromkeys(views.two_digits(end) for end in (fast["limit"].min(), fast["limit"].max()))
            row = {"place": place, "learning rate": f"{lr:g}"}
            row["fewest steps"] = views.format_steps(fast["steps"].min(), CAP)
            row["no kernel"] = views.format_steps(cells["steps"][cells["shape"] == "none"].min(), CAP)
            row["kernels within a tenth"] = f"{len(fast)} of {len(cells)}"
            rows.append(row | {"their limits": " to ".join(limits)})
    return markdown(rows)


def by_place(panels: Any, cells: Any, x: str, y: str = "steps to 95 %, median") -> Iterator[tuple[Axes, Any]]:
    """The axes of each place, on logarithmic scales, and its cells."""
    for axes, (place, of_place) in zip(panels, cells.groupby("place"), strict=True):
        axes.set_title(place, fontsize="large")
        axes.set(xscale="log", yscale="log")
        views.label(axes, x, y if axes is panels[0] else "")
        yield axes, of_place


def number(axis: Any, values: Any, labels: Any = None) -> None:
    """Number an axis at these values alone."""
    axis.set_ticks(values, labels or [f"{value:g}" for value in values])
    axis.minorticks_off()


def steps_line(axes: Axes, line: Any, x: str, colour: Any) -> None:
    """A line of median steps over a column, with a cross at the cap where the median seed fails."""
    line = line.sort_values(x)
    reaches = np.isfinite(line["steps"])
    axes.plot(line[x], line["steps"].where(reaches), "o-", color=colour, markersize=4, alpha=0.8)
    axes.plot(line[x], line["steps"].mask(reaches, np.nan).clip(upper=CAP), "x", color=colour)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.minorticks_off()


@STUDY.figure("With AdamW, kernels of one mean age (one colour) differ in steps", **LAYOUT)
def rates(frame: pd.DataFrame, panels: Any) -> None:
    """Steps over the learning rate, a line for each kernel, coloured by its mean age."""
    ages = sorted(frame["age"].unique())
    colours = dict(zip(ages, colormaps["viridis"](np.linspace(0, 0.9, len(ages))), strict=True))
    for axes, cells in by_place(panels, medians(frame), "learning rate (×: fails)"):
        for (_, age), line in cells.groupby(["shape", "age"], sort=False):
            steps_line(axes, line, "lr", colours[age])
        number(axes.xaxis, sorted(cells["lr"].unique()))
    views.legend(panels[0].figure, {f"{age:g}": colour for age, colour in colours.items()}, title="mean age (steps)")


@STUDY.figure("At one mean age, kernels with more weight on the newest gradient take fewer steps", **LAYOUT)
def ages(frame: pd.DataFrame, panels: Any) -> None:
    """Steps at the best learning rate over the mean age, a line for each shape."""
    for axes, best in by_place(panels, at_best_rate(medians(frame)), "mean age (steps; ×: fails)"):
        axes.axhline(best["steps"][best["shape"] == "none"].min(), color=COLOURS["none"], linestyle=":")
        for shape, line in best[best["shape"] != "none"].groupby("shape"):
            steps_line(axes, line, "age", COLOURS[shape])
        number(axes.xaxis, (1, 4, 16, 64))
    views.legend(panels[0].figure, COLOURS, title="momentum kernel (dotted: no kernel)", **TIGHT)


@STUDY.figure("Kernels with a stability limit far below 2 need small rates", **LAYOUT | {"sharey": False})
def limits(frame: pd.DataFrame, panels: Any) -> None:
    """The largest learning rate that works over the stability limit, a mark for each kernel."""
    best = at_best_rate(medians(frame))
    for axes, kernels in by_place(panels, best, "stability limit", "largest learning rate that works"):
        rates = PLACES[kernels["place"].iloc[0]][1]
        fails = rates[0] / 2  # where kernels that fail at all learning rates are drawn
        for shape, kernel in kernels.groupby("shape"):
            axes.plot(kernel["limit"], kernel["largest"].clip(lower=fails), "o", color=COLOURS[shape], alpha=0.8)
        axes.axvline(stability_limit("none", 0.0), color=plots.GREY, linestyle=":")
        number(axes.yaxis, (fails, *rates), ["fails", *(f"{rate:g}" for rate in rates)])
        number(axes.xaxis, (0.1, 1, 10, 100))
    views.legend(panels[0].figure, COLOURS, title="momentum kernel (dotted: the limit without one)", **TIGHT)
