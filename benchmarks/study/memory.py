"""What shape should the memory of gradients have, and where should it be? `python -m benchmarks.study.memory`.

Low-pass filters with dc gain 1 and the same mean age (in steps), in three places: before AdamW, whose own first moment
is off, in place of AdamW's first moment, and in place of Muon's momentum; each at five learning rates, on mod 97 and on
sparse parity. Results are appended, seed after seed; what is there is not trained again. With one run per program the
first seed comes first: a kernel and rate that it fails with is not trained with the others.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import pandas as pd
import scipy.signal
import scipy.stats
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks import RESULTS, run_command
from examples.harness.optimizers import stacked_muon
from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.harness.task import Task
from examples.modular import Modular
from examples.parity import Parity
from grokfast_jax import (
    ema,
    impulse_response,
    moving_average,
    parallel,
    scale_by_filtered_adam,
    sosfilt,
    stability_limit,
)

from . import contest
from .cells import as_cell
from .contest import Chain, Job, results, train_missing
from .methods import check_among
from .tables import MISSING, joined, steps, two_digits

OUT = RESULTS / "memory.jsonl"
Tx = optax.GradientTransformation
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


def average(age: float) -> Tx:
    """The EMA of a mean age, debiased."""
    return ema(age / (1 + age), start="debiased")


def nesterov(beta: Any) -> Tx:
    """Nesterov's form of the EMA, of mean age β² / (1 - β)."""
    return parallel((1 - beta, optax.identity()), (beta, ema(beta, start="debiased")))


def butterworth(age: float) -> Tx:
    """The Butterworth filter of second order, whose mean age is its group delay at frequency 0."""
    cutoff = 2 / math.pi * math.atan(1 / (math.sqrt(2) * age))
    return sosfilt(np.asarray(scipy.signal.butter(2, cutoff, output="sos")))


def windows(*sizes: int) -> Tx:
    """Moving averages, one after the other; each divides by its size from the first step on."""
    return optax.chain(*(moving_average(size, warmup=False) for size in sizes))


# By name: a filter of dc gain 1, of its mean age A
SHAPES: dict[str, Callable[[float], Tx]] = {
    "EMA": average,
    "Nesterov EMA": lambda a: nesterov((math.sqrt(a * a + 4 * a) - a) / 2),
    "two EMAs": lambda a: parallel((0.5, average(a / 4)), (0.5, average(7 * a / 4))),
    "gradient + 2 EMA": lambda a: parallel((1 / 3, optax.identity()), (2 / 3, average(1.5 * a))),
    "MA": lambda a: windows(round(2 * a + 1)),
    "triangular": lambda a: windows(round(a + 1), round(a + 1)),
    "Butterworth": butterworth,
}
MARKS = dict(zip(SHAPES, "os^vDPX", strict=True))  # in pictures
COLOURS = {shape: f"C{i}" for i, shape in enumerate(SHAPES)}
NONE = ("none", 0.0)


def kernel(shape: str, age: float) -> Tx:
    """A filter by shape and mean age."""
    return optax.identity() if (shape, age) == NONE else SHAPES[shape](age)


def warmed(lr: Any) -> Callable[[Any], Any]:
    """The learning rate with the paper's warm-up of ten steps."""
    return lambda step: lr * optax.linear_schedule(0.0, 1.0, 10)(step)


def stepped(scale: Tx, lr: Any, weight_decay: Any) -> Tx:
    """A scaled gradient with decoupled weight decay and a learning rate."""
    return optax.chain(scale, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(warmed(lr)))


def before_adamw(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """AdamW without a first moment of its own, behind the filter."""
    return stepped(optax.chain(memory, optax.scale_by_adam(b1=0.0, b2=0.98)), lr, weight_decay)


def in_adamw(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """AdamW with the filter in place of its first moment."""
    return stepped(scale_by_filtered_adam(memory, b2=0.98), lr, weight_decay)


def in_muon(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """Muon with the filter in place of its momentum; all that is no matrix is trained by AdamW."""
    matrices = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    options = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay, "adam_b2": 0.98}
    return optax.chain(optax.masked(memory, matrices), stacked_muon(warmed(lr), beta=0.0, **options))


PLACES = {"before AdamW": before_adamw, "in AdamW": in_adamw, "in Muon": in_muon}
# By task: what is trained, steps at most, weight decay and five learning rates in each place, kernels, runs per program
TITLES = {"modular": "mod 97", "parity": "sparse parity"}
TASKS: dict[str, tuple[Task, int]] = {"modular": (Modular(), 700), "parity": (Parity(), 2_000)}
RATES = {
    ("modular", "before AdamW"): (1.0, (0.0005, 0.001, 0.002, 0.004, 0.008)),
    ("modular", "in AdamW"): (1.0, (0.0005, 0.001, 0.002, 0.004, 0.008)),
    ("modular", "in Muon"): (0.3, (0.0125, 0.025, 0.05, 0.1, 0.2)),
    ("parity", "before AdamW"): (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    ("parity", "in AdamW"): (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    ("parity", "in Muon"): (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}
KERNELS = {
    "modular": [NONE, ("EMA", 1.0), ("EMA", 16.0), *((shape, 4.0) for shape in SHAPES)],
    "parity": [NONE, *itertools.product(SHAPES, (1.0, 4.0, 16.0, 64.0))],
}


def jobs(task: str, places: Sequence[str], seeds: Sequence[int], only: Sequence[float] = ()) -> list[Job]:
    """All runs on a task, seed after seed; if rates are given, those of them."""
    found = []
    trained, cap = TASKS[task]
    chains = {
        (place, shape, age): Chain(f"{task}, {place}, {shape}, age {age:g}", _make(place, shape, age), trained)
        for place in places
        for shape, age in KERNELS[task]
    }
    for seed in seeds:
        for (place, *_), chain in chains.items():
            decay, rates = RATES[task, place]
            rates = [rate for rate in rates if not only or rate in only]
            found += [Job(chain, {"lr": rate, "weight_decay": decay}, seed, cap) for rate in rates]
    return found


def promising(jobs: Sequence[Job], path: Path, first: int) -> list[Job]:
    """Jobs but for those whose chain and numbers have failed with the first seed."""
    stored = results(path)
    runs = (stored.get(as_cell(job.cell | {"seed": first})) for job in jobs)
    return [job for job, run in zip(jobs, runs, strict=True) if run is None or run["first_step"] is not None]


def _make(place: str, shape: str, age: float) -> Callable[..., Tx]:
    return lambda lr, weight_decay: PLACES[place](kernel(shape, age), lr, weight_decay)


def frame(path: Path) -> Frame:
    """The results, a row for each place, kernel, rate and seed."""
    table = contest.frame(path)
    if not len(table):
        return table
    parts = table.pop("chain").str.extract(r"^(?P<task>.+?), (?P<place>.+), (?P<shape>.+), age (?P<age>.+)$")
    return pd.concat([parts.astype({"age": float}), table], axis=1)


def medians(runs: Frame) -> Frame:
    """Over seeds, of every task, place, kernel and rate: the median of the steps, failures and seeds."""
    by = runs.groupby(["task", "place", "shape", "age", "lr"], sort=False)["first_step"]
    return by.agg(steps="median", fail=lambda first: int(np.isinf(first).sum()), seeds="size").reset_index()


def at_best_rate(cells: Frame) -> Frame:
    """Every kernel in every place at the rate with the fewest steps, and how many of the rates no seed fails at."""
    order = cells.sort_values(["steps", "fail"], kind="stable")
    best = order.groupby(["task", "place", "shape", "age"], sort=False).head(1)
    safe = cells[cells["fail"] == 0].groupby(["task", "place", "shape", "age"]).size().rename("rates without failure")
    return best.merge(safe.reset_index(), how="left").fillna({"rates without failure": 0})


def explained(cells: Frame) -> Frame:
    """What the steps follow, by place: the rate and the mean age, or how the kernel weighs the newest gradient.

    The first two are shares of the variance of the logarithm of the steps: over kernels that have their age in common
    with another, at rates with which none of these fails in the median. The others are rank correlations over all
    kernels at their best rates; a kernel that fails counts as the slowest.
    """
    rows = []
    best = at_best_rate(cells)
    for (task, place), some in cells[cells["shape"] != NONE[0]].groupby(["task", "place"], sort=False):
        log = np.log(some["steps"].where(np.isfinite(some["steps"])))
        groups = log.groupby([some["age"], some["lr"]])
        log = log[(groups.transform("count") == groups.transform("size")) & (groups.transform("size") > 1)]
        used = some.loc[log.index]

        def share(keys: Sequence[str], log: Any = log, used: Frame = used) -> str:
            total = ((log - log.mean()) ** 2).sum()
            within = ((log - log.groupby([used[key] for key in keys]).transform("mean")) ** 2).sum()
            return f"{1 - within / total:.0%}" if total > 0 and used["lr"].nunique() > 1 else ""

        kernels = best[(best["task"] == task) & (best["place"] == place)]
        weights = [newest(*key) for key in zip(kernels["shape"], kernels["age"], strict=True)]
        rank = {
            "rank correlation with mean age": rank_correlation(kernels["age"], kernels["steps"]),
            "rank correlation with weight of newest": rank_correlation(weights, kernels["steps"]),
        }
        shares = {"rate explains": share(["lr"]), "with mean age": share(["lr", "age"])}
        rows.append({"task, place": f"{TITLES[task]}, {place}", "kernels": len(kernels)} | shares | rank)
    return pd.DataFrame(rows)


def rank_correlation(values: Any, steps: Any) -> str:
    """Spearman's rank correlation, of numbers that may be infinite; empty if all of one side are equal."""
    if len(set(values)) < 2 or len(set(steps)) < 2:
        return ""
    return f"{np.corrcoef(scipy.stats.rankdata(values), scipy.stats.rankdata(steps))[0, 1]:.2f}"


@functools.cache
def newest(shape: str, age: float) -> float:
    """The weight that a kernel gives the newest gradient."""
    return float(impulse_response(kernel(shape, age), 1)[0])


@functools.cache
def limit(shape: str, age: float) -> float:
    """The stability limit of a kernel; that of no memory is 2."""
    return float(stability_limit(kernel(shape, age), 4_096))


def largest_rates(cells: Frame) -> Frame:
    """Every kernel's stability limit, and the largest rate at which the median seed reaches 95 %, 0 if at none."""
    reached = cells.assign(largest=cells["lr"].where(np.isfinite(cells["steps"]), 0.0))
    rows = reached.groupby(["task", "place", "shape", "age"], sort=False)["largest"].max().reset_index()
    return rows.assign(limit=[limit(*key) for key in zip(rows["shape"], rows["age"], strict=True)])


def bounds(cells: Frame) -> Frame:
    """By place: does the largest rate that works follow the stability limit, and is it that of no memory?"""
    rows = []
    for (task, place), some in largest_rates(cells).groupby(["task", "place"], sort=False):
        bar = some["largest"][some["shape"] == NONE[0]].max()
        less, more = some[some["limit"] < limit(*NONE)], some[some["limit"] > limit(*NONE)]
        bear = lambda kernels, bar=bar: f"{(kernels['largest'] >= bar).sum()} of {len(kernels)}" * bool(bar > 0)
        rows.append(
            {
                "task, place": f"{TITLES[task]}, {place}",
                "kernels of a limit below 2 that bear the rate of no memory": bear(less),
                "kernels of a limit above 2 that do": bear(more),
                "below 2: rank correlation of limit and largest rate": rank_correlation(less["limit"], less["largest"]),
            }
        )
    return pd.DataFrame(rows)


def fastest_limits(cells: Frame) -> Frame:
    """By place and learning rate: the stability limits of the kernels that take the fewest steps, or a tenth more."""
    rows = []
    for (task, place, rate), some in cells.groupby(["task", "place", "lr"], sort=True):
        fewest, cap = some["steps"].min(), TASKS[task][1]
        if not np.isfinite(fewest):
            continue
        fast = some[some["steps"] <= 1.1 * fewest]
        limits = [limit(*key) for key in zip(fast["shape"], fast["age"], strict=True)]
        none = some["steps"][some["shape"] == NONE[0]]
        rows.append(
            {
                "task, place": f"{TITLES[task]}, {place}",
                "learning rate": f"{rate:g}",
                "fewest steps": steps(fewest, cap),
                "no memory": steps(none.iloc[0], cap) if len(none) else "",
                "kernels within a tenth": f"{len(fast)} of {len(some)}",
                "their limits": " to ".join(dict.fromkeys(two_digits(end) for end in (min(limits), max(limits)))),
            }
        )
    return pd.DataFrame(rows)


def table(path: Path) -> str:
    """Every kernel in every place at its best rate, what its age explains, and what limits are fast at each rate."""
    runs = frame(path)
    if not len(runs):
        return MISSING
    cells = medians(runs)
    rows = [
        {
            "task, place": f"{TITLES[row.task]}, {row.place}",
            "kernel": row.shape if row.shape == NONE[0] else f"{row.shape}, age {row.age:g}",
            "stability limit": two_digits(limit(row.shape, row.age)),
            "best rate": f"{row.lr:g}",
            "steps to 95 %, median": steps(row.steps, TASKS[row.task][1]),
            "fail": f"{row.fail} of {row.seeds}",
            "rates without failure": f"{row[-1]:.0f} of {len(RATES[row.task, row.place][1])}",
        }
        for row in at_best_rate(cells).itertuples(index=False)
    ]
    found = (one.to_markdown(index=False) + "\n" for one in (explained(cells), bounds(cells), fastest_limits(cells)))
    return joined(*found, markdown(rows))


def panels(cells: Frame, title: str) -> tuple[Figure, Iterator[tuple[Axes, str, Frame]]]:
    """A figure with a panel for each task and place, and for each panel its axes, its task and what it shows."""
    tasks = [task for task in TASKS if (cells["task"] == task).any()]
    figure = Figure(figsize=(10, 1.2 + 3.2 * len(tasks)), layout="constrained")
    claim(figure, title)

    def each() -> Iterator[tuple[Axes, str, Frame]]:
        for i, (task, place) in enumerate(itertools.product(tasks, PLACES), 1):
            axes = figure.add_subplot(len(tasks), len(PLACES), i)
            axes.set_title(f"{TITLES[task]}, {place}", fontsize="large")
            axes.set_xscale("log")
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            if i % len(PLACES) == 1:
                axes.set_ylabel("steps to 95 %, median", fontsize="large")
            yield axes, task, cells[(cells["task"] == task) & (cells["place"] == place)]

    return figure, each()


def law_picture(path: Path) -> Figure:
    """Steps over the learning rate, a line for each kernel, coloured by its mean age: do lines of one age coincide?"""
    cells = medians(frame(path))
    ages = sorted(cells["age"].unique())
    colours = dict(zip(ages, colormaps["viridis"](np.linspace(0, 0.9, len(ages))), strict=True))
    figure, drawn = panels(cells, "Lines of one colour have one mean age; for AdamW they do not coincide")
    for axes, task, some in drawn:
        for (_, age), line in some.groupby(["shape", "age"], sort=False):
            line = line.sort_values("lr")
            reached, cap = line["steps"].where(np.isfinite(line["steps"])), TASKS[task][1]
            axes.plot(line["lr"], reached, "o-", color=colours[age], markersize=4, linewidth=1.5)
            axes.plot(line["lr"][reached.isna()], np.full(int(reached.isna().sum()), cap), "x", color=colours[age])
        axes.set_xlabel("learning rate; x: fails", fontsize="large")
        axes.set_xticks(sorted(some["lr"].unique()), [f"{rate:g}" for rate in sorted(some["lr"].unique())])
        axes.xaxis.set_minor_locator(NullLocator())
    handles = [Line2D([], [], color=colour, label=f"{age:g}") for age, colour in colours.items()]
    figure.legend(handles=handles, title="mean age", loc="outside lower center", ncols=len(ages), frameon=False)
    return figure


def age_picture(path: Path) -> Figure:
    """Steps at the best rate over the mean age, a line for each shape."""
    figure, drawn = panels(
        at_best_rate(medians(frame(path))), "At one mean age, the more the newest gradient weighs, the fewer the steps"
    )
    for axes, _, some in drawn:
        none = some[(some["shape"] == NONE[0]) & np.isfinite(some["steps"])]["steps"]
        for value in none:
            axes.axhline(value, color=GREY, linestyle=":")
        for shape, mark in MARKS.items():
            line = some[some["shape"] == shape].sort_values("age")
            reached = line["steps"].where(np.isfinite(line["steps"]))
            axes.plot(line["age"], reached, f"{mark}-", color=COLOURS[shape], alpha=0.8)
        axes.set_xlabel("mean age (steps)", fontsize="large")
        axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axes.xaxis.set_minor_locator(NullLocator())
    legend(figure, "no memory")
    return figure


def limit_picture(path: Path) -> Figure:
    """The largest rate that works over the stability limit, a mark for each kernel."""
    cells = medians(frame(path))
    largest = largest_rates(cells)
    figure, drawn = panels(cells, "The less stable a window is, the smaller the rate that it bears")
    for axes, task, some in drawn:
        rates = sorted(some["lr"].unique())
        fails = min(rates, default=1.0) / 2
        kernels = largest[(largest["task"] == task) & largest["place"].isin(some["place"])]
        for shape, mark in MARKS.items():
            one = kernels[kernels["shape"] == shape]
            axes.plot(
                one["limit"], one["largest"].where(one["largest"] > 0, fails), mark, color=COLOURS[shape], alpha=0.8
            )
        axes.axvline(limit(*NONE), color=GREY, linestyle=":")
        axes.set_yticks([fails, *rates], ["fails", *(f"{rate:g}" for rate in rates)])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("stability limit", fontsize="large")
        axes.set_ylabel("largest rate that works" if axes.get_ylabel() else "", fontsize="large")
    legend(figure, "no memory")
    return figure


def legend(figure: Figure, dotted: str) -> None:
    """A key to the shapes, and to a dotted line."""
    handles = [Line2D([], [], color=COLOURS[shape], marker=mark, label=shape) for shape, mark in MARKS.items()]
    handles.append(Line2D([], [], color=GREY, linestyle=":", label=dotted))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def main(
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(TASKS),
    places: tuple[str, ...] = tuple(PLACES),
    seeds: tuple[int, ...] = tuple(range(8)),
    rates: tuple[float, ...] = (),
    group_size: int = 1,
    out: Path = OUT,
) -> None:
    """Train what is missing.

    Args:
      tasks: Which of modular and parity.
      places: Which of "before AdamW", "in AdamW" and "in Muon".
      seeds: Seeds of every kernel and rate.
      rates: Only these learning rates; by default all five of each place.
      group_size: Runs to train at once in one vmapped program: for parity as many as there are seeds times rates.
      out: File for the results.
    """
    check_among("TASKS", tasks, TASKS)
    check_among("--places", places, PLACES)
    known = sorted({rate for task in tasks for place in places for rate in RATES[task, place][1]})
    check_among("--rates", [f"{rate:g}" for rate in rates or known], [f"{rate:g}" for rate in known])
    for task in tasks:
        listed = jobs(task, places, seeds, rates)
        if group_size > 1:  # all runs of a chain one after the other
            train_missing(sorted(listed, key=lambda job: job.chain.name), out, group_size)
            continue
        for _, some in itertools.groupby(listed, lambda job: job.seed):
            train_missing(promising(list(some), out, seeds[0]), out)


if __name__ == "__main__":
    run_command(main, "benchmarks.study.memory")
