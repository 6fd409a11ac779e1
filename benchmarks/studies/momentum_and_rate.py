"""Is a Grokfast filter more than a shorter momentum, or a higher learning rate?

Multiplication mod 97. The β1 of AdamW (decay 1) and its learning rate vary, without a filter and with the published MA
before it. At a rate of 0.01 Adam and AdamW failed at all three decays tried (`mod97`), so the rates end at 0.003. The
controls are coupled Adam at a learning rate raised as much as a filter speeds up what follows the slow part
(measured with AdamW), with the decay that keeps their product; coupled Adam with the best of nine pairs of rate and
decay, each filter with its own best, too; Adam at that pair and the published EMA before Adam, with other β1; and AdamW
as it is, with rate and decay traded, and at four decays, with and without the MA, at the strong ones also with other
momenta.

Primary comparisons, named before the runs, each paired over the sixteen fresh seeds: the EMA and the MA before Adam, as
published, each against Adam at the raised rate; and the MA before AdamW at β1 0.9 against AdamW alone at β1 0.5.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples.harness.optimizers import warmup
from examples.harness.plots import BLUE, ORANGE
from examples.harness.task import Data
from examples.harness.train import TrainState
from examples.modular import Modular
from grokfast_jax import grokfast_ema, grokfast_ma

SEEDS, CAP = range(300, 316), 3_000
B1S, RATES = [0.0, 0.5, 0.8, 0.9, 0.98], [0.001, 0.003]
LOWPASS = {
    "none": optax.identity,
    "ema": lambda: grokfast_ema(0.98, 2.0),
    "ma": lambda: grokfast_ma(100, 5.0),
    "weak_ma": lambda: grokfast_ma(100, 3.0),
}


def filtered_adam(
    lr: float, weight_decay: float, b1: float, lowpass: Literal["none", "ema", "ma", "weak_ma"], coupled: bool
) -> optax.GradientTransformation:
    """Adam with coupled decay or AdamW, without a filter or with one of the paper's before it."""
    adam, decay = optax.scale_by_adam(b1, 0.98), optax.add_decayed_weights(weight_decay)
    steps = (decay, adam) if coupled else (adam, decay)
    return optax.chain(LOWPASS[lowpass](), *steps, optax.scale_by_learning_rate(warmup(lr)))


def norms(task: Any, state: TrainState, data: Data) -> dict[str, jax.Array]:
    """The norm of the parameters, and the median over them of Adam's root second moment."""
    del task, data
    moments = jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "nu"))
    return {
        "param_norm": optax.tree_utils.tree_norm(state.params),
        "root_nu": jnp.median(jnp.concatenate([jnp.sqrt(nu).ravel() for nu in moments])),
    }


def five(values: list[float]) -> list[float]:
    """Five of the values, evenly spaced from the first to the last."""
    return [values[int(i)] for i in np.linspace(0, len(values) - 1, 5)]


on_mod97 = functools.partial(product, Modular(), filtered_adam, max_steps=CAP, seed=SEEDS)
DECOUPLED = {"coupled": False, "weight_decay": 1.0}
BEST_PAIR = {"lr": 0.003, "weight_decay": 0.001, "coupled": True}  # of nine, for Adam without a filter
PAPER_EMA = {"lr": 0.001, "weight_decay": 0.005, "coupled": True, "lowpass": "ema"}
GRID: list[tuple[str, dict[str, Any]]] = [  # a row per method, with its values of β1
    *(("AdamW", {"b1": B1S, "lr": lr, "lowpass": "none", **DECOUPLED}) for lr in RATES),
    *(("MA before AdamW", {"b1": B1S, "lr": lr, "lowpass": "ma", **DECOUPLED}) for lr in RATES),
    ("Adam", {"b1": B1S, "lowpass": "none", **BEST_PAIR}),
    ("EMA before Adam", {"b1": B1S[:-1], **PAPER_EMA}),
]
PUBLISHED = [
    on_mod97(b1=0.9, **PAPER_EMA),
    on_mod97(lr=0.001, weight_decay=0.01, b1=0.9, lowpass="ma", coupled=True),
]
RAISED = [  # Adam without a filter at 2.9 and 5.4 times the rate, by `effective_lr`
    on_mod97(lr=0.0029, weight_decay=0.00172, b1=0.9, lowpass="none", coupled=True),
    on_mod97(lr=0.0054, weight_decay=0.00186, b1=0.9, lowpass="none", coupled=True),
]
SHORT = on_mod97(lr=0.001, b1=0.5, lowpass="none", **DECOUPLED)
MA_ADAMW = on_mod97(lr=0.001, b1=0.9, lowpass="ma", **DECOUPLED)
STRONG = {"lr": 0.001, "weight_decay": 3.0, "coupled": False}  # three times the decay
STRONG_MA = on_mod97(b1=0.9, lowpass="ma", **STRONG)
STRONG_ADAMW = {f"β1 {b1:g}": on_mod97(b1=b1, lowpass="none", **STRONG) for b1 in (0.9, 0.5, 0.98)}
TRADED = {  # the same AdamW without a filter, and with rate and decay traded
    "AdamW": on_mod97(lr=0.001, b1=0.9, lowpass="none", **DECOUPLED),
    "AdamW, 3 × the rate, decay / 3": on_mod97(lr=0.003, weight_decay=1 / 3, b1=0.9, lowpass="none", coupled=False),
    "AdamW, 3 × the rate": on_mod97(lr=0.003, b1=0.9, lowpass="none", **DECOUPLED),
    "AdamW, 3 × the decay": STRONG_ADAMW["β1 0.9"],
}
PRIMARY = {
    "EMA before Adam against Adam at 2.9 × the rate": (PUBLISHED[0], RAISED[0]),
    "MA before Adam against Adam at 5.4 × the rate": (PUBLISHED[1], RAISED[1]),
    "MA before AdamW against AdamW with β1 0.5": (MA_ADAMW, SHORT),
}
TUNED = on_mod97(b1=0.9, lowpass="none", **BEST_PAIR)
AT_TUNED = {lowpass: on_mod97(b1=0.9, lowpass=lowpass, **BEST_PAIR) for lowpass in ("ma", "ema")}
BEST_OF_NINE = {  # each filter at its own best pair
    "EMA before Adam, each at its best of nine pairs": on_mod97(
        lr=0.001, weight_decay=0.003, b1=0.9, lowpass="ema", coupled=True
    ),
    "MA before Adam, each at its best of nine pairs": AT_TUNED["ma"],
}
BEFORE_ADAM = {  # against Adam at its best pair; the decay of 0.005 was the MA's best in `mod97`, on three seeds
    "EMA before Adam, as published": (PUBLISHED[0], TUNED),
    "MA before Adam, as published": (PUBLISHED[1], TUNED),
    **{name: (side, TUNED) for name, side in BEST_OF_NINE.items()},
    "MA before Adam, decay 0.005": (
        on_mod97(lr=0.001, weight_decay=0.005, b1=0.9, lowpass="ma", coupled=True),
        TUNED,
    ),
}
BEFORE_ADAMW = {f"MA before AdamW against {name}": (MA_ADAMW, side) for name, side in TRADED.items() if name != "AdamW"}
HIGH = on_mod97(lr=0.003, weight_decay=3.0, b1=0.9, lowpass="weak_ma", coupled=False)
BEFORE_ADAMW["MA, λ 3, at 0.003, decay 3, against AdamW at 0.003, decay 1"] = (HIGH, TRADED["AdamW, 3 × the rate"])
SIX = {  # the six settings that `docs/choose.md` recommends for a new task
    "as it is": [TRADED["AdamW"], MA_ADAMW],
    "3 × rate": [TRADED["AdamW, 3 × the rate"], on_mod97(lr=0.003, b1=0.9, lowpass="ma", **DECOUPLED)],
    "3 × rate, decay / 3": [
        TRADED["AdamW, 3 × the rate, decay / 3"],
        on_mod97(lr=0.003, weight_decay=1 / 3, b1=0.9, lowpass="ma", coupled=False),
    ],
}
DECAYS = {  # at the paper's rate, without the filter and with it
    decay: [
        on_mod97(lr=0.001, weight_decay=decay, b1=0.9, lowpass=lowpass, coupled=False) for lowpass in ("none", "ma")
    ]
    for decay in (1.0, 1.5, 2.0, 3.0)
}
BEFORE_ADAMW |= {
    f"both with 3 × the decay, AdamW with {name}": (STRONG_MA, runs)
    for name, runs in STRONG_ADAMW.items()
    if name != "β1 0.9"  # which the table of decays has
}
BEFORE_ADAMW |= {  # each at its best of four decays, and shorter momenta
    f"MA at decay 3 against AdamW at decay 2, β1 {b1:g}": (
        STRONG_MA,
        on_mod97(b1=b1, lowpass="none", **STRONG | {"weight_decay": 2.0}),
    )
    for b1 in (0.8, 0.5)
}


def runs(results: Results) -> Iterator[Run]:
    """The primary comparisons first, then the decays, the controls, six settings, and the grid, row after row."""
    controls = [*BEFORE_ADAM.values(), *BEFORE_ADAMW.values()]
    for pair in (*PRIMARY.values(), *DECAYS.values(), *controls, [*AT_TUNED.values()], *SIX.values()):
        results.of([*pair[0], *pair[1]])
        yield from (run for side in pair for run in side)
    for _, settings in GRID:
        row = on_mod97(**settings)
        results.of(row)
        yield from row


STUDY = Study("momentum_and_rate", runs, measure=norms, reduce=five)


def select(frame: Frame, run: Run) -> Frame:
    """All seeds of a run's setting."""
    return views.runs_of(frame, functools.partial(run.method, **run.hyperparams))


def compared(frame: Frame, comparisons: Mapping[str, tuple[list[Run], list[Run]]]) -> dict[str, tuple[Frame, Frame]]:
    """Both sides of each comparison that has all seeds."""
    sides = {name: (select(frame, first[0]), select(frame, second[0])) for name, (first, second) in comparisons.items()}
    return {name: pair for name, pair in sides.items() if min(map(len, pair)) == len(SEEDS)}


def tested(pairs: Mapping[str, tuple[Frame, Frame]]) -> Rows:
    """A row per comparison: exact sign tests, and their Benjamini-Hochberg adjustment over the table."""
    tests = [paired(*pair) for pair in pairs.values()]
    adjusted = scipy.stats.false_discovery_control([test.p for test in tests]) if tests else []
    for (name, sides), test, q in zip(pairs.items(), tests, adjusted, strict=True):
        first, second = (views.steps_and_failures(side["steps_to_95"].to_numpy(), CAP) for side in sides)
        row = {
            "comparison": name,
            "with the filter": first,
            "without": second,
            "filter needs fewer : more": views.seed_counts(test),
        }
        yield row | {"ratio of steps": f"{test.ratio:.2f}", "adjusted p": f"{q:.2g}"}


@STUDY.table
def primary(frame: Frame) -> Rows:
    """The primary comparisons."""
    return tested(compared(frame, PRIMARY))


@STUDY.table
def before_adam(frame: Frame) -> Rows:
    """The filters before Adam against Adam with rate and decay tuned."""
    return tested(compared(frame, BEFORE_ADAM))


@STUDY.table
def before_adamw(frame: Frame) -> Rows:
    """The MA before AdamW against AdamW with rate and decay traded, and with other momenta."""
    return tested(compared(frame, BEFORE_ADAMW))


def without_and_with(alone: Frame, ma: Frame) -> dict[str, str]:
    """Median steps and failures of AdamW without and with the MA."""
    return {
        name: views.steps_and_failures(runs["steps_to_95"].to_numpy(), CAP)
        for name, runs in (("AdamW", alone), ("with the MA", ma))
    }


@STUDY.table
def six(frame: Frame) -> Rows:
    """AdamW without and with the MA at the settings that we recommend for a new task."""
    for name, (alone, ma) in SIX.items():
        sides = select(frame, alone[0]), select(frame, ma[0])
        if min(map(len, sides)) == len(SEEDS):
            counts = views.seed_counts(paired(*reversed(sides)))
            yield {"setting": name} | without_and_with(*sides) | {"MA needs fewer : more": counts}


@STUDY.table
def decays(frame: Frame) -> Rows:
    """AdamW with and without the MA by weight decay, and the MA at its best decay against AdamW at each."""
    found = {decay: [select(frame, side[0]) for side in sides] for decay, sides in DECAYS.items()}
    found = {decay: sides for decay, sides in found.items() if min(map(len, sides)) == len(SEEDS)}
    if not found:
        return
    best = min((ma for _, ma in found.values()), key=lambda runs: runs["steps_to_95"].median())
    for decay, (alone, ma) in found.items():
        row = {"decay": f"{decay:g}"} | without_and_with(alone, ma)
        row["same decay: MA needs fewer : more"] = views.seed_counts(paired(ma, alone))
        yield row | {"MA at its best decay needs fewer : more": views.seed_counts(paired(best, alone))}


@STUDY.table
def shrinkage(frame: Frame) -> Rows:
    """What the weight decay does along the runs: medians over the seeds, half-way to 95 % and at the end."""
    for name, sides in compared(frame, PRIMARY).items():
        for method, runs in zip(name.split(" against "), sides, strict=True):
            root_nu, norm = (np.array(runs[column].to_list()) for column in ("root_nu", "param_norm"))
            step = (runs["lr"] * runs["weight_decay"]).to_numpy()[:, None] / np.where(
                runs["coupled"].iloc[0], root_nu, 1
            )
            row = {"method": method, "root of the second moment": f"{np.median(root_nu[:, 2]):.2g}"}
            row["shrinkage per step"] = f"{np.median(step[:, 2]):.2g}"
            yield row | {"norm of the parameters": f"{np.median(norm[:, 2]):.0f}, {np.median(norm[:, -1]):.0f}"}


@STUDY.table
def table(frame: Frame) -> Rows:
    """Median steps of each method, a column per β1; rows that have all seeds of their values of β1."""
    for name, settings in GRID:
        cells = {b1: select(frame, on_mod97(**settings | {"b1": b1})[0])["steps_to_95"] for b1 in settings["b1"]}
        if all(len(steps) == len(SEEDS) for steps in cells.values()):
            row = {"method": name, "learning rate, decay": f"{settings['lr']:g}, {settings['weight_decay']:g}"}
            medians = {b1: views.steps_and_failures(steps.to_numpy(), CAP) for b1, steps in cells.items()}
            yield row | {f"β1 {b1:g}": medians.get(b1, "not run") for b1 in B1S}


def drawn(axes: Any, frame: Frame, methods: Mapping[str, list[Run]]) -> None:
    """Steps to 95 % of the methods that have all seeds, a dot per seed; the colour says whether there is a filter."""
    groups = {
        name: (select(frame, runs[0]), BLUE if runs[0].hyperparams["lowpass"] == "none" else ORANGE)
        for name, runs in methods.items()
    }
    groups = {name: group for name, group in groups.items() if len(group[0]) == len(SEEDS)}
    if groups:
        views.step_dots(axes, groups)


@STUDY.figure("Adam with a tuned rate needs fewer steps than the EMA", width=8, height=3.2)
def figure(frame: Frame, axes: Any) -> None:
    """The published filters before Adam, and Adam alone at raised and at tuned rates."""
    names = [
        "EMA before Adam",
        "MA before Adam",
        "Adam, 0.003, decay 0.001",
        "Adam, 2.9 × the rate",
        "Adam, 5.4 × the rate",
    ]
    drawn(axes, frame, dict(zip(names, [*PUBLISHED, TUNED, *RAISED], strict=True)))


@STUDY.figure("At a low rate the MA tolerates a stronger decay than AdamW", width=8, height=4.4)
def adamw(frame: Frame, axes: Any) -> None:
    """AdamW with and without the MA, with decay and momentum varied."""
    alone = {f"AdamW, decay 3, {name}": runs for name, runs in STRONG_ADAMW.items()}
    plain = {"MA before AdamW": MA_ADAMW, "AdamW": TRADED["AdamW"], "AdamW, β1 0.5": SHORT}
    plain |= {"MA before AdamW, decay 2": DECAYS[2.0][1], "AdamW, decay 2": DECAYS[2.0][0]}
    higher = {"AdamW, rate 0.003": TRADED["AdamW, 3 × the rate"]}
    drawn(axes, frame, {**plain, "MA before AdamW, decay 3": STRONG_MA, **alone, **higher})
