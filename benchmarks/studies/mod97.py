"""Does a Grokfast filter help on multiplication mod 97, by how much, and why?

The learning rate is the paper's, 0.001, unless a setting has its own. A method with a filter is compared seed by seed
with its controls, which have no filter: runs of one seed share initial weights, split and batches. A run continues for
50 evaluations after the first at 95 % validation accuracy, to show whether it stays there.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from benchmarks import methods, views
from benchmarks.study import Study
from benchmarks.views import FILTER, NO_FILTER
from examples import modular
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Method
from examples.harness.plots import BLUE, GREY, ORANGE, PURPLE

Frame = Any  # pandas.DataFrame; type checkers know nothing of its columns
Settings = Mapping[str, Run]  # by label
Controls = Mapping[str, Iterable[str]]  # by the label of a method without a filter, those compared with it
SEEDS, FEWER_SEEDS, ABLATION_SEEDS = range(8), range(5), range(3)
CAP = 5_000
grid = functools.partial(product, modular.Modular(), hold_evals=50)  # all combinations of lists of values


def setting(method: Method, **hyperparams: Any) -> Run:
    """A method on multiplication with some hyperparameters; its runs differ in the seed alone."""
    return grid(method, **hyperparams)[0]


# By their labels in tables
RUNS = {
    "adam": setting(modular.adam),
    "adam-0.00167": setting(modular.adam, weight_decay=0.00167),
    "adam-0.005": setting(modular.adam, weight_decay=0.005),
    "adam-0.01": setting(modular.adam, weight_decay=0.01),
    "adamw-0.01": setting(modular.adamw, weight_decay=0.01),
    "adamw-0.1": setting(modular.adamw, weight_decay=0.1),
    "adamw-1": setting(modular.adamw),
    "nadamw-1": setting(methods.nadamw),
    "lion-1": setting(methods.lion),
    "ademamix-1": setting(methods.ademamix),
    "muon": setting(modular.muon, weight_decay=0.0),
    "muon-1": setting(modular.muon),
    "fastest": setting(modular.fastest),
    "ema": setting(modular.ema),
    "ema-0.95": setting(modular.ema, alpha=0.95),
    "ema-normalized": setting(methods.normalized_ema),
    "ma": setting(modular.ma),
    "two-stage": setting(modular.two_stage),
    # From the step on at which the window is full: before it, the decay alone would shrink all weights to nothing.
    "slow-only": setting(modular.two_stage, fast=0.0, start_step=99),
    "ema+adam": setting(modular.ema, weight_decay=0.0),
    "ema-late+adam": setting(methods.late_ema, weight_decay=0.0),
    "ma+adam": setting(modular.ma, weight_decay=0.0),
    "ema+adamw-0.1": setting(modular.ema_adamw, weight_decay=0.1),
    "ema+adamw-1": setting(modular.ema_adamw),
    "ema-late+adamw-1": setting(modular.late_ema_adamw),
    "ema+muon": setting(methods.ema_muon, weight_decay=0.0),
    "ema+muon-1": setting(methods.ema_muon),
    "ma+adamw-0.1": setting(modular.ma_adamw, weight_decay=0.1),
    "ma+adamw-1": setting(modular.ma_adamw),
    "ma+muon": setting(methods.ma_muon, weight_decay=0.0),
    "ma+muon-1": setting(methods.ma_muon),
}
# The methods that are compared with each method without a filter. Adam does not see the scale of its gradients:
# amplifying the slow part by 1 + lamb divides a coupled decay by 1 + lamb. The fair control therefore has 0.00167,
# 0.005 / 3 for the EMA and 0.01 / 6 for the MA.
CONTROLS = {
    "adam": ("ema+adam", "ema-late+adam", "ma+adam"),
    "adam-0.00167": ("ema", "ema-0.95", "ma", "two-stage", "slow-only"),
    "adam-0.005": ("ema", "ema-normalized"),
    "adam-0.01": ("ma",),
    "adamw-0.1": ("ema+adamw-0.1", "ma+adamw-0.1"),
    "adamw-1": ("ema", "ma", "ema+adamw-1", "ema-late+adamw-1", "ma+adamw-1"),
    "muon": ("ema+muon", "ma+muon"),
    "muon-1": ("ema+muon-1", "ma+muon-1"),
}

# What tables say of a method's function
EMA, MA = "Grokfast-EMA α {alpha:g} λ {lamb:g}", "Grokfast-MA w {window_size} λ {lamb:g}"
WHAT = {
    "adam": "no filter, Adam",
    "adamw": "no filter, AdamW",
    "nadamw": "no filter, NAdamW",
    "lion": "no filter, Lion",
    "ademamix": "no filter, AdEMAMix",
    "muon": "no filter, Muon",
    "fastest": "no filter, Muon on hidden matrices",
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
    """Filter and optimizer with their numbers."""
    numbers = {"alpha": 0.98, "lamb": 2.0, "window_size": 100} | run.key  # the numbers of methods that have them fixed
    name = "slow_only" if run.key.get("fast") == 0 else run.key["method"]
    return f"{WHAT[name]} weight decay {{weight_decay:g}}".format(**numbers)


def with_task(labels: Iterable[str], **fields: Any) -> dict[str, Run]:
    """Methods by label, on a task with these fields."""
    return {label: dataclasses.replace(RUNS[label], task=modular.Modular(**fields)) for label in labels}


# On other tasks: the fair control of both filters, the paper's methods, and the recommended one
ELSEWHERE = ("adam-0.00167", "adam-0.005", "adamw-1", "ema", "ma", "ma+adamw-1")
OPERATIONS = ("addition", "division", "multiplication", "subtraction")
BY_OPERATION = {f"operation {name}": with_task(ELSEWHERE, operation=name) for name in OPERATIONS}
# With small embeddings a stronger coupled decay takes fewer steps, so the MA has a second control.
BY_START = {
    f"embeddings {std}, fraction {part}": with_task(("adam-0.01", *ELSEWHERE), embedding_std=std, train_fraction=part)
    for std in (1.0, 0.02)
    for part in (0.5, 0.3)
}


# Three differences of the EMA from the MA: the average starts at the first gradient, amplifies it at once, and by less.
# Tables of settings leave out the note after the comma of a label, because `what` has it.
EARLY = {
    "ema": RUNS["ema"],
    "ema, start zero": setting(methods.ema_with_start, start="zero"),
    "ema, start debiased": setting(methods.ema_with_start),
    "ema+adamw-1": RUNS["ema+adamw-1"],
    "ema+adamw-1, start zero": setting(methods.ema_adamw_with_start, start="zero"),
    "ema+adamw-1, start debiased": setting(methods.ema_adamw_with_start),
    "ema+adamw-0.1": RUNS["ema+adamw-0.1"],
    "ema+adamw-0.1, start debiased": setting(methods.ema_adamw_with_start, weight_decay=0.1),
    "ema, from step 100": setting(methods.late_ema, lamb=2.0),
    "ema+adamw-1, from step 100": setting(modular.late_ema_adamw, lamb=2.0),
    "ema+adamw-1, lamb 5.0": setting(modular.ema_adamw, lamb=5.0),
    "ema+adamw-1, start debiased, lamb 5.0": setting(methods.ema_adamw_with_start, lamb=5.0),
    "ema-late+adamw-1": RUNS["ema-late+adamw-1"],
    "ma+adamw-1, lamb 2.0": setting(modular.ma_adamw, lamb=2.0),
    "ma+adamw-1": RUNS["ma+adamw-1"],
}
EARLY_PAIRS = [
    ("ema, start debiased", "adam-0.00167"),
    ("ema, start debiased", "ema"),
    ("ema+adamw-1, start debiased", "ema+adamw-1"),
    ("ema+adamw-1, start debiased", "adamw-1"),
    ("ema+adamw-1, from step 100", "adamw-1"),
    ("ema+adamw-1, start debiased, lamb 5.0", "adamw-1"),
    ("ema+adamw-0.1, start debiased", "adamw-0.1"),
]

# As in the paper's Table 1 and Figure 6: without weight decay, and the slow part alone after fitting
PAPER = {
    "ma": RUNS["ma+adam"],
    "two-stage": setting(modular.two_stage, weight_decay=0.0),
    "slow-only": setting(modular.two_stage, weight_decay=0.0, fast=0.0, start_step=99),
    "slow-only, from step 500": setting(modular.two_stage, weight_decay=0.0, fast=0.0, start_step=500),
}
PAPER_PAIRS = [*((label, "adam") for label in PAPER), ("two-stage", "ma")]

# Without decay only the filter differs. What a filter amplifies is also followed faster, hence the higher rates.
UNDECAYED = grid(modular.adam, lr=[0.001, 0.003, 0.006])
UNDECAYED += [RUNS[label] for label in ("ema+adam", "ema-late+adam", "ma+adam")]

# The paper's Figures 4 (there without decay), 7 and 8
DECAYS = [0.0, 0.001, 0.002, 0.005, 0.01, 0.02]
ABLATIONS = {
    "λ, EMA": ("lamb", grid(modular.ema, lamb=[0.0, 0.5, 1.0, 2.0, 5.0, 10.0])),
    "α, EMA": ("alpha", grid(modular.ema, alpha=[0.8, 0.9, 0.95, 0.98, 0.99, 0.995])),
    "decay, no filter": ("weight_decay", grid(modular.adam, weight_decay=DECAYS)),
    "decay, EMA": ("weight_decay", grid(modular.ema, weight_decay=DECAYS)),
    "decay, MA": ("weight_decay", grid(modular.ma, weight_decay=DECAYS)),
}
WINDOW_GRID = grid(modular.ma, window_size=[2, 10, 50, 100, 200], lamb=[1.0, 2.0, 5.0, 10.0])
TUNED_ADAMW = setting(modular.adamw, lr=0.003)  # as mod97_tuned chooses it


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """The runs of some settings with some seeds."""
    return [dataclasses.replace(run, seed=seed) for run, seed in itertools.product(runs, seeds)]


def runs(results: Results) -> Iterator[Run]:
    """All runs; the engine trains once what several parts share."""
    del results
    tripled_rate, debiased = UNDECAYED[1], EARLY["ema+adamw-0.1, start debiased"]  # with fewer seeds
    main = [*RUNS.values(), TUNED_ADAMW, *EARLY.values(), *PAPER.values(), *UNDECAYED]
    yield from with_seeds([run for run in main if run not in (tripled_rate, debiased)], SEEDS)
    yield from with_seeds([run for by in (BY_OPERATION | BY_START).values() for run in by.values()], FEWER_SEEDS)
    ablated = [run for _, line in ABLATIONS.values() for run in line]
    yield from with_seeds([*ablated, *WINDOW_GRID, tripled_rate], ABLATION_SEEDS)
    yield from with_seeds([debiased], (4, 5))


STUDY = Study("mod97", runs)


def seeds_of(frame: Frame, run: Run) -> Frame:
    """The results of the runs that differ from a run in the seed alone."""
    return views.runs_of(frame, run.method, **{k: v for k, v in run.key.items() if k not in ("method", "seed")})


def quoted(label: str) -> str:
    """A label as tables show it, with the note after its comma."""
    name, comma, rest = label.partition(",")
    return f"`{name}`{comma}{rest}"


def rows(frame: Frame, labelled: Iterable[tuple[dict[str, str], Run]]) -> str:
    """A table with a row per setting, after its first cells."""
    return views.summary((cells, seeds_of(frame, run)) for cells, run in labelled)


def described(frame: Frame, by_label: Settings) -> str:
    """A table of labelled settings, each in words."""
    cells = lambda label, run: {"method": quoted(label.partition(",")[0]), "what": what(run)}
    return rows(frame, ((cells(label, run), run) for label, run in by_label.items()))


def pairs_of(labels: Iterable[str], controls: Controls) -> list[tuple[str, str]]:
    """Each method with each of its controls among the labels."""
    controls = {control: filtered for control, filtered in controls.items() if control in labels}
    return [(label, control) for label in labels for control, filtered in controls.items() if label in filtered]


def matched(frame: Frame, by_label: Settings, pairs: Iterable[tuple[str, str]], **cells: str) -> Iterator[Any]:
    """Rows of a table of methods compared seed by seed."""
    for label, control in pairs:
        found = (seeds_of(frame, by_label[name]) for name in (label, control))
        yield {**cells, "method": quoted(label), "against": quoted(control)}, *found


def by_setting(frame: Frame, groups: Mapping[str, Settings], controls: Controls, hidden: str = "") -> str:
    """The methods in each setting; then those with a filter against controls, except in the `hidden` setting."""
    cells = lambda text, label: {"setting": text, "method": quoted(label)}
    items = [(cells(text, label), run) for text, by in groups.items() for label, run in by.items()]
    shown = {text: by for text, by in groups.items() if text != hidden}
    pairs = (matched(frame, by, pairs_of(by, controls), setting=text) for text, by in shown.items())
    return views.joined(rows(frame, items), views.comparison_table(itertools.chain.from_iterable(pairs)))


@STUDY.table
def table(frame: Frame) -> str:
    """Every method."""
    return described(frame, RUNS)


@STUDY.table
def pairs(frame: Frame) -> str:
    """Every method with a filter against its controls; then what the first steps of the EMA do."""
    return views.comparison_table(matched(frame, RUNS | EARLY, pairs_of(RUNS, CONTROLS) + EARLY_PAIRS))


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
    pairs = matched(frame, PAPER | {"adam": RUNS["adam"]}, PAPER_PAIRS)
    return views.joined(described(frame, PAPER), views.comparison_table(pairs))


@STUDY.table
def undecayed(frame: Frame) -> str:
    """Without weight decay."""
    cells = lambda run: {"setting": f"learning rate {run.hyperparams['lr']}", "what": what(run)}
    return rows(frame, ((cells(run), run) for run in UNDECAYED))


def colour(run: Run) -> str:
    """The colour of a method with or without a filter."""
    return NO_FILTER if what(run).startswith("no filter") else FILTER


def method_dots(axes: Axes, frame: Frame, settings: Iterable[Run], *, log: bool = False) -> None:
    """Steps to 95 % of some settings in words, sorted by the median; the learning rate is named if not the paper's."""
    groups = {}
    for run in settings:
        text = what(run).removeprefix("no filter, ").removeprefix("Grokfast-").replace(" weight decay", ", decay")
        text += f", rate {run.hyperparams['lr']:g}" * (run.hyperparams["lr"] != 0.001)
        if len(found := seeds_of(frame, run)):
            groups[text] = found, colour(run)
    slowness = lambda item: tuple(item[1][0]["steps_to_95"].clip(upper=CAP).agg(["median", "mean"]))
    views.step_dots(axes, dict(sorted(groups.items(), key=slowness)), log=log)
    views.legend(axes.figure, {"no filter": NO_FILTER, "with a filter": FILTER})


@STUDY.figure("The filter helps; a tuned learning rate and Muon help more", width=8, height=4.4)
def hero(frame: Frame, axes: Axes) -> None:
    """The share of seeds that have reached 95 % over the steps."""
    curves = {
        "Grokfast-EMA before Adam": (RUNS["ema"], ORANGE),
        "its fair control: Adam, a third of the decay": (RUNS["adam-0.00167"], GREY),
        "AdamW with its learning rate tuned, no filter": (TUNED_ADAMW, BLUE),
        "the method fastest: Muon with a short momentum": (RUNS["fastest"], PURPLE),
    }
    for name, (run, shade) in curves.items():
        axes.ecdf(seeds_of(frame, run)["steps_to_95"].clip(upper=CAP), color=shade, linewidth=3, label=name)
    axes.set(xlim=(0, 3_000), ylim=(-0.02, 1.04))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    views.label(axes, "training step (multiplication mod 97)", "share of seeds at 95 % so far")
    axes.figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="large")


@STUDY.figure("Against the fair control, decay 0.00167, filters save a third", width=9, height=3.6)
def fair_control(frame: Frame, axes: Axes) -> None:
    """Both filters before Adam, and their controls."""
    method_dots(axes, frame, [RUNS[label] for label in ("adam-0.005", "adam-0.01", "adam-0.00167", "ema", "ma")])


@STUDY.figure("Every method at the paper's learning rate, 0.001", width=10.5, height=12)
def all_methods(frame: Frame, axes: Axes) -> None:
    """Every method."""
    method_dots(axes, frame, RUNS.values(), log=True)


@STUDY.figure("The paper's λ and α are among the best here (3 seeds)", width=11, height=6, columns=3, rows=2)
def ablations(frame: Frame, panels: Any) -> None:
    """Steps to 95 % over one hyperparameter: above λ and α, below the decay."""
    frame = frame[frame["seed"].isin(ABLATION_SEEDS)]
    panels[0, 2].set_axis_off()
    for axes, (title, (name, line)) in zip([*panels[0, :2], *panels[1]], ABLATIONS.items(), strict=True):
        steps = {f"{run.hyperparams[name]:g}": seeds_of(frame, run)["steps_to_95"].to_numpy(float) for run in line}
        views.dots(axes, {value: (one, colour(line[0])) for value, one in steps.items()}, 1.04 * CAP)
        axes.set(xlim=(0, 2.2 * CAP), xticks=[0, CAP], xticklabels=["0", f"{CAP:,}"])
        views.label(axes, "steps to 95 %", title)


@STUDY.figure("Few windows and λ of the MA reach 95 % (median of 3 seeds)", width=7.4, height=3.4)
def window_grid(frame: Frame, axes: Axes) -> None:
    """Median steps to 95 % over window size and λ."""
    found = pd.concat([seeds_of(frame, run) for run in WINDOW_GRID])
    found = found[found["seed"].isin(ABLATION_SEEDS)]
    views.heat_map(axes, found.pivot_table("steps_to_95", "lamb", "window_size", "median"), CAP)
    views.label(axes, f"window size w; {views.FAILS}: fails", "λ")
