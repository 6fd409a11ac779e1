"""By how much filters raise the learning rate: the measure against its bounds, the controls, and the views."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.studies import effective_lr as study
from examples import parity
from examples.harness.engine import Results, product
from examples.harness.train import TrainState

pytestmark = pytest.mark.usefixtures("lenient")  # for transformations of optax


@pytest.mark.parametrize("is_noise", [True, False])
def test_a_filter_raises_the_rate_by_the_bound_where_gradients_are_noise_and_not_where_they_are_constant(is_noise):
    lamb, window = 5.0, 50
    tx = study.filtered_adamw(0.01, 0.1, lamb, window)
    params = jnp.zeros(300)
    grads = jax.random.normal(jax.random.key(0), (1_000, 300)) if is_noise else jnp.ones((1_000, 300))
    state = jax.lax.scan(lambda state, g: (tx.update(g, state, params)[1], None), tx.init(params), grads)[0]
    numbers = study.rms_ratio(None, TrainState(params, state, jnp.zeros((), jnp.int32)), {})
    squared_response = (1 + lamb / window) ** 2 + (window - 1) * (lamb / window) ** 2
    expected = (1 + lamb) / math.sqrt(squared_response) if is_noise else 1
    assert (1 + lamb) * numbers["rms_ratio"] == pytest.approx(expected, rel=0.05)


def test_nothing_is_measured_without_a_filter():
    state = parity.adamw().init(jnp.zeros(3))
    assert study.rms_ratio(None, TrainState(jnp.zeros(3), state, jnp.zeros((), jnp.int32)), {}) == {}


@pytest.fixture
def results(tmp_path):
    """λ 2 raises the rate by 2.5, and takes longer than its control; with λ 5 the control's runs are not there."""
    made = Results(tmp_path / "effective_lr.jsonl")
    for lamb, ratio, steps in ((2.0, 2.5 / 3, 1_000), (5.0, 0.5, None)):
        setting = {"lr": 0.003, "weight_decay": 0.3, "window": 0, "lamb": lamb}
        for run in study.on_parity(study.filtered_adamw, **setting, seed=range(16)):
            made.append([{"run": run.key, "steps_to_95": steps if run.seed else None, "rms_ratio": ratio}])
    for run in study.on_parity(parity.adamw, lr=0.0075, weight_decay=0.12, seed=range(16)):
        made.append([{"run": run.key, "steps_to_95": 800}])
    return made


def test_the_control_has_the_raised_rate(results):
    (row,) = study.settings(results.frame()).to_dict("records")
    assert (row["multiplier"], row["stable"], row["decided"]) == (2.5, True, True)
    assert (row["fewer"], row["more"]) == (0, 16)
    (first, *_) = study.control(results.frame().iloc[0], 2.5)
    assert (first.hyperparams["lr"], first.hyperparams["weight_decay"]) == (0.0075, 0.12)
    _, _, line = re.sub(" +", " ", study.verdicts(results.frame())).splitlines()
    assert line == "| 0.3 | stable | 1 | 2.5 | 0 | 1 |"


def test_controls_follow_the_runs_with_a_filter(results):
    runs = list(study.runs(results))
    filtered, controls = runs[: len(study.filtered_runs())], runs[len(study.filtered_runs()) :]
    assert all("lamb" in run.hyperparams for run in filtered)
    assert [run.hyperparams["lr"] for run in controls] == [0.0075] * 16 + [0.009] * 16  # λ 2, then λ 5


def test_the_figure_marks_unstable_filters(results, tmp_path):
    for window in (25, 50, 100):
        setting = {"lr": 0.003, "weight_decay": 0.3, "window": window, "lamb": 2.0}
        for run in study.on_parity(study.filtered_adamw, **setting, seed=range(16)):
            results.append([{"run": run.key, "steps_to_95": 900, "rms_ratio": 2.5 / 3}])
    panels = study.STUDY.made_figures(tmp_path)["effective_lr"].axes
    white = [sum(len(line.get_xdata()) for line in axes.lines if line.get_color() == "white") for axes in panels]
    assert white == [0, 1, 0, 0]  # the EMA, then windows of 25, 50 and 100


def test_the_numbers_in_the_text_of_the_page_are_those_of_the_results():
    found = study.settings(study.STUDY.results().frame()).query("task == 'Modular'").set_index("window")
    numbers = {w: (f"{row.multiplier:.2g}", row.fewer, row.more, f"{row.p:.2f}") for w, row in found.iterrows()}
    assert numbers == {0: ("2.9", 1, 7, "0.07"), 100: ("5.4", 6, 1, "0.12")}


@pytest.mark.slow
def test_a_study_trains_the_controls_of_what_it_has_measured(tmp_path, monkeypatch):
    small = functools.partial(product, parity.Parity(), max_steps=100, group_size=16)
    setting = {"lr": 0.003, "weight_decay": 0.3, "window": 0, "lamb": 2.0}
    monkeypatch.setattr(study, "on_parity", small)
    monkeypatch.setattr(study, "filtered_runs", lambda: small(study.filtered_adamw, **setting, seed=range(16)))
    frame = study.STUDY.train(tmp_path).frame()
    assert frame["method"].tolist() == ["filtered_adamw"] * 16 + ["adamw"] * 16
    assert frame["rms_ratio"].iloc[:16].between(1 / 3, 1).all()
    assert frame["rms_ratio"].iloc[16:].isna().all()
    assert frame["lr"].iloc[-1] == pytest.approx(0.003 * study.lr_multiplier(frame.iloc[:16]), rel=1e-3)
    before = (tmp_path / "effective_lr.jsonl").read_bytes()
    study.STUDY.train(tmp_path)
    assert (tmp_path / "effective_lr.jsonl").read_bytes() == before
