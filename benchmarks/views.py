"""The tables and plots that all studies share: a summary, a comparison in pairs, dots, lines, maps."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.harness.methods import Method, base, hyperparams
from examples.harness.plots import BLUE, GREY, ORANGE, claim
from examples.harness.tables import markdown, median_and_range

from .statistics import Comparison, Frame, interval, paired

MISSING = "Not measured yet.\n"
FEWEST = 6  # seeds of an interval: with fewer, a bootstrap interval of the median covers it too rarely
FAILS = "×"
NO_FILTER, FILTER = BLUE, ORANGE


def runs_of(frame: Frame, method: Method, free: Sequence[str] = (), **others: Any) -> Frame:
    """The runs of a method: those that have the values of its hyperparameters, but for `free` ones, and of others."""
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


def steps_and_failures(steps: np.ndarray, cap: float) -> str:
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
    low, high = interval(steps) if len(steps) >= FEWEST else (steps.min(), steps.max())
    return f"{median} ({format_steps(low, cap)} to {format_steps(high, cap)})"


def seed_counts(found: Comparison) -> str:
    """The seeds with fewer and with more steps, and the p of their sign test."""
    return f"{found.fewer} : {found.more} (p {'< 0.001' if found.p < 0.001 else f'= {found.p:.2g}'})"


def two_digits(value: float) -> str:
    """A number with two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def joined(*tables: str) -> str:
    """Tables one below the other; empty ones are left out."""
    return "\n".join(table for table in tables if table)


def outcome_cells(runs: Frame) -> dict[str, str]:
    """Outcomes of the seeds of one method, as cells of a table.

    steps to fit: median of the steps to 95 % training accuracy. steps to 95 %: median of the steps to 95 % validation
    accuracy, with its interval. slowest: the 95th percentile of these. fail: seeds that do not reach it. hold: of the
    runs that reach it, how many are at it in all evaluations that follow, and the share of these evaluations.
    """
    steps, cap = runs["steps_to_95"].to_numpy(float), float(runs["max_steps"].max())
    cells = {
        "steps to fit": format_steps(float(np.median(runs["fit_steps"])), cap),
        "steps to 95 %": median_and_interval(steps, cap),
        "slowest": format_steps(np.percentile(steps, 95, method="higher"), cap),
        "fail": f"{np.isinf(steps).sum()} of {len(runs)}",
    }
    if "held_evals" in runs:
        # Where the cap cut off the evaluations, holding is unknown; a run that diverged counts as below from there on.
        followed = (runs["followed_evals"] == runs["hold_evals"]) | ~runs["finite"].astype(bool)
        reached = runs[np.isfinite(steps) & followed & (runs["hold_evals"] > 0)]
        share = reached["held_evals"] / reached["hold_evals"]
        cells["hold"] = f"{(share == 1).sum()} of {len(share)} ({share.mean():.0%})" if len(share) else ""
    return cells


def summary(groups: Mapping[str, Frame] | Iterable[tuple[Mapping[str, str], Frame]]) -> str:
    """A table with the outcomes of each group of runs, one row per group; groups without runs are left out.

    Args:
      groups: Frames by the method's label, or pairs of the first cells of a row and a frame.
    """
    items = [({"method": k}, v) for k, v in groups.items()] if isinstance(groups, Mapping) else groups
    rows = [{**cells, **outcome_cells(runs)} for cells, runs in items if len(runs)]
    return markdown(rows) if rows else MISSING


def ranges(
    groups: Mapping[str, Frame] | Iterable[tuple[Mapping[str, str], Frame]],
    columns: Mapping[str, tuple[str, float, str]],
) -> str:
    """A table with the median and the range over the seeds of each group of runs; groups without runs are left out.

    Args:
      groups: Frames by the method's label, or pairs of the first cells of a row and a frame.
      columns: By title, the name of a column of the frames, the factor of its values, and how they are formatted. An
        infinite value is a run that fails; a cell without numbers is empty.
    """
    items = [({"method": k}, v) for k, v in groups.items()] if isinstance(groups, Mapping) else groups
    rows = []
    for cells, runs in items:
        if len(runs):
            row = {**cells, "seeds": str(len(runs))}
            for title, (column, factor, form) in columns.items():
                values = factor * runs[column].to_numpy(float)
                failing = np.where(np.isinf(values), np.nan, values)
                row[title] = "" if np.isnan(values).all() else median_and_range(failing, form)
            rows.append(row)
    return markdown(rows) if rows else MISSING


def comparison_table(pairs: Iterable[tuple[Mapping[str, str], Frame, Frame]]) -> str:
    """A table of methods compared seed by seed, one row per pair that has seeds in common.

    p is that of an exact two-sided sign test, q the same adjusted for all rows by Benjamini and Hochberg.

    Args:
      pairs: The first cells of a row, and the frames of both methods.
    """
    found = [(cells, paired(*both)) for cells, *both in pairs if set(both[0]["seed"]) & set(both[1]["seed"])]
    if not found:
        return MISSING
    adjusted = scipy.stats.false_discovery_control([one.p for _, one in found])
    rows = [
        {
            **cells,
            "fewer : more : neither": f"{one.fewer} : {one.more} : {one.ties}",
            "p": f"{one.p:.2g}",
            "q": f"{q:.2g}",
            "ratio of steps (seeds)": f"{one.ratio:.2f} ({one.both})" if one.both else "",
        }
        for (cells, one), q in zip(found, adjusted, strict=True)
    ]
    return markdown(rows)


def chart(
    title: str, width: float = 7, height: float = 4, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure whose title makes its point, and its axes: one, or an array of `columns` (by `rows`, if several)."""
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

    The number of seeds that fail, which are infinite, stands at `end`.
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


def step_dots(axes: Axes, groups: Mapping[str, tuple[Frame, str]], *, log: bool = False) -> None:
    """Steps to 95 % of groups of runs with their colours, up to the cap, which is drawn."""
    cap = max(float(runs["max_steps"].max()) for runs, _ in groups.values())
    dots(axes, {k: (runs["steps_to_95"].to_numpy(float), colour) for k, (runs, colour) in groups.items()}, 1.1 * cap)
    first = min(float(runs["steps_to_95"].min()) for runs, _ in groups.values())
    ticks = [tick for tick in (50, 100, 200, 500, 1000, 2000, 5000) if first / 2 < tick <= cap]
    ticks = ticks if log else np.linspace(0, cap, 6)
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xlim(ticks[0], cap * (3.5 if log else 1.6))
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.axvline(cap, color=GREY, linewidth=1, linestyle=":")
    label(axes, "steps to 95 % (dot: a seed, bar: the median)")


def lines(axes: Axes, groups: Mapping[str, tuple[Sequence[float], Sequence[np.ndarray], str]]) -> None:
    """A line through the medians of each group's values over x, with the range of the seeds."""
    for name, (x, values, colour) in groups.items():
        axes.plot(x, [np.median(one) for one in values], "o-", color=colour, linewidth=2, label=name)
        axes.fill_between(x, [np.min(one) for one in values], [np.max(one) for one in values], color=colour, alpha=0.2)


def share_map(axes: Axes, shares: Frame, framed: Frame, colours: str, crosses: Frame | None = None) -> None:
    """Shares in per cent, more being darker; a line around some cells, a cross in place of the number in others."""
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1.3, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        text = FAILS if crosses is not None and crosses.iloc[y, x] else f"{100 * share:.0f}"
        axes.text(x, y, text, ha="center", va="center", color="white" if share > 0.7 else "black")
    is_framed = np.pad(framed, 1)
    for (y, x), (dy, dx) in itertools.product(np.argwhere(is_framed), ((0, 1), (0, -1), (1, 0), (-1, 0))):
        if not is_framed[y + dy, x + dx]:
            ends = [x - 1 + (dx - dy) / 2, x - 1 + (dx + dy) / 2], [y - 1 + (dy - dx) / 2, y - 1 + (dy + dx) / 2]
            axes.plot(*ends, color="black", linewidth=2, clip_on=False)
    axes.set_xticks(range(shares.shape[1]), [f"{value:g}" for value in shares.columns])
    axes.set_yticks(range(shares.shape[0]), [v if isinstance(v, str) else f"{v:g}" for v in shares.index])
    axes.grid(visible=False)
