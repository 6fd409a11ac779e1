"""The jump of the loss where a filter is switched on."""

import pytest

from benchmarks import views
from benchmarks.studies import switch_on as study
from examples.harness.engine import product, to_frame
from examples.shakespeare import Shakespeare

pytestmark = pytest.mark.usefixtures("lenient")


def test_a_jump_is_measured_at_the_switch():
    """A loss that falls by 1 per step, and is 100 higher in one record, 30 steps after the switch."""
    rows = [
        {"step": step, "train_loss": 10_000 - step + 100 * (step == 1_030), "val_loss": step / 100}
        for step in range(10, 1_510, 10)
    ]
    # The mean of the 50 steps before the switch is 20 above the last of them.
    assert study.observe(None, ((row, None) for row in rows), {}) == {"jump_at_1000": 50.0, "last_val_loss": 15.0}


def frame_of(jumps):
    """A frame with the jumps of the seeds of each method."""
    lines = []
    for label, of_seeds in jumps.items():
        runs = product(Shakespeare(), study.METHODS[label], seed=range(len(of_seeds)))
        lines += [
            {"run": run.key, "jump_at_1000": jump, "last_val_loss": 2} for run, jump in zip(runs, of_seeds, strict=True)
        ]
    return to_frame(lines)


def test_the_table_has_median_and_range():
    lines = study.table(frame_of({"empty EMA": [0.4, 0.5, 0.3]})).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["empty EMA", "3", "0.400 (0.300 to 0.500)", "2.000"]


def test_the_figure_has_a_row_per_method():
    _, axes = views.chart("title")
    study.figure(frame_of({label: [0.1, 0.2] for label in study.METHODS}), axes)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(study.METHODS)
    assert [line.get_color() for line in axes.lines[:4:2]] == [views.NO_FILTER, views.GREY]


def test_the_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == len(results.frame()) == 18
    assert results.missing(runs) == []
