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


def test_the_best_rate_has_the_lowest_median_and_a_failing_seed_counts_as_the_slowest():
    frame = made_up(lambda shape, age, lr: 10 * age + 1 / lr)
    best = study.at_best_rate(frame).groupby("place")["lr"].unique().map(list).to_dict()
    assert best == {"before AdamW": [0.05], "in AdamW": [0.05], "in Muon": [1.0]}
    frame.loc[(frame["shape"] == "EMA") & (frame["age"] == 4) & (frame["seed"] == 1), "steps_to_95"] = math.inf
    assert row(study.table(frame), "in Muon", "EMA, age 4")[1:] == ["> 2,000, 1 fail", "0 : 2 (p = 0.5)"]
    assert row(study.table(frame), "in Muon", "none")[1:] == ["1"]


def test_the_figure_draws_four_kernels_and_the_failures():
    frame = made_up(lambda shape, age, lr: math.inf if (shape, age) == ("MA", 64) else 300.0)
    panels = study.STUDY.figures["momentum_kernels"](frame).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[1].lines}
    assert [*lines] == ["without momentum", *study.DRAWN]
    assert lines["MA"] == [300, 300, 300, 1.5 * study.CAP]
