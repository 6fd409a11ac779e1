"""Pictures of runs, drawn from their records alone."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from .files import write_whole
from .records import Row
from .task import Metric

# Okabe and Ito's palette, which colour-blind readers can tell apart; the colours of all pictures.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#595959"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY)


def claim(figure: Figure, text: str) -> None:
    """Put the point that a picture makes above it."""
    figure.suptitle(text, x=0.01, ha="left", fontsize="x-large", fontweight="bold")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)  # about twice the size at which it is shown
    write_whole(path, buffer.getvalue())


def curves(rows: Sequence[Row], title: str, metric: Metric) -> Figure:
    """The metric of one run on its training and validation examples, over its steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, rows, metric)
    axes.set_title(title, fontsize="medium", wrap=True)
    return figure


def draw_curves(axes: Axes, rows: Sequence[Row], metric: Metric) -> None:
    """The lines of `curves`."""
    _prepare(axes, metric, "{}")
    steps = [row["step"] for row in rows]
    for part, label, colour in (("train", "training", ORANGE), ("val", "validation", BLUE)):
        axes.plot(steps, [row[f"{part}_{metric}"] for row in rows], label=label, color=colour)
    number_steps(axes, steps)
    axes.legend()


def bands(groups: Mapping[str, Sequence[Sequence[Row]]], title: str, metric: Metric) -> Figure:
    """The validation metric of groups of runs over their steps: the median run, and the range of the runs.

    A run that stopped early counts with its last value from there on.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _prepare(axes, metric, "validation {}")
    axes.set_title(title, fontsize="medium", wrap=True)
    for label, runs in groups.items():
        steps = np.unique([row["step"] for rows in runs for row in rows])
        values = [
            np.interp(steps, [row["step"] for row in rows], [row[f"val_{metric}"] for row in rows]) for rows in runs
        ]
        (line,) = axes.plot(steps, np.median(values, axis=0), label=label)
        axes.fill_between(steps, np.min(values, axis=0), np.max(values, axis=0), color=line.get_color(), alpha=0.2)
        number_steps(axes, steps)
    axes.legend()
    return figure


def number_steps(axes: Axes, steps: Sequence[float] | np.ndarray) -> None:
    """Number a logarithmic axis of steps, more densely where it is short."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(steps) < 150 * min(steps) else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _prepare(axes: Axes, metric: Metric, ylabel: str) -> None:
    """Prepare axes for metrics over steps: accuracies from 0 to 100 %, losses on a logarithmic scale."""
    if metric == "accuracy":
        axes.set(ylabel=ylabel.format("accuracy (%)"), ylim=(0, 1.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    else:
        axes.set(ylabel=ylabel.format("loss"), yscale="log")
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set(xlabel="optimizer steps", xscale="log")
    axes.grid(alpha=0.3)
