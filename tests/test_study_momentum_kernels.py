"""Momentum kernels: their gain and age, the optimizers that use them, and the tables of made-up results."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks.studies import momentum_kernels as study
from examples.harness.methods import split
from grokfast_jax import dc_gain, mean_age

pytestmark = pytest.mark.usefixtures("lenient")  # for transformations of optax


@pytest.mark.parametrize("age", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("shape", [*study.SHAPES][1:])
def test_kernels_have_a_gain_of_one_and_their_age(shape, age):
    kernel = study.SHAPES[shape](age)
    assert dc_gain(kernel) == pytest.approx(1, abs=1e-5)
    assert mean_age(kernel) == pytest.approx(age, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "age", "weight"),
    [("none", 0.0, 1.0), ("EMA", 4.0, 0.2), ("Nesterov EMA", 3.2, 0.36), ("MA", 4.0, 1 / 9), ("triangular", 4.0, 0.04)],
)
def test_weight_of_the_newest_gradient(shape, age, weight):
    assert study.newest_weight(shape, age) == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "age", "limit"), [("none", 0.0, 2), ("EMA", 4.0, 18), ("MA", 4.0, 18 * math.sin(math.pi / 18) ** 2)]
)
def test_stability_limits(shape, age, limit):
    assert study.stability_limit(shape, age) == pytest.approx(limit, rel=1e-4)


def test_places_differ_in_what_the_preconditioner_sees():
    params = {"w": jnp.eye(3), "b": jnp.ones(3)}
    grow = lambda k, p: (k + 1.0) * jnp.cos(k + jnp.arange(float(p.size)).reshape(p.shape))
    grads = [jax.tree.map(functools.partial(grow, k), params) for k in range(15)]

    def last(place, shape="EMA", age=2.0):
        tx = study.momentum_kernel(0.1, 0.0, place, shape, age)
        state, update = tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state, params)
        return updates

    before, within, muon = (last(place) for place in study.PLACES)
    assert not np.allclose(before["w"], within["w"], rtol=1e-2)
    assert np.linalg.svd(muon["w"], compute_uv=False)[:2] == pytest.approx(0.1, rel=0.4)  # the gradients have rank 2
    plain = last("in Muon", "none", 0.0)
    assert np.array_equal(plain["b"], muon["b"])  # vectors keep their own first moment
    assert not np.allclose(plain["w"], muon["w"], rtol=1e-2)


def test_runs_are_told_apart_by_columns_and_differ_in_traced_numbers_within_a_group():
    assert split(study.momentum_kernel, {"lr": 1.0, "weight_decay": 0.0, "place": "", "shape": "", "age": 1.0}) == (
        {"lr": 1.0, "weight_decay": 0.0},
        {"place": "", "shape": "", "age": 1.0},
    )
    results = study.STUDY.results()
    frame = pd.DataFrame([run.key for run in study.runs(results)])
    assert len(frame) == 3 * 29 * 5 * 8
    assert not frame.duplicated().any()
    sizes = frame.groupby(["place", "shape", "age", "group_size"]).size().reset_index(name="runs")
    assert (sizes["runs"] == sizes["group_size"]).all()  # every group is whole


def made_up(steps):
    """Results by the steps of a kernel at a learning rate, the same with two seeds and in all places."""
    rows = [
        {"place": place, "shape": shape, "age": age, "lr": lr, "seed": seed, "steps_to_95": steps(shape, age, lr)}
        for place, (_, rates) in study.PLACES.items()
        for shape, age in study.KERNELS
        for lr in rates
        for seed in range(2)
    ]
    return pd.DataFrame(rows)


def row(table, *first):
    """The cells of the row of a table that begins with these."""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines()]
    found = [cells for cells in rows if cells[: len(first)] == list(first)]
    assert len(found) <= 1
    return found[0][len(first) :] if found else None


def test_largest_rates_follow_the_limit():
    frame = made_up(lambda shape, age, lr: math.inf if lr > 0.03 * study.stability_limit(shape, age) else 300.0)
    best = study.at_best_rate(study.medians(frame)).set_index(["place", "shape", "age"])
    largest = best.loc["in AdamW"]["largest"]
    assert largest["none", 0.0] == 0.05
    assert largest["MA", 4.0] == 0.01  # its limit is 0.54
    assert largest["MA", 64.0] == 0
    low, high, correlation = row(study.largest_rates(frame), "in AdamW")
    assert high == "16 of 16"
    assert low.endswith("of 12")
    assert float(correlation) > 0.9
    fast = study.fastest(frame)
    assert row(fast, "in AdamW", "0.01")[-1].startswith("0.4 to ")
    assert row(fast, "in AdamW", "0.05")[:3] == ["300", "300", "17 of 29"]
    assert row(fast, "in Muon", "1")[:2] == ["300", "> 2,000"]  # without a kernel the limit is 2
    assert row(study.table(frame), "in AdamW", "MA, age 64")[2:] == ["> 2,000", "2 of 2", "0 of 5"]


def test_the_steps_are_explained_by_what_they_follow():
    by_age = made_up(lambda shape, age, lr: round(10 * age + 1 / lr))
    _, lr, lr_and_age, correlation, _ = row(study.explained(by_age), "in AdamW")
    assert (lr_and_age, correlation) == ("100%", "1.00")
    assert 0 < float(lr.rstrip("%")) < 100
    by_weight = made_up(lambda shape, age, lr: round(300 - 200 * study.newest_weight(shape, age)))
    _, lr, _, _, correlation = row(study.explained(by_weight), "in AdamW")
    assert (lr, correlation) == ("0%", "-1.00")
    best = study.at_best_rate(study.medians(by_age))
    assert best.groupby("place")["lr"].unique().map(list).to_dict() == {
        "before AdamW": [0.05],
        "in AdamW": [0.05],
        "in Muon": [1.0],
    }
    assert set(best["safe"]) == {5}


def test_the_fastest_kernels_are_within_a_tenth_at_rates_at_which_some_work():
    steps = {"none": 300.0, "EMA": 330.0}
    fast = study.fastest(made_up(lambda shape, age, lr: math.inf if lr < 0.02 else steps.get(shape, 331.0)))
    assert row(fast, "in AdamW", "0.01") is None
    assert row(fast, "in AdamW", "0.02") == ["300", "300", "5 of 29", "2 to 258"]


def test_a_failing_seed_counts_as_the_slowest():
    frame = made_up(lambda shape, age, lr: 300.0)
    frame.loc[(frame["shape"] == "EMA") & (frame["age"] == 4) & (frame["seed"] == 1), "steps_to_95"] = math.inf
    assert row(study.table(frame), "in Muon", "EMA, age 4")[2:] == ["> 2,000", "1 of 2", "0 of 5"]
    assert row(study.table(frame), "in Muon", "none")[2:] == ["300", "0 of 2", "5 of 5"]


def test_figures_draw_every_kernel():
    frame = made_up(lambda shape, age, lr: math.inf if lr > 0.03 * study.stability_limit(shape, age) else 300.0)
    figures = {}
    for name, drawing in study.STUDY.figures.items():
        figures[name], axes = study.views.chart(drawing.title, **drawing.layout)
        drawing.draw(frame, axes)
    rates, _, limits = (figures[f"momentum_kernels_{name}"].axes[1] for name in ("rates", "ages", "limits"))
    assert sum(line.get_linestyle() == "-" for line in rates.lines) == 29
    crosses = [line for line in rates.lines if line.get_marker() == "x"]
    fails = frame[(frame["place"] == "in AdamW") & (frame["seed"] == 0) & np.isinf(frame["steps_to_95"])]
    assert sum(int(np.isfinite(line.get_ydata()).sum()) for line in crosses) == len(fails)
    assert sum(len(line.get_xdata()) for line in limits.lines if line.get_marker() == "o") == 29
