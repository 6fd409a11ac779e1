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
    numbers = {name: hyperparams(experiment.methods[name]) for name in study.TWO_BY_TWO}
    assert [numbers[name]["weight_decay"] for name in study.TWO_BY_TWO] == [decays[0]] * 2 + [decays[1]] * 2
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
    mnist = {
        name: [{"steps_to_80": 100 * k, "steps_to_85": 200 * k, "steps_to_88": None, "best_val_accuracy": 0.86}] * 2
        for k, name in enumerate(study.TWO_BY_TWO, 1)
    }
    losses = {"baseline": (2.0, 3.0), "filter-only": (4.0, 2.0), "decay-only": (1.0, 1.0), "paper": (0.5, 0.25)}
    qm9 = {name: [{"min_val_loss": loss} for loss in of_seeds] for name, of_seeds in losses.items()}
    imdb = {name: [{"best_val_accuracy": 0.6, "min_val_loss": 0.75}] for name in study.TWO_BY_TWO}
    found = ((study.MNIST, mnist), (study.QM9, qm9), (study.IMDB, imdb))
    return pd.concat([results_of(*one) for one in found], ignore_index=True)


def test_tables(frame):
    assert cells(study.mnist_steps(frame))[-1] == ["paper", "2", "400", "800", "fails", "86.0"]
    assert cells(study.qm9_losses(frame)) == [
        ["method", "seed 0", "seed 1", "median"],
        ["baseline", "2.00", "3.00", "2.50"],
        ["filter-only", "4.00", "2.00", "3.00"],
        ["decay-only", "1.00", "1.00", "1.00"],
        ["paper", "0.50", "0.25", "0.38"],
    ]
    assert cells(study.imdb_accuracies(frame))[-1] == ["paper", "1", "60.0", "0.750"]


def draw(name, frame):
    drawing = study.STUDY.figures[name]
    figure, axes = views.chart(drawing.title, **drawing.layout)
    drawing.draw(frame, axes)
    return figure.axes


def test_figures(frame):
    (axes,) = draw("paper_tasks_mnist", frame)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(study.TWO_BY_TWO.values())
    assert [line.get_xdata()[0] for line in axes.lines[::2]] == [200, 400, 600, 800]
    assert [line.get_color() for line in axes.lines[::2]] == [views.NO_FILTER, views.FILTER] * 2
    without, with_decay = draw("paper_tasks_qm9", frame)
    assert without.get_title() == "without decay: lower in 1 of 2 splits"
    assert with_decay.get_title() == "with decay: lower in 2 of 2 splits"
    assert [list(line.get_ydata()) for line in without.lines] == [[2, 4], [3, 2]]
    assert [line.get_color() == views.FILTER for line in without.lines] == [False, True]
    (axes,) = draw("paper_tasks_imdb", frame)
    assert axes.lines[0].get_xdata().tolist() == [60]


def test_the_memory_of_a_buffer_is_counted():
    """The ring has a slot more than the window has strides: 101 of float32, or 11."""
    runs = product(modular.Modular(), study.small_buffer_ma, stride=[1, 10], buffer_dtype=[None, "bfloat16"])
    frame = to_frame({"run": run.key, "steps_to_95": 900} for run in runs)
    assert [row[:4] for row in cells(study.buffers(frame))[1:]] == [
        ["float32", "1", "1", "1"],
        ["bfloat16", "1", "1/2", "1"],
        ["float32", "10", "1/9", "1"],
        ["bfloat16", "10", "1/18", "1"],
    ]


def test_ranges_count_failures_and_leave_out_groups_without_runs():
    runs = pd.DataFrame({"steps": [100.0, 300.0, math.inf], "loss": [math.nan] * 3})
    table = views.ranges({"a": runs, "b": runs[:0]}, {"steps": ("steps", 10, ",.0f"), "loss": ("loss", 1, ".2f")})
    assert cells(table) == [
        ["method", "seeds", "steps", "loss"],
        ["a", "3", "3,000 (1,000 to fails), 1 of 3 failed", ""],
    ]
    assert views.ranges({"b": runs[:0]}, {}) == views.MISSING


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
