"""The measures of Fourier circuits: against clocks made by hand, noise, and NumPy in float64."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.special
from matplotlib.figure import Figure

from examples import circuits
from examples.circuits import Cycle
from examples.harness.cli import parse
from examples.harness.errors import UsageError
from examples.harness.experiment import Measure
from examples.harness.runner import stored, train
from examples.harness.train import program, step
from examples.modular import EXPERIMENT, Modular

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")

OPERATIONS = ("multiplication", "addition", "subtraction", "division")
TASKS = [(11, operation) for operation in OPERATIONS]
TASKS += [pytest.param(97, operation, marks=pytest.mark.slow) for operation in OPERATIONS]
by_operation = pytest.mark.parametrize(("p", "operation"), TASKS)


def answers(cycle):
    """The index of the answer of each pair, (i, j)."""
    index = np.arange(len(cycle.elements))
    return (index[:, None] + cycle.sign * index) % len(index)


def clock(cycle, keys, tokens, scale=20.0):
    """Embedding and logits of a model that computes by a clock on some frequencies, by hand."""
    n = len(cycle.elements)
    angle = 2 * np.pi * np.arange(n) / n
    waves = [wave(k * angle) for k in keys for wave in (np.cos, np.sin)]
    embedding = np.zeros((tokens, 2 * len(keys)))
    embedding[cycle.elements] = np.stack(waves, axis=1)
    logits = np.full((n, n, tokens), -scale)
    away = answers(cycle)[:, :, None] - np.arange(n)
    logits[:, :, cycle.elements] = scale * sum(np.cos(2 * np.pi * k * away / n) for k in keys)
    return embedding, logits


def keys_for(p):
    return [1, 3] if p == 11 else [5, 16, 33]


@by_operation
def test_a_clock_has_its_frequencies_and_nothing_else(p, operation, x64):
    cycle, keys = Cycle.of(p, operation), keys_for(p)
    n = len(cycle.elements)
    embedding, logits = clock(cycle, keys, p + 2)
    mask = np.isin(np.arange(1, n // 2 + 1), keys)
    share = circuits.power_shares(jnp.array(embedding[cycle.elements]))
    np.testing.assert_allclose(share, mask / len(keys), atol=1e-12)
    np.testing.assert_allclose(circuits.gini(share), 1 - len(keys) / (n // 2), atol=1e-12)

    loss = lambda mask: circuits.restricted_loss(jnp.array(logits), cycle, jnp.array(mask))
    assert loss(mask) < 1e-3
    # All elements of the cycle are alike, all else is far below.
    assert loss(np.zeros_like(mask)) == pytest.approx(math.log(n), abs=1e-6)

    coefficients = circuits.logit_coefficients(jnp.array(logits), cycle)
    np.testing.assert_allclose(coefficients, mask / len(keys) ** 0.5, atol=1e-12)
    np.testing.assert_array_equal(coefficients >= circuits.KEY_CORRELATION, mask)
    # The clock of the other direction is none of this one.
    other = cycle._replace(sign=-cycle.sign)
    assert circuits.restricted_loss(jnp.array(logits), other, jnp.array(mask)) > 0.9 * math.log(n)


def test_a_frequency_that_is_its_own_mirror_image_counts_once(x64):
    cycle = Cycle.of(97, "multiplication")
    embedding, logits = clock(cycle, [48], 99)
    mask = np.arange(1, 49) == 48
    np.testing.assert_allclose(circuits.power_shares(jnp.array(embedding[cycle.elements])), mask, atol=1e-12)
    np.testing.assert_allclose(circuits.logit_coefficients(jnp.array(logits), cycle), mask, atol=1e-12)


@by_operation
def test_a_cycle_goes_as_the_operation_does(p, operation):
    task, cycle = Modular(p=p, operation=operation), Cycle.of(p, operation)
    assert sorted(cycle.elements) == list(range(p - task.y_values, p))
    x, y = np.meshgrid(cycle.elements, cycle.elements, indexing="ij")
    pairs = jnp.array(x * task.y_values + y - (p - task.y_values))
    np.testing.assert_array_equal(task.operands(pairs), (x, y))
    np.testing.assert_array_equal(task.answer(pairs), cycle.elements[answers(cycle)])
    assert len(Cycle.of(p, operation, control=True).elements) != len(cycle.elements)


def test_primitive_roots_are_those_of_the_tables():
    roots = {2: 1, 3: 2, 5: 2, 7: 3, 11: 2, 23: 5, 41: 6, 97: 5, 113: 3, 191: 19}
    assert {p: circuits.primitive_root(p) for p in roots} == roots


@pytest.mark.parametrize("operation", ["multiplication", "division"])
def test_another_primitive_root_puts_the_frequencies_in_another_order(operation, x64):
    """g = h^m turns frequency k into mk: 97 has the primitive roots 5 and 7."""
    rng = np.random.default_rng(0)
    embedding = jnp.array(rng.normal(size=(99, 16)))
    by_pair = rng.normal(size=(97, 97, 99))  # by the numbers x and y
    five = Cycle.of(97, operation)
    seven = five._replace(elements=np.array([pow(7, j, 97) for j in range(96)]))
    (m,) = np.flatnonzero(five.elements == 7)
    frequencies = np.arange(1, 49)
    image = np.minimum(frequencies * m % 96, -frequencies * m % 96) - 1  # the index of k of root 7 for root 5
    share, other = (circuits.power_shares(embedding[cycle.elements]) for cycle in (five, seven))
    assert not np.allclose(share, other)
    np.testing.assert_allclose(np.sort(other), np.sort(share), rtol=1e-10)
    np.testing.assert_allclose(other[image], share, rtol=1e-10)
    found = []
    for cycle, mask in ((five, frequencies <= 4), (seven, np.isin(frequencies, image[:4] + 1))):
        logits = jnp.array(by_pair[cycle.elements[:, None], cycle.elements])
        found.append(
            [
                circuits.restricted_loss(logits, cycle, jnp.array(mask)),
                circuits.logit_coefficients(logits, cycle)[mask].sum(),
            ]
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


@by_operation
def test_numpy_in_float64_agrees(p, operation, x64):
    """By sums over all pairs and frequencies, without a transform."""
    cycle, rng = Cycle.of(p, operation), np.random.default_rng(p)
    n, sign = len(cycle.elements), cycle.sign
    frequencies = np.arange(1, n // 2 + 1)
    embedding, logits = rng.normal(size=(n, 7)), rng.normal(size=(n, n, p + 2))
    key = frequencies % 3 == 1
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    turn = 2 * np.pi / n

    def part(values, angle):
        """The part of the variance over all axes but the last that is in cos and sin of an angle."""
        flat = values.reshape(-1, values.shape[-1])
        waves = [np.cos(angle).ravel(), np.sin(angle).ravel()]
        return sum((wave @ flat) ** 2 / (wave @ wave) for wave in waves if wave @ wave > 1e-9) / len(flat)

    power = np.array([part(embedding, turn * k * np.arange(n)).sum() for k in frequencies])
    share = power / power.sum()
    np.testing.assert_allclose(circuits.power_shares(jnp.array(embedding)), share, rtol=1e-10)
    np.testing.assert_allclose(power.sum(), embedding.var(axis=0).sum(), rtol=1e-10)
    differences = np.abs(share[:, None] - share).mean() / (2 * share.mean())
    np.testing.assert_allclose(circuits.gini(jnp.array(share)), differences, rtol=1e-10)

    basis = [wave(turn * k * (i + sign * j)) for k in frequencies[key] for wave in (np.cos, np.sin)]
    projected = sum(
        np.multiply.outer(wave, np.tensordot(wave, logits, 2) / np.sum(wave**2))
        for wave in basis
        if np.any(wave > 1e-6)
    )
    answer = cycle.elements[(i + sign * j) % n][:, :, None]
    loss = lambda z: -np.take_along_axis(scipy.special.log_softmax(z, axis=-1), answer, -1)
    restricted = loss(projected + logits.mean(axis=(0, 1))).mean()
    found = circuits.restricted_loss(jnp.array(logits), cycle, jnp.array(key))
    np.testing.assert_allclose(found, restricted, rtol=1e-10)

    on_cycle = logits[:, :, cycle.elements]
    on_cycle = (on_cycle - on_cycle.mean(axis=2, keepdims=True)).ravel()
    away = (i + sign * j)[:, :, None] - np.arange(n)
    correlations = [np.corrcoef(on_cycle, np.cos(turn * k * away).ravel())[0, 1] for k in frequencies]
    np.testing.assert_allclose(circuits.logit_coefficients(jnp.array(logits), cycle), correlations, atol=1e-10)


@pytest.mark.slow
def test_a_random_model_looks_like_noise_in_both_bases():
    task = Modular()
    params = jax.vmap(task.init)(jax.random.split(jax.random.key(0), 8))
    found = jax.jit(jax.vmap(functools.partial(circuits.measure, task)))(params)
    expected = (1 / (np.pi * task.dim)) ** 0.5  # of shares that are normal with a relative deviation of 1 / sqrt(dim)
    for name in ("gini", "gini_control"):
        np.testing.assert_allclose(np.mean(found[name]), expected, rtol=0.15)
    assert not found["is_key"].any()
    np.testing.assert_allclose(found["restricted_loss"], math.log(97), rtol=0.06)
    assert (found["logit_share"] == 0).all()


@functools.cache
def small(operation):
    """A tiny model, what is measured of it, and the logits of its plain form."""
    task = Modular(p=11, dim=16, heads=2, depth=2 if operation == "multiplication" else 1, operation=operation)

    @jax.jit
    def measured():
        params, tokens = task.init(jax.random.key(3)), task.tokens(jnp.arange(task.pairs))
        plain = {"logits": task.with_params(params)(tokens)[:, -1], "tokens": tokens}
        logits = circuits.logits_of_all_pairs(task, params, Cycle.of(11, operation))
        return params, circuits.measure(task, params), logits, plain

    return task, *jax.device_get(measured())


@pytest.mark.parametrize(
    "operation", ["division", *(pytest.param(name, marks=pytest.mark.slow) for name in OPERATIONS[:3])]
)
def test_what_is_measured_is_of_the_model(operation):
    _, _, _, logits, plain = small(operation)
    cycle = Cycle.of(11, operation)
    for i, j in itertools.product(range(len(cycle.elements)), repeat=2):
        x, y = cycle.elements[i], cycle.elements[j]
        (row,) = np.flatnonzero((plain["tokens"][:, 0] == x) & (plain["tokens"][:, 2] == y))
        np.testing.assert_allclose(logits[i, j], plain["logits"][row], atol=1e-5)


def test_vmapped_measures_are_the_single_ones():
    task, params, single, *_ = small("division")
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    vmapped = jax.jit(jax.vmap(functools.partial(circuits.measure, task)))(twice)
    for i in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], vmapped), single, rtol=1e-4, atol=1e-5)


def test_two_has_no_cycle_to_measure():
    with pytest.raises(UsageError, match=r"--p must be at least 3 where circuits are measured, got 2"):
        circuits.measure(Modular(p=2), {})


@pytest.mark.slow
def test_a_run_with_measures_costs_an_eighth_more_at_most():
    adamw = EXPERIMENT.run("adamw")
    compiled, key = program(adamw), jax.random.key(0)
    (_, data), state = compiled.draw(key), compiled.init(adamw.traced, key)
    batch = jax.tree.map(lambda x: x[0], adamw.task.batches(data, key))
    flops = lambda function, *arguments: jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    update = functools.partial(step, adamw.task, adamw.make_tx(adamw.traced))
    per_update = flops(update, data, (state.params, state.opt_state), batch)
    measured = flops(functools.partial(circuits.metrics, adamw.task), state.params, data)
    per_step = measured / circuits.MEASURE.every / adamw.task.steps
    assert 0.01 * per_update < per_step < per_update / 8  # validation, a quarter of a chunk, not counted


def run(experiment, *argv):
    train(experiment, *parse(experiment, [str(word) for word in argv]))


@pytest.mark.slow
def test_a_run_records_and_draws_its_circuit(tmp_path):
    small = ["--p", "5", "--dim", "8", "--heads", "2", "--depth", "1", "--batch-size", "8", "--stop-at", "None"]
    run(EXPERIMENT, *small, "--measure", "circuit", "--max-steps", "24", "--out", tmp_path / "run")
    frame = pd.read_csv(tmp_path / "run" / "metrics.csv")
    columns = [name for name in frame if name.startswith("circuit_")]
    measured = frame[frame["circuit_gini"].notna()]
    assert {"circuit_restricted_loss", "circuit_share_2", "circuit_logit_2", "circuit_gini_control"} <= {*columns}
    assert "circuit_share_3" not in columns  # 4 elements have the frequencies 1 and 2
    assert frame["step"].tolist() == list(range(2, 26, 2))
    assert measured["step"].tolist() == [2, 12, 22]
    assert measured[columns].notna().all(axis=None)
    np.testing.assert_allclose(measured["circuit_share_1"] + measured["circuit_share_2"], 1, rtol=1e-5)
    assert (tmp_path / "run" / "circuit.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_and_one_without_a_clock_are_drawn():
    names = ("restricted_loss", "gini", "share_1", "share_2", "logit_1")
    for coefficient, keys in ((0.0, []), (0.5, ["2"])):
        measured = {f"circuit_{name}": 0.04 for name in names} | {"circuit_logit_2": coefficient}
        rows = [{"step": 10.0} | measured, {"step": 20.0}, {"step": 30.0} | measured]
        _, shares = circuits.plot(rows, "a run").axes
        assert [text.get_text() for text in shares.texts] == keys


SIZE = Measure(
    lambda task, params, data: {"norm": jnp.linalg.norm(params["w"]), "loss": data["x"][0, 0] + task.batch_size},
    lambda rows, title: Figure(),
    every=3,
)
MEASURED = dataclasses.replace(toy.EXPERIMENT, measures={"size": SIZE})


@pytest.mark.usefixtures("shared_programs")
def test_a_task_has_measures_of_its_own_also_when_resumed(tmp_path):
    whole, resumed, without = (tmp_path / name for name in ("whole", "resumed", "without"))
    run(MEASURED, "--measure", "size", "--max-steps", "40", "--out", whole)
    frame = pd.read_csv(whole / "metrics.csv")
    assert list(frame)[-2:] == ["size_loss", "size_norm"]
    assert frame["step"][frame["size_norm"].notna()].tolist() == [4, 16, 28, 40]
    assert frame["size_norm"].nunique() == 4
    assert (whole / "size.png").exists()

    run(MEASURED, "--measure", "size", "--max-steps", "20", "--out", resumed)
    _, first, options = stored(resumed)
    assert options.measure == "size"
    train(MEASURED, dataclasses.replace(first, max_steps=40), options, resume=True)
    assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()

    run(MEASURED, "--max-steps", "40", "--out", without)
    plain = pd.read_csv(without / "metrics.csv")
    pd.testing.assert_frame_equal(plain, frame[list(plain)])
    assert len(list(plain)) == 5
    assert not (without / "size.png").exists()


def test_a_measure_is_one_of_the_tasks(tmp_path):
    for experiment, message in (
        (EXPERIMENT, r"--measure must be circuit, got size"),
        (toy.EXPERIMENT, r"--measure must be left out, for tests.toy has no measure, got size"),
    ):
        with pytest.raises(UsageError, match=message):
            run(experiment, "--measure", "size", "--out", tmp_path / "run")


def test_the_circle_of_a_clock_is_round_and_a_start_is_seen_from_it():
    task, k = Modular(), 5
    cycle = Cycle.of(97, "multiplication")
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(99, 128)) * 1e-3
    angle = 2 * np.pi * k * np.arange(96) / 96
    directions = np.linalg.qr(rng.normal(size=(128, 2)))[0]
    embedding[cycle.elements] += np.stack([np.cos(angle), np.sin(angle)], axis=1) @ directions.T + 3.0
    first, last = circuits.circle_points(task, [{"token": rng.normal(size=(99, 128))}, {"token": embedding}], k)
    np.testing.assert_allclose(last, np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=0.01)
    for points in (first, last):
        assert np.mean(np.sum(points**2, axis=1)) == pytest.approx(1)
    assert np.std(np.linalg.norm(first, axis=1)) > 0.2
    panels = Figure().subplots(1, 2)
    circuits.draw_circles(panels, np.stack([first, last]), ["one", "two"], k)
    np.testing.assert_allclose(panels[1].collections[0].get_offsets(), last)
