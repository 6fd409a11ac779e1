"""The pictures of the study, from its results alone."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .methods import METHODS, PARTS, Variant
from .statistics import Results, all_tuned


def methods_picture(results: Results, variants: Mapping[str, Variant]) -> Figure | None:
    """Steps to 95 % of some variants: a point a seed, a line at the median, and beside it how many fail.

    None if none of them has been run.
    """
    groups = {label: variant for label, variant in variants.items() if len(results.reported(variant))}
    if not groups:
        return None
    figure = Figure(figsize=(7, 0.9 + 0.26 * len(groups)), layout="constrained")
    axes = figure.subplots()
    beyond = 1.1 * results.cap
    for y, variant in enumerate(groups.values()):
        steps = results.reported(variant)["first_step"]
        filtered = METHODS[variant.method].config.filtering.filter != "none"
        colour = "#D55E00" if filtered else "#0072B2"
        reached = steps[np.isfinite(steps)]
        axes.plot(reached, np.full(len(reached), y), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
        axes.plot([min(steps.median(), beyond)] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2)
        if failed := len(steps) - len(reached):
            axes.text(beyond, y, f"  {failed} of {len(steps)}", va="center", fontsize="small", color=colour)
    axes.axvline(results.cap, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set(xlim=(None, 1.8 * results.cap), xlabel="steps to 95 % validation accuracy; on the right: how many fail")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    for name, colour in (("no filter", "#0072B2"), ("with a filter", "#D55E00")):
        axes.plot([], [], "o", color=colour, label=name)
    figure.legend(loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    return figure


ABLATIONS = {  # part: the changed setting, and how it is called
    "lamb": ("lamb", "λ (EMA)"),
    "alpha": ("alpha", "α (EMA)"),
    "decay": ("weight_decay", "weight decay"),
    "window": ("window_size", "window size w (MA)"),
}


def ablation(results: Results, part: str) -> dict[str, pd.DataFrame]:
    """For each line of the picture (of two settings or more) its steps: seeds that all settings have by settings."""
    lines: dict[str, list[pd.DataFrame]] = {}
    for variant in PARTS[part]:
        runs = results.reported(variant)
        if len(runs):
            line = variant.method if METHODS[variant.method].config.filtering.filter != "none" else "no filter"
            line = f"λ {variant.changes['lamb']:g}" if part == "window" else line
            setting = variant.changes[ABLATIONS[part][0]]
            lines.setdefault(line, []).append(pd.DataFrame({setting: runs["first_step"]}))
    joined = {line: pd.concat(steps, axis=1, join="inner") for line, steps in lines.items() if len(steps) > 1}
    shared = pd.concat(list(joined.values()), axis=1, join="inner").index if joined else ()
    return {line: steps.loc[shared] for line, steps in joined.items() if len(shared)}


def ablation_picture(results: Results) -> Figure | None:
    """Steps to 95 % over one setting, a panel a part: a line through the medians, a point a seed.

    Runs that fail are above the dotted line. None if nothing has been measured at two settings.
    """
    measured = {part: lines for part in ABLATIONS if (lines := ablation(results, part))}
    if not measured:
        return None
    beyond = 1.06 * results.cap
    columns = min(2, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    for i, (part, lines) in enumerate(measured.items(), 1):
        axes = figure.add_subplot(rows, columns, i)
        settings = sorted({setting for steps in lines.values() for setting in steps})
        for label, steps in lines.items():
            places = [settings.index(setting) for setting in steps]
            (drawn,) = axes.plot(places, steps.median().clip(upper=beyond), label=label)
            shown = steps.clip(upper=beyond).to_numpy().T
            axes.plot(places, shown, ".", color=drawn.get_color(), alpha=0.5)
        axes.axhline(results.cap, color="grey", linewidth=0.8, linestyle=":")
        seeds = len(next(iter(lines.values())))
        seeds_shown = f"{seeds} seed{'s' * (seeds > 1)}"
        axes.set(xlabel=f"{ABLATIONS[part][1]}, {seeds_shown}", ylabel="steps to 95 %", ylim=(0, 1.12 * results.cap))
        axes.set_xticks(range(len(settings)), [f"{value:g}" for value in settings])
        axes.grid(alpha=0.3)
        # Above the axes, for points may lie anywhere within
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), frameon=False)
    return figure


def pictures(results: Results) -> dict[str, tuple[str, Figure]]:
    """All pictures for which there are results, by name: what is seen in words, and the picture."""
    methods = {name: Variant(name, {}) for name in METHODS}
    tuned = {variant.name: variant for variant in all_tuned(results).values()}
    every = {
        "study_methods": ("Steps to 95 % by method, a point a seed", methods_picture(results, methods)),
        "study_tuned": ("Steps to 95 % by tuned method, a point a seed", methods_picture(results, tuned)),
        "study_ablations": ("Steps to 95 % over the settings of the filters", ablation_picture(results)),
    }
    return {name: (text, figure) for name, (text, figure) in every.items() if figure is not None}
