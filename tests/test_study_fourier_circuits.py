"""The study of Fourier circuits: what it stores of a run, and its tables by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks import views
from benchmarks.studies import fourier_circuits as study
from benchmarks.study import Study
from benchmarks.views import chart
from examples import circuits, modular
from examples.harness import engine
from examples.harness.engine import product
from examples.harness.loop import evaluations
from examples.harness.train import TrainState
from examples.modular import Modular

pytestmark = pytest.mark.usefixtures("lenient")

TINY = Modular(p=11, dim=16, heads=2, depth=1, batch_size=16)  # 4 steps between two evaluations


def result(key, **changes):
    """A row of the frame."""
    steps = {"steps_to_95": 150, "fit_steps": 75, "clock_step": 100}
    numbers = {"gini": 0.5, "gini_control": 0.04, "logit_share": 0.9}
    place = {"method": "ma", "operation": "multiplication", "seed": 0}
    return place | steps | numbers | {"key": key} | changes


FRAME = pd.DataFrame(
    [
        result([4, 5, 7], method="adamw"),
        result([3, 9], method="adamw", seed=1),
        result([3, 9], method="adamw", seed=2, steps_to_95=np.inf, clock_step=np.nan),
        result([1, 2], seed=1, steps_to_95=200, fit_steps=150),
        result([4, 5], seed=0),
    ]
)


def cells_of(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows[2:]


def test_formation_is_relative_to_the_steps_to_95():
    assert cells_of(study.table(FRAME)) == [
        ["AdamW", "2", "0.50", "0.67", "2 (2 to 3)", "0 of 2"],
        ["MA + Adam", "2", "0.62 (0.50 to 0.75)", "0.58 (0.50 to 0.67)", "2", "1 of 2"],
    ]


def test_methods_are_compared_over_the_operations_on_which_both_reach_95():
    """The MA has fewer frequencies with seed 0, and its clock is first with seed 1; addition has AdamW alone."""
    alone = result([*range(1, 9)], method="adamw", operation="addition", clock_step=10)
    for frame in (FRAME, pd.concat([FRAME, pd.DataFrame([alone])])):
        assert cells_of(study.controls(frame)) == [
            ["AdamW", "", "", "", ""],
            ["MA + Adam", "1 : 0 (p = 1)", "1 : 0 (p = 1)", "", ""],
        ]


def test_the_clocks_of_an_operation_by_hand():
    row = ["multiplication", "4", "2 (2 to 3)", "0.50", "0.04", "0.90"]
    assert cells_of(study.operations(FRAME)) == [row]


def test_methods_are_compared_from_the_same_start_and_from_others():
    """From the same start the methods share 4 and 5 with seed 0, and nothing with seed 1."""
    (row,) = cells_of(study.comparison(FRAME))
    assert row == ["AdamW, MA + Adam", "1.0", "0.0", "1 : 0 (p = 1)"]


def test_a_mark_of_the_figure_is_a_run_that_reaches_95():
    _, axes = chart("title")
    study.figure(FRAME, axes)
    drawn = [(line.get_xdata().tolist(), line.get_color()) for line in axes.lines[:2]]
    assert drawn == [([0.5, 0.5], views.NO_FILTER), ([0.75, 0.5], views.FILTER)]


# By step: restricted loss with the key frequencies of the end, Gini coefficient, training and validation accuracy
COURSE = {0: (2.4, 0.1, 0, 0), 20: (2.3, 0.2, 1, 0.1), 40: (1.1, 0.3, 1, 0.9), 48: (0.2, 0.7, 1, 1)}


def test_what_is_stored_of_a_run_by_hand(monkeypatch):
    is_key = np.array([False, True, False, True, False])

    def measure(task, params, key_k=None):
        loss, gini, *_ = COURSE[params["step"]]
        assert key_k is None or (key_k == is_key).all()
        assert key_k is not None or params["step"] == 48
        share, coefficients = np.array([0.1, 0.2, 0.3, 0.3, 0.1]), np.array([0.0, 0.6, 0.0, 0.3, 0.01236])
        numbers = {"restricted_loss": loss, "gini": gini, "gini_control": 0.0312345, "logit_share": 0.5}
        return numbers | {"is_key": is_key, "share": share, "logit_coefficients": coefficients}

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(Modular, "init", lambda self, key: {"step": 0, "token": np.eye(13)})
    (run,) = product(TINY, modular.adamw, max_steps=48, stop_at=None)
    history = []
    for step in range(4, 52, 4):
        _, _, train, val = COURSE.get(step, (0, 0, 0, 0))
        row = {"step": step, "train_accuracy": train, "val_accuracy": val}
        history.append((row, TrainState({"step": step, "token": np.eye(13)}, (), jnp.array(step // 4))))
    stored = study.observe(run, iter(history), {"val": None})
    circle = stored.pop("circle")
    assert stored == {
        "key": [2, 4],
        "clock_step": 40,  # log(11) / 2 is 1.199
        "gini": 0.7,
        "gini_control": 0.03123,
        "logit_share": 0.5,
    }
    assert (circle["k"], circle["steps"], circle["accuracy"]) == (4, [0, 20, 48], [[0, 0], [1, 0.1], [1, 1]])
    assert np.array(circle["points"]).shape == (3, 10, 2)
    assert "circle" not in study.observe(dataclasses.replace(run, seed=1), iter(history), {"val": None})


@pytest.mark.slow
def test_a_run_is_measured_as_it_is_trained(tmp_path, shared_programs, monkeypatch):
    monkeypatch.setattr(circuits, "KEY_CORRELATION", 0.0)  # so that there are some after few steps
    (run,) = product(TINY, modular.adamw, max_steps=28, stop_at=None)
    frame = Study("tiny", lambda results: [run], observe=study.observe).train(tmp_path).frame()
    stored, key, compiled = frame.iloc[0], jax.random.key(0), engine.program(run)
    params = {0: jax.device_get(compiled.init(run.traced, key).params)}
    for evaluation in evaluations(compiled, run.traced, key):
        params[evaluation.step] = jax.device_get(evaluation.state.params)
        if evaluation.step == 28:
            break
    end = study.measure(TINY, params[28])
    steps = [0, 20, 28]  # every fifth evaluation and the last
    measured = [study.measure(TINY, params[step], end["is_key"]) for step in steps]

    assert stored["last_step"] == 28
    assert stored["key"] == [k for k in range(1, 6) if end["logit_coefficients"][k - 1] >= 0]
    assert 0 < len(stored["key"]) < 5
    for name in ("gini", "gini_control", "logit_share"):
        assert stored[name] == pytest.approx(float(measured[-1][name]), rel=1e-3)
    assert len({float(one["restricted_loss"]) for one in measured}) == 3

    points = circuits.circle_points(TINY, [params[step] for step in stored["circle"]["steps"]], stored["circle"]["k"])
    np.testing.assert_allclose(stored["circle"]["points"], points, atol=0.006)


def test_runs_of_a_group_cannot_be_observed(tmp_path, shared_programs):
    runs = product(TINY, modular.adamw, seed=range(2), max_steps=4, group_size=2)
    with pytest.raises(ValueError, match="group_size must be 1 where runs are observed, got 2"):
        Study("tiny", lambda results: runs, observe=study.observe).train(tmp_path)


def test_the_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 192
    assert results.missing(runs) == []
