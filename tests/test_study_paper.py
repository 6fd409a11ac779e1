"""The comparison with the paper: runs followed in parameter space, and verdicts by hand."""

import json
import math
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks import DOCS
from benchmarks.studies import paper
from examples.harness.engine import Results, product
from examples.modular import Modular, adam, adamw, ema

pytestmark = pytest.mark.usefixtures("lenient")


def test_the_distances_are_those_between_the_states_of_a_run(monkeypatch):
    path = {0: 0.0, 400: 3.0, 800: 6.0, 900: 10.0}  # of the one parameter, by step
    monkeypatch.setattr(Modular, "init", lambda self, key: {"w": jnp.full((1,), path[0])})
    (run,) = product(Modular(), adam)
    rows = {step: {"step": step, "train_accuracy": step / 842, "val_accuracy": step / 947} for step in path if step}
    state = lambda step: SimpleNamespace(params={"w": jnp.full((1,), path[step])})
    history = [(row, state(step)) for step, row in rows.items()]
    assert paper.follow(run, iter(history[:2]), None) == {"A_B": 6}
    further = [*history, ({"step": 910, "train_accuracy": 1, "val_accuracy": 1}, state(400))]
    for states in (history, further):
        assert paper.follow(run, iter(states), None) == {"A_B": 6, "B_C": 4, "A_C": 10}
    (baseline,) = product(Modular(), adam, max_steps=paper.BASELINE_STEPS)
    at_the_end = [*history, ({**rows[900], "step": paper.BASELINE_STEPS}, state(400))]
    assert paper.follow(baseline, iter(at_the_end), None) == {"A_B": 6, "B_C": 3, "A_C": 3}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_distances_are_of_the_runs_that_reach_c():
    runs = [run.key for run in product(Modular(), adam, weight_decay=0.005, seed=range(3))]
    steps = ([3.0, 4.0, 5.0], [5.0, 4.0, 7.0], [80.0, math.nan, math.nan])
    frame = pd.DataFrame(
        [key | dict(zip(("A_B", "B_C", "A_C"), numbers, strict=True)) for key, numbers in zip(runs, steps, strict=True)]
    )
    row = ["4.0 ± 1.4", "4.0 ± 0.0", "6.0 ± 1.4"]
    assert cells(paper.distances(frame))[0] == ["Adam, decay 0.005", *row]


def test_published_numbers_are_judged_by_hand():
    steps = pd.Series([1_000.0, 1_100.0, math.inf])
    assert not paper.near(900, steps[2:])
    assert [paper.near(number, steps) for number in (900, 910, 1_210, 1_220)] == [False, True, True, False]
    assert paper.near(700, steps, pd.Series([750.0]))
    control = pd.Series({0: 2_000.0, 2: 3_000.0, 1: math.inf, 3: 4_000.0})
    assert paper.times_fewer(control, steps).to_dict() == {0: 2.0}
    assert paper.in_words(steps) == "1,100 (1,000 to > 5,000; 3 seeds, 1 fail)"
    assert paper.in_words(steps[2:]) == "all fail in 5,000 steps (1 seed)"
    assert paper.in_words(pd.Series([1.0, 2.0, 4.0])) == "2.00 (1.00 to 4.00; 3 seeds)"
    grid = pd.DataFrame({0.1: [1.0, 9.0], 0.2: [math.inf, 2.0], 0.3: [5.0, 5.0]})
    assert paper.best_claim("", "", 0.1, grid)[3] == "0.1 and 0.3 (median 5; 2 seeds)"
    assert paper.claim("Fig. 2", "MA", 790, steps)[2:] == ("790", paper.in_words(steps), "no")
    assert paper.claim("Fig. 2", "ratio", 1.5, pd.Series([1.4, 1.6]))[2:] == (
        "1.50",
        "1.50 (1.40 to 1.60; 2 seeds)",
        "agrees",
    )


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [([1_400.0, 1_500.0], "agrees"), ([390.0, 350.0], "in part"), ([90.0, 95.0], "no"), ([], "not run")],
)
def test_the_distance_of_the_baseline_is_compared_with_the_ema(ends, verdict):
    runs = product(Modular(), ema) + product(Modular(), adam, max_steps=paper.BASELINE_STEPS, seed=range(len(ends)))
    frame = pd.DataFrame([run.key | {"A_C": value} for run, value in zip(runs, [92.0, *ends], strict=True)])
    *_, here, found = cells(paper.claims(frame))[0]
    assert found == verdict
    assert here.startswith(f"{np.mean(ends) / 92:.2f} (" if ends else "the baseline was not")


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (([45_000.0], [44_000.0], [2_000.0]), "agrees"),  # baseline, decay alone, both
        (([45_000.0], [2_100.0], [2_000.0]), "in part"),
        (([45_000.0], [44_000.0], [9_000.0]), "in part"),
        (([45_000.0], [44_000.0], [46_000.0]), "no"),
    ],
)
def test_a_gain_of_another_task_is_judged_by_what_the_decay_alone_gives(outcomes, verdict):
    outcomes = [pd.Series(values) for values in outcomes]
    assert paper.task_claim("", "", (44_022, 2_001), outcomes, ",.0f").verdict == verdict


@pytest.mark.parametrize(
    ("published", "others", "verdict"),
    [
        ([900, 950, 700], [1_000, math.inf, math.inf], "agrees"),
        ([900, 950, math.inf], [800, 800, 800], "no"),
        ([900, 700, math.inf], [800, 800, 800], "in part"),
        ([math.inf] * 3, [800, 800, 800], "no"),
        ([math.inf], [math.inf], "no"),
    ],
)
def test_a_published_best_setting_is_judged_by_the_seeds(published, others, verdict):
    grid = pd.DataFrame({(5.0, 100): published, (2.0, 50): others}, dtype=float)
    assert paper.best_claim("", "", (5.0, 100), grid, as_published=True)[-1] == verdict
    limited = paper.best_claim("", "", (5.0, 100), grid)[-1]
    assert limited == ("in part" if verdict == "agrees" else verdict)


@pytest.fixture
def mod97(tmp_path, monkeypatch):
    """A function that writes steps by seed of a setting of mod 97."""
    results = Results(tmp_path / "mod97.jsonl")
    monkeypatch.setattr(paper.mod97.STUDY, "results", lambda: results)

    def write(method, by_seed, **settings):
        lines = []
        for seed, steps in by_seed.items():
            (run,) = product(Modular(), method, hold_evals=50, seed=seed, **settings)
            lines.append({"run": run.key, "steps_to_95": steps, "fit_steps": 100, "provenance": "here"})
        with results.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    return write


def test_a_grid_has_the_seeds_that_all_settings_have(mod97):
    mod97(ema, {0: 900, 1: None, 2: 800}, lamb=1.0)
    mod97(ema, {0: 700, 1: 600, 3: 500}, lamb=2.0)
    mod97(adamw, {0: 100})
    grid = paper.grid_of("lamb", paper.mod97.grid(ema, lamb=[1.0, 2.0]))
    assert grid.to_dict("index") == {0: {1.0: 900.0, 2.0: 700.0}, 1: {1.0: math.inf, 2.0: 600.0}}
    assert paper.best_claim("Fig. 4", "EMA: best λ", 2.0, grid) == (
        ("Fig. 4", "EMA: best λ", "2", "2 (median 650; 2 seeds)", "in part")
    )
    assert (
        paper.best_claim("", "", 1.0, grid)[3]
        == "2 (median 650; 2 seeds); 1: > 5,000 (900 to > 5,000; 2 seeds, 1 fail)"
    )
    assert paper.steps_of(ema, lamb=2.0).to_dict() == {0: 700.0, 1: 600.0, 3: 500.0}


def test_the_results_are_those_of_all_runs_but_the_baseline():
    results = paper.STUDY.results()
    assert {run.max_steps for run in results.missing(paper.runs(results))} == {paper.BASELINE_STEPS}


def test_the_roots_of_the_published_distances_are_told():
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [\w, ]+ \| ([\d.]+), (\d+) \| ([\d.]+), (\d+) \| ([\d.]+), (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 2
    for row in rows:
        squares, roots = np.array(row[::2], float), np.array(row[1::2], float)
        np.testing.assert_array_equal(np.sqrt(1_000 * squares).round(), roots)
        assert squares[2] > squares[0] + squares[1]
        assert roots[2] < roots[0] + roots[1]


@pytest.mark.parametrize(("dampening", "is_exact"), [(0.0, True), (0.3, False)])
def test_theorem_a1_is_exact_without_dampening(dampening, is_exact):
    """The optimizer x(t) = 0.9 x(t-1) + B g(t) starts with x(0) = g(0); the filter is amplified and starts at zero."""
    gradients = np.random.default_rng(0).normal(size=200)

    def optimizer(inputs):
        out = [inputs[0]]
        for g in inputs[1:]:
            out.append(0.9 * out[-1] + (1 - dampening) * g)
        return np.array(out)

    def amplified(inputs):
        slow, out = 0.0, []
        for g in inputs:
            slow = 0.98 * slow + 0.02 * g
            out.append(g + 2 * slow)
        return np.array(out)

    difference = np.abs(optimizer(amplified(gradients)) - amplified(optimizer(gradients)))
    assert (difference.max() < 1e-12) == is_exact
    assert is_exact or 0 < difference[-50:].max() < difference.max() / 5  # a transient
