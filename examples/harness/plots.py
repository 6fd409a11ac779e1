"""Pictures of runs, drawn from their records alone."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .records import Row
from .run_folder import write_whole


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


def curves(rows: Sequence[Row], title: str) -> Figure:
    """Training and validation accuracy of one run over its steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.semilogx(steps, [100 * row["train_accuracy"] for row in rows], label="training", color="tab:red")
    axes.semilogx(steps, [100 * row["val_accuracy"] for row in rows], label="validation", color="tab:green")
    axes.set(xlabel="optimizer steps", ylabel="accuracy (%)", ylim=(0, 101))
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bands(groups: Mapping[str, Sequence[Sequence[Row]]], title: str) -> Figure:
    """Validation accuracy of groups of runs over their steps: the median run, and the range of the runs.

    A run that stopped early counts with its last value from there on.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, runs in groups.items():
        steps = np.unique([row["step"] for rows in runs for row in rows])
        accuracy = [
            np.interp(steps, [row["step"] for row in rows], [100 * row["val_accuracy"] for row in rows])
            for rows in runs
        ]
        (line,) = axes.semilogx(steps, np.median(accuracy, axis=0), label=label)
        axes.fill_between(steps, np.min(accuracy, axis=0), np.max(accuracy, axis=0), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="optimizer steps", ylabel="validation accuracy (%)")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def heat_map(values: np.ndarray, x: tuple[str, Sequence[str]], y: tuple[str, Sequence[str]], title: str) -> Figure:
    """A table of numbers in colour; not a number is shown as a dash. `x` and `y` name an axis and its values."""
    figure = Figure(figsize=(max(5.5, 1.6 + 0.9 * len(x[1])), 1.6 + 0.6 * len(y[1])), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis_r", aspect="auto")
    figure.colorbar(image, ax=axes)
    axes.set(xlabel=x[0], ylabel=y[0])
    axes.set_title(title, fontsize="medium")
    axes.set_xticks(range(len(x[1])), x[1])
    axes.set_yticks(range(len(y[1])), y[1])
    middle = np.nanmean(values) if np.isfinite(values).any() else 0.0
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > middle else "black"
        axes.text(j, i, f"{value:,.0f}" if np.isfinite(value) else "-", ha="center", va="center", color=colour)
    return figure
