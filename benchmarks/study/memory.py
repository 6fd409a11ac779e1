"""What shape should the memory of gradients have, and where should it be? `python -m benchmarks.study.memory`.

Low-pass filters with dc gain 1 and the same mean age (in steps), in three places: before AdamW, whose own first moment
is off, in place of AdamW's first moment, and in place of Muon's momentum; each at five learning rates, on mod 97 and on
sparse parity. Results are appended, seed after seed; what is there is not trained again.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import scipy.signal
import tyro

from benchmarks import RESULTS, run_command
from examples.harness.task import Task
from examples.modular import Modular
from examples.parity import Parity
from grokfast_jax import ema, moving_average, parallel, scale_by_filtered_adam, sosfilt

from .contest import Chain, Job, train_missing
from .methods import check_among

OUT = RESULTS / "memory.jsonl"
Tx = optax.GradientTransformation


def average(age: float) -> Tx:
    """The EMA of a mean age, debiased."""
    return ema(age / (1 + age), start="debiased")


def nesterov(beta: Any) -> Tx:
    """Nesterov's form of the EMA, of mean age β² / (1 - β)."""
    return parallel((1 - beta, optax.identity()), (beta, ema(beta, start="debiased")))


def butterworth(age: float) -> Tx:
    """The Butterworth filter of second order, whose mean age is its group delay at frequency 0."""
    cutoff = 2 / math.pi * math.atan(1 / (math.sqrt(2) * age))
    return sosfilt(np.asarray(scipy.signal.butter(2, cutoff, output="sos")))


def windows(*sizes: int) -> Tx:
    """Moving averages, one after the other; each divides by its size from the first step on."""
    return optax.chain(*(moving_average(size, warmup=False) for size in sizes))


# By name: a filter of dc gain 1, of its mean age A
SHAPES: dict[str, Callable[[float], Tx]] = {
    "EMA": average,
    "Nesterov EMA": lambda a: nesterov((math.sqrt(a * a + 4 * a) - a) / 2),
    "two EMAs": lambda a: parallel((0.5, average(a / 4)), (0.5, average(7 * a / 4))),
    "gradient + 2 EMA": lambda a: parallel((1 / 3, optax.identity()), (2 / 3, average(1.5 * a))),
    "MA": lambda a: windows(round(2 * a + 1)),
    "triangular": lambda a: windows(round(a + 1), round(a + 1)),
    "Butterworth": butterworth,
}
NONE = ("none", 0.0)


def kernel(shape: str, age: float) -> Tx:
    """A filter by shape and mean age."""
    return optax.identity() if (shape, age) == NONE else SHAPES[shape](age)


def warmed(lr: Any) -> Callable[[Any], Any]:
    """The learning rate with the paper's warm-up of ten steps."""
    return lambda step: lr * optax.linear_schedule(0.0, 1.0, 10)(step)


def stepped(scale: Tx, lr: Any, weight_decay: Any) -> Tx:
    """A scaled gradient with decoupled weight decay and a learning rate."""
    return optax.chain(scale, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(warmed(lr)))


def before_adamw(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """AdamW without a first moment of its own, behind the filter."""
    return stepped(optax.chain(memory, optax.scale_by_adam(b1=0.0, b2=0.98)), lr, weight_decay)


def in_adamw(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """AdamW with the filter in place of its first moment."""
    return stepped(scale_by_filtered_adam(memory, b2=0.98), lr, weight_decay)


def in_muon(memory: Tx, lr: Any, weight_decay: Any) -> Tx:
    """Muon with the filter in place of its momentum; all that is no matrix is trained by AdamW."""
    matrices = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    options = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay, "adam_b2": 0.98}
    return optax.chain(optax.masked(memory, matrices), optax.contrib.muon(warmed(lr), beta=0.0, **options))


PLACES = {"before AdamW": before_adamw, "in AdamW": in_adamw, "in Muon": in_muon}
# By task: what is trained, steps at most, weight decay and five learning rates in each place, kernels, runs per program
TASKS: dict[str, tuple[Task, int]] = {"modular": (Modular(), 700), "parity": (Parity(), 2_000)}
RATES = {
    ("modular", "before AdamW"): (1.0, (0.0005, 0.001, 0.002, 0.004, 0.008)),
    ("modular", "in AdamW"): (1.0, (0.0005, 0.001, 0.002, 0.004, 0.008)),
    ("modular", "in Muon"): (0.3, (0.0125, 0.025, 0.05, 0.1, 0.2)),
    ("parity", "before AdamW"): (0.3, (0.003, 0.01, 0.03, 0.1, 0.3)),
    ("parity", "in AdamW"): (0.3, (0.003, 0.01, 0.03, 0.1, 0.3)),
    ("parity", "in Muon"): (0.1, (0.01, 0.03, 0.1, 0.3, 1.0)),
}
KERNELS = {
    "modular": [NONE, ("EMA", 1.0), ("EMA", 16.0), *((shape, 4.0) for shape in SHAPES)],
    "parity": [NONE, *itertools.product(SHAPES, (1.0, 4.0, 16.0, 64.0))],
}


def jobs(task: str, places: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All runs on a task, seed after seed."""
    found = []
    trained, cap = TASKS[task]
    chains = {
        (place, shape, age): Chain(f"{task}, {place}, {shape}, age {age:g}", _make(place, shape, age), trained)
        for place in places
        for shape, age in KERNELS[task]
    }
    for seed in seeds:
        for (place, *_), chain in chains.items():
            decay, rates = RATES[task, place]
            found += [Job(chain, {"lr": rate, "weight_decay": decay}, seed, cap) for rate in rates]
    return found


def _make(place: str, shape: str, age: float) -> Callable[..., Tx]:
    return lambda lr, weight_decay: PLACES[place](kernel(shape, age), lr, weight_decay)


def main(
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(TASKS),
    places: tuple[str, ...] = tuple(PLACES),
    seeds: tuple[int, ...] = tuple(range(8)),
    group_size: int = 1,
    out: Path = OUT,
) -> None:
    """Train what is missing.

    Args:
      tasks: Which of modular and parity.
      places: Which of "before AdamW", "in AdamW" and "in Muon".
      seeds: Seeds of every kernel and rate.
      group_size: Runs to train at once in one vmapped program: for parity as many as there are seeds times rates.
      out: File for the results.
    """
    check_among("TASKS", tasks, TASKS)
    check_among("--places", places, PLACES)
    for task in tasks:
        listed = jobs(task, places, seeds)
        if group_size > 1:  # all runs of a chain one after the other
            listed.sort(key=lambda job: job.chain.name)
        train_missing(listed, out, group_size)


if __name__ == "__main__":
    run_command(main, "benchmarks.study.memory")
