"""How far does the training loss jump where a filter is switched on late?

A character GPT is trained on tiny Shakespeare, with a filter from the first step on, from step 1,000 on, or without.
The jump is the highest training loss of the records within 100 steps after step 1,000, less the mean of those within 50
steps up to it.
"""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, product
from examples import shakespeare
from examples.harness.engine import four_digits
from examples.harness.methods import Method
from examples.harness.records import Row
from examples.harness.task import Data
from examples.harness.train import TrainState
from examples.shakespeare import Shakespeare

SWITCH, BEFORE, AFTER = 1_000, 50, 100  # steps
METHODS: dict[str, Method] = {
    "without a filter": shakespeare.baseline,
    "gradients tripled, without a filter": shakespeare.tripled,
    "EMA from the first step": shakespeare.ema,
    "EMA that has collected": shakespeare.late_ema,
    "empty EMA, sum divided by 1 + λ": shakespeare.METHODS["empty-ema-mean"],
    "empty EMA": shakespeare.empty_ema,
}


def runs(_results: Results) -> Iterator[Run]:
    """All methods with three seeds."""
    for method in METHODS.values():
        yield from product(Shakespeare(), method, seed=range(3), max_steps=1_500)


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, Any]:
    """The jump of the training loss at the switch, and the last validation loss."""
    del run, data
    rows = [row for row, _ in history]
    losses = {row["step"]: row["train_loss"] for row in rows}
    before = [loss for step, loss in losses.items() if SWITCH - BEFORE < step <= SWITCH]
    after = [loss for step, loss in losses.items() if SWITCH < step <= SWITCH + AFTER]
    return {"jump_at_1000": four_digits(max(after) - sum(before) / len(before)), "last_val_loss": rows[-1]["val_loss"]}


STUDY = Study("switch_on", runs, observe=observe)


def by_method(frame: Frame) -> dict[str, Frame]:
    """The runs of each method, by its name in words."""
    groups = {label: views.runs_of(frame, method) for label, method in METHODS.items()}
    return {label: runs for label, runs in groups.items() if len(runs)}


@STUDY.table
def table(frame: Frame) -> Rows:
    """The jump of each method, and its validation loss at the end."""
    ranges = {"jump at step 1,000": ("jump_at_1000", ".3f"), "validation loss at the end": ("last_val_loss", ".3f")}
    for label, runs in by_method(frame).items():
        yield {"method": label, **views.range_cells(runs, ranges)}


@STUDY.figure("A filter switched on empty makes the loss jump", width=8, height=3.6)
def figure(frame: Frame, axes: Axes) -> None:
    """The jumps at step 1,000."""
    colour = lambda label: views.FILTER if "EMA" in label else views.GREY if "tripled" in label else views.NO_FILTER
    views.dots(axes, {k: (runs["jump_at_1000"].to_numpy(float), colour(k)) for k, runs in by_method(frame).items()})
    views.label(axes, "jump at step 1,000 (nats per character; dot: a seed)")
