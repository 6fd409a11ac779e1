"""Learning rate and weight decay tuned on mod 97, with and without filters; and the leaderboard by its earlier rules.

Each method's pair is chosen from nine, in at most 2,500 steps. All nine are run with one seed, and the best three with
a second one; the pair with the lowest median of both is chosen. Among pairs that fail, the best accuracy decides. The
two seeds are not reported. This study goes when the leaderboard has been run by its present rules.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, find_study, paired
from examples import modular

from . import mod97

TUNING_SEEDS = (1000, 1001)

# Learning rates and weight decays. At one rate Lion steps further than Adam and Muon less far, so their grids lie
# elsewhere; rate times decoupled decay spans 3e-4 to 3e-2 in all.
COUPLED, AMPLIFIED = ((1e-3, 3e-3, 1e-2), (0.0003, 0.001, 0.003)), ((1e-3, 3e-3, 1e-2), (0.001, 0.003, 0.01))
DECOUPLED, MUON = ((1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0)), ((1e-2, 3e-2, 1e-1), (0.03, 0.1, 0.3))
LION = ((3e-4, 1e-3, 3e-3), (1.0, 3.0, 10.0))
TUNED = {  # by label: the label in mod97, and the grid
    "Adam": ("Adam, decay 0.005", COUPLED),
    "EMA before Adam": ("EMA before Adam, decay 0.005", AMPLIFIED),
    "MA before Adam": ("MA before Adam, decay 0.01", AMPLIFIED),
    "AdamW": ("AdamW, decay 1", DECOUPLED),
    "EMA before AdamW": ("EMA before AdamW, decay 1", DECOUPLED),
    "EMA, λ 5 from step 100, before AdamW": ("EMA before AdamW, decay 1, λ 5 from step 100", DECOUPLED),
    "MA before AdamW": ("MA before AdamW, decay 1", DECOUPLED),
    "Muon": ("Muon, decay 1", MUON),
    "EMA before Muon": ("EMA before Muon, decay 1", MUON),
    "MA before Muon": ("MA before Muon, decay 1", MUON),
    "NAdamW": ("NAdamW, decay 1", DECOUPLED),
    "AdEMAMix": ("AdEMAMix, decay 1", DECOUPLED),
    "Lion": ("Lion, decay 1", LION),
}
COMPARED = list(TUNED)[:10]  # with a filter and without


def pair(label: str, lr: float, weight_decay: float, **rule: int) -> Run:
    """A method with a learning rate and a weight decay."""
    run = mod97.RUNS[TUNED[label][0]]
    return dataclasses.replace(run, hyperparams={**run.hyperparams, "lr": lr, "weight_decay": weight_decay}, **rule)


def grid(label: str) -> list[Run]:
    """The nine pairs of a method, as they are tuned."""
    return [pair(label, *values, max_steps=2_500, hold_evals=0) for values in itertools.product(*TUNED[label][1])]


def best(frame: Frame, settings: Sequence[Run], seeds: Sequence[int], count: int) -> list[Run]:
    """The settings with the lowest median of steps, then the best accuracy; empty while one lacks a seed."""
    frame = frame[frame["seed"].isin(seeds)].fillna({"best_val_accuracy": 0.0})
    tried = [(run, mod97.seeds_of(frame, run)) for run in settings]
    slowness = lambda item: (item[1]["steps_to_95"].median(), -item[1]["best_val_accuracy"].median())
    is_complete = all(len(found) == len(seeds) for _, found in tried)
    return [run for run, _ in sorted(tried, key=slowness)[:count]] if is_complete else []


def finalists(frame: Frame, label: str) -> list[Run]:
    """The pairs of a method that are worth a second seed."""
    return best(frame, grid(label), TUNING_SEEDS[:1], 3)


def chosen(frame: Frame) -> dict[str, Run]:
    """The methods with complete tuning, each with its best pair."""
    found = ((label, best(frame, finalists(frame, label), TUNING_SEEDS, 1)) for label in TUNED)
    return {
        label: dataclasses.replace(run, max_steps=mod97.CAP, hold_evals=50) for label, runs in found for run in runs
    }


# At every rate and decay that is best for one of these, the others, too
BESIDE_ADAMW = ("AdamW", "EMA, λ 5 from step 100, before AdamW", "MA before AdamW")
RATES = {
    f"learning rate {lr}, decay {decay:g}": {label: pair(label, lr, decay) for label in BESIDE_ADAMW}
    for lr, decay in itertools.product((0.001, 0.003), (1.0, 3.0))
}
SMALLER_LAMB = "MA, λ 3, before AdamW"
for decay, run in zip((1, 3), mod97.grid(modular.ma_adamw, lr=0.003, weight_decay=[1.0, 3.0], lamb=3.0), strict=True):
    RATES[f"learning rate 0.003, decay {decay}"][SMALLER_LAMB] = run


def runs(results: Results) -> Iterator[Run]:
    """The grids, their finalists, and the pairs that these choose."""
    tuning = mod97.with_seeds(itertools.chain.from_iterable(map(grid, TUNED)), TUNING_SEEDS[:1])
    yield from tuning
    frame = results.of(tuning)
    finals = mod97.with_seeds((run for label in TUNED for run in finalists(frame, label)), TUNING_SEEDS[1:])
    yield from finals
    yield from mod97.with_seeds(chosen(results.of([*tuning, *finals])).values(), mod97.SEEDS)
    yield from mod97.with_seeds([run for by_label in RATES.values() for run in by_label.values()], mod97.SEEDS)


STUDY = Study("mod97_tuned", runs)


def pair_of(found: Frame) -> str:
    """Learning rate and decay of the runs of one setting."""
    return f"{found['lr'].iloc[0]:g}, {found['weight_decay'].iloc[0]:g}"


def standings(items: Iterable[tuple[str, str, Frame, Frame]]) -> Rows:
    """A row per method and pair, compared seed by seed with a control unless it is the control."""
    for label, text, found, control in items:
        cells = views.outcome_cells(found)
        yield {
            "method": label,
            "learning rate, decay": text,
            **{name: cells[name] for name in ("steps to 95 %", "fail", "hold") if name in cells},
            "fewer : more": "" if found is control else views.seed_counts(paired(found, control)),
        }


def control_of(label: str) -> str:
    """The optimizer of a method with a filter."""
    return label.rpartition(" before ")[2]


@STUDY.table
def table(frame: Frame) -> Rows:
    """The methods with a filter and without, each with its pair; one more pair that the tuning did not try."""
    found, items = chosen(frame), []
    seeds = {label: mod97.seeds_of(frame, run) for label, run in found.items()}
    for label in filter(found.get, COMPARED):
        values = (found[label].hyperparams["lr"], found[label].hyperparams["weight_decay"])
        both = zip(values, TUNED[label][1], strict=True)
        text = ", ".join(f"{value:g}" + " (edge)" * (value in (axis[0], axis[-1])) for value, axis in both)
        items.append((label, text, seeds[label], seeds.get(control_of(label), seeds[label])))
    extra = mod97.seeds_of(frame, RATES["learning rate 0.003, decay 3"][SMALLER_LAMB])
    if len(extra):
        items.append((f"{SMALLER_LAMB} (not tuned)", pair_of(extra), extra, seeds["AdamW"]))
    return standings(items)


@STUDY.table
def rate(frame: Frame) -> Rows:
    """AdamW without a filter and with two, at four pairs of rate and decay."""
    for setting, by_label in RATES.items():
        row = {"setting": setting} | dict.fromkeys((*BESIDE_ADAMW, SMALLER_LAMB), "")
        for label, run in by_label.items():
            if len(found := mod97.seeds_of(frame, run)):
                held = views.outcome_cells(found)["hold"].partition(" (")[0]
                row[label] = views.steps_and_failures(found["steps_to_95"].to_numpy(), mod97.CAP)
                row[label] += f"; holds {held}" * bool(held)
        if any(list(row.values())[1:]):
            yield row


@STUDY.figure("With learning rate and decay tuned, no filter clearly gains (8 seeds)", width=8.4, height=4.8)
def all_tuned(frame: Frame, axes: Axes) -> None:
    """The methods with a filter and without."""
    found = chosen(frame)
    mod97.method_dots(axes, {label: mod97.seeds_of(frame, found[label]) for label in COMPARED if label in found})


@STUDY.figure("With the MA, AdamW stays at 95 %", width=8, height=3.6)
def hold(frame: Frame, axes: Axes) -> None:
    """How many runs reach 95 %, and how many of these stay there, at three pairs of rate and decay."""
    settings = list(RATES)[:3]
    for shift, label in ((-0.18, "AdamW"), (0.18, "MA before AdamW")):
        y, shade = np.arange(len(settings)) + shift, mod97.colour(label)
        found = [mod97.seeds_of(frame, RATES[setting][label]) for setting in settings]
        axes.barh(y, [np.isfinite(runs["steps_to_95"]).sum() for runs in found], 0.32, color=shade, alpha=0.3)
        axes.barh(y, [(runs["held_evals"] == 50).sum() for runs in found], 0.32, color=shade)
    axes.set(yticks=range(len(settings)), yticklabels=settings)
    axes.invert_yaxis()
    views.label(axes, "seeds that reach 95 % (pale) and hold it for 50 evaluations (full)")
    views.legend(axes.figure, {"AdamW": views.NO_FILTER, "MA before AdamW": views.FILTER}, fontsize="large")


class Entrant(NamedTuple):
    """An optimizer of the leaderboard by its earlier rules."""

    method: str
    task: str = "Modular"
    one_minus_beta: float | None = None  # of the entered runs, where a method has several


ENTRANTS = {
    "`fastest`": Entrant("fastest"),
    "Muon, β 0.8": Entrant("muon_tuned", one_minus_beta=0.2),
    "Muon, Nesterov kernel 0.8": Entrant("muon_nesterov_kernel"),
    "Muon without momentum": Entrant("muon_tuned", one_minus_beta=1.0),
    "AdamW, Nesterov kernel 0.8": Entrant("adamw_nesterov_kernel"),
    "AdamW, perpendicular gradients": Entrant("adamw_perpendicular"),
    "AdamW, StableMax": Entrant("adamw_tuned", task="StableMax"),
    "AdamW, embedding learning rate": Entrant("adamw_embedding_rate"),
    "AdamW, scaled logits": Entrant("adamw_tuned", task="ScaledLogits"),
    "Lion, clipped row norms": Entrant("lion_clipped_rows"),
    # These have seeds 0 to 7 in this study, by their labels in TUNED.
    "NAdamW": Entrant("nadamw_tuned"),
    "AdamW": Entrant("adamw_tuned"),
    "AdEMAMix": Entrant("ademamix_tuned"),
    "MA before AdamW": Entrant("ma_adamw_tuned"),
    "EMA before AdamW": Entrant("ema_adamw_tuned"),
    "Lion": Entrant("lion_tuned"),
}
UNTOUCHED = list(ENTRANTS)[:5]
LEADERBOARD_CAP = 1_000
FEW_PAIRS = {  # with 30 % of the pairs
    "AdamW": "adamw_tuned", "EMA before AdamW": "ema_adamw_tuned", "MA before AdamW": "ma_adamw_tuned",
    "Muon": "muon_tuned", "EMA before Muon": "ema_muon_tuned", "MA before Muon": "ma_muon_tuned",
}  # fmt: skip


def entered(label: str, **task: Any) -> Frame:
    """The reported runs of an entrant in the results of `leaderboard`, one per seed."""
    rows: Any = find_study("leaderboard").results().frame()
    entrant, fields = ENTRANTS[label], {"p": 97, "operation": "multiplication", "train_fraction": 0.5, **task}
    fields |= {"method": entrant.method, "task": entrant.task}
    if entrant.one_minus_beta:
        fields["one_minus_beta"] = entrant.one_minus_beta
    for name, value in fields.items():
        rows = rows[rows[name] == value]
    rows = rows[(rows["seed"] < 64) & (rows["max_steps"] == LEADERBOARD_CAP)]
    return rows.sort_values("hold_evals", ascending=False).drop_duplicates("seed")


def finals(frame: Frame, runs: dict[str, Run]) -> dict[str, Frame]:
    """The first sixteen seeds of every entrant, up to the leaderboard's cap, the fewest steps first."""
    found = {}
    for label in ENTRANTS:
        rows = entered(label)
        if label in runs:
            rows = pd.concat([mod97.seeds_of(frame, runs[label]), rows])
        rows = rows[rows["seed"] < 16].assign(max_steps=LEADERBOARD_CAP)
        found[label] = rows.assign(
            steps_to_95=rows["steps_to_95"].where(rows["steps_to_95"] <= LEADERBOARD_CAP, np.inf)
        )
    return mod97.by_median(found)


@STUDY.table
def board(frame: Frame) -> Rows:
    """All entrants by the earlier rules, compared with AdamW."""
    found = finals(frame, chosen(frame))
    return standings((label, pair_of(rows), rows, found["AdamW"]) for label, rows in found.items())


@STUDY.table
def untouched(frame: Frame) -> Rows:
    """The best five with 64 seeds, and with eight seeds on other tasks without further tuning."""
    del frame
    tasks = {name: {"operation": name} for name in ("addition", "subtraction", "division")}
    tasks |= {"p = 113": {"p": 113}, "30 % of the pairs": {"train_fraction": 0.3}}
    for label in UNTOUCHED:
        found = {"64 seeds": entered(label)} | {name: entered(label, **task) for name, task in tasks.items()}
        steps = {name: runs["steps_to_95"].to_numpy() for name, runs in found.items()}
        yield {"optimizer": label} | {k: views.steps_and_failures(v, LEADERBOARD_CAP) for k, v in steps.items()}


@STUDY.table
def few_pairs(frame: Frame) -> Rows:
    """With 30 % of the pairs, each tuned by nine pairs, against no filter."""
    del frame
    rows: Any = find_study("leaderboard").results().frame()
    rows = rows[(rows["train_fraction"] == 0.3) & (rows["max_steps"] == 2_000)]
    rows = rows.drop(columns="held_evals")
    found = {label: rows[rows["method"] == method] for label, method in FEW_PAIRS.items()}
    return standings((label, pair_of(runs), runs, found[control_of(label)]) for label, runs in found.items())


@STUDY.figure("Muon variants needed the fewest steps (unequal tuning)", width=8.4, height=6.4)
def optimizers(frame: Frame, axes: Axes) -> None:
    """Every entrant by the earlier rules."""
    mod97.method_dots(axes, finals(frame, chosen(frame)))
