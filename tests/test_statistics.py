"""Medians, intervals and failures, and comparisons seed by seed, against independent computations."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from benchmarks import statistics, views


def test_the_interval_of_a_median_covers_it_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = statistics.interval(rng.exponential(size=25), 500)
        covered += low <= math.log(2) <= high
    assert 180 <= covered <= 199


def test_the_interval_is_that_of_scipy_where_all_steps_are_finite():
    values = np.random.default_rng(1).exponential(1000, size=8).round(-1)
    expected = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    medians = np.unique([np.median(pair) for pair in itertools.product(values, values)])  # all that there can be
    for ours, theirs in zip(statistics.interval(values), expected, strict=True):
        # The same resamples; SciPy may interpolate to the next median.
        assert abs(np.searchsorted(medians, ours) - np.searchsorted(medians, theirs)) <= 1
    assert statistics.interval(np.array([1.0, 1.0, 1.0, math.inf, math.inf, math.inf])) == (1.0, math.inf)


def test_methods_are_compared_over_the_seeds_that_both_have_and_failures_come_last():
    first = pd.DataFrame({"seed": range(6), "steps_to_95": [1000, 2000, math.inf, math.inf, 600, 100]})
    second = pd.DataFrame({"seed": [4, 3, 2, 1, 0], "steps_to_95": [600, math.inf, 500, 1000, 2000]})
    assert statistics.paired(first, second) == (1, 2, 2, 1.0, 1.0, 3)
    assert statistics.paired(first.head(1), second) == (1, 0, 0, 1.0, 0.5, 1)
    fails = statistics.paired(first.iloc[2:4], second)
    assert fails[:4] == (0, 1, 1, 1.0)
    assert math.isnan(fails.ratio)


def outcomes(steps, held=None, **changes):
    """The cells of some seeds with their steps, of at most 5,000, followed for 50 evaluations."""
    frame = pd.DataFrame({"steps_to_95": steps, "fit_steps": 100.0, "max_steps": 5_000, "hold_evals": 50})
    reached = np.isfinite(frame["steps_to_95"])
    runs = frame.assign(followed_evals=np.where(reached, 50, np.nan), finite=True, **changes)
    runs["held_evals"] = np.where(reached, 50, np.nan) if held is None else held
    return list(views.outcome_cells(runs).values())


def test_failures_count_as_slower_than_any_run():
    assert outcomes([1000, math.inf, 3000, math.inf, 2000])[:4] == [
        "100",
        "3,000 (1,000 to > 5,000)",
        "> 5,000",
        "2 of 5",
    ]
    assert outcomes([1000, math.inf, 3000, math.inf, 2000, 1500])[1] == "2,500 (1,250 to > 5,000)"
    assert outcomes([math.inf], fit_steps=math.inf) == ["> 5,000", "> 5,000", "> 5,000", "1 of 1", ""]


@pytest.mark.parametrize(
    ("steps", "held", "changes", "cell"),
    [
        ([1000.0, 1000.0], [50, 49], {}, "1 of 2 (99%)"),
        ([4900.0], [10], {"followed_evals": 10}, ""),  # cut off by the cap: unknown
        ([4900.0], [10], {"followed_evals": 10, "finite": False}, "0 of 1 (20%)"),  # diverged: below from there on
        ([1000.0], [0], {"followed_evals": 0, "hold_evals": 0}, ""),  # not followed
    ],
)
def test_a_run_holds_95_percent_if_all_evaluations_that_follow_are_at_it(steps, held, changes, cell):
    frame = {"steps_to_95": steps, "fit_steps": 100.0, "max_steps": 5_000, "hold_evals": 50, "followed_evals": 50}
    runs = pd.DataFrame({**frame, "finite": True, "held_evals": held, **changes})
    assert views.outcome_cells(runs)["hold"] == cell
