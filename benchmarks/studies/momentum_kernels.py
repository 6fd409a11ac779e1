"""Which momentum kernel reaches 95 % in the fewest steps, and in which place of an optimizer?

A momentum kernel is a low-pass filter of the gradients. Seven shapes with dc gain 1 are compared at four mean ages (in
steps) on sparse parity, each at five learning rates in three places: before AdamW without a first moment, in place of
AdamW's first moment, and in place of Muon's momentum.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import scipy.signal

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples.harness import plots
from examples.harness.methods import Static, Tx
from examples.harness.optimizers import stacked_muon, warmup
from examples.parity import Parity
from grokfast_jax import ema, moving_average, parallel, scale_by_filtered_adam, sosfilt

CAP = 2_000  # steps
KERNEL = ["place", "shape", "age"]


def debiased_ema(age: float) -> Tx:
    """The EMA of a mean age."""
    return ema(age / (1 + age), start="debiased")


def nesterov_ema(age: float) -> Tx:
    """Nesterov's form of the EMA; its mean age is β² / (1 - β)."""
    beta = (math.sqrt(age**2 + 4 * age) - age) / 2
    return parallel((1 - beta, optax.identity()), (beta, ema(beta, start="debiased")))


def butterworth(age: float) -> Tx:
    """The Butterworth filter of second order; its mean age is the group delay at frequency 0."""
    cutoff = 2 / math.pi * math.atan(1 / (math.sqrt(2) * age))
    return sosfilt(np.asarray(scipy.signal.butter(2, cutoff, output="sos")))


def window(size: float) -> Tx:
    """A moving average that divides by its size from the first step on."""
    return moving_average(round(size), warmup=False)


SHAPES: dict[str, Callable[[float], Tx]] = {  # kernels by mean age
    "none": lambda age: optax.identity(),
    "EMA": debiased_ema,
    "Nesterov EMA": nesterov_ema,
    "two EMAs": lambda age: parallel((0.5, debiased_ema(age / 4)), (0.5, debiased_ema(7 * age / 4))),
    "gradient + 2 EMA": lambda age: parallel((1 / 3, optax.identity()), (2 / 3, debiased_ema(1.5 * age))),
    "MA": lambda age: window(2 * age + 1),
    "triangular": lambda age: optax.chain(window(age + 1), window(age + 1)),
    "Butterworth": butterworth,
}
DRAWN = {  # line and colour in the figure
    "gradient + 2 EMA": ("o-", plots.ORANGE),
    "EMA": ("s-", plots.GREY),
    "two EMAs": ("D--", plots.GREY),
    "MA": ("^-", "black"),
}
KERNELS = [("none", 0.0), *itertools.product([*SHAPES][1:], (1.0, 4.0, 16.0, 64.0))]
PLACES = {  # weight decay and learning rates
    "before AdamW": (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    "in AdamW": (0.3, (0.003, 0.01, 0.02, 0.03, 0.05)),
    "in Muon": (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}


def momentum_kernel(lr: float, weight_decay: float, place: str, shape: str, age: Static) -> Tx:
    """AdamW or Muon with a momentum kernel. Muon updates vectors by AdamW with its own first moment."""
    schedule, kernel = warmup(lr), SHAPES[shape](age)
    if place == "in Muon":
        matrices = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
        decays = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
        return optax.chain(optax.masked(kernel, matrices), stacked_muon(schedule, beta=0.0, adam_b2=0.98, **decays))
    before = optax.chain(kernel, optax.scale_by_adam(b1=0.0, b2=0.98))
    adam = before if place == "before AdamW" else scale_by_filtered_adam(kernel, b2=0.98)
    return optax.chain(adam, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule))


def group_size(place: str, shape: str, lr: float) -> int:
    """How many runs were trained at once: in some places two learning rates were added later."""
    if place == "before AdamW" or (place, shape) == ("in AdamW", "Butterworth"):
        return 16 if lr in (0.02, 0.05) else 24
    return 40


def runs(_results: Results) -> Iterator[Run]:
    """Every kernel in every place at every learning rate, with eight seeds."""
    for (place, (decay, rates)), (shape, age) in itertools.product(PLACES.items(), KERNELS):
        for lr in rates:
            setting = {"lr": lr, "weight_decay": decay, "place": place, "shape": shape, "age": age, "seed": range(8)}
            how = {"max_steps": CAP, "group_size": group_size(place, shape, lr)}
            yield from product(Parity(), momentum_kernel, **setting, **how)


STUDY = Study("momentum_kernels", runs)


def at_best_rate(frame: Frame) -> Any:
    """Every kernel in every place at the learning rate with the lowest median, then the fewest failures.

    A row has the runs at that rate, and their median.
    """
    rows = []
    for key, runs in frame.groupby([*KERNEL, "lr"], sort=False):
        steps = runs["steps_to_95"]
        rows.append([*key, runs, steps.median(), np.isinf(steps).sum()])
    found = pd.DataFrame(rows, columns=[*KERNEL, "lr", "runs", "steps", "failures"])
    return found.sort_values(["steps", "failures", "lr"]).drop_duplicates(KERNEL)


@STUDY.table
def table(frame: Frame) -> Rows:
    """Every kernel in every place at its best learning rate."""
    best = at_best_rate(frame)
    without = best[best["shape"] == "none"].set_index("place")["runs"]
    for row in best.itertuples():
        yield {
            "place": row.place,
            "kernel": f"{row.shape}, age {row.age:g}" if row.age else row.shape,
            "best learning rate": f"{row.lr:g}",
            "steps to 95 %": views.steps_and_failures(row.runs["steps_to_95"], CAP),
            "seeds with fewer : more steps than without": (
                views.seed_counts(paired(row.runs, without[row.place])) if row.age else ""
            ),
        }


@STUDY.figure(
    "Of old kernels, gradient + 2 EMA needs the fewest steps",
    width=8.4,
    height=4.6,
    columns=3,
    sharex=True,
    sharey=True,
)
def figure(frame: Frame, panels: Any) -> None:
    """Steps at the best learning rate over the mean age, by kernel: the median, and the range of the seeds."""
    for axes, (place, best) in zip(panels, at_best_rate(frame).groupby("place"), strict=True):
        without = best["steps"][best["shape"] == "none"].min()
        axes.axhline(without, color=views.NO_FILTER, linestyle=":", linewidth=2, label="without momentum")
        lines = {}
        for i, (shape, style) in enumerate(DRAWN.items()):
            kernel = best[best["shape"] == shape].sort_values("age")
            x = np.log2(kernel["age"]) + 0.2 * (i - 1.5)
            lines[shape] = (x, [runs["steps_to_95"] for runs in kernel["runs"]], *style)
        views.step_lines(axes, lines, fails=1.5 * CAP, ticks=(200, 500, 1_000, 2_000))
        axes.set_title(place, fontsize="large", loc="left")
        axes.set_xticks([0, 2, 4, 6], ["1", "4", "16", "64"])
        views.label(axes, "mean age (steps)", "steps to 95 %" if axes is panels[0] else "")
    panels[1].legend(loc="upper left", frameon=False)
