"""Methods and their hyperparameters, the keys of runs, and the parts of optimizers that methods share."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.harness.engine import as_text, product
from examples.harness.errors import UsageError
from examples.harness.experiment import Experiment, Run
from examples.harness.methods import (
    STATIC,
    Alpha,
    LearningRate,
    Momentum,
    Static,
    Tx,
    hyperparams,
    parameters,
    split,
)
from examples.harness.optimizers import from_step, stacked_muon, warmup
from grokfast_jax import grokfast_ema

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


def method(lr: LearningRate, alpha: Alpha = 0.9, plain: float = 0.5, b1: Static = 0.9, kind: str = "a") -> Tx:
    """A method with a hyperparameter of each kind."""
    return optax.chain(grokfast_ema(plain, alpha), optax.adam(lr, b1))


def test_hyperparameters_are_the_parameters_of_the_function():
    assert list(parameters(method)) == ["lr", "alpha", "plain", "b1", "kind"]
    traced, static = split(method, hyperparams(method, lr=1))
    assert traced == {"lr": 1.0, "alpha": 0.9, "plain": 0.5}
    assert static == {"b1": 0.9, "kind": "a"}
    assert split(toy.ma, hyperparams(toy.ma))[1] == {"window_size": 7}
    assert Annotated[float, STATIC] == Static


def test_a_static_number_may_have_a_range():
    def ranged(b1: Momentum = 0.9) -> Tx:
        return optax.adam(0.1, b1)

    assert split(ranged, hyperparams(ranged)) == ({}, {"b1": 0.9})
    with pytest.raises(UsageError, match=r"--b1 must be in \[0, 1\), got 2"):
        hyperparams(ranged, b1=2)


def test_defaults_are_filled_in_and_numbers_are_pythons():
    assert hyperparams(toy.ma, lamb=3) == {"lr": 0.01, "weight_decay": 0.005, "window_size": 7, "lamb": 3.0}
    preset = functools.partial(functools.partial(toy.ma, lamb=2.0), lr=0.5)
    assert hyperparams(preset, window_size=5) == {"lr": 0.5, "weight_decay": 0.005, "window_size": 5, "lamb": 2.0}
    assert hyperparams(preset, lr=1e-3)["lr"] == 1e-3
    found = hyperparams(toy.ma, lr=np.float32(0.5), lamb=jnp.array(2), window_size=np.int64(4), weight_decay=1)
    assert [type(value) for value in found.values()] == [float, float, int, float]
    assert list(found.values()) == [0.5, 1.0, 4, 2.0]
    assert type(hyperparams(toy.ma, window_size=4.0)["window_size"]) is int


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1}, "--lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("inf")}, "--lr must be a finite number of at least 0, got inf"),
        ({"weight_decay": float("nan")}, "--weight-decay must be a finite number of at least 0, got nan"),
        ({"lamb": float("nan")}, "--lamb must be a finite number, got nan"),
        ({"lr": "x"}, "--lr must be a number, got x"),
        ({"lr": None}, "--lr must be a number, got None"),
        ({"window_size": 0}, "--window-size must be at least 1, got 0"),
        ({"window_size": 2.5}, "--window-size must be a whole number, got 2.5"),
        ({"window_size": float("inf")}, "--window-size must be a whole number, got inf"),
        ({"foo": 1, "bar": 2}, "ma takes lr, weight_decay, window_size, lamb, got bar, foo"),
    ],
)
def test_errors_name_argument_range_and_value(given, message):
    with pytest.raises(UsageError, match=message):
        hyperparams(toy.ma, **given)


def test_what_the_library_refuses_and_what_is_missing_are_wrong_use():
    with pytest.raises(UsageError, match="method needs a value of lr"):
        hyperparams(method)
    with pytest.raises(UsageError, match=r"alpha must be .*, got 1\.5"):  # the library's own words
        hyperparams(method, lr=1, plain=1.5)
    with pytest.raises(TypeError, match=r"functools\.partial of ma must give its hyperparameters by name"):
        run_of(functools.partial(toy.ma, 0.5))


def run_of(method=toy.ma, task=None, **settings):
    (run,) = product(task or toy.Toy(), method, **settings)
    return run


def test_a_key_is_flat_and_complete_and_survives_json():
    run = run_of(lamb=3, seed=4, stop_at=0.5)
    assert run.key == {
        "task": "Toy",
        "batch_size": 6,
        "examples": 30,
        "method": "ma",
        "lr": 0.01,
        "weight_decay": 0.005,
        "window_size": 7,
        "lamb": 3.0,
        "seed": 4,
        "max_steps": 80,
        "stop_at": 0.5,
        "hold_evals": 0,
        "group_size": 1,
    }
    assert json.loads(json.dumps(run.key)) == run.key
    assert as_text(json.loads(json.dumps(run.key))) == as_text(run.key)
    numpys = run_of(lamb=np.float64(3), seed=np.int64(4), stop_at=np.float64(0.5), window_size=np.int32(7))
    assert json.dumps(numpys.key) == json.dumps(run.key)
    assert as_text({"a": 1, "b": 2.0}) == as_text({"b": 2, "a": 1.0}) != as_text({"a": 1, "b": 2.5})
    assert as_text({"a": True}) != as_text({"a": 1})


def test_every_change_changes_the_key():
    changes = [
        {"task": toy.Toy(examples=31)},
        {"task": toy.Toy(batch_size=5)},
        {"task": dataclasses.make_dataclass("Toy2", [], bases=(toy.Toy,), frozen=True)()},
        {"method": functools.partial(toy.ma, lamb=4.0)},
        {"lr": 0.02},
        {"weight_decay": 0.0},
        {"window_size": 8},
        {"lamb": 6.0},
        {"seed": 1},
        {"max_steps": 84},
        {"stop_at": 0.5},
        {"stop_at": 0.5, "hold_evals": 1},
        {"group_size": 2},
    ]
    runs = [run_of(), *(run_of(**change) for change in changes)]
    assert len({as_text(run.key) for run in runs}) == len(runs)
    assert {name for change in changes for name in change} >= runs[0].key.keys() - {"batch_size", "examples"}
    same = [run_of(method=functools.partial(toy.ma, lamb=4.0)), run_of(lamb=4.0)]
    assert same[0].key == same[1].key  # the name of a partial is a label
    assert same[0].program_key == same[1].program_key == run_of(seed=3).program_key
    assert run_of(window_size=8).program_key != run_of().program_key


def test_where_the_data_are_is_no_part_of_a_key():
    @dataclasses.dataclass(frozen=True)
    class WithFiles(toy.Toy):
        """A task that reads files."""

        data_dir: Path | None = None

    assert run_of(task=WithFiles(data_dir=Path("a"))).key == run_of(task=WithFiles()).key


def test_names_that_clash_and_values_that_a_key_cannot_hold_are_refused():
    def clashes(batch_size: float = 1.0) -> Tx:
        return optax.sgd(batch_size)

    with pytest.raises(TypeError, match=r"must not share names, got \{'batch_size'\}; rename them"):
        run_of(clashes)
    with pytest.raises(TypeError, match=r"must not share names, got \{'seed'\}; rename them"):
        Run(toy.Toy(), toy.adam, {"seed": 1.0})

    def with_tuple(betas: tuple = (0.9, 0.99)) -> Tx:
        return optax.adam(1.0, *betas)

    with pytest.raises(TypeError, match=r"betas must be a number, a text or None, which a key can hold, got \(0.9"):
        run_of(with_tuple)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"seed": -1}, r"--seed must be in \[0, 2\*\*32\), got -1"),
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"hold_evals": -1}, "--hold-evals must be at least 0, got -1"),
        ({"hold_evals": 1, "stop_at": None}, "--hold-evals must be 0 without --stop-at, got 1"),
        ({"group_size": 0}, "--group-size must be at least 1, got 0"),
        ({"stop_at": 95.0}, r"--stop-at must be in \(0, 1\], or None, got 95.0"),
        ({"stop_at": 0.0}, r"--stop-at must be in \(0, 1\], or None, got 0.0"),
    ],
)
def test_a_rule_out_of_range_is_refused(rule, message):
    with pytest.raises(UsageError, match=message):
        run_of(**rule)


def test_a_product_has_all_combinations_the_last_fastest():
    runs = product(toy.Toy(), toy.ema, lamb=[1.0, 2.0], lr=0.5, seed=range(2), max_steps=(4, 8))
    assert [(r.hyperparams["lamb"], r.seed, r.max_steps) for r in runs] == [
        (lamb, seed, steps) for lamb in (1.0, 2.0) for seed in (0, 1) for steps in (4, 8)
    ]
    assert all(run.hyperparams["lr"] == 0.5 and run.hyperparams["alpha"] == 0.98 for run in runs)
    assert product(toy.Toy(), toy.ema)[0].max_steps == toy.Toy.max_steps
    assert product(toy.Toy(), toy.ema, lamb=[]) == []


def test_an_experiment_finds_methods_by_name_and_by_function():
    methods = {"ema": toy.ema, "strong": functools.partial(toy.ema, lamb=9.0)}
    experiment = Experiment("tests.toy", toy.Toy(), methods, default="strong")
    assert experiment.run().hyperparams["lamb"] == 9.0
    assert experiment.run("ema", lr=0.5, seed=3).key == product(toy.Toy(), toy.ema, lr=0.5, seed=3)[0].key
    assert toy.EXPERIMENT.method("adam") is toy.adam
    with pytest.raises(UsageError, match=r"must be one of ema, strong, got 'stron'; did you mean strong\?"):
        experiment.method("stron")


def test_the_learning_rate_rises_and_a_weight_switches():
    steps = jnp.arange(15)
    np.testing.assert_allclose(jax.vmap(warmup(2.0))(steps), 2.0 * np.minimum(np.arange(15) / 10, 1), rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(from_step(5, 3.0, before=1.0))(steps), [1.0] * 5 + [3.0] * 10)
    np.testing.assert_array_equal(jax.vmap(from_step(0, 3.0))(steps), [3.0] * 15)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0, "ns_steps": 8}])
def test_muon_on_stacked_arrays_is_muon(options, x64):
    shapes = {"blocks": [{"w": (3, 4), "b": (4,)}, {"w": (3, 4), "v": (4, 3), "b": (4,)}], "head": {"w": (4, 3)}}

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda node: isinstance(node, tuple))

    def trained(muon):
        tx, params = muon(0.1, weight_decay=0.3, adam_weight_decay=0.2, adam_b2=0.98, **options), draw(0)
        state, update = tx.init(params), jax.jit(tx.update)
        for seed in range(1, 4):
            updates, state = update(draw(seed), state, params)
            params = optax.apply_updates(params, updates)
        return params

    stacked = trained(stacked_muon)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), stacked, trained(optax.contrib.muon))
    jax.tree.map(lambda a, b: np.testing.assert_array_less(1e-4, np.abs(a - b).max()), stacked, draw(0))
