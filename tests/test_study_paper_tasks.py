"""The paper's other tasks: filter and weight decay, two by two, and a smaller buffer of the MA."""

import math

import pandas as pd
import pytest

from benchmarks import views
from benchmarks.studies import paper_tasks as study
from examples import modular
from examples.harness.engine import product, to_frame
from examples.harness.methods import hyperparams

pytestmark = pytest.mark.usefixtures("lenient")


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if ":-" not in line]


def test_stored_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 4 * (5 + 5 + 3) + 12
    assert results.missing(runs) == []
    assert len(results.frame()) == len(runs)
    assert {run.task.__class__.__name__: run.max_steps for run in runs} == {
        "Mnist": 100_000,
        "Qm9": 100_000,
        "Imdb": 750,
        "Modular": 5_000,
    }


@pytest.mark.parametrize(
    ("experiment", "decays", "filter_numbers"),
    [
        (study.MNIST, (0.01, 2.0), {"lr": 1e-3, "alpha": 0.8, "lamb": 0.1}),
        (study.QM9, (0.0, 0.01), {"lr": 1e-3, "alpha": 0.9, "lamb": 1.0}),
        (study.IMDB, (1.0, 10.0), {"lr": 3e-4, "alpha": 0.98, "lamb": 2.0}),
    ],
)
def test_methods_are_filter_and_decay_two_by_two(experiment, decays, filter_numbers):
    numbers = {name: hyperparams(experiment.methods[name]) for name in study.NAMES}
    assert [numbers[name]["weight_decay"] for name in study.NAMES] == [decays[0]] * 2 + [decays[1]] * 2
    for name in ("filter-only", "paper"):
        assert {key: numbers[name][key] for key in filter_numbers} == filter_numbers
    for name in ("baseline", "decay-only"):
        assert numbers[name] == {"lr": filter_numbers["lr"], "weight_decay": numbers[name]["weight_decay"]}


def results_of(experiment, outcomes):
    """A frame with an outcome for each method and seed."""
    return to_frame(
        {"run": run.key, **outcome}
        for name, of_seeds in outcomes.items()
        for run, outcome in zip(
            product(experiment.task, experiment.methods[name], seed=range(len(of_seeds))), of_seeds, strict=True
        )
    )


@pytest.fixture
def frame():
    steps = {"baseline": (40, 50), "filter-only": (30, 60), "decay-only": (4, None), "paper": (3, 6)}
    losses = {"baseline": (2.0, 3.0), "filter-only": (4.0, 2.0), "decay-only": (1.0, 1.0), "paper": (0.5, 0.25)}
    accuracies = {"baseline": (0.5, 0.6), "filter-only": (0.6, 0.7), "decay-only": (0.7,), "paper": (0.8,)}
    found = (
        (study.MNIST, "steps_to_85", steps),
        (study.QM9, "min_val_loss", losses),
        (study.IMDB, "best_val_accuracy", accuracies),
    )
    by_method = lambda column, outcomes: {name: [{column: x} for x in xs] for name, xs in outcomes.items()}
    return pd.concat([results_of(task, by_method(*one)) for task, *one in found], ignore_index=True)


def test_the_filter_is_compared_with_each_weight_decay(frame):
    assert cells(study.two_by_two(frame))[1:] == [
        ["MNIST: steps to 85 %", "0.01", "45 (40 to 50)", "45 (30 to 60)", "1, 1 of 2", "1"],
        ["MNIST: steps to 85 %", "2", "fails (4 to fails), 1 of 2 failed", "4 (3 to 6)", "2, 0 of 2", "0.5"],
        ["QM9: lowest loss", "0", "2.50 (2.00 to 3.00)", "3.00 (2.00 to 4.00)", "1, 1 of 2", "1"],
        ["QM9: lowest loss", "0.01", "1.00", "0.38 (0.25 to 0.50)", "2, 0 of 2", "0.5"],
        ["IMDb: best accuracy (%)", "1", "55.0 (50.0 to 60.0)", "65.0 (60.0 to 70.0)", "2, 0 of 2", "0.5"],
        ["IMDb: best accuracy (%)", "10", "70.0", "80.0", "1, 0 of 1", "1"],
    ]


def test_the_figure_joins_the_outcomes_of_a_seed(frame):
    panels = study.STUDY.figures["paper_tasks"](frame).axes
    joined = [list(line.get_ydata()) for line in panels[1].lines if line.get_color() == views.GREY]
    assert joined == [[2, 4], [3, 2], [1, 0.5], [1, 0.25]]
    colours = {line.get_color() for line in panels[1].lines} - {views.GREY}
    assert colours == {views.NO_FILTER, views.FILTER}


def test_the_memory_of_a_buffer_is_counted():
    """The ring has a slot more than the window has strides: 101 of float32, or 11."""
    runs = product(modular.Modular(), study.small_buffer_ma, stride=[1, 10], buffer_dtype=[None, "bfloat16"])
    frame = to_frame({"run": run.key, "steps_to_95": 900} for run in runs)
    assert [row[:4] for row in cells(study.buffers(frame))[1:]] == [
        ["float32", "1", "101", "1"],
        ["bfloat16", "1", "50.5", "1"],
        ["float32", "10", "11", "1"],
        ["bfloat16", "10", "5.5", "1"],
    ]


def test_ranges_count_failures():
    runs = pd.DataFrame({"steps": [1000.0, 3000.0, math.inf]})
    expected = {"runs": "3", "steps to 95 %": "3,000 (1,000 to fails), 1 of 3 failed"}
    assert views.range_cells(runs, {"steps to 95 %": ("steps", ",.0f")}) == expected


def test_runs_of_a_method_have_its_numbers():
    keys = [
        run.key
        for lamb in (2.0, 5.0)
        for run in product(modular.Modular(), modular.ema, lamb=lamb, weight_decay=[0.0, 0.005], seed=range(2))
    ]
    frame = pd.DataFrame(keys + [run.key for run in product(modular.Modular(), modular.adam)])
    assert views.runs_of(frame, modular.ema).index.tolist() == [2, 3]
    assert views.runs_of(frame, modular.ema, free=["weight_decay"]).index.tolist() == [0, 1, 2, 3]
    assert views.runs_of(frame, modular.ema, seed=1).index.tolist() == [3]
    assert views.runs_of(frame, modular.adam).index.tolist() == [8]
    assert views.runs_of(frame, modular.ma).empty
