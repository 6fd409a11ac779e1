"""What a run has recorded: one row per evaluation, with `step` and the metrics."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .task import Metric

Row = Mapping[str, float]  # of one run, the first has all names; others may lack what is measured less often


def to_row(step: int, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A record: the step, then training, then validation metrics, each with the loss first."""
    names = sorted(metrics, key=lambda name: (name.split("_")[0], not name.endswith("_loss"), name))
    # The shortest decimal that is this float32, not its long expansion in float64.
    return {"step": step} | {name: float(str(np.asarray(metrics[name])[()])) for name in names}


def selection_metric(row: Row) -> Metric:
    """The metric that runs are selected by: the accuracy, or the loss where the task has no accuracy."""
    return "accuracy" if "val_accuracy" in row else "loss"


def best(rows: Sequence[Row]) -> float:
    """The highest validation accuracy of a run, or its lowest validation loss where the task has no accuracy."""
    metric = selection_metric(rows[0])
    return {"accuracy": max, "loss": min}[metric](row[f"val_{metric}"] for row in rows)


def format_metric(metric: Metric, value: float) -> str:
    """A metric as people read it: an accuracy in per cent, a loss with four digits."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def step_reached(rows: Sequence[Row], threshold: float, hold: int = 0) -> int | None:
    """The first step at which a run is at `threshold` or better, and stays so for `hold` evaluations more."""
    streak = 0
    for i, row in enumerate(rows):
        reached = row["val_accuracy"] >= threshold if "val_accuracy" in row else row["val_loss"] <= threshold
        streak = streak + 1 if reached else 0
        if streak == hold + 1:
            return int(rows[i - hold]["step"])
    return None


def is_finite(row: Row) -> bool:
    """Whether all metrics of a row are finite."""
    return all(math.isfinite(value) for value in row.values())
