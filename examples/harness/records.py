"""The records of a run, one row per evaluation with `step` and the metrics, and the outcome they amount to."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .task import Metric

if TYPE_CHECKING:
    from .experiment import Run

Row = Mapping[str, float]  # of one run, the first has all names; others may lack what is measured less often


def to_row(step: int, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A record: the step, then training, then validation metrics, each with the loss first."""
    names = sorted(metrics, key=lambda name: (name.split("_")[0], not name.endswith("_loss"), name))
    # The shortest decimal that is this float32, not its long expansion in float64.
    return {"step": step} | {name: float(str(np.asarray(metrics[name])[()])) for name in names}


def best(rows: Sequence[Row], metric: Metric) -> float:
    """The highest validation accuracy of a run, or its lowest validation loss."""
    return {"accuracy": max, "loss": min}[metric](row[f"val_{metric}"] for row in rows)


def format_metric(metric: Metric, value: float) -> str:
    """A metric as people read it: an accuracy in per cent, a loss with four digits."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def reaches(row: Row, threshold: float, metric: Metric, part: str = "val") -> bool:
    """Whether a record is at the threshold or better."""
    value = row[f"{part}_{metric}"]
    return value >= threshold if metric == "accuracy" else value <= threshold


def steps_to(rows: Sequence[Row], threshold: float, metric: Metric, part: str = "val") -> int | None:
    """The first step at which a run is at the threshold or better; None if it never is."""
    return next((int(row["step"]) for row in rows if reaches(row, threshold, metric, part)), None)


def is_finite(row: Row) -> bool:
    """Whether all metrics of a row are finite."""
    return all(math.isfinite(value) for value in row.values())


def after_reaching(run: "Run", rows: Sequence[Row]) -> Sequence[Row] | None:
    """The records after the first at `stop_at`; None if there is none."""
    metric = run.task.metric
    first = None if run.stop_at is None else steps_to(rows, run.stop_at, metric)
    return None if first is None else [row for row in rows if row["step"] > first]


def is_finished(run: "Run", rows: Sequence[Row]) -> bool:
    """Whether a run has ended: `hold_evals` evaluations after it reached `stop_at`, or unreached at `max_steps`."""
    if not rows:
        return False
    after = after_reaching(run, rows)
    return rows[-1]["step"] >= run.max_steps if after is None else len(after) >= run.hold_evals


def outcome(run: "Run", rows: Sequence[Row]) -> dict[str, Any]:
    """What is stored of a run, beside its key.

    steps_to_95 and the like: the first step at each of the task's thresholds, None if there is none.
    fit_steps: the first step whose training metric is at the last threshold.
    followed_evals, held_evals: evaluations after the first at `stop_at`, and how many of these are at it.
    """
    metric, thresholds = run.task.metric, run.task.thresholds
    finite = [row for row in rows if is_finite(row)]
    found: dict[str, Any] = {f"steps_to_{100 * t:g}": steps_to(rows, t, metric) for t in thresholds}
    if thresholds:
        found["fit_steps"] = steps_to(rows, thresholds[-1], metric, "train")
    after = after_reaching(run, rows)
    if after:
        assert run.stop_at is not None
        found["followed_evals"] = len(after)
        found["held_evals"] = sum(reaches(row, run.stop_at, metric) for row in after)
    if metric == "accuracy":
        found["best_val_accuracy"] = round(best(finite, metric), 4) if finite else None
    found["min_val_loss"] = min((row["val_loss"] for row in finite), default=None)
    return found | {"last_step": int(rows[-1]["step"]), "finite": is_finite(rows[-1])}
