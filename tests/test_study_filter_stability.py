"""The stability of filters over λ: its limits, and what table and figure say of made-up results."""

import math
import re

import pandas as pd
import pytest

from benchmarks import views
from benchmarks.filters import adamw_stability_limit
from benchmarks.studies import filter_stability as study


@pytest.fixture(scope="module")
def frame():
    """Two seeds of the MA with w = 100 and of the EMA, with λ 3 and 5, at a high and at a low learning rate."""
    rows = [
        {"window_size": window, "lr": lr, "weight_decay": 0.3, "lamb": lamb, "seed": seed, "steps_to_95": steps}
        for lr, window, lamb, of_seeds in (
            (0.03, 100, 3.0, (400, 500)),
            (0.03, 100, 5.0, (math.inf, math.inf)),
            (0.03, math.nan, 3.0, (450, 450)),
            (0.03, math.nan, 5.0, (700, math.inf)),
            (0.003, 100, 3.0, (math.inf, math.inf)),
            (0.003, 100, 5.0, (3_000, 3_500)),
        )
        for seed, steps in enumerate(of_seeds)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("lamb", "decay", "limit"),
    [(5, 0.009, 0.101), (5, 0.01, 0.107), (5, 0.03, 153), (3, 0.009, 131), (3, 0.01, 133), (3, 0.03, 137)],
)
def test_limits_of_the_published_window(lamb, decay, limit):
    """The page on sparse parity has these numbers."""
    assert adamw_stability_limit(100, lamb, decay) == pytest.approx(limit, rel=0.01)


def test_table(frame):
    assert adamw_stability_limit(0, 3, 0.009) == pytest.approx(148, rel=0.01)
    high = re.sub(" +", " ", study.high_lr(frame))
    assert "| λ | MA, w 100 | EMA |" in high
    assert "| 3 | 450 [131] | 450 [147] |" in high
    assert "| 5 | all fail [0.1] | > 4,000, 1 fail [216] |" in high
    low = re.sub(" +", " ", study.low_lr(frame))
    assert "| 3 | all fail [0.14] |" in low
    assert "| 5 | 3,250 [0.065] |" in low


def test_figure(frame):
    drawing = study.STUDY.figures["filter_stability"]
    figure, panels = views.chart(drawing.title, **drawing.layout)
    drawing.draw(frame, panels)
    low, empty, high = figure.axes
    assert not empty.lines
    (line,) = (line for line in low.lines if line.get_linestyle() == "-")
    assert line.get_ydata().round(-1).tolist() == [0, 100]
    inside = {
        (line.get_color(), x): line.get_markerfacecolor() == "white"
        for line in high.lines
        if line.get_marker() == "o"
        for x in line.get_xdata()
    }
    ema, ma = study.COLOURS[0], study.COLOURS[100]
    assert inside == {(ema, 3): False, (ema, 5): False, (ma, 3): False, (ma, 5): True}


def test_runs():
    runs = pd.DataFrame([run.key for run in study.runs(study.STUDY.results())])
    assert len(runs) == 3 * 5 * 7 * 16
    assert not runs.duplicated().any()
    assert runs.groupby(["lr", "weight_decay"]).size().to_dict() == dict.fromkeys(study.SETTINGS, 5 * 7 * 16)
