"""The pictures of the site, from results alone: each makes one point, which its title says."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from examples.harness.plots import BLUE, GREY, ORANGE, PURPLE, claim, number_steps

from . import board, circuits, edge, memory, noise, raised, region, spectra, trajectories, windows
from .methods import AFTER, METHODS, PARTS, TUNED, TUNING, Variant, grid
from .statistics import Results, all_tuned

NO_FILTER, FILTER = BLUE, ORANGE
FAILS = "×"


def is_filtered(variant: Variant) -> bool:
    """Whether there is a filter before the optimizer."""
    return variant.run(0, 1).filtering.filter != "none"


def steps_of(results: Results, variant: Variant) -> np.ndarray:
    """Steps to 95 % of each seed of a variant, infinite where it fails."""
    return results.reported(variant)["first_step"].to_numpy(float)


def chart(title: str, width: float = 7, height: float = 4, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure whose title makes its point, and its axes: one, or an array of `columns`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    claim(figure, title)
    axes = figure.subplots(1, columns, **options)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize="large")
        one.grid(alpha=0.3)
    return figure, axes


def label(axes: Axes, x: str = "", y: str = "") -> None:
    """Label the axes, large enough to be read at half the size."""
    axes.set_xlabel(x, fontsize="large")
    axes.set_ylabel(y, fontsize="large")


def key(figure: Figure, colours: Mapping[str, str], **options: Any) -> None:
    """Say below the chart which colour is what."""
    marks = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, **options)


def draw_dots(axes: Axes, groups: Mapping[str, tuple[np.ndarray, str]], end: float | None = None) -> None:
    """A row for each group of values: a dot a seed, a bar at the median; how many fail, infinite, stands at `end`."""
    for y, (steps, colour) in enumerate(groups.values()):
        reached, middle = steps[np.isfinite(steps)], float(np.median(steps))
        axes.plot(reached, np.full(len(reached), y), "o", color=colour, alpha=0.5, markersize=8, markeredgewidth=0)
        if math.isfinite(middle):
            axes.plot([middle] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=3)
        if end and (failed := len(steps) - len(reached)):
            text = f"{FAILS} {failed} of {len(steps)} fail" if len(reached) else f"{FAILS} 0 of {len(steps)} reach it"
            axes.text(end, y, text, va="center", fontsize="large", color=colour, fontweight="bold")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def method_dots(
    results: Results, variants: Mapping[str, Variant], title: str, *, is_sorted: bool = True, log: bool = False
) -> Figure | None:
    """Steps to 95 % of some variants by label, sorted by the median or left in order; None without runs."""
    groups = {}
    for name, variant in variants.items():
        if len(steps := steps_of(results, variant)):
            groups[name] = steps, FILTER if is_filtered(variant) else NO_FILTER
    if not groups:
        return None
    if is_sorted:
        slowness = lambda item: (np.median(item[1][0]), np.mean(np.minimum(item[1][0], results.cap)))
        groups = dict(sorted(groups.items(), key=slowness))
    figure, axes = chart(title, 9, 1.6 + 0.34 * len(groups))
    draw_dots(axes, groups, end=1.04 * results.cap)
    ticks = [200, 500, 1000, 2000, 5000] if log else range(0, results.cap + 1, 1000)
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xlim(200 if log else 0, results.cap * (4 if log else 1.6))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.axvline(results.cap, color=GREY, linewidth=1, linestyle=":")
    label(axes, "steps to 95 % (dot: a seed, bar: the median)")
    key(figure, {"no filter": NO_FILTER, "with a filter": FILTER})
    return figure


def words_for(variants: Iterable[Variant]) -> dict[str, Variant]:
    """Variants by their names in words."""
    return {variant.in_words: variant for variant in variants}


def tuned_words(variant: Variant) -> str:
    """The name in words of a tuned method, with its learning rate."""
    return f"{variant.in_words}, rate {variant.changes['lr']:g}"


# The first picture of the README: the tuned method whose rate and decay come from the results has no changes here.
HERO: dict[str, tuple[str, str, str]] = {  # curve: method, whether "tuned" or "as is", colour
    "Grokfast-EMA before Adam": ("ema", "as is", ORANGE),
    "its fair control: Adam, a third of the decay": ("adam-0.00167", "as is", GREY),
    "AdamW with its learning rate tuned, no filter": ("adamw-1", "tuned", BLUE),
    "the preset fastest: Muon with a short memory": ("fastest", "as is", PURPLE),
}


def hero(results: Results) -> Figure | None:
    """The share of seeds that have reached 95 % over the steps."""
    tuned = all_tuned(results)
    curves = {}
    for name, (method, form, colour) in HERO.items():
        variant = tuned.get(method) if form == "tuned" else Variant(method, {})
        if variant and len(steps := steps_of(results, variant)):
            curves[name] = np.sort(steps), colour
    if not curves:
        return None
    figure, axes = chart("The filter helps; a tuned learning rate and Muon help more", 8, 4.4)
    last = max(steps[np.isfinite(steps)].max(initial=0) for steps, _ in curves.values())
    for name, (steps, colour) in curves.items():
        reached = steps[np.isfinite(steps)]
        share = np.arange(len(reached) + 1) / len(steps)
        x = [0, *reached, 1.05 * last]
        axes.step(x, 100 * np.array([*share, share[-1]]), where="post", color=colour, linewidth=3, label=name)
    axes.set(xlim=(0, 1.05 * last), ylim=(-2, 104))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    label(axes, "training step (multiplication mod 97)", "seeds at 95 % so far (%)")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="large")
    return figure


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.3) -> None:
    """A box with text, centred at a point."""
    size = {"boxstyle": "round,pad=0.05", "linewidth": 2, "edgecolor": colour, "facecolor": "white"}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, **size))
    axes.text(x, y, text, ha="center", va="center", fontsize="large")


def schematic() -> Figure:
    """The three places of a filter in the chain."""
    figure, axes = chart("Three places for a filter", 8, 3.6)
    axes.set_axis_off()
    axes.set(xlim=(-0.3, 11.3), ylim=(-0.7, 2.7))
    rows = [
        ("before the optimizer (the paper)", "g + λ · filter(g)", ORANGE, "AdamW", BLUE),
        ("in place of Adam's first moment", "filter(g)", ORANGE, "divide by √v of g", BLUE),
        ("in place of Muon's momentum", "filter(g)", ORANGE, "orthogonalise", BLUE),
    ]
    for y, (place, one, colour, other, second) in zip((2, 1, 0), rows, strict=True):
        axes.text(-0.3, y, place, va="center", fontsize="large")
        axes.text(4.15, y, "g", ha="center", va="center", fontsize="x-large", fontstyle="italic")
        box(axes, 6.0, y, one, colour)
        box(axes, 9.1, y, other, second)
        for start, stop in ((4.35, 4.75), (7.25, 7.85), (10.35, 10.8)):
            axes.annotate("", (stop, y), (start, y), arrowprops={"arrowstyle": "->", "linewidth": 1.5, "color": GREY})
        axes.text(10.85, y, "step", va="center", fontsize="large")
    return figure


def undecayed(results: Results) -> Figure | None:
    """Without decay, at three rates."""
    named = {f"{one.in_words}, rate {one.changes.get('lr', 0.001):g}": one for one in PARTS["undecayed"]}
    return method_dots(results, named, "Without decay the filters generalise where Adam fails")


def tuned_filters(results: Results) -> Figure | None:
    """Three optimizers at their tuned rate and decay, alone and behind each filter."""
    tuned = all_tuned(results)
    names = ["adam-0.005", "ema", "ma", "adamw-1", "ema+adamw-1", "ema-late+adamw-1", "ma+adamw-1"]
    names += ["muon-1", "ema+muon-1", "ma+muon-1"]
    chosen = {tuned_words(tuned[name]): tuned[name] for name in names if name in tuned}
    return method_dots(results, chosen, "Tuned, AdamW and Muon need no filter", is_sorted=False)


def hold(results: Results) -> Figure | None:
    """How many of the runs that reach 95 % stay there, at four pairs of rate and decay."""
    pairs = [(0.001, 1.0), (0.001, 3.0), (0.003, 1.0)]
    methods = {"AdamW alone": ("adamw-1", NO_FILTER), "MA before AdamW": ("ma+adamw-1", FILTER)}
    figure, axes = chart("Behind the MA, AdamW stays at 95 %", 8, 3.4)
    for i, (name, (method, colour)) in enumerate(methods.items()):
        for j, (rate, decay) in enumerate(pairs):
            runs = results.reported(Variant(method, {"lr": rate, "weight_decay": decay}))
            reached = np.isfinite(runs["first_step"].to_numpy(float))
            if not reached.any():
                return None
            held = np.sum(reached & (runs["of_these_at_threshold"].to_numpy() == AFTER))
            y = j + 0.36 * (i - 0.5)
            axes.barh(y, 100 * held / reached.sum(), 0.32, color=colour, label=name if j == 0 else None)
            axes.text(100 * held / reached.sum() + 1, y, f"{held} of {reached.sum()}", va="center", fontsize="large")
    axes.set_yticks(range(len(pairs)), [f"rate {rate:g}, decay {decay:g}" for rate, decay in pairs])
    axes.set(xlim=(0, 115), xticks=range(0, 101, 25))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    label(axes, f"runs that hold 95 % at the next {AFTER} evaluations (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="large")
    return figure


def operations(results: Results) -> Figure | None:
    """Steps behind each filter as a part of those of the fair control, seed by seed."""
    figure, axes = chart("On other operations the filters beat the fair control, too", 8, 3.8)
    y, names = 0, []
    for operation in ("addition", "subtraction", "division"):
        for method, colour in (("ema", FILTER), ("ma", PURPLE)):
            one, other = (
                results.reported(Variant(name, {"operation": operation}))["first_step"]
                for name in (method, "adam-0.00167")
            )
            both = pd.concat([one, other], axis=1, join="inner").to_numpy(float)
            if not len(both):
                return None
            ratios = both[:, 0] / both[:, 1]  # 0 where the control alone fails
            shown = ratios[ratios > 0]
            axes.plot(shown, np.full(len(shown), y), "o", color=colour, markersize=8, alpha=0.6, markeredgewidth=0)
            if failed := int(np.sum(ratios == 0)):
                text = f"{FAILS} control fails with {failed} of {len(both)}"
                axes.text(1.38, y, text, va="center", color=GREY, fontweight="bold", fontsize="large")
            names.append(f"{operation}, {method.upper()}")
            y += 1
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 2.3), xticks=[0, 0.25, 0.5, 0.75, 1, 1.25])
    axes.grid(visible=False, axis="y")
    label(axes, "steps to 95 %, as a part of those of the fair control; left of 1: fewer")
    return figure


def start(results: Results) -> Figure | None:
    """Small initial embeddings, with half of the pairs and with 30 %."""
    names = ("adam-0.00167", "adam-0.005", "adam-0.01", "adamw-1", "ema", "ma")
    parts = {"half of the pairs": 0.5, "30 % of the pairs": 0.3}
    figure, panels = chart("With small embeddings the right decay beats the filters", 9.5, 4, 2, sharey=True)
    for axes, (title, fraction) in zip(panels, parts.items(), strict=True):
        groups = {}
        for name in names:
            variant = Variant(name, {"embedding_std": 0.02, "train_fraction": fraction})
            steps = steps_of(results, variant)
            if not len(steps):
                return None
            groups[variant.in_words] = steps, FILTER if is_filtered(variant) else NO_FILTER
        draw_dots(axes, groups, end=results.cap * 1.04)
        axes.set_title(title, fontsize="large")
        axes.set(xlim=(0, results.cap * 1.75), xticks=[0, 2000, 4000])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.axvline(results.cap, color=GREY, linewidth=1, linestyle=":")
        label(axes, "steps to 95 %")
    key(figure, {"no filter": NO_FILTER, "with a filter": FILTER})
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
            line = METHODS[variant.method].config.filtering.filter.upper()
            line = f"λ {variant.changes['lamb']:g}" if part == "window" else "no filter" if line == "NONE" else line
            setting = variant.changes[ABLATIONS[part][0]]
            lines.setdefault(line, []).append(pd.DataFrame({setting: runs["first_step"]}))
    joined = {line: pd.concat(steps, axis=1, join="inner") for line, steps in lines.items() if len(steps) > 1}
    shared = pd.concat(list(joined.values()), axis=1, join="inner").index if joined else ()
    return {line: steps.loc[shared] for line, steps in joined.items() if len(shared)}


def ablation_picture(results: Results) -> Figure | None:
    """Steps to 95 % over one setting, a panel a part: a dot a seed, a bar at the median, failures above the line."""
    measured = {part: lines for part in ("lamb", "alpha", "decay") if (lines := ablation(results, part))}
    if not measured:
        return None
    figure, panels = chart("The paper's λ and α are among the best here", 9.5, 4, len(measured))
    colours = {"EMA": FILTER, "MA": PURPLE, "no filter": NO_FILTER}
    for axes, (part, lines) in zip(np.ravel(panels), measured.items(), strict=True):
        settings = sorted({setting for steps in lines.values() for setting in steps})
        for i, (line, steps) in enumerate(lines.items()):
            aside = 0.24 * (i - (len(lines) - 1) / 2)
            for setting, column in steps.items():
                x, values = settings.index(setting) + aside, column.to_numpy(float)
                reached = values[np.isfinite(values)]
                axes.plot([x] * len(reached), reached, "o", color=colours[line], alpha=0.5, markeredgewidth=0)
                if math.isfinite(middle := float(np.median(values))):
                    axes.plot([x - 0.13, x + 0.13], [middle] * 2, color=colours[line], linewidth=3)
                if failed := len(values) - len(reached):
                    place = results.cap * (1.03 + 0.08 * i)
                    text = f"{FAILS}{failed}"
                    axes.text(x, place, text, ha="center", color=colours[line], fontweight="bold")
        axes.axhline(results.cap, color=GREY, linewidth=1, linestyle=":")
        axes.set(ylim=(0, 1.28 * results.cap), yticks=range(0, results.cap + 1, 1000))
        axes.set_xticks(range(len(settings)), [f"{value:g}" for value in settings], fontsize="medium", rotation=45)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        seeds = len(next(iter(lines.values())))
        label(axes, f"{ABLATIONS[part][1]}; {seeds} seed{'s' * (seeds > 1)}", "steps to 95 %")
    key(figure, {f"{name} ({FAILS}n: n seeds fail)" if name == "EMA" else name: c for name, c in colours.items()})
    return figure


def draw_heat(axes: Axes, table: pd.DataFrame, cap: int, form: Callable[[float], str]) -> None:
    """Steps in colour, fewer being darker, each written out; a setting that fails is white with a cross."""
    values = table.to_numpy(float)
    axes.imshow(np.where(np.isfinite(values), values, np.nan), cmap="viridis", aspect="auto", vmin=200, vmax=cap)
    for (i, j), value in np.ndenumerate(values):
        text = form(value) if math.isfinite(value) else FAILS
        is_dark = math.isfinite(value) and value < 0.6 * cap
        axes.text(j, i, text, ha="center", va="center", color="white" if is_dark else "black", fontsize="large")
    axes.set_xticks(range(table.shape[1]), [f"{value:g}" for value in table.columns])
    axes.set_yticks(range(table.shape[0]), [f"{value:g}" for value in table.index])
    axes.grid(visible=False)


def window_grid(results: Results) -> Figure | None:
    """Median steps to 95 % over window size and λ."""
    cells = {}
    for variant in PARTS["window"]:
        runs = results.reported(variant)
        if len(runs):
            cells[variant.changes["lamb"], variant.changes["window_size"]] = runs["first_step"]
    if not cells:
        return None
    shared = pd.concat(cells, axis=1, join="inner")  # the seeds that all have
    table = shared.median().unstack()
    how = "one seed" if len(shared) == 1 else f"median of {len(shared)} seeds"
    figure, axes = chart(f"Few windows and λ of the MA reach 95 % ({how})", 7.4, 3.4)
    draw_heat(axes, table, results.cap, lambda value: f"{value:,.0f}")
    label(axes, f"window size w; {FAILS}: fails", "λ")
    return figure


def rate_and_decay(results: Results) -> Figure | None:
    """Steps to 95 % of the tuning's runs over learning rate and decay, with and without the MA."""
    methods = {"AdamW alone": "adamw-1", "MA before it": "ma+adamw-1", "Muon alone": "muon-1"}
    figure, panels = chart("Rate and decay matter more than the filter (one seed)", 9.5, 3.6, len(methods))
    for axes, (title, method) in zip(panels, methods.items(), strict=True):
        cells = {}
        for variant in grid([method], lr=TUNED[method][0], weight_decay=TUNED[method][1]):
            runs = results.same_but_for_seed(variant.run(TUNING["tuning"], results.cap))
            if TUNING["tuning"] not in runs.index:
                return None
            cells[tuple(variant.changes.values())] = runs.at[TUNING["tuning"], "first_step"]
        draw_heat(axes, pd.Series(cells).unstack().T, 2500, lambda value: f"{value:,.0f}")
        axes.set_title(title, fontsize="large")
        label(axes, "learning rate", "weight decay")
    return figure


def by_preset(runs: pd.DataFrame, column: str, words: Mapping[str, str]) -> dict[str, tuple[np.ndarray, str]]:
    """The values of a column by preset in words, each with the colour of a method with or without a filter."""
    values = {preset: group[column].to_numpy(float) for preset, group in runs.groupby(runs.columns[0])}
    colour = lambda name: FILTER if "filter" in name.replace("no filter", "") or "EMA" in name else NO_FILTER
    return {name: (values[preset], colour(name)) for preset, name in words.items()}


PRESETS = {"baseline": "neither", "filter-only": "filter", "decay-only": "decay", "paper": "filter and decay"}


def mnist(runs: pd.DataFrame) -> Figure:
    """Steps to 85 % test accuracy of the four presets."""
    figure, axes = chart("On MNIST the weight decay does it", 8, 3.2)
    draw_dots(axes, by_preset(runs, "steps_to_85", PRESETS))
    axes.set_xscale("log")
    number_steps(axes, axes.get_xlim())
    label(axes, "steps to 85 % test accuracy (dot: a seed, bar: the median)")
    return figure


def qm9(runs: pd.DataFrame) -> Figure:
    """Lowest validation loss without and with the filter, a line a split."""
    losses = runs.pivot(index="seed", columns="preset", values="min_val_loss")
    figure, panels = chart("On QM9 the filter helps only on top of the decay", 8, 4, 2, sharey=True)
    both = {"without decay": ("baseline", "filter-only"), "with decay": ("decay-only", "paper")}
    for axes, (title, (without, behind)) in zip(panels, both.items(), strict=True):
        pairs = losses[[without, behind]].to_numpy()
        for pair in pairs:
            colour = FILTER if pair[1] < pair[0] else GREY
            axes.plot([0, 1], pair, "o-", color=colour, linewidth=2, markersize=8)
        title = f"{title}: lower in {np.sum(pairs[:, 1] < pairs[:, 0])} of {len(pairs)} splits"
        axes.set_title(title, fontsize="large")
        axes.set_xticks([0, 1], ["no filter", "EMA"])
        axes.set(xlim=(-0.2, 1.2), ylim=(0, None))
    label(panels[0], y="lowest validation loss (a0⁶)")
    return figure


def imdb(runs: pd.DataFrame) -> Figure:
    """Best validation accuracy of the four presets, above chance."""
    figure, axes = chart("On IMDb the decay does most of it, in three splits", 8, 3.2)
    draw_dots(axes, by_preset(runs.assign(best=100 * runs["best_val_accuracy"]), "best", PRESETS))
    axes.axvline(50, color=GREY, linewidth=1.5, linestyle=":")
    axes.text(50.2, 3.45, "chance", color=GREY, fontsize="large")
    axes.set_xlim(49, 75)
    label(axes, "best validation accuracy (%; dot: a split, bar: the median)")
    return figure


SWITCHED = {
    "baseline": "no filter",
    "tripled-1000": "gradients tripled, no filter",
    "ema-1000": "EMA that has collected",
    "ema-1000-empty-mean": "empty EMA, sum divided by 1 + λ",
    "ema-1000-empty": "empty EMA",
}


def switch_on(jumps: pd.DataFrame) -> Figure:
    """How far the training loss jumps at step 1,000."""
    figure, axes = chart("A filter switched on empty makes the loss jump", 8, 3.4)
    draw_dots(axes, by_preset(jumps, "jump_at_1000", SWITCHED))
    label(axes, "jump at step 1,000 (nats per character)")
    return figure


def cost(result: Mapping[str, Any]) -> Figure:
    """Time and memory of the moving average over its window."""
    rows = pd.DataFrame(result["rows"]).query("layout == 'few' and mode == 'scan'")
    rows = rows.query("parameters == parameters.min()").set_index("filter")
    ratio, arrays = rows["ratio"].map(lambda one: one["median"]), rows["state_bytes"] / 4 - 2  # less Adam's two moments
    windows = {int(name.removeprefix("ma-")): name for name in rows.index if name.startswith("ma-")}
    figure, (left, right) = chart("The window costs memory, not time", 9, 3.6, 2)
    for axes, values in ((left, ratio), (right, arrays)):
        axes.plot(list(windows), values[list(windows.values())], "o-", color=FILTER, markersize=9, linewidth=2)
        axes.axhline(values["ema"], color=NO_FILTER, linewidth=2, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks(list(windows), [f"{window:,}" for window in windows])
        axes.minorticks_off()
    left.text(10, ratio["ema"] + 0.07, "EMA", color=NO_FILTER, fontsize="large", fontweight="bold")
    left.text(10, ratio[windows[10]] + 0.1, "moving average", color=FILTER, fontsize="large", fontweight="bold")
    left.set_ylim(0, 2.4)
    label(left, "window size w", "time, AdamW alone = 1")
    right.set_yscale("log")
    right.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    right.text(10, 1.25, "EMA: 1", color=NO_FILTER, fontsize="large", fontweight="bold")
    right.text(10, 60, "moving average: w + 3", color=FILTER, fontsize="large", fontweight="bold")
    label(right, "window size w", "arrays like the parameters")
    return figure


def board_picture(path: Path, study: Results) -> Figure:
    """Steps to 95 % of every optimizer of the board, the fewest first."""
    found = board.Board(path, study)
    order = found.best(len(board.ENTRANTS))
    figure, axes = chart("Muon with a short memory takes the fewest steps", 8, 1 + 0.32 * len(order))
    colour = lambda name: (
        FILTER if name.startswith("Grokfast") else PURPLE if "kernel" in name or name == "fastest" else NO_FILTER
    )
    draw_dots(
        axes, {name: (found.steps(name, found.chosen(name), board.SEEDS), colour(name)) for name in order}, board.CAP
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    label(axes, "steps to 95 % validation accuracy, 16 seeds")
    key(figure, {"a filter before it": FILTER, "a kernel in it": PURPLE, "others": NO_FILTER})
    return figure


def of_study(results: Results) -> dict[str, Figure | None]:
    """The pictures of the mod-97 study by name; None where its runs are missing."""
    fair = ("adam-0.005", "adam-0.01", "adam-0.00167", "ema-normalized", "ema", "ma")
    adamw: dict[str, Variant] = {
        "AdamW alone": Variant("adamw-1", {}),
        "MA before it": Variant("ma+adamw-1", {}),
        "EMA, λ 5 from step 100": Variant("ema-late+adamw-1", {}),
        "EMA, debiased": Variant("ema+adamw-1", {"start": "debiased"}),
        "EMA as published": Variant("ema+adamw-1", {}),
    }
    tuned = {tuned_words(variant): variant for variant in all_tuned(results).values()}
    return {
        "hero": hero(results),
        "fair_control": method_dots(
            results,
            words_for(Variant(name, {}) for name in fair),
            "Against the fair control, decay 0.00167, filters save a third",
        ),
        "before_adamw": method_dots(results, adamw, "Before AdamW the MA saves a tenth; the EMA as published harms"),
        "undecayed": undecayed(results),
        "tuned_filters": tuned_filters(results),
        "hold": hold(results),
        "operations": operations(results),
        "start": start(results),
        "all_methods": method_dots(
            results,
            words_for(PARTS["methods"]),
            "Every method at the paper's learning rate, 0.001",
            log=True,
        ),
        "all_tuned": method_dots(results, tuned, "Every method with a learning rate and a decay of its own", log=True),
        "ablations": ablation_picture(results),
        "window_grid": window_grid(results),
        "rate_and_decay": rate_and_decay(results),
    }


def pictures(folder: Path, study: Path) -> dict[str, Figure]:
    """All pictures for which there are results, by name: those in `folder`, and those of the study in `study`."""
    read_json = lambda path: json.loads(path.read_text())
    by_file: dict[str, tuple[str, Callable[[Path], Figure]]] = {
        "mnist": ("mnist.csv", lambda path: mnist(pd.read_csv(path))),
        "qm9": ("qm9.csv", lambda path: qm9(pd.read_csv(path))),
        "imdb": ("imdb.csv", lambda path: imdb(pd.read_csv(path))),
        "switch_on": ("shakespeare_switch_on.csv", lambda path: switch_on(pd.read_csv(path))),
        "cost": ("step_cost.json", lambda path: cost(read_json(path))),
        "trajectories": ("trajectories.jsonl", trajectories.picture),
        "spectra": ("spectra.jsonl", spectra.picture),
        "region": ("region.jsonl", region.picture),
        "memory_rates": ("memory.jsonl", memory.law_picture),
        "memory_ages": ("memory.jsonl", memory.age_picture),
        "memory_limits": ("memory.jsonl", memory.limit_picture),
        "edge": ("edge.jsonl", edge.picture),
        "windows": ("parity_lamb.csv", windows.picture),
        "raised": ("raised.jsonl", raised.picture),
        "noise": ("noise.jsonl", noise.picture),
        "clocks": ("circuits.jsonl", circuits.picture),
        "circles": ("circuits.jsonl", circuits.circles),
        "board": ("board.jsonl", lambda path: board_picture(path, Results.load(study))),
    }
    drawn = {"schematic": schematic(), "responses": spectra.responses_picture()}
    drawn |= {name: draw(folder / file) for name, (file, draw) in by_file.items() if (folder / file).exists()}
    return drawn | {name: one for name, one in of_study(Results.load(study)).items() if one is not None}
