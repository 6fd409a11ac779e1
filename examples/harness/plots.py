"""Pictures of runs, drawn from their records alone."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from .files import write_whole
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


def curves(groups: Mapping[str, Sequence[pd.Series]], title: str, metric: Metric) -> Figure:
    """The metric over the steps: the median run of each group, and the range of its runs, each a series by step.

    A run that stopped early counts with its last value from there on. One that diverged ends at a cross.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="optimizer steps", xscale="log")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.grid(alpha=0.3)
    if metric == "accuracy":
        axes.set(ylabel="accuracy (%)", ylim=(0, 1.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    else:
        axes.set(ylabel="loss", yscale="log")
        axes.yaxis.set_minor_formatter(LogFormatter())
    for i, (label, series) in enumerate(groups.items()):
        runs: Any = pd.concat(series, axis=1).sort_index().interpolate("index")
        colour = COLOURS[i % len(COLOURS)]
        for column, one in enumerate(series):
            for end in one.index.to_numpy()[one.isna().to_numpy()][:1]:
                axes.plot(end, runs.iat[runs.index.get_loc(end), column], "x", color=colour, markersize=10)
                runs.iloc[runs.index > end, column] = math.nan
        axes.plot(runs.index, runs.median(axis=1), label=label, color=colour)
        axes.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2)
        number_steps(axes, runs.index)
    axes.legend()
    return figure


def number_steps(axes: Axes, steps: Sequence[float] | pd.Index) -> None:
    """Number a logarithmic axis of steps, more densely where it is short."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(steps) < 150 * min(steps) else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
