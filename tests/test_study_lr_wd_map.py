"""The map of learning rates and weight decays at which a method works: its runs, its results, its numbers."""

import json
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
    assert len(runs) == 32 * (5 * 42 + 3 * 16) + 16 * 8 + 4 * 4
    assert results.missing(runs) == []
    assert len(results.frame()) == len(runs)


def test_each_grid_begins_with_the_method_without_a_filter():
    for methods in study.METHODS.values():
        label, *others = methods
        assert "no filter" in label
        assert any("EMA" in other for other in others)


@pytest.fixture
def small(monkeypatch):
    """One bit of four, in a grid of two pairs: one that works, and one that does not move."""
    task = parity.Parity(n=4, k=1, points=60, fresh_points=40, width=8, eval_every=10)
    monkeypatch.setattr(study, "TASK", task)
    monkeypatch.setattr(study, "GRIDS", {"AdamW": ([0.0, 0.03], [0.1]), "Muon": ([0.1], [0.1])})
    monkeypatch.setattr(study, "METHODS", {"AdamW": dict([*study.METHODS["AdamW"].items()][:1]), "Muon": {}})
    monkeypatch.setattr(study, "SEEDS", 4)
    monkeypatch.setattr(study, "RULE", {"max_steps": 100, "group_size": 4})
    return product(task, parity.adamw, lr=[0.0, 0.03], weight_decay=0.1, seed=range(4), **study.RULE)


def test_the_seeds_of_a_pair_share_a_line_and_are_trained_once(tmp_path, small):
    results = Results(tmp_path / "lr_wd_map.jsonl", trains=True)
    frame = results.of(small)
    text = results.path.read_text()
    _, still, moving = map(json.loads, text.splitlines())
    assert still["run"]["seed"] == moving["run"]["seed"] == [0, 1, 2, 3]
    assert still["steps_to_95"] == [None] * 4
    assert all(step in range(10, 101, 10) for step in moving["steps_to_95"])
    assert moving["steps_to_95"] == moving["last_step"]
    assert frame[frame["lr"] == 0.03]["steps_to_95"].tolist() == moving["steps_to_95"]
    results.of(small)
    assert results.path.read_text() == text
    results.path.write_text("".join(text.splitlines(keepends=True)[:2]))
    assert [run.hyperparams["lr"] for run in results.missing(small)] == [0.03] * 4
    steps = study.by_pair(frame)["AdamW"]["AdamW, no filter"]
    assert list(steps.index) == [(0.0, 0.1), (0.03, 0.1)]
    assert steps.loc[(0.03, 0.1)].tolist() == moving["steps_to_95"]
    assert np.isinf(steps.loc[(0.0, 0.1)]).all()
    (_, row) = cells(study.table(frame))
    assert (row[0], row[4], row[5]) == ("AdamW, no filter", "1 (1 to 1) of 2", "")
    assert cells(study.rates(frame))[1] == ["0", "all fail"]
    assert study.by_pair(frame.iloc[1:])["AdamW"] == {}  # a grid with a gap is left out


def test_a_pair_works_if_nine_tenths_of_its_seeds_reach_95_percent():
    failing = lambda number: [math.inf] * number + [100.0] * (20 - number)
    steps = frame_of({(0.1, 1.0): failing(0), (0.1, 2.0): failing(2), (0.1, 3.0): failing(3), (0.1, 4.0): failing(20)})
    assert study.works(steps.to_numpy()).tolist() == [True, True, False, False]
    # The first pair always works, the last never, the others in some of the resampled sets of seeds.
    assert study.region_size(steps) == (2, 1, 3)
    assert study.region_size(steps, steps) == (0, 0, 0)
    control = frame_of(dict.fromkeys(steps.index, failing(20)))
    assert study.region_size(steps, control) == (2, 1, 3)
    assert study.region_size(control, steps) == (-2, -3, -1)


def test_the_interval_of_a_region_is_that_of_the_binomial_distribution():
    """Of one pair with 16 of 20 seeds, resampled: P(at least 18 reach 95 %) = 0.206, so 0 and 1 are both in it."""
    steps = lambda failing: frame_of({(0.1, 1.0): [math.inf] * failing + [100.0] * (20 - failing)})
    assert study.region_size(steps(4)) == (0, 0, 1)
    # With 12 of 20 it is 0.0036, below 2.5 %.
    assert study.region_size(steps(8)) == (0, 0, 0)


def results_of(optimizer, label, steps):
    """The frame of a method's runs with these steps by pair and seed."""
    method = study.METHODS[optimizer][label]
    lines = [
        run.key | {"steps_to_95": value, "fit_steps": 50.0}
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
    monkeypatch.setattr(study, "GRIDS", {"AdamW": ([0.1, 0.2], [1.0, 2.0]), "Muon": ([0.1], [1.0, 2.0])})
    steps = {
        (0.1, 1.0): [100.0, 100.0, 100.0, math.inf, 900.0, 900.0, math.inf, math.inf],
        (0.1, 2.0): [100.0, 100.0, 100.0, 200.0, 700.0, 500.0, 600.0, math.inf],
        (0.2, 1.0): [200.0] * 4 + [50.0] * 4,
        (0.2, 2.0): [math.inf] * 8,
    }
    frame = frame_of(steps)
    pair, steps_of_others = study.best_pair(frame)
    assert pair == (0.1, 2.0)  # the same median as the first, and a lower mean
    assert steps_of_others.tolist() == [700, 500, 600, math.inf]
    few = dict([*steps.items()][:2])
    grids = [("AdamW", label, steps) for label in ("AdamW, no filter", "MA before AdamW")]
    results = pd.concat(results_of(*one) for one in [*grids, ("Muon", "EMA before Muon", few)])
    _, *rows = cells(study.table(results))
    assert rows[0][:4] == ["AdamW, no filter", "0.1, 2", "650 (500 to > 4,000)", "1 of 4"]
    assert [row[0] for row in rows] == ["AdamW, no filter", "MA before AdamW", "EMA before Muon"]
    assert [row[5] for row in rows] == ["", "+0 (+0 to +0)", ""]  # nothing to compare Muon with
    assert [row[4][-4:] for row in rows] == ["of 4", "of 4", "of 2"]
    assert rows[0][6] == "62%"  # 20 of 32
    assert cells(study.rates(results)) == [
        ["learning rate", "AdamW, no filter", "MA before AdamW"],
        ["0.1", *["650 (decay 2; 1 fail)"] * 2],
        ["0.2", *["50 (decay 1)"] * 2],
        ["learning rate", "EMA before Muon"],
        ["0.1", "650 (decay 2; 1 fail)"],
    ]


def test_the_map_marks_what_works_and_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(study, "SEEDS", 10)
    monkeypatch.setattr(study, "RULE", {"max_steps": 4_000, "group_size": 10})
    monkeypatch.setattr(study, "GRIDS", {"AdamW": ([0.1, 0.2], [1.0, 2.0]), "Muon": ([0.1], [1.0])})
    reach = lambda number: [100.0] * number + [math.inf] * (10 - number)
    steps = {(0.1, 1.0): reach(9), (0.1, 2.0): reach(8), (0.2, 1.0): reach(0), (0.2, 2.0): reach(0)}
    frame = results_of("AdamW", "AdamW, no filter", steps)
    frame.loc[(frame["lr"] == 0.2) & (frame["weight_decay"] == 2.0), "fit_steps"] = math.inf
    drawing = study.STUDY.figures["lr_wd_map"]
    _, axes = views.chart(drawing.title, **drawing.layout)
    drawing.draw(frame, axes)
    first = axes[0, 0]
    assert sorted(text.get_text() for text in first.texts) == ["0", "80", "90"]
    (outlined,) = first.patches
    assert outlined.get_xy() == (-0.5, 0.5)  # the lower rate and, at the bottom, the weaker decay
    (cross,) = first.lines
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (1, 0)
    assert not axes[0, 1].texts
    assert [panel.get_visible() for panel in axes[1]] == [True] * 3 + [False] * 2


def test_without_results_there_is_no_number(tmp_path):
    assert set(study.STUDY.made_tables(tmp_path).values()) == {views.MISSING}
    assert study.STUDY.made_figures(tmp_path) == {}
