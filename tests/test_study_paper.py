"""The comparison with the paper: runs followed in parameter space, and verdicts by hand."""

import json
import math
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import grokfast_jax as gf
from benchmarks import DOCS
from benchmarks.studies import paper
from examples.harness.engine import Results, product
from examples.modular import Modular, adam, adamw, ema

pytestmark = pytest.mark.usefixtures("lenient")


def test_the_distances_are_those_between_the_states_of_a_run(monkeypatch):
    path = {0: 0.0, 400: 3.0, 800: 6.0, 900: 10.0}  # of the one parameter, by step
    monkeypatch.setattr(Modular, "init", lambda self, key: {"w": jnp.full((1,), path[0])})
    (run,) = product(Modular(), adam)
    rows = {
        step: {"step": step, "train_accuracy": step / 842, "val_accuracy": step / 947, "val_loss": 1_000 - step}
        for step in path
        if step
    }
    state = lambda step: SimpleNamespace(params={"w": jnp.full((1,), path[step])})
    history = [(row, state(step)) for step, row in rows.items()]
    assert paper.follow(run, iter(history[:2]), None) == {"A_B": 6}
    further = [*history, ({"step": 910, "train_accuracy": 1, "val_accuracy": 1}, state(400))]
    for states in (history, further):
        assert paper.follow(run, iter(states), None) == {"A_B": 6, "B_C": 4, "A_C": 10}
    (baseline,) = product(Modular(), adam, max_steps=paper.BASELINE_STEPS)
    at_the_end = [*history, ({**rows[900], "step": paper.BASELINE_STEPS}, state(400))]
    found = paper.follow(baseline, iter(at_the_end), None)
    assert {name: value for name, value in found.items() if "_" in name and len(name) == 3} == (
        {"A_B": 6, "B_C": 3, "A_C": 3}
    )
    assert found["lowest_accuracy"] == [float(f"{400 / 947:.4g}"), float(f"{900 / 947:.4g}")]
    assert found["highest_accuracy"] == [float(f"{900 / 947:.4g}")] * 2
    assert found["share_at_95"] == [0.3333, 1.0]
    assert found["highest_loss"] == [600, 100]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_distances_are_of_the_runs_that_reach_c():
    runs = [run.key for run in product(Modular(), adam, weight_decay=0.005, seed=range(3))]
    steps = ([3.0, 4.0, 5.0], [5.0, 4.0, 7.0], [80.0, math.nan, math.nan])
    frame = pd.DataFrame(
        [key | dict(zip(("A_B", "B_C", "A_C"), numbers, strict=True)) for key, numbers in zip(runs, steps, strict=True)]
    )
    row = ["4.0 ± 1.4", "4.0 ± 0.0", "6.0 ± 1.4"]
    assert cells(paper.distances(frame))[0] == ["Adam, decay 0.005", "2", *row]
    assert cells(paper.distances(frame[:1]))[0] == ["Adam, decay 0.005", "1", "3.0", "4.0", "5.0"]


def test_the_baseline_is_told_by_windows():
    keys = [run.key for run in product(Modular(), adam, max_steps=paper.BASELINE_STEPS, stop_at=None, seed=range(2))]
    windows = np.arange(12)
    stored = [
        {
            "lowest_accuracy": list(windows / 100),
            "highest_accuracy": list((windows + i) / 20),
            "share_at_95": list(windows / 1_000),
            "highest_loss": list(10.0 * windows + i),
        }
        for i in range(2)
    ]
    frame = pd.DataFrame([key | numbers for key, numbers in zip(keys, stored, strict=True)])
    rows = cells(paper.baseline(frame))
    assert len(rows) == 12
    assert rows[0] == ["10 to 25,000", "0.0%", "2.5%", "0.0%", "1"]
    assert rows[11] == ["275,010 to 300,000", "11.0%", "57.5%", "1.1%", "111"]


def test_published_numbers_are_judged_by_hand():
    steps = pd.Series([1_000.0, 1_100.0, math.inf])
    assert not paper.near(900, steps[2:])
    assert [paper.near(number, steps) for number in (900, 910, 1_210, 1_220)] == [False, True, True, False]
    assert paper.near(700, steps, pd.Series([750.0]))
    assert [paper.verdict(*ok, seeds=seeds) for ok in ((1, 1), (0, 1), (0, 0)) for seeds in (2, 3)] == (
        ["open", "agrees", "open", "in part", "open", "no"]
    )
    control = pd.Series({0: 2_000.0, 2: 3_000.0, 1: math.inf, 3: 4_000.0})
    assert paper.times_fewer(control, steps).to_dict() == {0: 2.0}
    assert paper.in_words(steps) == "1,100 (1,000 to > 5,000; 3 seeds, 1 fail)"
    assert paper.in_words(steps[2:]) == "all fail in 5,000 steps (1 seed)"
    assert paper.in_words(steps[:1]) == "1,000 (1 seed)"
    assert paper.in_words(pd.Series([1.0, 2.0, 4.0])) == "2.00 (1.00 to 4.00; 3 seeds)"
    grid = pd.DataFrame({0.1: [1.0, 9.0], 0.2: [math.inf, 2.0], 0.3: [5.0, 5.0]})
    assert paper.best_claim("", "", 0.1, grid)[3] == "0.1 and 0.3 (median 5; 2 seeds)"
    assert paper.claim("Fig. 2", "MA", 790, steps)[2:] == ("790", paper.in_words(steps), "no")
    assert paper.claim("Fig. 2", "ratio", 1.5, pd.Series([1.4, 1.5, 1.6]))[2:] == (
        "1.50",
        "1.50 (1.40 to 1.60; 3 seeds)",
        "agrees",
    )


@pytest.mark.parametrize(
    ("steps", "cap", "number", "curve"),  # the verdict where 39,890 steps are published, and where only curves are
    [
        ([math.inf] * 8, 5_000, "open", "open"),
        ([math.inf], 50_000, "open", "open"),
        ([math.inf] * 3, 50_000, "no", "no"),
        ([40_000.0, math.inf, math.inf], 50_000, "agrees", "in part"),
        ([3_000.0, math.inf, math.inf], 5_000, "no", "in part"),
        ([3_000.0, 4_000.0, 2_000.0], 5_000, "no", "agrees"),
    ],
)
def test_runs_that_fail_tell_if_they_are_long_enough_and_three(steps, cap, number, curve):
    steps = pd.Series(steps)
    assert paper.claim("", "", 39_890, steps, cap=cap).verdict == number
    assert paper.reaching("", "", steps, cap=cap).verdict == curve


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [([math.inf] * 3, "agrees"), ([900.0, math.inf, math.inf], "in part"), ([900.0] * 3, "no"), ([math.inf], "open")],
)
def test_a_setting_that_fails_is_judged_by_all_seeds(steps, verdict):
    assert paper.failing("", "", "fails", pd.Series(steps)).verdict == verdict


@pytest.mark.parametrize(
    ("fails", "low", "here", "verdict"),
    [
        ([0, 0, 1], 0.5, "0.5, 2 reach 95 %; 10: 1 of 3 fail", "agrees"),
        ([0, 0, 3], 0.1, "0.5, 2 reach 95 %; 0.1 was not run; 10: 3 of 3 fail", "in part"),
        ([2, 0, 0], 0.5, "2 reach 95 %; 0.5: 2 of 3 fail", "in part"),
        ([3, 3, 0], 0.5, "0.5: 3 of 3 fail; 2: 3 of 3 fail", "no"),
    ],
)
def test_a_published_range_is_judged_by_its_values(fails, low, here, verdict):
    grid = pd.DataFrame({x: [math.inf] * n + [900.0] * (3 - n) for x, n in zip((0.5, 2.0, 10.0), fails, strict=True)})
    assert paper.range_claim("", low, 2.0, grid)[2:] == (f"{low:g} to 2", here, verdict)


@pytest.mark.parametrize(
    ("copies", "verdicts"),  # of the parameters that the EMA keeps, and the MA
    [((1, 103), ["agrees", "agrees", "in part"]), ((2.3, 60), ["no", "no", "agrees"]), ((25, 1), ["no", "no", "no"])],
)
def test_memory_is_judged_by_the_state(copies, verdicts):
    kept = zip(("none", "ema", "ma-100"), (0, *copies), strict=True)
    rows = [{"filter": name, "state_bytes": 8 + 4 * n} for name, n in kept]
    assert [row.verdict for row in paper.memory_claims(rows)] == verdicts


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([1_400.0, 1_500.0, 1_450.0], "agrees"),
        ([390.0, 350.0, 370.0], "in part"),
        ([90.0, 95.0, 91.0], "no"),
        ([1_400.0, 1_500.0], "open"),
        ([], "open"),
    ],
)
def test_the_distance_of_the_baseline_is_compared_with_the_ema(ends, verdict):
    runs = product(Modular(), ema) + product(Modular(), adam, max_steps=paper.BASELINE_STEPS, seed=range(len(ends)))
    followed = [{"A_C": value, "steps_to_95": 60_000.0} for value in (92.0, *ends)]
    frame = pd.DataFrame([run.key | numbers for run, numbers in zip(runs, followed, strict=True)])
    *_, here, found = cells(paper.claims(frame))[0]
    assert found == verdict
    assert here.startswith(f"{np.median(ends) / 92:.2f} (" if ends else "the baseline was not")


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (([45_000.0], [44_000.0], [2_000.0]), "agrees"),  # baseline, decay alone, both
        (([45_000.0], [2_100.0], [2_000.0]), "in part"),
        (([45_000.0], [44_000.0], [9_000.0]), "in part"),
        (([45_000.0], [44_000.0], [46_000.0]), "no"),
        (([45_000.0], [44_000.0], [2_000.0]), "open"),
    ],
)
def test_a_gain_of_another_task_is_judged_by_what_the_decay_alone_gives(outcomes, verdict):
    outcomes = [pd.Series(values * (1 if verdict == "open" else 3)) for values in outcomes]
    assert paper.task_claim("", "", (44_022, 2_001), outcomes, ",.0f").verdict == verdict


@pytest.mark.parametrize(
    ("published", "others", "verdict"),
    [
        ([900, 950, 700], [1_000, math.inf, math.inf], "agrees"),
        ([900, 950, math.inf], [800, 800, 800], "no"),
        ([900, 700, math.inf], [800, 800, 800], "in part"),
        ([math.inf] * 3, [800, 800, 800], "no"),
        ([math.inf] * 3, [math.inf] * 3, "no"),
        ([700, 700], [800, 800], "open"),
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
        ("Fig. 4", "EMA: best λ", "2", "2 (median 650; 2 seeds)", "open")
    )
    assert (
        paper.best_claim("", "", 1.0, grid)[3]
        == "2 (median 650; 2 seeds); 1: > 5,000 (900 to > 5,000; 2 seeds, 1 fail)"
    )
    assert paper.steps_of(ema, lamb=2.0).to_dict() == {0: 700.0, 1: 600.0, 3: 500.0}


def test_the_results_are_those_of_all_runs():
    results = paper.STUDY.results()
    assert results.missing(paper.runs(results)) == []


def test_the_roots_of_the_published_distances_are_told():
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    cell = r" ([\d.]+) ± [\d.]+ \| (\d+) \|"
    rows = re.findall(rf"^\| [\w, ]+ \|{3 * cell}$", text, re.MULTILINE)
    assert len(rows) == 2
    for row in rows:
        squares, roots = np.array(row[::2], float), np.array(row[1::2], float)
        np.testing.assert_array_equal(np.sqrt(1_000 * squares).round(), roots)
        assert squares[2] > squares[0] + squares[1]
        assert roots[2] < roots[0] + roots[1]


@pytest.mark.parametrize("page", ["paper", "mod97"])
def test_both_best_alphas_are_compared_with_eight_seeds(page):
    first, second = (paper.steps_of(ema, alpha=alpha) for alpha in (0.98, 0.95))
    text = " ".join((DOCS / f"{page}.md").read_text(encoding="utf-8").split())
    assert len(first) == len(second) == 8
    assert f"{first.median():,.0f} steps with α 0.98 and {second.median():,.0f} with α 0.95. On six of" in text
    assert ((first < second).sum(), (first > second).sum()) == (6, 2)


def test_the_steps_of_the_ema_are_those_of_its_runs():
    steps = paper.steps_of(ema)
    text = (DOCS / "paper.md").read_text(encoding="utf-8")
    assert f"the published 910 steps on eight seeds: {steps.min():,.0f} to {steps.max():,.0f}." in text
    assert not paper.near(910, steps)
    assert paper.near(910, paper.authors("ema"))


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        (["SGD", "momentum", "Nesterov"], "agrees"),
        (["SGD", "dampened momentum"], "in part"),
        (["dampened momentum"], "no"),
    ],
)
def test_theorem_a1_is_judged_by_the_optimizers(names, verdict):
    assert paper.order_claim({name: paper.LINEAR[name] for name in names}).verdict == verdict


@pytest.mark.parametrize(("settle", "first"), [(0, 1.0), (1, 0.1)])
def test_dampened_momentum_starts_with_the_first_gradient(settle, first):
    response = gf.impulse_response(paper.LINEAR["dampened momentum"], 4, settle=settle)
    np.testing.assert_allclose(response, first * 0.9 ** np.arange(4), rtol=1e-5)
