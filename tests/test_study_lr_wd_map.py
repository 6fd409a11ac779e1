"""The map of learning rates and weight decays at which a method works: its runs, its results, its numbers."""

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import views
from benchmarks.studies import lr_wd_map as study
from examples import parity
from examples.harness.engine import Results, product

pytestmark = pytest.mark.usefixtures("lenient")


def frame_of(pairs):
    """Steps by pair and seed."""
    return pd.DataFrame(pairs).T.rename_axis(["lr", "weight_decay"])


def cells(table):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line and ":-" not in line
    ]


def test_stored_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 32 * (5 * 42 + 3 * 16 + 3 + 5)
    assert results.missing(runs) == []
    assert len(results.frame()) == len(runs)


def test_each_grid_begins_with_the_method_without_a_filter():
    for methods in study.METHODS.values():
        label, *others = methods
        assert "without a filter" in label
        assert any("EMA" in other for other in others)


@pytest.fixture
def small(monkeypatch):
    """One bit of four, in a grid of two pairs: one that works, and one that does not move."""
    task = parity.Parity(n=4, k=1, points=60, fresh_points=40, width=8, eval_every=10)
    monkeypatch.setattr(study, "TASK", task)
    monkeypatch.setattr(study, "RULE", {"max_steps": 100, "group_size": 4})
    return product(task, parity.adamw, lr=[0.0, 0.03], weight_decay=0.1, seed=range(4), **study.RULE)


def test_the_steps_of_a_pair_are_by_seed(tmp_path, small):
    results = Results(tmp_path / "lr_wd_map.jsonl", trains=True)
    steps = study.by_pair(results.of(small), parity.adamw)
    assert list(steps.index) == [(0.0, 0.1), (0.03, 0.1)]
    assert steps.columns.tolist() == [0, 1, 2, 3]
    assert np.isinf(steps.loc[(0.0, 0.1)]).all()
    assert all(step in range(10, 101, 10) for step in steps.loc[(0.03, 0.1)])
    assert results.missing(small) == []


def test_a_pair_works_if_nine_tenths_of_its_seeds_reach_95_percent():
    failing = lambda number: [math.inf] * number + [100.0] * (20 - number)
    steps = frame_of({(0.1, 1.0): failing(0), (0.1, 2.0): failing(2), (0.1, 3.0): failing(3), (0.1, 4.0): failing(20)})
    assert study.works(steps).tolist() == [True, True, False, False]
    # The first pair always works, the last never, the others in some of the resampled sets of seeds.
    assert study.more_pairs(steps, steps) == "+0 (+0 to +0)"
    control = frame_of(dict.fromkeys(steps.index, failing(20)))
    assert study.more_pairs(steps, control) == "+2 (+1 to +3)"
    assert study.more_pairs(control, steps) == "-2 (-3 to -1)"


def test_the_interval_of_a_region_is_that_of_the_binomial_distribution():
    """Of one pair with 16 of 20 seeds, resampled: P(at least 18 reach 95 %) = 0.206, so 0 and 1 are both in it."""
    steps = lambda failing: frame_of({(0.1, 1.0): [math.inf] * failing + [100.0] * (20 - failing)})
    assert study.more_pairs(steps(4), steps(20)) == "+0 (+0 to +1)"
    # With 12 of 20 it is 0.0036, below 2.5 %.
    assert study.more_pairs(steps(8), steps(20)) == "+0 (+0 to +0)"


WITHOUT = "AdamW without a filter"


def results_of(label, steps):
    """The frame of a method's runs with these steps by pair and seed."""
    method = study.METHODS["AdamW"][label]
    lines = [
        run.key | {"steps_to_95": value}
        for (lr, decay), values in steps.items()
        for run, value in zip(
            product(study.TASK, method, lr=lr, weight_decay=decay, seed=range(len(values)), **study.RULE),
            values,
            strict=True,
        )
    ]
    return pd.DataFrame(lines)


def test_the_best_pair_is_chosen_by_the_first_half_of_the_seeds_and_reported_with_the_other(monkeypatch):
    monkeypatch.setattr(study, "SEEDS", 8)
    monkeypatch.setattr(study, "RULE", {"max_steps": 4_000, "group_size": 8})
    steps = {
        (0.1, 1.0): [100.0, 100.0, 100.0, math.inf, 900.0, 900.0, math.inf, math.inf],
        (0.1, 2.0): [100.0, 100.0, 100.0, 200.0, 700.0, 500.0, 600.0, math.inf],
        (0.2, 1.0): [200.0] * 4 + [50.0] * 4,
        (0.2, 2.0): [math.inf] * 8,
    }
    pair, others = study.best_pair(frame_of(steps).rename_axis(columns="seed"))
    assert pair == (0.1, 2.0)  # the same median as the first, and a lower mean
    assert others["steps_to_95"].tolist() == [700, 500, 600, math.inf]
    assert others["seed"].tolist() == [4, 5, 6, 7]
    methods = {"AdamW": {label: study.METHODS["AdamW"][label] for label in (WITHOUT, "AdamW with the MA")}}
    monkeypatch.setattr(study, "METHODS", methods)
    results = pd.concat(results_of(label, steps) for label in methods["AdamW"])
    _, *rows = cells(study.table(results))
    assert rows == [
        [WITHOUT, "0.1, 2", "650, 1 fail", "", "1 of 4", ""],
        ["AdamW with the MA", "0.1, 2", "650, 1 fail", "0 : 0 (p = 1)", "1 of 4", "+0 (+0 to +0)"],
    ]


def test_the_map_marks_what_works(monkeypatch):
    monkeypatch.setattr(study, "RULE", {"max_steps": 4_000, "group_size": 10})
    reach = lambda number: [100.0] * number + [math.inf] * (10 - number)
    steps = {(0.1, 1.0): reach(9), (0.1, 2.0): reach(8), (0.2, 1.0): reach(0), (0.2, 2.0): reach(0)}
    frame = pd.concat(results_of(label, steps) for label in study.METHODS["AdamW"])
    axes = study.STUDY.figures["lr_wd_map"](frame).axes[0]
    # Decays from the top down, learning rates from left to right.
    assert [text.get_text() for text in axes.texts] == ["80", "0", "90", "0"]
    ends = np.concatenate([edge for edges in axes.collections for edge in edges.get_segments()])
    assert (*ends.min(axis=0), *ends.max(axis=0)) == (-0.5, 0.5, 0.5, 1.5)


def test_without_results_there_is_no_number(tmp_path):
    assert set(study.STUDY.made_tables(tmp_path).values()) == {views.MISSING}
    assert study.STUDY.made_figures(tmp_path) == {}
