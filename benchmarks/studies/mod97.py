"""Does a Grokfast filter help on multiplication mod 97, by how much, and why?

The learning rate is the paper's, 0.001, unless a setting has its own. A method with a filter is compared seed by seed
with its controls, which have no filter: runs of one seed share initial weights, split and batches. A run continues for
50 evaluations after the first at 95 % validation accuracy, to show whether it stays there.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from benchmarks import methods, views
from benchmarks.study import Study
from benchmarks.views import FAILS, FILTER, NO_FILTER
from examples import modular
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Method
from examples.harness.plots import BLUE, GREY, ORANGE, PURPLE

Frame = Any  # pandas.DataFrame; type checkers know nothing of its columns
SEEDS, FEWER_SEEDS, ABLATION_SEEDS = range(8), range(5), range(3)
CAP = 5_000


def setting(method: Method, **hyperparams: Any) -> Run:
    """A method on multiplication with some hyperparameters; its runs differ in the seed alone."""
    return product(modular.Modular(), method, hold_evals=50, **hyperparams)[0]


def on_task(run: Run, **fields: Any) -> Run:
    """The same with other fields of the task."""
    task: Any = run.task
    return dataclasses.replace(run, task=dataclasses.replace(task, **fields))


class Entry(NamedTuple):
    """A method of the study."""

    run: Run
    words: str  # filter and optimizer as pictures name them
    controls: tuple[str, ...] = ()  # methods without a filter that tell what the filter adds, the fairest first


# By their labels in tables. Adam does not see the scale of its gradients: amplifying the slow part by 1 + lamb divides
# a coupled decay by 1 + lamb. The fair control therefore has 0.00167, 0.005 / 3 for the EMA and 0.01 / 6 for the MA.
METHODS = {
    "adam": Entry(setting(modular.adam), "Adam"),
    "adam-0.00167": Entry(setting(modular.adam, weight_decay=0.00167), "Adam"),
    "adam-0.005": Entry(setting(modular.adam, weight_decay=0.005), "Adam"),
    "adam-0.01": Entry(setting(modular.adam, weight_decay=0.01), "Adam"),
    "adamw-0.01": Entry(setting(modular.adamw, weight_decay=0.01), "AdamW"),
    "adamw-0.1": Entry(setting(modular.adamw, weight_decay=0.1), "AdamW"),
    "adamw-1": Entry(setting(modular.adamw), "AdamW"),
    "nadamw-1": Entry(setting(methods.nadamw), "NAdamW"),
    "lion-1": Entry(setting(methods.lion), "Lion"),
    "ademamix-1": Entry(setting(methods.ademamix), "AdEMAMix"),
    "muon": Entry(setting(modular.muon, weight_decay=0.0), "Muon"),
    "muon-1": Entry(setting(modular.muon), "Muon"),
    "fastest": Entry(setting(modular.fastest), "Muon on hidden matrices, rate 0.06"),
    "ema": Entry(setting(modular.ema), "EMA + Adam", ("adam-0.00167", "adam-0.005", "adamw-1")),
    "ema-0.95": Entry(setting(modular.ema, alpha=0.95), "EMA (α 0.95) + Adam", ("adam-0.00167",)),
    "ema-normalized": Entry(setting(methods.normalized_ema), "normalized EMA + Adam", ("adam-0.005",)),
    "ma": Entry(setting(modular.ma), "MA + Adam", ("adam-0.00167", "adam-0.01", "adamw-1")),
    "two-stage": Entry(setting(modular.two_stage), "MA from step 500 + Adam", ("adam-0.00167",)),
    # From the step on at which the window is full: before it, the decay alone would shrink all weights to nothing.
    "slow-only": Entry(
        setting(modular.two_stage, fast=0.0, start_step=99),
        "slow part of the MA from step 99 + Adam",
        ("adam-0.00167",),
    ),
    "ema+adam": Entry(setting(modular.ema, weight_decay=0.0), "EMA + Adam", ("adam",)),
    "ema-late+adam": Entry(setting(methods.late_ema, weight_decay=0.0), "EMA from step 100 + Adam", ("adam",)),
    "ma+adam": Entry(setting(modular.ma, weight_decay=0.0), "MA + Adam", ("adam",)),
    "ema+adamw-0.1": Entry(setting(modular.ema_adamw, weight_decay=0.1), "EMA + AdamW", ("adamw-0.1",)),
    "ema+adamw-1": Entry(setting(modular.ema_adamw), "EMA + AdamW", ("adamw-1",)),
    "ema-late+adamw-1": Entry(setting(modular.late_ema_adamw), "EMA from step 100 + AdamW", ("adamw-1",)),
    "ema+muon": Entry(setting(methods.ema_muon, weight_decay=0.0), "EMA + Muon", ("muon",)),
    "ema+muon-1": Entry(setting(methods.ema_muon), "EMA + Muon", ("muon-1",)),
    "ma+adamw-0.1": Entry(setting(modular.ma_adamw, weight_decay=0.1), "MA + AdamW", ("adamw-0.1",)),
    "ma+adamw-1": Entry(setting(modular.ma_adamw), "MA + AdamW", ("adamw-1",)),
    "ma+muon": Entry(setting(methods.ma_muon, weight_decay=0.0), "MA + Muon", ("muon",)),
    "ma+muon-1": Entry(setting(methods.ma_muon), "MA + Muon", ("muon-1",)),
}
RUNS = {label: method.run for label, method in METHODS.items()}

# What tables say of a method's function
UNFILTERED = {
    "adam": "Adam",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "lion": "Lion",
    "ademamix": "AdEMAMix",
    "muon": "Muon",
    "fastest": "Muon on hidden matrices",
}
EMA, MA = "Grokfast-EMA α {alpha:g} λ {lamb:g}", "Grokfast-MA w {window_size} λ {lamb:g}"
FILTERED = {
    "ema": f"{EMA}, Adam",
    "ema_with_start": f"{EMA} start {{start}}, Adam",
    "normalized_ema": f"{EMA} normalized, Adam",
    "late_ema": f"{EMA} from step {{start_step}}, Adam",
    "ma": f"{MA}, Adam",
    "two_stage": f"{MA} from step {{start_step}}, Adam",
    "slow_only": f"{MA} fast 0 from step {{start_step}}, Adam",
    "ema_adamw": f"{EMA}, AdamW",
    "ema_adamw_with_start": f"{EMA} start {{start}}, AdamW",
    "late_ema_adamw": f"{EMA} from step {{start_step}}, AdamW",
    "ma_adamw": f"{MA}, AdamW",
    "ema_muon": f"{EMA}, Muon",
    "ma_muon": f"{MA}, Muon",
}


def what(run: Run) -> str:
    """Filter and optimizer with their numbers, for tables."""
    numbers = {"alpha": 0.98, "lamb": 2.0, "window_size": 100} | run.key  # the numbers of methods that have them fixed
    name = "slow_only" if run.key.get("fast") == 0 else run.key["method"]
    text = FILTERED[name] if name in FILTERED else f"no filter, {UNFILTERED[name]}"
    return f"{text} weight decay {{weight_decay:g}}".format(**numbers)


def words(name: str, run: Run, *, rate: bool = False) -> str:
    """The words of a method with its weight decay and, if asked for, its learning rate, for pictures."""
    decay, lr = run.hyperparams["weight_decay"], run.hyperparams["lr"]
    return name + (f", decay {decay:g}" if decay else ", no decay") + f", rate {lr:g}" * rate


# On other tasks: the fair control of both filters, the paper's methods, and the recommended one
ELSEWHERE = ("adam-0.00167", "adam-0.005", "adamw-1", "ema", "ma", "ma+adamw-1")
BY_OPERATION = {
    f"operation {operation}": {label: on_task(RUNS[label], operation=operation) for label in ELSEWHERE}
    for operation in ("addition", "division", "multiplication", "subtraction")
}
# With small embeddings a stronger coupled decay takes fewer steps, so the MA has a second control.
BY_START = {
    f"embeddings {std}, fraction {part}": {
        label: on_task(RUNS[label], embedding_std=std, train_fraction=part) for label in ("adam-0.01", *ELSEWHERE)
    }
    for std in (1.0, 0.02)
    for part in (0.5, 0.3)
}

# Three differences of the EMA from the MA: the average starts at the first gradient, amplifies it at once, and by less
DEBIASED, DEBIASED_ADAMW = setting(methods.ema_with_start), setting(methods.ema_adamw_with_start)
DEBIASED_5 = setting(methods.ema_adamw_with_start, lamb=5.0)
DEBIASED_TENTH = setting(methods.ema_adamw_with_start, weight_decay=0.1)
LATE_2 = setting(modular.late_ema_adamw, lamb=2.0)
EARLY = [
    ("ema", RUNS["ema"]),
    ("ema", setting(methods.ema_with_start, start="zero")),
    ("ema", DEBIASED),
    ("ema+adamw-1", RUNS["ema+adamw-1"]),
    ("ema+adamw-1", setting(methods.ema_adamw_with_start, start="zero")),
    ("ema+adamw-1", DEBIASED_ADAMW),
    ("ema+adamw-0.1", RUNS["ema+adamw-0.1"]),
    ("ema+adamw-0.1", DEBIASED_TENTH),
    ("ema", setting(methods.late_ema, lamb=2.0)),
    ("ema+adamw-1", LATE_2),
    ("ema+adamw-1", setting(modular.ema_adamw, lamb=5.0)),
    ("ema+adamw-1", DEBIASED_5),
    ("ema-late+adamw-1", RUNS["ema-late+adamw-1"]),
    ("ma+adamw-1", setting(modular.ma_adamw, lamb=2.0)),
    ("ma+adamw-1", RUNS["ma+adamw-1"]),
]
Pair = tuple[str, Run, str, Run]  # two settings with their labels, the second being what the first is compared with
EARLY_PAIRS: list[Pair] = [
    ("`ema`, start debiased", DEBIASED, "`adam-0.00167`", RUNS["adam-0.00167"]),
    ("`ema`, start debiased", DEBIASED, "`ema`", RUNS["ema"]),
    ("`ema+adamw-1`, start debiased", DEBIASED_ADAMW, "`ema+adamw-1`", RUNS["ema+adamw-1"]),
    ("`ema+adamw-1`, start debiased", DEBIASED_ADAMW, "`adamw-1`", RUNS["adamw-1"]),
    ("`ema+adamw-1`, from step 100", LATE_2, "`adamw-1`", RUNS["adamw-1"]),
    ("`ema+adamw-1`, start debiased, lamb 5.0", DEBIASED_5, "`adamw-1`", RUNS["adamw-1"]),
    ("`ema+adamw-0.1`, start debiased", DEBIASED_TENTH, "`adamw-0.1`", RUNS["adamw-0.1"]),
]

# As in the paper's Table 1 and Figure 6: without weight decay, and the slow part alone after fitting
TWO_STAGE = setting(modular.two_stage, weight_decay=0.0)
SLOW_ONLY = setting(modular.two_stage, weight_decay=0.0, fast=0.0, start_step=99)
SLOW_AFTER_FITTING = setting(modular.two_stage, weight_decay=0.0, fast=0.0, start_step=500)
NO_DECAY, MA_NO_DECAY = RUNS["adam"], RUNS["ma+adam"]
PAPER = [("ma", MA_NO_DECAY), ("two-stage", TWO_STAGE), ("slow-only", SLOW_ONLY), ("slow-only", SLOW_AFTER_FITTING)]
PAPER_PAIRS: list[Pair] = [
    ("`ma`", MA_NO_DECAY, "`adam`", NO_DECAY),
    ("`two-stage`", TWO_STAGE, "`adam`", NO_DECAY),
    ("`slow-only`", SLOW_ONLY, "`adam`", NO_DECAY),
    ("`slow-only`, from step 500", SLOW_AFTER_FITTING, "`adam`", NO_DECAY),
    ("`two-stage`", TWO_STAGE, "`ma`", MA_NO_DECAY),
]

# Without decay only the filter differs. What a filter amplifies is also followed faster, hence the higher rates.
TRIPLED_RATE = setting(modular.adam, lr=0.003)
UNDECAYED = [
    ("Adam", NO_DECAY),
    ("Adam", TRIPLED_RATE),
    ("Adam", setting(modular.adam, lr=0.006)),
    *((METHODS[label].words, RUNS[label]) for label in ("ema+adam", "ema-late+adam", "ma+adam")),
]

# The paper's Figures 4 (there without decay), 7 and 8: by the name of the axis, the line and the value
DECAYS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)
ABLATIONS = {
    "λ (EMA)": {"EMA": {lamb: setting(modular.ema, lamb=lamb) for lamb in (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)}},
    "α (EMA)": {"EMA": {alpha: setting(modular.ema, alpha=alpha) for alpha in (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)}},
    "weight decay": {
        name: {decay: setting(method, weight_decay=decay) for decay in DECAYS}
        for name, method in (("no filter", modular.adam), ("EMA", modular.ema), ("MA", modular.ma))
    },
}
WINDOW_GRID = {
    (lamb, window): setting(modular.ma, window_size=window, lamb=lamb)
    for lamb in (1.0, 2.0, 5.0, 10.0)
    for window in (2, 10, 50, 100, 200)
}
TUNED_ADAMW = setting(modular.adamw, lr=0.003)  # as mod97_tuned chooses it


def with_seeds(settings: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """The runs of some settings with some seeds."""
    return [dataclasses.replace(run, seed=seed) for run, seed in itertools.product(settings, seeds)]


def runs(results: Results) -> Iterator[Run]:
    """All runs; the engine trains once what several parts share."""
    del results
    main = [*RUNS.values(), TUNED_ADAMW, *(run for _, run in EARLY + PAPER + UNDECAYED)]
    yield from with_seeds([run for run in main if run not in (TRIPLED_RATE, DEBIASED_TENTH)], SEEDS)
    yield from with_seeds([run for by in (BY_OPERATION | BY_START).values() for run in by.values()], FEWER_SEEDS)
    ablated = [run for by_line in ABLATIONS.values() for line in by_line.values() for run in line.values()]
    yield from with_seeds([*ablated, *WINDOW_GRID.values(), TRIPLED_RATE], ABLATION_SEEDS)
    yield from with_seeds([DEBIASED_TENTH], (4, 5))


STUDY = Study("mod97", runs)


def seeds_of(frame: Frame, run: Run) -> Frame:
    """The results of the runs that differ from a run in the seed alone."""
    return views.runs_of(frame, run.method, **{k: v for k, v in run.key.items() if k not in ("method", "seed")})


def rows(frame: Frame, settings: Iterable[tuple[Mapping[str, str], Run]]) -> str:
    """A table with a row per setting, after its first cells."""
    return views.summary((cells, seeds_of(frame, run)) for cells, run in settings)


def compared(frame: Frame, pairs: Iterable[Pair]) -> str:
    """A table of settings compared seed by seed."""
    return views.comparison_table(
        ({"method": one, "against": other}, seeds_of(frame, run), seeds_of(frame, control))
        for one, run, other, control in pairs
    )


def described(frame: Frame, settings: Iterable[tuple[str, Run]]) -> str:
    """A table of labelled settings, each in words."""
    return rows(frame, (({"method": f"`{label}`", "what": what(run)}, run) for label, run in settings))


@STUDY.table
def table(frame: Frame) -> str:
    """Every method."""
    return described(frame, RUNS.items())


@STUDY.table
def pairs(frame: Frame) -> str:
    """Every method with a filter against its controls; then what the first steps of the EMA do."""
    by_label: list[Pair] = [
        (f"`{label}`", RUNS[label], f"`{control}`", RUNS[control])
        for label, entry in METHODS.items()
        for control in entry.controls
    ]
    return compared(frame, by_label + EARLY_PAIRS)


def by_setting(
    frame: Frame, settings: Mapping[str, Mapping[str, Run]], controls: Mapping[str, Iterable[str]], hidden: str = ""
) -> str:
    """The methods in each setting; then those with a filter against controls, except in the `hidden` setting."""
    cells = lambda text, label: {"setting": text, "method": f"`{label}`"}
    all_rows = [(cells(text, label), run) for text, by in settings.items() for label, run in by.items()]
    compared_rows = [
        (cells(text, label) | {"against": f"`{control}`"}, seeds_of(frame, run), seeds_of(frame, by[control]))
        for text, by in settings.items()
        if text != hidden
        for label, run in by.items()
        for control in controls[label]
        if control in by
    ]
    return views.joined(rows(frame, all_rows), views.comparison_table(compared_rows))


CONTROLS = {label: entry.controls for label, entry in METHODS.items()}


@STUDY.table
def operations(frame: Frame) -> str:
    """All operations."""
    return by_setting(frame, BY_OPERATION, CONTROLS, hidden="operation multiplication")


@STUDY.table
def start(frame: Frame) -> str:
    """Initial scales and training fractions."""
    return by_setting(frame, BY_START, CONTROLS)


@STUDY.table
def early(frame: Frame) -> str:
    """The first steps of the filters."""
    return described(frame, EARLY)


@STUDY.table
def paper(frame: Frame) -> str:
    """Two stages, and the slow part alone."""
    return views.joined(described(frame, PAPER), compared(frame, PAPER_PAIRS))


@STUDY.table
def undecayed(frame: Frame) -> str:
    """Without weight decay."""
    cells = lambda run: {"setting": f"learning rate {run.hyperparams['lr']}", "what": what(run)}
    return rows(frame, ((cells(run), run) for _, run in UNDECAYED))


def colour(run: Run) -> str:
    """The colour of a method with or without a filter."""
    return NO_FILTER if run.key["method"] in UNFILTERED else FILTER


def steps_of(frame: Frame, run: Run) -> np.ndarray:
    """Steps to 95 % of the seeds of a setting, infinite where it fails."""
    return seeds_of(frame, run)["steps_to_95"].to_numpy(float)


def height(count: int) -> float:
    """Height of a figure with a row for each method."""
    return 1.6 + 0.34 * count


def method_dots(
    axes: Axes, frame: Frame, settings: Mapping[str, Run], *, is_sorted: bool = True, log: bool = False
) -> None:
    """Steps to 95 % of some settings by label, sorted by the median or left in order."""
    groups = {name: (seeds_of(frame, run), colour(run)) for name, run in settings.items()}
    groups = {name: group for name, group in groups.items() if len(group[0])}
    if is_sorted:
        steps = {name: runs["steps_to_95"] for name, (runs, _) in groups.items()}
        slowness = lambda name: (steps[name].median(), steps[name].clip(upper=CAP).mean())
        groups = {name: groups[name] for name in sorted(groups, key=slowness)}
    views.step_dots(axes, groups, log=log)
    views.legend(axes.figure, {"no filter": NO_FILTER, "with a filter": FILTER})


def in_words(labels: Iterable[str]) -> dict[str, Run]:
    """Methods by their names in words."""
    return {words(METHODS[label].words, RUNS[label]): RUNS[label] for label in labels}


@STUDY.figure("The filter helps; a tuned learning rate and Muon help more", width=8, height=4.4)
def hero(frame: Frame, axes: Axes) -> None:
    """The share of seeds that have reached 95 % over the steps."""
    curves = {
        "Grokfast-EMA before Adam": (RUNS["ema"], ORANGE),
        "its fair control: Adam, a third of the decay": (RUNS["adam-0.00167"], GREY),
        "AdamW with its learning rate tuned, no filter": (TUNED_ADAMW, BLUE),
        "the preset fastest: Muon with a short memory": (RUNS["fastest"], PURPLE),
    }
    found = {name: np.sort(steps_of(frame, run)) for name, (run, _) in curves.items()}
    last = max(steps[np.isfinite(steps)].max(initial=0) for steps in found.values())
    for name, steps in found.items():
        reached = steps[np.isfinite(steps)]
        share = np.arange(len(reached) + 1) / max(1, len(steps))
        line = {"color": curves[name][1], "linewidth": 3, "label": name}
        axes.step([0, *reached, 1.05 * last], 100 * np.array([*share, share[-1]]), where="post", **line)
    axes.set(xlim=(0, 1.05 * last), ylim=(-2, 104))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    views.label(axes, "training step (multiplication mod 97)", "seeds at 95 % so far (%)")
    axes.figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="large")


@STUDY.figure("Three places for a filter", width=8, height=3.6)
def schematic(frame: Frame, axes: Axes) -> None:
    """The three places of a filter in the chain."""
    del frame

    def box(x: float, y: float, text: str, edge: str) -> None:
        size = {"boxstyle": "round,pad=0.05", "linewidth": 2, "edgecolor": edge, "facecolor": "white"}
        axes.add_patch(FancyBboxPatch((x - 1.15, y - 0.3), 2.3, 0.6, **size))
        axes.text(x, y, text, ha="center", va="center", fontsize="large")

    axes.set_axis_off()
    axes.set(xlim=(-0.3, 11.3), ylim=(-0.7, 2.7))
    places = [
        ("before the optimizer (the paper)", "g + λ · filter(g)", "AdamW"),
        ("in place of Adam's first moment", "filter(g)", "divide by √v of g"),
        ("in place of Muon's momentum", "filter(g)", "orthogonalise"),
    ]
    for y, (place, lowpass, optimizer) in zip((2, 1, 0), places, strict=True):
        axes.text(-0.3, y, place, va="center", fontsize="large")
        axes.text(4.15, y, "g", ha="center", va="center", fontsize="x-large", fontstyle="italic")
        box(6.0, y, lowpass, ORANGE)
        box(9.1, y, optimizer, BLUE)
        for left, right in ((4.35, 4.75), (7.25, 7.85), (10.35, 10.8)):
            axes.annotate("", (right, y), (left, y), arrowprops={"arrowstyle": "->", "linewidth": 1.5, "color": GREY})
        axes.text(10.85, y, "step", va="center", fontsize="large")


@STUDY.figure("Against the fair control, decay 0.00167, filters save a third", width=9, height=height(6))
def fair_control(frame: Frame, axes: Axes) -> None:
    """Both filters before Adam, and their controls."""
    method_dots(axes, frame, in_words(["adam-0.005", "adam-0.01", "adam-0.00167", "ema-normalized", "ema", "ma"]))


@STUDY.figure("Before AdamW the MA saves a tenth; the EMA as published harms", width=9, height=height(5))
def before_adamw(frame: Frame, axes: Axes) -> None:
    """The filters before AdamW with a decay of 1."""
    settings = {
        "AdamW alone": RUNS["adamw-1"],
        "MA before it": RUNS["ma+adamw-1"],
        "EMA, λ 5 from step 100": RUNS["ema-late+adamw-1"],
        "EMA, debiased": DEBIASED_ADAMW,
        "EMA as published": RUNS["ema+adamw-1"],
    }
    method_dots(axes, frame, settings)


@STUDY.figure("Without decay the filters generalise where Adam fails", width=9, height=height(6))
def without_decay(frame: Frame, axes: Axes) -> None:
    """Adam at three learning rates, and with each filter."""
    method_dots(axes, frame, {words(name, run, rate=True): run for name, run in UNDECAYED})


@STUDY.figure("Every method at the paper's learning rate, 0.001", width=10.5, height=height(len(METHODS)))
def all_methods(frame: Frame, axes: Axes) -> None:
    """Every method."""
    method_dots(axes, frame, in_words(METHODS), log=True)


@STUDY.figure("On other operations the filters beat the fair control, too", width=8, height=3.8)
def other_operations(frame: Frame, axes: Axes) -> None:
    """Ratio of the steps with each filter to the steps of the fair control, seed by seed."""
    names = []
    pairs = itertools.product(("addition", "subtraction", "division"), (("ema", FILTER), ("ma", PURPLE)))
    for operation, (label, shade) in pairs:
        by_label = {k: seeds_of(frame, run) for k, run in BY_OPERATION[f"operation {operation}"].items()}
        steps = {k: runs.set_index("seed")["steps_to_95"] for k, runs in by_label.items()}
        ratios = (steps[label] / steps["adam-0.00167"]).to_numpy()  # 0 where the control alone fails
        shown, y = ratios[ratios > 0], len(names)
        axes.plot(shown, np.full(len(shown), y), "o", color=shade, markersize=8, alpha=0.6, markeredgewidth=0)
        if failed := int(np.sum(ratios == 0)):
            text = f"{FAILS} control fails with {failed} of {len(ratios)}"
            axes.text(1.38, y, text, va="center", color=GREY, fontweight="bold", fontsize="large")
        names.append(f"{operation}, {label.upper()}")
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 2.3), xticks=[0, 0.25, 0.5, 0.75, 1, 1.25])
    axes.grid(visible=False, axis="y")
    views.label(axes, "steps to 95 %, as a part of those of the fair control; left of 1: fewer")


@STUDY.figure("With small embeddings the right decay beats the filters", width=9.5, height=4, columns=2, sharey=True)
def small_embeddings(frame: Frame, panels: Any) -> None:
    """Small initial embeddings, with half of the pairs and with 30 %."""
    labels = ("adam-0.00167", "adam-0.005", "adam-0.01", "adamw-1", "ema", "ma")
    for axes, (title, part) in zip(panels, {"half of the pairs": 0.5, "30 % of the pairs": 0.3}.items(), strict=True):
        by_label = BY_START[f"embeddings 0.02, fraction {part}"]
        groups = {label: (steps_of(frame, by_label[label]), colour(by_label[label])) for label in labels}
        views.dots(axes, dict(zip(in_words(labels), groups.values(), strict=True)), 1.04 * CAP)
        axes.set_title(title, fontsize="large")
        axes.set(xlim=(0, 1.75 * CAP), xticks=[0, 2000, 4000])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.axvline(CAP, color=GREY, linewidth=1, linestyle=":")
        views.label(axes, "steps to 95 %")
    views.legend(panels[0].figure, {"no filter": NO_FILTER, "with a filter": FILTER})


@STUDY.figure("The paper's λ and α are among the best here", width=9.5, height=4, columns=3)
def ablations(frame: Frame, panels: Any) -> None:
    """Steps to 95 % over one hyperparameter: a dot per seed, a bar at the median, failures above the line."""
    frame = frame[frame["seed"].isin(ABLATION_SEEDS)]
    colours = {"EMA": FILTER, "MA": PURPLE, "no filter": NO_FILTER}
    for axes, (title, lines) in zip(panels, ABLATIONS.items(), strict=True):
        for i, (name, line) in enumerate(lines.items()):
            for x, run in enumerate(line.values()):
                x, steps = x + 0.24 * (i - (len(lines) - 1) / 2), steps_of(frame, run)
                reached, middle = steps[np.isfinite(steps)], float(np.median(steps))
                axes.plot([x] * len(reached), reached, "o", color=colours[name], alpha=0.5, markeredgewidth=0)
                if math.isfinite(middle):
                    axes.plot([x - 0.13, x + 0.13], [middle] * 2, color=colours[name], linewidth=3)
                if failed := len(steps) - len(reached):
                    y, bold = CAP * (1.03 + 0.08 * i), {"color": colours[name], "fontweight": "bold"}
                    axes.text(x, y, f"{FAILS}{failed}", ha="center", **bold)
        axes.axhline(CAP, color=GREY, linewidth=1, linestyle=":")
        values = next(iter(lines.values()))
        axes.set(xlim=(-0.5, len(values) - 0.5), ylim=(0, 1.28 * CAP), yticks=range(0, CAP + 1, 1000))
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize="medium", rotation=45)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        views.label(axes, f"{title}; {len(ABLATION_SEEDS)} seeds", "steps to 95 %")
    views.legend(panels[0].figure, colours, title=f"{FAILS}n: n seeds fail")


@STUDY.figure("Few windows and λ of the MA reach 95 % (median of 3 seeds)", width=7.4, height=3.4)
def window_grid(frame: Frame, axes: Axes) -> None:
    """Median steps to 95 % over window size and λ."""
    frame = frame[frame["seed"].isin(ABLATION_SEEDS)]
    steps = pd.Series({key: np.median(steps_of(frame, run)) for key, run in WINDOW_GRID.items()})
    views.heat_map(axes, steps.unstack(), CAP)
    views.label(axes, f"window size w; {FAILS}: fails", "λ")
