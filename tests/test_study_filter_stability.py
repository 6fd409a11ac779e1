"""The stability of filters over λ: its limits, its runs, and the map of made-up results."""

import math

import pandas as pd
import pytest

from benchmarks.methods import adamw_stability_limit
from benchmarks.studies import filter_stability as study


@pytest.mark.parametrize(
    ("window", "lamb", "decay", "limit"),
    [(100, 5, 0.009, 0.101), (100, 5, 0.01, 0.107), (100, 5, 0.03, 153), (100, 3, 0.009, 131), (0, 3, 0.009, 148)],
)
def test_limits(window, lamb, decay, limit):
    """Of the published MA, of its smaller λ, and of the EMA; the page has the first and the fourth."""
    assert adamw_stability_limit(window, lamb, decay) == pytest.approx(limit, rel=0.01)


def test_the_map_has_a_line_around_unstable_filters():
    rows = [
        {"window_size": window, "lr": lr, "weight_decay": decay, "lamb": lamb, "seed": seed, "steps_to_95": steps}
        for lr, decay in study.SETTINGS
        for window in (25, 50, 100, 200, math.nan)
        for lamb in (3.0, 5.0)
        for seed, steps in enumerate((400.0, math.inf if lamb == 5 else 400.0))
    ]
    high = study.STUDY.figures["filter_stability"](pd.DataFrame(rows)).axes[2]
    assert [text.get_text() for text in high.texts] == ["100", "50"] * 5
    assert [label.get_text() for label in high.get_yticklabels()][::2] == ["MA, window 25", "MA, window 100", "EMA"]
    # Unstable are windows of 25 and 50 with both λ, and of 100 with λ 5: an outline of 10 edges.
    assert sum(len(edges.get_segments()) for edges in high.collections) == 10


def test_runs():
    runs = pd.DataFrame([run.key for run in study.runs(study.STUDY.results())])
    assert len(runs) == 3 * 5 * 7 * 16
    assert not runs.duplicated().any()
    assert runs.groupby(["lr", "weight_decay"]).size().to_dict() == dict.fromkeys(study.SETTINGS, 5 * 7 * 16)
