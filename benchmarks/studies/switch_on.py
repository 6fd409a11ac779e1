"""How far does the training loss jump where a filter is switched on late?

A character GPT is trained on tiny Shakespeare, with a filter from the first step on, from a later step on, or without.
The jump is the highest training loss of the records within 100 steps after the switch, less the mean of those within 50
steps up to it. A method that is never switched is measured at the switches of all others, as their control.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks import views
from benchmarks.study import Study
from examples import shakespeare
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Method
from examples.shakespeare import Shakespeare

BEFORE, AFTER = 50, 100  # steps

SMALL, LARGE = Shakespeare(), Shakespeare(layers=6, heads=6, width=384, context=256, dropout=0.2, batch_size=64)
MAX_STEPS = {SMALL: 1_500, LARGE: 6_000}
METHODS: dict[Shakespeare, dict[str, Method]] = {
    task: {"no filter": shakespeare.baseline, "EMA from the first step on": shakespeare.ema} for task in MAX_STEPS
}
METHODS[SMALL] |= {
    "gradients tripled, no filter": shakespeare.tripled,
    "EMA that has collected": shakespeare.late_ema,
    "empty EMA, sum divided by 1 + λ": shakespeare.METHODS["empty-ema-mean"],
    "empty EMA": shakespeare.empty_ema,
}
for step in (1_000, 2_000, 5_000):
    METHODS[LARGE] |= {
        f"EMA that has collected at step {step:,}": functools.partial(shakespeare.late_ema, start_step=step),
        f"empty EMA at step {step:,}": functools.partial(shakespeare.empty_ema, start_step=step),
    }


def runs(results: Results) -> Iterator[Run]:
    """The small model, then nanoGPT's size, which needs a GPU."""
    del results
    for task, methods in METHODS.items():
        for method in methods.values():
            yield from product(task, method, seed=range(3), max_steps=MAX_STEPS[task])


STUDY = Study("switch_on", runs, keep_curves=True)


def jump(curve: Mapping[str, Sequence[float]], switch: int) -> float:
    """The jump of the training loss where the filter is switched on; NaN if the curve lacks a record on either side."""
    step, loss = np.array(curve["step"]), np.array(curve["train_loss"])
    before = loss[(switch - BEFORE < step) & (step <= switch)]
    after = loss[(switch < step) & (step <= switch + AFTER)]
    return float(after.max() - before.mean()) if len(before) and len(after) else math.nan


def with_jumps(runs: pd.DataFrame, switches: Sequence[int]) -> pd.DataFrame:
    """The columns `jump_at_STEP` and `last_val_loss` of runs, from their curves where these are stored."""
    rows: list[Any] = runs.to_dict("records")
    for run in rows:
        if isinstance(curve := run.get("curve"), Mapping):
            own = switches if math.isnan(run["start_step"]) else [int(run["start_step"])]
            run |= {f"jump_at_{step}": jump(curve, step) for step in own} | {"last_val_loss": curve["val_loss"][-1]}
    return pd.DataFrame(rows, columns=[*(f"jump_at_{step}" for step in switches), "last_val_loss"])


def of_model(frame: pd.DataFrame, task: Shakespeare) -> tuple[list[int], dict[str, pd.DataFrame]]:
    """The steps at which filters are switched on, and the jumps of the runs of each method."""
    groups = {label: views.runs_of(frame, method, width=task.width) for label, method in METHODS[task].items()}
    switches = sorted({int(step) for runs in groups.values() for step in runs["start_step"].dropna()})
    return switches, {label: with_jumps(runs, switches) for label, runs in groups.items()}


@STUDY.table
def table(frame: pd.DataFrame) -> str:
    """Each method's jumps, and its validation loss at the end; a table for each model."""
    tables = []
    for task in METHODS:
        switches, groups = of_model(frame, task)
        columns = {f"jump at step {step:,}": (f"jump_at_{step}", 1, ".3f") for step in switches}
        columns["val. loss at the end"] = ("last_val_loss", 1, ".3f")
        tables += [views.ranges(groups, columns)] * any(map(len, groups.values()))
    return views.joined(*tables)


@STUDY.figure("A filter switched on empty makes the loss jump", width=8, height=3.4)
def figure(frame: pd.DataFrame, axes: Axes) -> None:
    """The jumps of the small model at step 1,000."""
    _, groups = of_model(frame, SMALL)
    colour = lambda label: views.FILTER if "EMA" in label else views.NO_FILTER
    shown = {label: runs for label, runs in groups.items() if label != "EMA from the first step on"}
    views.dots(axes, {k: (runs["jump_at_1000"].to_numpy(float), colour(k)) for k, runs in shown.items()})
    views.label(axes, "jump at step 1,000 (nats per character)")
