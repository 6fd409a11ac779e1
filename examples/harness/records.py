"""What a run has recorded: one row an evaluation, `step` and the metrics."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Row = Mapping[str, float]


def to_row(step: int, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A record: the step, then training, then validation metrics, each with the loss first."""
    names = sorted(metrics, key=lambda name: (name.split("_")[0], not name.endswith("_loss"), name))
    # The shortest decimal that is this float32, not its long expansion in float64.
    return {"step": step} | {name: float(str(np.asarray(metrics[name])[()])) for name in names}


def step_reached(rows: Sequence[Row], threshold: float, hold: int = 0) -> int | None:
    """The first step at which the validation accuracy is `threshold` or more, and is so `hold` evaluations longer."""
    run = 0
    for i, row in enumerate(rows):
        run = run + 1 if row["val_accuracy"] >= threshold else 0
        if run == hold + 1:
            return int(rows[i - hold]["step"])
    return None


def is_finite(row: Row) -> bool:
    """Whether all metrics of a row are finite."""
    return all(math.isfinite(value) for value in row.values())
