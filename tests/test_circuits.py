"""The measures of the clock: against clocks made by hand, noise, and NumPy in float64."""

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
import scipy.stats
from matplotlib.figure import Figure

from benchmarks.cost.tasks import matmul_flop
from benchmarks.study import circuits as study
from benchmarks.study.methods import METHODS
from examples import circuits
from examples.circuits import Cycle
from examples.harness.cli import main, parse
from examples.harness.config import Measure
from examples.harness.errors import UsageError, UserError
from examples.harness.runner import train
from examples.harness.train import program
from examples.modular import EXPERIMENT, Modular

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")

OPERATIONS = ("multiplication", "addition", "subtraction", "division")
TASKS = [(p, operation) for operation in OPERATIONS for p in (11, 97)]
by_operation = pytest.mark.parametrize(("p", "operation"), TASKS)


def clock(cycle, keys, tokens, scale=20.0):
    """Embedding, neurons and logits of a model that computes by a clock on some frequencies, by hand."""
    n = len(cycle.numbers)
    angle = 2 * np.pi * np.arange(n) / n
    waves = [wave(k * angle) for k in keys for wave in (np.cos, np.sin)]
    embedding = np.zeros((tokens, 2 * len(keys)))
    embedding[cycle.numbers] = np.stack(waves, axis=1)
    # The products from which the cos and sin of a sum are made
    neurons = np.stack([np.multiply.outer(a, b) for k in range(0, len(waves), 2) for a, b in pairs(waves[k : k + 2])])
    logits = np.full((n, n, tokens), -scale)
    away = cycle.answers[:, :, None] - np.arange(n)
    logits[:, :, cycle.numbers] = scale * sum(np.cos(2 * np.pi * k * away / n) for k in keys)
    return embedding, np.moveaxis(neurons, 0, -1), logits


def pairs(waves):
    return itertools.product(waves, repeat=2)


def keys_for(p):
    return [1, 3] if p == 11 else [5, 16, 33]


@by_operation
def test_a_clock_has_its_frequencies_and_nothing_else(p, operation, x64):
    cycle, keys = Cycle.of(p, operation), keys_for(p)
    n = len(cycle.numbers)
    embedding, neurons, logits = clock(cycle, keys, p + 2)
    mask = np.isin(np.arange(1, n // 2 + 1), keys)
    share = circuits.spectrum(jnp.array(embedding[cycle.numbers]))
    np.testing.assert_allclose(share, mask / len(keys), atol=1e-12)
    np.testing.assert_array_equal(circuits.fewest(share), mask)
    np.testing.assert_allclose(circuits.gini(share), 1 - len(keys) / (n // 2), atol=1e-12)
    tuned = circuits.tuning(jnp.array(neurons))
    np.testing.assert_allclose(tuned.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(circuits.tuned_neurons(jnp.array(neurons)), mask / len(keys), atol=1e-12)
    assert circuits.effective_rank(jnp.array(embedding[cycle.numbers])) == pytest.approx(2 * len(keys), abs=1e-9)

    train = jnp.array(np.random.default_rng(0).random((n, n)) < 0.5, float)
    losses = lambda mask: (
        circuits.restricted_loss(jnp.array(logits), cycle, jnp.array(mask)),
        circuits.excluded_loss(jnp.array(logits), cycle, jnp.array(mask), train),
    )
    restricted, excluded = losses(mask)
    assert restricted < 1e-3
    assert excluded == pytest.approx(math.log(n), abs=1e-6)  # all numbers on the cycle are alike, all else is far below
    none_restricted, none_excluded = losses(np.zeros_like(mask))
    assert none_restricted == pytest.approx(math.log(n), abs=1e-6)
    assert none_excluded < 1e-3

    coefficients = circuits.logit_coefficients(jnp.array(logits), cycle)
    np.testing.assert_allclose(coefficients, mask / len(keys) ** 0.5, atol=1e-12)
    np.testing.assert_array_equal(coefficients >= circuits.KEY, mask)
    # The clock of the other direction is none of this one.
    other = cycle._replace(sign=-cycle.sign)
    assert circuits.restricted_loss(jnp.array(logits), other, jnp.array(mask)) > 0.9 * math.log(n)


def test_a_frequency_that_is_its_own_mirror_image_counts_once(x64):
    cycle = Cycle.of(97, "multiplication")
    embedding, neurons, logits = clock(cycle, [48], 99)
    neurons = neurons[:, :, :1]  # sin is 0 at all places
    mask = np.arange(1, 49) == 48
    np.testing.assert_allclose(circuits.spectrum(jnp.array(embedding[cycle.numbers])), mask, atol=1e-12)
    np.testing.assert_allclose(circuits.tuning(jnp.array(neurons))[:, 0], mask, atol=1e-12)
    np.testing.assert_allclose(circuits.logit_coefficients(jnp.array(logits), cycle), mask, atol=1e-12)
    noise = np.random.default_rng(1).normal(size=(96, 3))
    np.testing.assert_allclose(circuits.power(jnp.array(noise)).sum(axis=0), noise.var(axis=0), rtol=1e-12)


@by_operation
def test_a_cycle_goes_as_the_operation_does(p, operation):
    task, cycle = Modular(p=p, operation=operation), Cycle.of(p, operation)
    assert sorted(cycle.numbers) == list(range(p - task.y_values, p))
    numbers = circuits.pair_numbers(task, cycle)
    x, y = task.operands(jnp.array(numbers))
    np.testing.assert_array_equal(x, np.broadcast_to(cycle.numbers[:, None], numbers.shape))
    np.testing.assert_array_equal(y, np.broadcast_to(cycle.numbers[None], numbers.shape))
    np.testing.assert_array_equal(task.answer(jnp.array(numbers)), cycle.numbers[cycle.answers])
    assert len(Cycle.control(p, operation).numbers) != len(cycle.numbers)


def test_primitive_roots_are_those_of_the_tables():
    roots = {2: 1, 3: 2, 5: 2, 7: 3, 11: 2, 23: 5, 41: 6, 97: 5, 113: 3, 191: 19}
    assert {p: circuits.primitive_root(p) for p in roots} == roots


@pytest.mark.parametrize("operation", ["multiplication", "division"])
def test_another_primitive_root_puts_the_frequencies_in_another_order(operation, x64):
    """g = h^m turns frequency k into mk: 97 has the primitive roots 5 and 7."""
    rng = np.random.default_rng(0)
    embedding = jnp.array(rng.normal(size=(99, 16)))
    by_pair = rng.normal(size=(97, 97, 99))  # by the numbers x and y
    five, seven = Cycle.of(97, operation), Cycle.of(97, operation, root=7)
    (m,) = np.flatnonzero(five.numbers == 7)
    places = np.arange(1, 49)
    image = np.minimum(places * m % 96, -places * m % 96) - 1  # the place of k of root 7 among those of root 5
    share, other = (circuits.spectrum(embedding[cycle.numbers]) for cycle in (five, seven))
    assert not np.allclose(share, other)
    np.testing.assert_allclose(np.sort(other), np.sort(share), rtol=1e-10)
    np.testing.assert_allclose(other[image], share, rtol=1e-10)
    found = []
    for cycle, mask in ((five, places <= 4), (seven, np.isin(places, image[:4] + 1))):
        logits = jnp.array(by_pair[cycle.numbers[:, None], cycle.numbers])
        found.append(
            [
                circuits.restricted_loss(logits, cycle, jnp.array(mask)),
                circuits.excluded_loss(logits, cycle, jnp.array(mask), jnp.ones((96, 96))),
                circuits.logit_coefficients(logits, cycle)[mask].sum(),
            ]
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


@by_operation
def test_numpy_in_float64_agrees(p, operation, x64):
    """By sums over all pairs and frequencies, without a transform."""
    cycle, rng = Cycle.of(p, operation), np.random.default_rng(p)
    n, sign = len(cycle.numbers), cycle.sign
    frequencies = np.arange(1, n // 2 + 1)
    embedding, neurons, logits = rng.normal(size=(n, 7)), rng.normal(size=(n, n, 5)), rng.normal(size=(n, n, p + 2))
    train, key = rng.integers(2, size=(n, n)), frequencies % 3 == 1
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    turn = 2 * np.pi / n

    def part(values, angle):
        """The part of the variance over all axes but the last that is in cos and sin of an angle."""
        flat = values.reshape(-1, values.shape[-1])
        waves = [np.cos(angle).ravel(), np.sin(angle).ravel()]
        return sum((wave @ flat) ** 2 / (wave @ wave) for wave in waves if wave @ wave > 1e-9) / len(flat)

    power = np.array([part(embedding, turn * k * np.arange(n)).sum() for k in frequencies])
    share = power / power.sum()
    np.testing.assert_allclose(circuits.spectrum(jnp.array(embedding)), share, rtol=1e-10)
    np.testing.assert_allclose(power.sum(), embedding.var(axis=0).sum(), rtol=1e-10)
    differences = np.abs(share[:, None] - share).mean() / (2 * share.mean())
    np.testing.assert_allclose(circuits.gini(jnp.array(share)), differences, rtol=1e-10)
    held = circuits.fewest(jnp.array(share))
    assert share[held].sum() >= 0.9
    assert share[held].sum() - share[held].min() < 0.9
    assert share[held].min() > share[~held].max(initial=0)

    angles = lambda k: {
        tuple(np.round(np.cos(a).ravel(), 6)): a
        for a in (k * turn * i, k * turn * j, k * turn * (i + j), k * turn * (i - j))
    }
    tuned = np.array([sum(part(neurons, angle) for angle in angles(k).values()) for k in frequencies])
    np.testing.assert_allclose(circuits.tuning(jnp.array(neurons)), tuned / neurons.var(axis=(0, 1)), rtol=1e-10)

    basis = [wave(turn * k * (i + sign * j)) for k in frequencies[key] for wave in (np.cos, np.sin)]
    projected = sum(
        np.multiply.outer(wave, np.tensordot(wave, logits, 2) / np.sum(wave**2))
        for wave in basis
        if np.any(wave > 1e-6)
    )
    answers = cycle.numbers[(i + sign * j) % n]
    loss = lambda z: -np.take_along_axis(scipy.special.log_softmax(z, axis=-1), answers[:, :, None], -1)[:, :, 0]
    restricted = loss(projected + logits.mean(axis=(0, 1))).mean()
    excluded = loss(logits - projected)[train == 1].mean()
    found = [
        circuits.restricted_loss(jnp.array(logits), cycle, jnp.array(key)),
        circuits.excluded_loss(jnp.array(logits), cycle, jnp.array(key), jnp.array(train, float)),
    ]
    np.testing.assert_allclose(found, [restricted, excluded], rtol=1e-10)

    on_cycle = logits[:, :, cycle.numbers]
    on_cycle = (on_cycle - on_cycle.mean(axis=2, keepdims=True)).ravel()
    away = (i + sign * j)[:, :, None] - np.arange(n)
    correlations = [np.corrcoef(on_cycle, np.cos(turn * k * away).ravel())[0, 1] for k in frequencies]
    np.testing.assert_allclose(circuits.logit_coefficients(jnp.array(logits), cycle), correlations, atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(np.cov(embedding.T))
    q = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    np.testing.assert_allclose(circuits.effective_rank(jnp.array(embedding)), np.prod(q**-q), rtol=1e-8)


def test_a_random_model_looks_like_noise_in_both_bases():
    task = Modular()
    params = jax.vmap(task.init)(jax.random.split(jax.random.key(0), 8))
    data = {"train": jnp.tile(jnp.arange(task.train_size), (8, 1))}
    found = jax.jit(jax.vmap(functools.partial(circuits.measure, task)))(params, data)
    expected = (1 / (np.pi * task.dim)) ** 0.5  # of shares that are normal with a relative deviation of 1 / sqrt(dim)
    for name in ("gini", "gini_control"):
        np.testing.assert_allclose(np.mean(found[name]), expected, rtol=0.15)
    assert not found["key"].any()
    np.testing.assert_allclose(found["restricted_loss"], math.log(97), rtol=0.06)
    assert (found["logit_share"] == 0).all()
    assert (found["effective_rank"] > 80).all()
    assert (found["embedding_frequencies"] >= 41).all()


@functools.cache
def small(operation):
    """A tiny model, its data, and what is measured of it: with its own key frequencies, and with none."""
    task = Modular(p=11, dim=16, heads=2, depth=2 if operation == "multiplication" else 1, operation=operation)

    @jax.jit
    def measured():
        params, data = task.init(jax.random.key(3)), task.split({}, jax.random.key(4))
        own = circuits.measure(task, params, data)
        none = circuits.measure(task, params, data, jnp.zeros_like(own["key"]))
        model, tokens = task.with_params(params), task.tokens(jnp.arange(task.pairs))
        batch = {"index": data["train"], "weight": jnp.ones(task.train_size)}
        plain = {"logits": model(tokens)[:, -1], "tokens": tokens, "loss": task.metrics(params, data, batch)["loss"]}
        return params, data, own, none, circuits.tables(task, params, Cycle.of(11, operation)), plain

    return task, *jax.device_get(measured())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_measured_is_of_the_model_and_its_training_pairs(operation):
    task, params, data, own, none, (logits, neurons), plain = small(operation)
    cycle = Cycle.of(11, operation)
    for i, j in itertools.product(range(len(cycle.numbers)), repeat=2):
        x, y = cycle.numbers[i], cycle.numbers[j]
        (row,) = np.flatnonzero((plain["tokens"][:, 0] == x) & (plain["tokens"][:, 2] == y))
        np.testing.assert_allclose(logits[i, j], plain["logits"][row], atol=1e-5)
    assert neurons.shape == (*cycle.answers.shape, 64)
    # Without a key frequency the excluded loss is the training loss, of the pairs that are on the cycle.
    on_cycle = np.isin(data["train"] // task.y_values, cycle.numbers)
    assert none["excluded_loss"] == pytest.approx(np.mean(plain["loss"][on_cycle]), rel=1e-4)
    assert on_cycle.all() == (operation in ("addition", "subtraction"))
    squares = sum(own[f"norm_{group}"] ** 2 for group in circuits.GROUPS)
    assert squares == pytest.approx(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(params)), rel=1e-5)
    assert own["norm_head"] == pytest.approx(np.linalg.norm(params["head"]["kernel"]), rel=1e-5)
    assert own["norm_mlp"] > own["norm_head"]
    centred = (plain["logits"] - plain["logits"].mean(axis=1, keepdims=True))[
        np.isin(plain["tokens"][:, 0], cycle.numbers)
    ]
    assert own["logit_scale"] == pytest.approx(np.sqrt(np.mean(centred**2)), rel=1e-4)


def test_vmapped_measures_are_the_single_ones():
    task, params, data, single, *_ = small("division")
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (params, data))
    vmapped = jax.jit(jax.vmap(functools.partial(circuits.measure, task)))(*twice)
    for i in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], vmapped), single, rtol=1e-4, atol=1e-5)


def test_the_neurons_are_what_the_last_mlp_reads():
    """Adding to a row of `down` does what that neuron's activation times as much in the bias of `down` does."""
    task, params, *_, (logits, neurons), _ = small("multiplication")
    up = np.zeros(16, np.float32)
    up[0] = 0.5
    i, j, f = 2, 5, 7

    def moved(name, index, by):
        other = jax.tree.map(np.copy, params)
        other["blocks"][1]["down"][name][index] += by
        return jax.jit(functools.partial(circuits.tables, task, cycle=Cycle.of(11, "multiplication")))(other)[0][i, j]

    by_row = moved("kernel", f, up)
    np.testing.assert_allclose(by_row, moved("bias", slice(None), neurons[i, j, f] * up), atol=1e-5)
    assert np.abs(by_row - logits[i, j]).max() > 1e-4


def test_two_has_no_cycle_to_measure():
    with pytest.raises(UsageError, match=r"--p must be at least 3 where circuits are measured, got 2"):
        circuits.measure(Modular(p=2), {}, {})


def test_a_run_with_measures_costs_a_tenth_more_at_most():
    config = EXPERIMENT.preset("adamw-1")
    compiled, key = program(config.task), jax.random.key(0)
    (shared, own), state = compiled.draw(key), compiled.init(config.hyper, key)
    chunk = matmul_flop(compiled.advance, config.hyper, key, shared, own, state)
    columns = jax.jit(functools.partial(circuits.columns, config.task))
    assert matmul_flop(columns, state.params, own) / circuits.MEASURE.every < 0.1 * chunk


def run(experiment, *argv):
    train(experiment, *parse(experiment, [str(word) for word in argv]))


@pytest.mark.usefixtures("collected")
def test_a_run_records_and_draws_its_circuit(tmp_path):
    small = ["--p", "5", "--dim", "8", "--heads", "2", "--depth", "1", "--batch-size", "8", "--stop-at", "None"]
    run(EXPERIMENT, *small, "--measure", "circuit", "--budget", "24", "--out", tmp_path / "run")
    frame = pd.read_csv(tmp_path / "run" / "metrics.csv")
    columns = [name for name in frame if name.startswith("circuit_")]
    measured = frame[frame["circuit_gini"].notna()]
    assert {"circuit_restricted_loss", "circuit_share_2", "circuit_logit_2", "circuit_norm_mlp"} <= {*columns}
    assert "circuit_share_3" not in columns  # 4 elements have the frequencies 1 and 2
    assert frame["step"].tolist() == list(range(2, 26, 2))
    assert measured["step"].tolist() == [2, 12, 22]
    assert measured[columns].notna().all(axis=None)
    np.testing.assert_allclose(measured["circuit_share_1"] + measured["circuit_share_2"], 1, rtol=1e-5)
    assert (tmp_path / "run" / "circuit.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_and_one_without_a_clock_are_drawn():
    names = ("restricted_loss", "excluded_loss", "gini", "share_1", "share_2", "logit_1")
    for coefficient, keys in ((0.0, "none is key"), (0.5, "key: 2")):
        measured = {f"circuit_{name}": 0.04 for name in names} | {"circuit_logit_2": coefficient}
        plain = [{"step": 10.0 * i, "train_accuracy": 0.5, "val_accuracy": 0.1} for i in (1, 2, 3)]
        *_, spectrum = circuits.picture([plain[0] | measured, plain[1], plain[2] | measured], "a run").axes
        assert spectrum.get_xlabel() == f"frequencies by share at step 30\n{keys}"


SIZE = Measure(
    lambda task, params, data: {"norm": jnp.linalg.norm(params["w"]), "loss": data["x"][0, 0] + task.batch_size},
    lambda rows, title: Figure(),
    every=3,
)
MEASURED = dataclasses.replace(toy.EXPERIMENT, measures={"size": SIZE})


@pytest.mark.usefixtures("collected")
def test_a_task_has_measures_of_its_own_also_when_resumed(tmp_path):
    whole, resumed, without = (tmp_path / name for name in ("whole", "resumed", "without"))
    run(MEASURED, "--measure", "size", "--budget", "40", "--out", whole)
    frame = pd.read_csv(whole / "metrics.csv")
    assert list(frame)[-2:] == ["size_loss", "size_norm"]
    assert frame["step"][frame["size_norm"].notna()].tolist() == [4, 16, 28, 40]
    assert frame["size_norm"].nunique() == 4
    assert (whole / "size.png").exists()

    run(MEASURED, "--measure", "size", "--budget", "20", "--out", resumed)
    run(MEASURED, "--resume", resumed, "--budget", "40")
    assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()

    run(MEASURED, "--budget", "40", "--out", without)
    plain = pd.read_csv(without / "metrics.csv")
    pd.testing.assert_frame_equal(plain, frame[list(plain)])
    assert len(list(plain)) == 5
    assert not (without / "size.png").exists()
    with pytest.raises(UsageError, match=r"--measure is None in the run in .*without and must stay so, got size"):
        run(MEASURED, "--resume", without, "--measure", "size")


def test_the_flag_is_there_where_a_task_has_measures(capsys):
    for experiment, there in ((EXPERIMENT, True), (toy.EXPERIMENT, False)):
        with pytest.raises(SystemExit):
            main(experiment, ["--help"])
        assert ("--measure {None,circuit}" in capsys.readouterr().out) == there
    with pytest.raises(SystemExit):
        main(toy.EXPERIMENT, ["--measure", "circuit"])
    assert "--measure" in capsys.readouterr().err


def test_the_circle_of_a_clock_is_round_and_a_start_is_seen_from_it():
    task, k = Modular(), 5
    cycle = Cycle.of(97, "multiplication")
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(99, 128)) * 1e-3
    angle = 2 * np.pi * k * np.arange(96) / 96
    directions = np.linalg.qr(rng.normal(size=(128, 2)))[0]
    embedding[cycle.numbers] += np.stack([np.cos(angle), np.sin(angle)], axis=1) @ directions.T + 3.0
    first, last = circuits.circle_points(task, [{"token": rng.normal(size=(99, 128))}, {"token": embedding}], k)
    np.testing.assert_allclose(last, np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=0.01)
    for points in (first, last):
        assert np.mean(np.sum(points**2, axis=1)) == pytest.approx(1)
    assert np.std(np.linalg.norm(first, axis=1)) > 0.2
    assert len(circuits.circles(np.stack([first, last]), ["one", "two"], k).axes) == 2


def result(key, coefficients=None, **changes):
    """A result of the study, as it is loaded."""
    shares = np.zeros(48)
    shares[np.array(key) - 1] = 1 / len(key)
    curves = {"restricted_loss": [4.6, 3.0, 2.0, 0.1], "gini": [0.05, 0.1, 0.4, 0.5], "logit_share": [0, 0, 0.5, 0.9]}
    base = {
        "method": "ma",
        "operation": "multiplication",
        "seed": 0,
        "p": 97,
        "first_step": 150,
        "first_step_train": 75,
    }
    found = {"key": key, "share": shares, "logit_coefficients": shares if coefficients is None else coefficients}
    return base | curves | found | {"steps": [0, 50, 100, 150], "gini_control": 0.04, "sketch": [1, 2]} | changes


def test_steps_of_the_study_by_hand():
    run = result([4, 5])
    assert (study.clock_step(run), study.gini_step(run)) == (100, 100)
    assert math.isnan(study.clock_step(run | {"restricted_loss": [4.6, 4.6, 4.6, 2.4]}))
    assert study.fit_step(run) == 75
    assert math.isnan(study.fit_step(run | {"first_step_train": None}))
    assert study.in_quotient(run).sum() == 32  # 96 has 32 units, in pairs of k and 96 - k
    assert not study.in_quotient(run)[[0, 4, 46]].any()
    assert not study.in_quotient(result([1], operation="addition")).any()
    assert len(study.reached([run, run | {"first_step": None}])) == 1


def test_chance_is_that_of_drawing_and_of_sums_of_draws():
    assert study.chance([(48, 5, 4)], 2) == pytest.approx(scipy.stats.hypergeom.sf(1, 48, 5, 4))
    assert study.chance([(48, 5, 4)] * 3, 0) == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = [(48, 5, 4), (48, 9, 7), (48, 8, 0)]
    sums = sum(rng.hypergeometric(marked, total - marked, drawn, 100_000) for total, marked, drawn in draws)
    assert study.chance(draws, 4) == pytest.approx(np.mean(sums >= 4), rel=0.05)
    assert np.mean(sums) == pytest.approx(sum(study.expected(*draw) for draw in draws), rel=0.01)


def test_logits_are_compared_by_their_clocks_and_by_a_sketch():
    cycle, rng = Cycle.of(97, "multiplication"), np.random.default_rng(0)
    logits = [sum(a * clock(cycle, [k], 99)[2] for k, a in keys.items()) for keys in ({4: 1, 9: 2}, {9: 1, 20: 1})]
    runs = [
        {"logit_coefficients": circuits.logit_coefficients(jnp.array(z, jnp.float32), cycle).tolist()} for z in logits
    ]
    plain = [(z[:, :, cycle.numbers] - z[:, :, cycle.numbers].mean(axis=2, keepdims=True)).ravel() for z in logits]
    assert study.clocks_alike(*runs) == pytest.approx(np.corrcoef(*plain)[0, 1], abs=1e-5)
    del rng

    task = Modular(p=11, dim=16, heads=2)
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (jax.jit(task.init)(key) for key in keys)
    mixed = [jax.tree.map(lambda a, b, t=t: a + t * (b - a), one, other) for t in (0.0, 0.1, 0.3, 1.0)]
    val = jnp.arange(task.pairs)

    @jax.jit
    def both(params):
        logits = task.with_params(params)(task.tokens(val))[:, -1]
        return study.sketch(task, params, val), (logits - logits.mean(axis=1, keepdims=True)).ravel()

    sketches, full = zip(*map(both, mixed), strict=True)
    for i in range(1, 4):
        estimate = study.logits_alike({"sketch": sketches[0]}, {"sketch": sketches[i]})
        assert estimate == pytest.approx(np.corrcoef(full[0], full[i])[0, 1], abs=3 / study.SKETCH**0.5)
    assert study.logits_alike({"sketch": sketches[0]}, {"sketch": sketches[0]}) == pytest.approx(1)


def cells_of(table):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if not line.startswith("|:")
    ]


def test_tables_of_the_study_by_hand():
    ma = [result([4, 5, 6], seed=0), result([1, 2], seed=1, first_step=200, first_step_train=150)]
    adamw = [result([4, 5, 7], seed=0, method="adamw-1"), result([3, 9], seed=1, method="adamw-1", first_step=None)]
    rows = cells_of(study.when([*adamw, *ma]))[1:]
    assert rows[0] == ["`adamw-1`", "2, 1 fail", "0.50", "0.67", "0.67", "3", "0.50"]
    assert rows[1] == [
        "`ma`",
        "2",
        "0.62 (0.50 to 0.75)",
        "0.58 (0.50 to 0.67)",
        "0.58 (0.50 to 0.67)",
        "2 (2 to 3)",
        "0.50",
    ]
    assert cells_of(study.kinds(ma))[1] == ["multiplication", "2", "2 (2 to 3)", "0.50", "0.04", "0.90", "0.1"]
    # 4, 6 and 2 have a divisor in common with 96.
    row = cells_of(study.quotients(ma))[1]
    assert row[:6] == ["`ma`", "2", "0.58 (0.50 to 0.67)", "0.67", "3 of 5", "3.3"]
    assert float(row[6]) == pytest.approx(study.chance([(48, 32, 3), (48, 32, 2)], 3), rel=0.05)
    assert study.quotients([result([1], operation="addition")]) == ""
    row = cells_of(study.common(study.reached([*adamw, *ma])))[1]
    assert row[:5] == ["`adamw-1`, `ma`", "1", "2.0", "0.2 (0.008)", "0.0"]
    assert row[5:] == ["1.00", "0.67 (0.00)"]


@pytest.fixture
def tiny_methods(monkeypatch):
    for name, preset in METHODS.items():
        task = Modular(p=11, dim=16, heads=2, depth=1, batch_size=16)
        monkeypatch.setitem(METHODS, name, preset._replace(config=dataclasses.replace(preset.config, task=task)))
    monkeypatch.setattr(study, "THRESHOLD", 0.0)  # reached by the first evaluation


def test_runs_are_named_by_their_method_and_tuned_muon_by_its_optimizer():
    assert (
        study.named({"optimizer": "muon", "lr": 0.03, "weight_decay": 0.3, "operation": "division", "seed": 3})
        == "muon"
    )
    assert study.named({"optimizer": "muon", "weight_decay": 1.0, "operation": "addition"}) == "muon-1"
    assert study.named({"optimizer": "adamw", "weight_decay": 1.0, "seed": 1}) == "adamw-1"
    with pytest.raises(UserError, match="no method is configured as"):
        study.named({"optimizer": "muon", "lr": 0.02})


def test_the_study_trains_what_is_missing_and_is_drawn(tmp_path, tiny_methods):
    out = tmp_path / "circuits.jsonl"
    assert study.table(out) == "Not measured yet.\n"
    arguments = {"operations": ("multiplication",), "cap": 60, "after": 6, "out": out}
    study.main((0, 1, 0), ("adamw-1",), **arguments)
    before = out.read_text()
    assert before.count("\n") == 1 + 2
    study.main((0,), ("adamw-1", "ma"), **arguments)
    assert out.read_text().startswith(before)
    assert out.read_text().count("\n") == 1 + 3
    runs = study.load(out)
    assert [(run["method"], run["seed"], run["p"]) for run in runs] == [
        ("adamw-1", 0, 11),
        ("adamw-1", 1, 11),
        ("ma", 0, 11),
    ]
    for run in runs:
        assert (run["first_step"], run["first_step_train"], run["last_step"]) == (4, 4, 4 + 6 * 4)
        assert run["steps"] == [0, 20, 28]
        assert len(run["restricted_loss"]) == len(run["gini"]) == len(run["steps"])
        assert sum(run["share"]) == pytest.approx(1, abs=1e-3)
        assert len(run["sketch"]) == study.SKETCH
        assert ("circle" in run) == (run["seed"] == 0)
    assert np.array(runs[0]["circle"]["points"]).shape == (3, 10, 2)
    assert cells_of(study.table(out))[1][:2] == ["`adamw-1`", "2"]
    study.picture(out).savefig(tmp_path / "when.png")
    study.circles(out).savefig(tmp_path / "circles.png")
    for change in ({"cap": 40}, {"after": 5}):
        with pytest.raises(UserError, match=r"line 2 was made with another --cap or --after; delete it"):
            study.main((0,), ("adamw-1",), **arguments | change)
    with pytest.raises(UserError, match=r"--operations must be among multiplication, .*, got power"):
        study.main(operations=("power",))
