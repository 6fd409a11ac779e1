"""Does a Grokfast filter help on multiplication mod 97, by how much, and against which control?

The learning rate is the paper's, 0.001, unless a label has another. The EMA has α 0.98 and λ 2, the MA a window of 100
and λ 5, unless a label says otherwise. Methods are compared seed by seed: runs of one seed share initial weights, split
and batches. A run continues for 50 evaluations after the first at 95 % validation accuracy, to show whether it stays.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks import methods, views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from benchmarks.views import FILTER, NO_FILTER
from examples import modular
from examples.harness.methods import Method

SEEDS, FEWER_SEEDS, ABLATION_SEEDS = range(8), range(5), range(3)
CAP = 5_000
FILTER_COLOURS = {"without a filter": NO_FILTER, "with a filter": FILTER}
grid = functools.partial(product, modular.Modular(), hold_evals=50)  # all combinations of lists of values


def setting(method: Method, **hyperparams: Any) -> Run:
    """A method on multiplication with some hyperparameters; its runs differ in the seed alone."""
    return grid(method, **hyperparams)[0]


RUNS = {
    "Adam, decay 0": setting(modular.adam),
    "Adam, learning rate 0.003, decay 0": setting(modular.adam, lr=0.003),
    "Adam, learning rate 0.006, decay 0": setting(modular.adam, lr=0.006),
    "Adam, decay 0.00167": setting(modular.adam, weight_decay=0.00167),
    "Adam, learning rate 0.003, decay 0.001": setting(modular.adam, lr=0.003, weight_decay=0.001),
    "Adam, decay 0.005": setting(modular.adam, weight_decay=0.005),
    "Adam, decay 0.01": setting(modular.adam, weight_decay=0.01),
    "AdamW, decay 0.01": setting(modular.adamw, weight_decay=0.01),
    "AdamW, decay 0.1": setting(modular.adamw, weight_decay=0.1),
    "AdamW, decay 1": setting(modular.adamw),
    "AdamW, learning rate 0.003, decay 1": setting(modular.adamw, lr=0.003),
    "NAdamW, decay 1": setting(methods.nadamw),
    "Lion, decay 1": setting(methods.lion),
    "AdEMAMix, decay 1": setting(methods.ademamix),
    "Muon, decay 0": setting(modular.muon, weight_decay=0.0),
    "Muon, decay 1": setting(modular.muon),
    "Muon, learning rate 0.03, decay 0.3": setting(modular.muon, lr=0.03, weight_decay=0.3),
    "`fastest`, learning rate 0.06, decay 0.3": setting(modular.fastest),
    "EMA before Adam, decay 0.005": setting(modular.ema),
    "EMA before Adam, decay 0.005, start zero": setting(methods.ema_with_start, start="zero"),
    "EMA before Adam, decay 0.005, start debiased": setting(methods.ema_with_start),
    "EMA before Adam, decay 0.005, from step 100": setting(methods.late_ema, lamb=2.0),
    "EMA before Adam, decay 0.005, α 0.95": setting(modular.ema, alpha=0.95),
    "EMA before Adam, decay 0.005, normalized": setting(methods.normalized_ema),
    "EMA before Adam, decay 0": setting(modular.ema, weight_decay=0.0),
    "EMA before Adam, decay 0, λ 5 from step 100": setting(methods.late_ema, weight_decay=0.0),
    "MA before Adam, decay 0.01": setting(modular.ma),
    "MA before Adam, learning rate 0.003, decay 0.001": setting(modular.ma, lr=0.003, weight_decay=0.001),
    "MA before Adam, decay 0.01, from step 500": setting(modular.two_stage),
    # From the step on at which the window is full: before it, the decay alone would shrink all weights to nothing.
    "MA before Adam, decay 0.01, slow part alone from step 99": setting(modular.two_stage, fast=0.0, start_step=99),
    "MA before Adam, decay 0": setting(modular.ma, weight_decay=0.0),
    "MA before Adam, decay 0, from step 500": setting(modular.two_stage, weight_decay=0.0),
    "MA before Adam, decay 0, slow part alone from step 99": setting(
        modular.two_stage, weight_decay=0.0, fast=0.0, start_step=99
    ),
    "MA before Adam, decay 0, slow part alone from step 500": setting(modular.two_stage, weight_decay=0.0, fast=0.0),
    "EMA before AdamW, decay 0.1": setting(modular.ema_adamw, weight_decay=0.1),
    "EMA before AdamW, decay 1": setting(modular.ema_adamw),
    "EMA before AdamW, decay 1, start zero": setting(methods.ema_adamw_with_start, start="zero"),
    "EMA before AdamW, decay 1, start debiased": setting(methods.ema_adamw_with_start),
    "EMA before AdamW, decay 1, start debiased, λ 5": setting(methods.ema_adamw_with_start, lamb=5.0),
    "EMA before AdamW, decay 1, λ 5": setting(modular.ema_adamw, lamb=5.0),
    "EMA before AdamW, decay 1, from step 100": setting(modular.late_ema_adamw, lamb=2.0),
    "EMA before AdamW, decay 1, λ 5 from step 100": setting(modular.late_ema_adamw),
    "MA before AdamW, decay 0.1": setting(modular.ma_adamw, weight_decay=0.1),
    "MA before AdamW, decay 1": setting(modular.ma_adamw),
    "MA before AdamW, decay 1, λ 2": setting(modular.ma_adamw, lamb=2.0),
    "EMA before Muon, decay 0": setting(methods.ema_muon, weight_decay=0.0),
    "EMA before Muon, decay 1": setting(methods.ema_muon),
    "EMA before Muon, learning rate 0.03, decay 0.3": setting(methods.ema_muon, lr=0.03, weight_decay=0.3),
    "MA before Muon, decay 0": setting(methods.ma_muon, weight_decay=0.0),
    "MA before Muon, decay 1": setting(methods.ma_muon),
    "MA before Muon, learning rate 0.01, decay 0.3": setting(methods.ma_muon, lr=0.01, weight_decay=0.3),
}
UNDECAYED = [k for k in RUNS if "Adam, " in k and "decay 0" in k.split(", ") and "alone" not in k]
PUBLISHED = {"EMA": "EMA before Adam, decay 0.005", "MA": "MA before Adam, decay 0.01"}
CONTROLS = [  # of the published filters
    "Adam, decay 0.00167",
    "Adam, learning rate 0.003, decay 0.001",
    "AdamW, decay 1",
    "AdamW, learning rate 0.003, decay 1",
]
SHOWN = [
    *CONTROLS,
    "Adam, decay 0.005",
    "Adam, decay 0",
    *PUBLISHED.values(),
    "MA before AdamW, decay 1",
    "EMA before AdamW, decay 1",
    "MA before Adam, decay 0",
]
ELSEWHERE = [
    "Adam, decay 0.00167",
    "Adam, decay 0.005",
    "Adam, decay 0.01",
    "AdamW, decay 1",
    *PUBLISHED.values(),
    "MA before AdamW, decay 1",
]
ON_OPERATIONS = [label for label in ELSEWHERE if label != "Adam, decay 0.01"]
OPERATIONS = {
    name: modular.Modular(operation=name) for name in ("multiplication", "addition", "subtraction", "division")
}
STARTS = {
    "half of the pairs": modular.Modular(),
    "half, small embeddings": modular.Modular(embedding_std=0.02),
    "30 %": modular.Modular(train_fraction=0.3),
    "30 %, small embeddings": modular.Modular(embedding_std=0.02, train_fraction=0.3),
}

# The paper's Figures 4 (there without decay), 7 and 8
DECAYS = [0.0, 0.001, 0.002, 0.005, 0.01, 0.02]
ABLATIONS = {
    "λ of the EMA": ("lamb", grid(modular.ema, lamb=[0.0, 0.5, 1.0, 2.0, 5.0, 10.0])),
    "α of the EMA": ("alpha", grid(modular.ema, alpha=[0.8, 0.9, 0.95, 0.98, 0.99, 0.995])),
    "decay, without a filter": ("weight_decay", grid(modular.adam, weight_decay=DECAYS)),
    "decay, with the EMA": ("weight_decay", grid(modular.ema, weight_decay=DECAYS)),
    "decay, with the MA": ("weight_decay", grid(modular.ma, weight_decay=DECAYS)),
}
WINDOW_GRID = grid(modular.ma, window_size=[2, 10, 50, 100, 200], lamb=[1.0, 2.0, 5.0, 10.0])

# At other learning rates and decays: how many runs reach 95 %, and how many stay there
BESIDE_ADAMW = {
    "AdamW": modular.adamw,
    "EMA, λ 5 from step 100, before AdamW": modular.late_ema_adamw,
    "MA before AdamW": modular.ma_adamw,
}
PAIRS = {
    f"learning rate {lr}, decay {decay:g}": {
        label: setting(method, lr=lr, weight_decay=decay) for label, method in BESIDE_ADAMW.items()
    }
    for lr, decay in itertools.product((0.001, 0.003), (1.0, 3.0))
}


# The nine pairs among which those at other rates in RUNS and in `fourier_circuits` were chosen: all with one seed, the
# best three with a second
TUNING_SEEDS = (1000, 1001)
NINE = functools.partial(grid, lr=[1e-3, 3e-3, 1e-2], max_steps=2_500, hold_evals=0, seed=TUNING_SEEDS[0])
NINE_OF_MUON = functools.partial(NINE, lr=[1e-2, 3e-2, 1e-1], weight_decay=[0.03, 0.1, 0.3])
TUNED = {
    "Adam": NINE(modular.adam, weight_decay=[3e-4, 1e-3, 3e-3]),
    "AdamW": NINE(modular.adamw, weight_decay=[0.3, 1.0, 3.0]),
    "EMA before Adam": NINE(modular.ema, weight_decay=[1e-3, 3e-3, 1e-2]),
    "MA before Adam": NINE(modular.ma, weight_decay=[1e-3, 3e-3, 1e-2]),
    "Muon": NINE_OF_MUON(modular.muon),
    "EMA before Muon": NINE_OF_MUON(methods.ema_muon),
    "MA before Muon": NINE_OF_MUON(methods.ma_muon),
}


def second_tries(results: Results, tried: list[Run]) -> list[Run]:
    """The three settings with the fewest steps, then the best accuracy, with the second seed."""
    frame = results.of(tried)
    if len(frame) < len(tried):
        return []
    order = frame.assign(accuracy=-frame["best_val_accuracy"].fillna(0)).sort_values(["steps_to_95", "accuracy"]).index
    return with_seeds([tried[i] for i in order[:3]], TUNING_SEEDS[1:])


def on(task: modular.Modular, label: str) -> Run:
    """A setting on another task."""
    return dataclasses.replace(RUNS[label], task=task)


def with_seeds(runs: Iterable[Run], seeds: Iterable[int]) -> list[Run]:
    """The runs of some settings with some seeds."""
    return [dataclasses.replace(run, seed=seed) for run, seed in itertools.product(runs, seeds)]


def runs(results: Results) -> Iterator[Run]:
    """All runs; the engine trains once what several parts share."""
    three_seeds = RUNS["Adam, learning rate 0.003, decay 0"]
    yield from with_seeds([run for run in RUNS.values() if run != three_seeds], SEEDS)
    elsewhere = [on(task, label) for task in STARTS.values() for label in ELSEWHERE]
    elsewhere += [on(task, label) for task in OPERATIONS.values() for label in ON_OPERATIONS]
    yield from with_seeds(elsewhere, FEWER_SEEDS)
    ablated = [run for _, line in ABLATIONS.values() for run in line]
    yield from with_seeds([*ablated, *WINDOW_GRID, three_seeds], ABLATION_SEEDS)
    for tried in TUNED.values():
        yield from tried
        yield from second_tries(results, tried)
    yield from with_seeds([run for by_label in PAIRS.values() for run in by_label.values()], SEEDS)


STUDY = Study("mod97", runs)


def seeds_of(frame: Frame, run: Run) -> Frame:
    """The results of the runs that differ from a run in the seed alone."""
    return views.runs_of(frame, run.method, **{k: v for k, v in run.key.items() if k not in ("method", "seed")})


@STUDY.table
def table(frame: Frame) -> Rows:
    """Every setting on multiplication."""
    return views.summary({label: seeds_of(frame, run) for label, run in RUNS.items()})


@STUDY.table
def published(frame: Frame) -> Rows:
    """The published filters before Adam against controls without a filter."""
    for control in CONTROLS:
        base = seeds_of(frame, RUNS[control])
        if len(base):
            row = {"without a filter": control, "median steps": views.format_steps(base["steps_to_95"].median(), CAP)}
            for name, label in PUBLISHED.items():
                row[f"{name}: fewer : more"] = views.seed_counts(paired(seeds_of(frame, RUNS[label]), base))
            yield row


def by_task(frame: Frame, tasks: Mapping[str, modular.Modular], labels: Iterable[str]) -> Rows:
    """Median steps and failures of five seeds, a column per task."""
    frame = frame[frame["seed"].isin(FEWER_SEEDS)]
    for label in labels:
        steps = {name: seeds_of(frame, on(task, label))["steps_to_95"] for name, task in tasks.items()}
        yield {"method": label} | {
            k: views.steps_and_failures(one, CAP) if len(one) else "" for k, one in steps.items()
        }


@STUDY.table
def operations(frame: Frame) -> Rows:
    """Four operations."""
    return by_task(frame, OPERATIONS, ON_OPERATIONS)


@STUDY.table
def start(frame: Frame) -> Rows:
    """Initial scales and training fractions."""
    return by_task(frame, STARTS, ELSEWHERE)


@STUDY.table
def pairs(frame: Frame) -> Rows:
    """AdamW without a filter and with two, at four pairs of learning rate and decay."""
    for pair, by_label in PAIRS.items():
        row = {"setting": pair} | dict.fromkeys(by_label, "")
        for label, run in by_label.items():
            if len(found := seeds_of(frame, run)):
                held = views.outcome_cells(found)["hold"].partition(" (")[0]
                row[label] = views.steps_and_failures(found["steps_to_95"].to_numpy(), CAP)
                row[label] += f"; holds {held}" * bool(held)
        if any(list(row.values())[1:]):
            yield row


def colour(label: str) -> str:
    """The colour of a method with or without a filter."""
    return FILTER if " before " in label else NO_FILTER


def by_median(groups: Mapping[str, Frame]) -> dict[str, Frame]:
    """Labelled runs, the fewest steps first."""
    slowness = lambda item: tuple(item[1]["steps_to_95"].clip(upper=CAP).agg(["median", "mean"]))
    return dict(sorted(groups.items(), key=slowness))


def method_dots(axes: Axes, groups: Mapping[str, Frame]) -> None:
    """Steps to 95 % of labelled runs on a logarithmic axis."""
    views.step_dots(axes, {k.replace("`", ""): (runs, colour(k)) for k, runs in groups.items() if len(runs)})
    views.legend(axes.figure, FILTER_COLOURS, fontsize="large")


@STUDY.figure("At 0.001 filters tend to help Adam; so does a rate of 0.003", width=8.4, height=5.2)
def all_methods(frame: Frame, axes: Axes) -> None:
    """The settings that make the point."""
    method_dots(axes, by_median({label: seeds_of(frame, RUNS[label]) for label in SHOWN}))


@STUDY.figure("Without weight decay, the MA reaches 95 % where Adam fails", width=8.4, height=3.6)
def without_decay(frame: Frame, axes: Axes) -> None:
    """Adam and both filters before it, without weight decay."""
    method_dots(axes, by_median({label: seeds_of(frame, RUNS[label]) for label in UNDECAYED}))


@STUDY.figure("The paper's λ and α are among the best here (3 seeds)", width=9, height=5.6, columns=3, rows=2)
def ablations(frame: Frame, panels: Any) -> None:
    """Steps to 95 % over one hyperparameter: above λ and α, below the decay."""
    frame = frame[frame["seed"].isin(ABLATION_SEEDS)]
    panels[0, 2].set_axis_off()
    for axes, (title, (name, line)) in zip([*panels[0, :2], *panels[1]], ABLATIONS.items(), strict=True):
        groups = {}
        for run in line:
            is_filtered = "without" not in title and run.hyperparams.get("lamb") != 0
            steps = seeds_of(frame, run)["steps_to_95"].to_numpy(float)
            groups[f"{run.hyperparams[name]:g}"] = steps, FILTER if is_filtered else NO_FILTER
        views.dots(axes, groups, 1.08 * CAP)
        axes.set(xlim=(0, 2.4 * CAP), xticks=[0, CAP], xticklabels=["0", f"{CAP:,}"])
        views.label(axes, "steps to 95 %", title)
    views.legend(panels[0, 0].figure, FILTER_COLOURS, fontsize="large")


@STUDY.figure("With the MA, AdamW holds 95 % for 50 evaluations in most runs", width=8, height=3.6)
def hold(frame: Frame, axes: Axes) -> None:
    """How many runs reach 95 %, and how many of these stay there, at three pairs of rate and decay."""
    shown = list(PAIRS)[:3]
    for shift, label in ((-0.18, "AdamW"), (0.18, "MA before AdamW")):
        y, shade = np.arange(len(shown)) + shift, colour(label)
        found = [seeds_of(frame, PAIRS[pair][label]) for pair in shown]
        axes.barh(y, [np.isfinite(runs["steps_to_95"]).sum() for runs in found], 0.32, color=shade, alpha=0.3)
        axes.barh(y, [(runs["held_evals"] == 50).sum() for runs in found], 0.32, color=shade)
    axes.set(yticks=range(len(shown)), yticklabels=shown)
    axes.invert_yaxis()
    views.label(axes, "seeds that reach 95 % (pale) and hold it for 50 evaluations (full)")
    views.legend(axes.figure, {"AdamW": NO_FILTER, "MA before AdamW": FILTER}, fontsize="large")
