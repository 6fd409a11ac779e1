"""The tables and plots that all studies share: a summary, a comparison in pairs, dots, lines, maps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.harness.methods import Method, base, hyperparams
from examples.harness.plots import BLUE, GREY, ORANGE, claim
from examples.harness.tables import median_and_range

from .statistics import Comparison, Frame

MISSING = "Not measured yet.\n"
FEWEST = 6  # seeds of an interval: with fewer, not even the range covers the median in 95 % of cases
FAILS = "×"
NO_FILTER, FILTER = BLUE, ORANGE


def runs_of(frame: Frame, method: Method, free: Sequence[str] = (), **others: Any) -> Frame:
    """The runs with a method, the values of its hyperparameters except `free` ones, and the values of others."""
    wanted = {"method": base(method).__name__, **hyperparams(method), **others}
    wanted = {name: value for name, value in wanted.items() if name not in free}
    rows: Any = frame
    if wanted.keys() - set(frame):
        return rows[:0]
    is_wanted = [frame[name].isna() if value is None else frame[name] == value for name, value in wanted.items()]
    return rows[np.logical_and.reduce(is_wanted)]


def format_steps(value: float, cap: float) -> str:
    """A number of steps, or that there were more than the cap."""
    return f"{value:,.0f}" if math.isfinite(value) else f"> {cap:,.0f}"


def steps_and_failures(steps: Any, cap: float) -> str:
    """The median of some steps, and how many runs fail, if any does."""
    failed = int(np.isinf(steps).sum())
    if failed == len(steps):
        return "all fail"
    return format_steps(float(np.median(steps)), cap) + f", {failed} fail" * bool(failed)


def median_and_interval(steps: np.ndarray, cap: float) -> str:
    """The median of some steps with its 95 % interval, or the range if there are few."""
    median = format_steps(float(np.median(steps)), cap)
    if len(steps) == 1 or not np.isfinite(steps).any():
        return median
    interval = scipy.stats.quantile_test(steps, p=0.5).confidence_interval(0.95)
    low, high = interval if len(steps) >= FEWEST else (steps.min(), steps.max())
    return f"{median} ({format_steps(low, cap)} to {format_steps(high, cap)})"


def seed_counts(found: Comparison) -> str:
    """The seeds with fewer and with more steps, and the p of their sign test."""
    return f"{found.fewer} : {found.more} (p {'< 0.001' if found.p < 0.001 else f'= {found.p:.2g}'})"


def outcome_cells(runs: Frame) -> dict[str, str]:
    """Outcomes of the seeds of one method, as cells of a table.

    steps to fit: median of the steps to 95 % training accuracy. steps to 95 %: median of the steps to 95 % validation
    accuracy, with its interval. fail: seeds that do not reach it. hold: of the runs that reach it, how many are at it
    in all evaluations that follow, and the share of these evaluations.
    """
    steps, cap = runs["steps_to_95"].to_numpy(float), float(runs["max_steps"].max())
    cells = {
        "steps to fit": format_steps(runs["fit_steps"].median(), cap),
        "steps to 95 %": median_and_interval(steps, cap),
        "fail": f"{np.isinf(steps).sum()} of {len(runs)}",
    }
    if "held_evals" in runs:
        reached = runs[np.isfinite(steps) & (runs["hold_evals"] > 0)]  # one that diverged counts as below from there on
        share = reached["held_evals"] / reached["hold_evals"]
        cells["hold"] = f"{(share == 1).sum()} of {len(share)} ({share.mean():.0%})" if len(share) else ""
    return cells


def summary(groups: Mapping[str, Frame]) -> list[dict[str, str]]:
    """The rows of a table with the outcomes of each group of runs, by label; groups without runs are left out."""
    return [{"method": label, **outcome_cells(runs)} for label, runs in groups.items() if len(runs)]


def range_cells(runs: Frame, columns: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Medians and ranges of some runs as cells of a table, by title: of the values of a column, in a format.

    An infinite value is a run that fails.
    """
    cells = {title: median_and_range(runs[column].to_numpy(float), form) for title, (column, form) in columns.items()}
    return {"runs": str(len(runs))} | cells


def chart(
    title: str, width: float = 7, height: float = 4, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure, titled with its point, and its axes: one, or an array of `columns` (by `rows`, if several)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    claim(figure, title)
    axes = figure.subplots(rows, columns, **options)
    for panel in np.ravel(axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize="large")
        panel.grid(alpha=0.3)
    return figure, axes


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Label the axes, large enough to be read at half the size."""
    axes.set_xlabel(x, fontsize="large")
    axes.set_ylabel(y, fontsize="large")


def legend(figure: Any, colours: Mapping[str, str], **options: Any) -> None:
    """Say below the chart which colour is what."""
    marks = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, **options)


def dots(axes: Axes, groups: Mapping[str, tuple[np.ndarray, str]], end: float | None = None) -> None:
    """A row for each group of values with its colour: a dot per seed, a bar at the median.

    Seeds that fail have infinite values; their number is written at `end`.
    """
    for y, (values, colour) in enumerate(groups.values()):
        reached, middle = values[np.isfinite(values)], float(np.median(values))
        axes.plot(reached, np.full(len(reached), y), "o", color=colour, alpha=0.5, markersize=8, markeredgewidth=0)
        if math.isfinite(middle):
            axes.plot([middle] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=3)
        if end and (failed := len(values) - len(reached)):
            text = f"{FAILS} {failed} of {len(values)} fail" if len(reached) else f"{FAILS} all {failed} fail"
            axes.text(end, y, text, va="center", fontsize="large", color=colour, fontweight="bold")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def step_dots(axes: Axes, groups: Mapping[str, tuple[Frame, str]]) -> None:
    """Steps to 95 % of groups of runs with their colours, up to the cap, which is drawn."""
    cap = max(float(runs["max_steps"].max()) for runs, _ in groups.values())
    first = min(float(runs["steps_to_95"].min()) for runs, _ in groups.values())
    dots(axes, {k: (runs["steps_to_95"].to_numpy(float), colour) for k, (runs, colour) in groups.items()}, 1.1 * cap)
    ticks = [tick for tick in (50, 100, 200, 500, 1000, 2000, 5000) if first / 2 < tick <= cap]
    axes.set(xscale="log", xlim=(min(ticks[0], 0.9 * first), 3.5 * cap))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(cap, color=GREY, linewidth=1, linestyle=":")
    label(axes, "steps to 95 % (dot: a seed, bar: the median)")


def step_lines(
    axes: Axes, groups: Mapping[str, tuple[Any, Sequence[Any], str, str]], fails: float, ticks: Sequence[int]
) -> None:
    """Medians of the steps over x, and the ranges of the seeds, on a logarithmic axis that has failing runs at `fails`.

    A group is the values of x, the steps of the seeds at each, and the style and the colour of its line.
    """
    for name, (x, seeds, style, colour) in groups.items():
        steps = np.minimum(seeds, fails)
        axes.plot(x, np.median(steps, axis=1), style, color=colour, linewidth=2, label=name)
        axes.vlines(x, steps.min(axis=1), steps.max(axis=1), color=colour, alpha=0.4)
    axes.set_yscale("log")
    axes.set_yticks([*ticks, fails], [*(f"{tick:,}" for tick in ticks), "fails"])
    axes.minorticks_off()


def share_map(axes: Axes, shares: Frame, framed: np.ndarray, colours: str) -> None:
    """Shares in per cent, more being darker, with a line around some cells."""
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1.3, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.7 else "black")
    is_framed = np.pad(framed, 1)
    y, x = np.nonzero(np.diff(is_framed, axis=1)[1:-1])
    axes.vlines(x - 0.5, y - 0.5, y + 0.5, color="black", linewidth=2, clip_on=False)
    y, x = np.nonzero(np.diff(is_framed, axis=0)[:, 1:-1])
    axes.hlines(y - 0.5, x - 0.5, x + 0.5, color="black", linewidth=2, clip_on=False)
    axes.set_xticks(range(shares.shape[1]), [f"{value:g}" for value in shares.columns])
    axes.set_yticks(range(shares.shape[0]), [v if isinstance(v, str) else f"{v:g}" for v in shares.index])
    axes.grid(visible=False)
