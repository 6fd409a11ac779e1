"""Which Fourier circuits do models of modular arithmetic learn, and when?

Each run continues for 50 evaluations after its first at 95 % validation accuracy. Its key frequencies are those of its
final parameters, as in Nanda et al. (arXiv 2301.05217), and the losses at all steps are measured with these. The clock
forms at the first measured step with a restricted loss below half of log p. Methods are compared from the same initial
parameters and split; the control is the same comparison between different seeds. Adam with coupled decay and without a
filter is the control of the filters before Adam.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples import circuits, modular
from examples.harness.engine import four_digits
from examples.harness.methods import Method, base
from examples.harness.records import Row, is_finished
from examples.harness.task import Data
from examples.harness.train import TrainState, keys
from examples.modular import Modular

OPERATIONS = ("multiplication", "addition", "subtraction", "division")
METHODS: dict[str, Method] = {
    "AdamW": modular.adamw,
    "Adam": functools.partial(modular.adam, weight_decay=0.00167),  # with the filters' 0.005 and 0.01 half and all fail
    "EMA + Adam": modular.ema,
    "MA + Adam": modular.ma,
    "Muon": functools.partial(modular.muon, lr=0.03, weight_decay=0.3),  # at AdamW's learning rate it takes thousands
    "fastest": modular.fastest,
}
MEASURE_EVERY = 5  # evaluations
measure = jax.jit(circuits.measure, static_argnums=0)


def runs(_results: Results) -> Iterator[Run]:
    """All methods on all operations."""
    for operation, method in itertools.product(OPERATIONS, METHODS.values()):
        yield from product(Modular(operation=operation), method, seed=range(8), hold_evals=50)


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, Any]:
    """The final key frequencies of a run, the step at which its clock forms, and measures of its final parameters."""
    del data
    task: Any = run.task
    params, rows = {0: task.init(keys(jax.random.key(run.seed)).init)}, []
    for row, state in history:
        rows.append(row)
        if len(rows) % MEASURE_EVERY == 0 or is_finished(run, rows):
            params[int(row["step"])] = jax.device_get(state.params)
    end = jax.device_get(measure(task, params[max(params)]))
    losses = {step: measure(task, p, end["is_key"])["restricted_loss"] for step, p in params.items()}
    result = {
        "key": (1 + np.flatnonzero(end["is_key"])).tolist(),
        "clock_step": next((step for step, loss in losses.items() if loss < math.log(task.p) / 2), None),
        **{name: four_digits(end[name]) for name in ("gini", "gini_control", "logit_share")},
    }
    is_drawn = run.seed == 0 and base(run.method) is modular.adamw and task.operation == "multiplication"
    return result | ({"circle": circle(task, params, rows, end["share"] * end["is_key"])} if is_drawn else {})


def circle(task: Modular, params: Mapping[int, Any], rows: Sequence[Row], key_share_k: np.ndarray) -> dict[str, Any]:
    """The embedding on the circle of its strongest key frequency k: at the start, memorised, and at the end.

    It is memorised at the measured step with the largest difference of training and validation accuracy.
    """
    accuracy = {0: (0.0, 0.0)} | {row["step"]: (row["train_accuracy"], row["val_accuracy"]) for row in rows}
    memorised = max(params, key=lambda step: accuracy[step][0] - accuracy[step][1])
    steps = [0, memorised, max(params)]
    n = len(circuits.Cycle.of(task.p, task.operation).elements)
    k = 1 + int(np.argmax(key_share_k[: (n - 1) // 2]))  # n/2 has a line, not a circle
    points = circuits.circle_points(task, [params[step] for step in steps], k).round(2).tolist()
    shown = [[round(value, 3) for value in accuracy[step]] for step in steps]
    return {"k": k, "steps": steps, "accuracy": shown, "points": points}


STUDY = Study("fourier_circuits", runs, observe=observe)


def reaching(frame: Frame) -> Frame:
    """The runs that reach 95 %: the number of their keys, fit and clock as shares of these steps, which comes first."""
    runs = frame[np.isfinite(frame["steps_to_95"])]
    fit, clock = (runs[column] / runs["steps_to_95"] for column in ("fit_steps", "clock_step"))
    return runs.assign(keys=runs["key"].map(len), fit=fit, clock=clock, clock_first=clock < fit)


def by_method(frame: Frame) -> dict[str, Frame]:
    """The runs of each method that reach 95 %."""
    runs = reaching(frame)
    groups = {label: runs[runs["method"] == base(method).__name__] for label, method in METHODS.items()}
    return {label: group for label, group in groups.items() if len(group)}


def seed_means(runs: Frame, column: str) -> Frame:
    """The mean over the runs of each seed."""
    return runs.groupby("seed", as_index=False)[column].mean()


def counts(first: Frame, second: Frame, column: str) -> str:
    """The seeds on which the mean of a column is smaller and larger, over the operations on which both reach 95 %."""
    place = ["operation", "seed"]
    one, other = first.merge(second[place]), second.merge(first[place])
    return views.seed_counts(paired(seed_means(one, column), seed_means(other, column), column))


@STUDY.table
def table(frame: Frame) -> Rows:
    """When the clock of each method forms, relative to the steps to 95 %, and its key frequencies."""
    ranges = {
        "training pairs fitted": ("fit", ".2f"),
        "clock forms": ("clock", ".2f"),
        "key frequencies": ("keys", ".0f"),
    }
    for label, runs in by_method(frame).items():
        first = f"{runs['clock_first'].sum()} of {len(runs)}"
        yield {"method": label, **views.range_cells(runs, ranges), "clock first": first}


@STUDY.table
def controls(frame: Frame) -> Rows:
    """The number of key frequencies and the share of runs with the clock first, against AdamW and against Adam."""
    groups = by_method(frame)
    for label, runs in groups.items():
        row = {"method": label}
        for name in ("AdamW", "Adam"):
            is_compared = name in groups and name != label
            fewer = counts(runs, groups[name], "keys") if is_compared else ""
            more = counts(groups[name], runs, "clock_first") if is_compared else ""
            row |= {f"fewer : more frequencies than {name}": fewer, f"clock first more : less often than {name}": more}
        yield row


@STUDY.table
def operations(frame: Frame) -> Rows:
    """The clocks of each operation, all methods together."""
    ranges = {
        "key frequencies": ("keys", ".0f"),
        "Gini, the operation's cycle": ("gini", ".2f"),
        "Gini, the other cycle": ("gini_control", ".2f"),
        "the clock's share of the logits": ("logit_share", ".2f"),
    }
    for operation, runs in reaching(frame).groupby("operation", sort=False):
        yield {"operation": operation, **views.range_cells(runs, ranges)}


@STUDY.table
def comparison(frame: Frame) -> Rows:
    """The key frequencies that two methods share, from the same start and from others; a seed is the unit."""
    for (label, first), (label_2, second) in itertools.combinations(by_method(frame).items(), 2):
        pairs = first.merge(second, on="operation", suffixes=("", "_2"))
        pairs["shared"] = [len({*a} & {*b}) for a, b in zip(pairs["key"], pairs["key_2"], strict=True)]
        is_same = pairs["seed"] == pairs["seed_2"]
        same, apart = (seed_means(part, "shared") for part in (pairs[is_same], pairs[~is_same]))
        yield {
            "methods": f"{label}, {label_2}",
            "shared, same start": f"{same['shared'].mean():.1f}",
            "shared, other starts": f"{apart['shared'].mean():.1f}",
            "seeds with more : fewer from the same start": views.seed_counts(paired(apart, same, "shared")),
        }


MARKS = {  # marker, and place of the label
    "AdamW": ("o", 0.04, 0.65),
    "Adam": ("v", 0.33, 0.2),
    "EMA + Adam": ("d", 0.5, 0.31),
    "MA + Adam": ("^", 0.98, 0.4),
    "Muon": ("s", 0.99, 0.68),
    "fastest": ("D", 0.68, 1.07),
}


@STUDY.figure("AdamW fits the training pairs before its clock forms,\nMuon and the filters after", width=7, height=6)
def figure(frame: Frame, axes: Any) -> None:
    """When runs fit the training pairs and form the clock, as shares of their steps to 95 %."""
    for label, runs in by_method(frame).items():
        (marker, *place), colour = MARKS[label], views.FILTER if "+" in label else views.NO_FILTER
        hollow = {"markerfacecolor": "none"} if label in ("Adam", "EMA + Adam", "Muon") else {}
        axes.plot(runs["fit"], runs["clock"], marker, color=colour, markersize=7, alpha=0.8, **hollow)
        axes.annotate(label, place, color=colour, fontsize="large", fontweight="bold")
    axes.axline((0, 0), slope=1, color=views.GREY, linewidth=1)
    for text, place in (("fit first", (0.1, 0.13)), ("clock first", (0.13, 0.07))):
        axes.annotate(text, place, rotation=45, rotation_mode="anchor", color=views.GREY, fontsize="large")
    axes.set(xlim=(0, 1.2), ylim=(0, 1.2), aspect="equal")
    views.label(axes, "training pairs fitted (share of the steps to 95 %)", "clock forms (share of the steps to 95 %)")


@STUDY.figure("After grokking, the embeddings of the numbers form a circle", width=9, height=3.8, columns=3)
def circles(frame: Frame, panels: Any) -> None:
    """The embedding of a run of multiplication with AdamW, at three stages."""
    stored = frame["circle"].dropna().iloc[0]
    stages = zip(("start", "memorised", "generalised"), stored["steps"], stored["accuracy"], strict=True)
    titles = [
        f"{name}, step {step:,}\ntraining {100 * train:.0f} %, validation {100 * val:.0f} %"
        for name, step, (train, val) in stages
    ]
    circuits.draw_circles(panels, np.array(stored["points"]), ["start\n", *titles[1:]], stored["k"])
    for axes in panels:
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
