"""The study: its methods and cells, its files, its statistics, its paths and spectra."""

import dataclasses
import itertools
import math
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.stats

import benchmarks
from benchmarks.study import __main__ as study
from benchmarks.study import cells, methods, pictures, spectra, statistics, tables, trajectories
from benchmarks.study.cells import BASE, as_cell, differences
from benchmarks.study.methods import METHODS, PARTS, TUNED, TUNING_CAP, TUNING_SEEDS, Variant, grid
from benchmarks.study.statistics import Results
from examples.harness.errors import UserError
from examples.harness.loop import evaluations
from examples.harness.optimizers import make_tx
from examples.harness.sweep import train_all
from examples.harness.train import program
from examples.modular import Modular

pytestmark = pytest.mark.usefixtures("lenient")


@dataclasses.dataclass(frozen=True)
class Toy(Modular):
    """Points that a random plane divides, in place of pairs of numbers: it compiles and generalises in no time."""

    train_size = 20

    def init(self, key):
        return {"w": 0.1 * jax.random.normal(key, (5,)), "b": jnp.zeros(())}

    def split(self, shared, key):
        x, order = jax.random.normal(key, (30, 5)), jnp.arange(30)
        return {"x": x, "y": (x @ jnp.arange(1.0, 6.0) > 0).astype(float), "train": order[10:], "val": order[:10]}

    def metrics(self, params, data, batch):
        x, y = data["x"][batch["index"]], data["y"][batch["index"]]
        logit = x @ params["w"] + params["b"]
        return {"loss": jnp.logaddexp(0.0, logit) - y * logit, "accuracy": ((logit > 0) == (y > 0)).astype(float)}


@pytest.fixture
def toys(monkeypatch):
    """The methods on the toy, with four steps between evaluations."""
    for name, preset in METHODS.items():
        config = dataclasses.replace(preset.config, task=Toy(batch_size=6)).replace(lr=0.05)
        monkeypatch.setitem(METHODS, name, preset._replace(config=config))
    for module in (study, methods, trajectories):
        monkeypatch.setattr(module, "THRESHOLD", 0.9)


def test_every_method_moves_all_parameters_and_is_like_no_other():
    params = {"matrix": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "vector": jnp.linspace(0.5, 1.5, 3)}
    ends = {}
    for name, (config, *_) in METHODS.items():
        late = min(config.filtering.filter_from, 2)
        tx = make_tx(config.replace(window_size=2, filter_from=late, lr_warmup=0).hyper)
        state, end = tx.init(params), params
        for i in range(6):
            updates, state = tx.update(jax.tree.map(lambda p, i=i: jnp.cos(p + i * i), params), state, end)
            end = optax.apply_updates(end, updates)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).all()), params, end))), name
        ends[name] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(end)])
    for a, b in itertools.combinations(ends, 2):
        assert np.abs(ends[a] - ends[b]).max() > 1e-6, (a, b)


def test_amplifying_gradients_is_weakening_the_coupled_decay():
    """Why the control of `ema` has a third of its decay: what holds for all of a gradient holds for its slow part."""
    base = METHODS["ema"].config.replace(lamb=0.0)
    amplified = base.replace(fast=3.0)
    weaker = base.replace(weight_decay=base.optimization.weight_decay / 3)
    ends = []
    for config in (amplified, weaker, base):
        tx, params = make_tx(config.hyper), jnp.linspace(-1.0, 1.0, 12)
        state = tx.init(params)
        for i in range(30):
            updates, state = tx.update(0.01 * jnp.cos(params + i * i), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)
    assert np.abs(ends[0] - ends[2]).max() > 1e-3


def cell(variant, seed=3, cap=100):
    return as_cell(differences(variant.run(seed, cap)))


def test_parts_are_made_of_valid_variants_each_of_which_is_there_once():
    for part, chosen in PARTS.items():
        # One with the very values of its method is another spelling of that method.
        assert len({cell(variant) for variant in chosen}) == len(chosen), part
    assert {name: sum(v.method == name for v in PARTS["tuning"]) for name in TUNED} == dict.fromkeys(TUNED, 9)
    changed = Variant("ma", {"operation": "division"}).run(3, 100).flat()
    assert [changed[name] for name in ("seed", "budget", "filter", "operation")] == [3, 100, "ma", "division"]
    assert [Variant("ma", {}).run(seed, 5000).run.budget for seed in (0, *TUNING_SEEDS)] == [5000, 2500, 2500]


def test_every_method_with_a_filter_has_controls_and_all_of_them_are_compared():
    for name, preset in METHODS.items():
        assert bool(preset.controls) == (preset.config.filtering.filter != "none"), name
        assert all(METHODS[control].config.filtering.filter == "none" for control in preset.controls)
    compared = methods.pairs("methods")
    assert (Variant("ma+muon", {}), Variant("muon", {})) in compared
    assert len(compared) == sum(len(preset.controls) for preset in METHODS.values())
    # What is changed of the filter is not changed of what has none.
    changes = {"weight_decay": 1e-4, "start": "debiased"}
    PARTS["test"] = [Variant("ema+adamw-1", changes)]
    assert methods.pairs("test") == [(PARTS.pop("test")[0], Variant("adamw-1", {"weight_decay": 1e-4}))]
    assert ("ema", "adam-0.005") in methods.tuned_pairs()  # whose tuned decay may be that of adam-0.00167
    assert [other for one, other in methods.tuned_pairs() if one == "ma"] == ["adam-0.005", "adamw-1"]


def test_a_cell_is_what_was_run_however_it_is_called():
    ema = cell(Variant("ema", {}))
    assert ema == (("budget", 100), ("filter", "ema"), ("seed", 3))
    assert cell(Variant("ema", {"lamb": 2.0})) == ema
    assert cell(Variant("ema", {"alpha": 0.95})) == cell(Variant("ema-0.95", {}))
    assert cell(Variant("adam-0.005", {"weight_decay": 0.0})) == cell(Variant("adam", {}))
    every = {variant.run(3, 100): cell(variant) for part in PARTS.values() for variant in part}
    assert len(set(every.values())) == len(every)
    assert methods.method_of(dict(cell(Variant("ma+muon-1", {}), 7, 50))) == "ma+muon-1"
    with pytest.raises(UserError, match=r"no method is configured as {'lr': 0.5} any more; delete its results"):
        methods.method_of({"lr": 0.5, "seed": 3})


def test_fields_of_the_configuration_and_of_the_base_are_compared_strictly(monkeypatch):
    config = METHODS["ema"].config
    assert BASE | differences(config) == config.facts()
    with monkeypatch.context() as patch:
        patch.delitem(BASE, "hold")
        with pytest.raises(UserError, match=r"study.cells lacks the field hold; add it with the value that earlier"):
            differences(config)
    monkeypatch.setitem(BASE, "dropout", 0.0)
    with pytest.raises(UserError, match=r"has the field dropout, which configurations lack; remove it"):
        differences(config)


@pytest.fixture
def origins(monkeypatch):
    """What the origin of appended results is, and may be set to."""
    origin = {"schema": cells.SCHEMA, "device": "one", "commit": "a"}
    monkeypatch.setattr(cells, "_origin", lambda: dict(origin))
    return origin


def test_a_file_says_once_where_the_results_after_it_come_from(tmp_path, origins):
    path = tmp_path / "results.jsonl"
    assert list(cells.read(path)) == []
    cells.append(path, {"cell": {"seed": 1}})
    cells.append(path, {"cell": {"seed": 2}}, {"cell": {}})
    origins["commit"] = "b"
    cells.append(path, {"cells": [{"seed": 3}, {"seed": 4}]})
    lines = path.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if "schema" in line] == [1, 5]
    found = list(cells.read(path))
    assert [line.origin["commit"] for line in found] == ["a", "a", "a", "b"]
    assert [line.result for line in found[1:3]] == [{"cell": {"seed": 2}}, {"cell": {}}]
    assert found[3].place == f"{path}, line 6"


def test_what_a_crash_left_of_a_line_is_passed_over_and_overwritten(tmp_path, origins):
    path = tmp_path / "results.jsonl"
    cells.append(path, {"cell": {"seed": 1}}, {"cell": {"seed": 2}})
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for torn in range(len(whole)):
        path.write_bytes(whole[:torn])
        expected = whole[:torn].count(b"\n") - 1
        assert [line.result["cell"]["seed"] for line in cells.read(path)] == [1, 2][: max(0, expected)]
        if torn in (0, 3, last + 3, len(whole) - 1):
            cells.append(path, {"cell": {"seed": 5}})
            assert [line.result["cell"]["seed"] for line in cells.read(path)] == [*[1, 2][: max(0, expected)], 5]
            assert path.read_bytes().endswith(b"\n")


def test_writers_at_once_lose_nothing(tmp_path, origins):
    path = tmp_path / "results.jsonl"

    def write(first):
        for seed in range(first, first + 10):
            cells.append(path, {"cell": {"seed": seed}, "text": "x" * 5000})

    threads = [threading.Thread(target=write, args=(10 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line.result["cell"]["seed"] for line in cells.read(path)) == list(range(60))
    assert path.read_text().count("schema") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"cell": {"speed": 1, "seed": 2}}', r"results.jsonl, line 3 has the unknown field speed; delete the line"),
        ('{"cells": [{"seed": 2}, {"mass": 1}]}', r"line 3 has the unknown field mass"),
        ('{"schema": 0}', r"results.jsonl, line 3 has schema 0, not 1"),
        ('{"cell": {"seed": 1}', r"results.jsonl, line 3 is damaged; delete the line"),
        ('{"sell": {}}', r"line 3 is damaged"),
        ("[]", r"line 3 is damaged"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_place(tmp_path, origins, line, message):
    path = tmp_path / "results.jsonl"
    cells.append(path, {"cell": {"seed": 1}})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        list(cells.read(path))


def test_a_result_without_a_schema_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"cell": {}}\n')
    with pytest.raises(UserError, match=r"line 1 has schema None, not 1"):
        list(cells.read(tmp_path / "results.jsonl"))


def test_the_stored_results_are_found():
    """Renew these only with the results: another number says that `BASE` or a method has changed."""
    results = Results.load(Path(benchmarks.__file__).parent / "results" / "study")
    assert list(results.reported(Variant("ma", {}))["first_step"]) == [1270, 1540, 1110, 920, 950, 960, 830, 890]
    found = results.reported(Variant("adamw-1", {"lr": 0.003}))["first_step"]
    assert list(found) == [640, 520, 350, 650, 550, 490, 410, 470]


def test_a_run_is_followed_after_its_first_time_at_the_threshold_and_summarised():
    def rows(values):
        accuracies = [{"train_accuracy": min(1.0, 2 * v), "val_accuracy": v} for v in values]
        return [{"step": 10 * i, "train_loss": 1.0, "val_loss": 1.0} | a for i, a in enumerate(accuracies, 1)]

    values = [0.1, 0.48, 0.95] + [1.0] * 40 + [0.5] * 9
    config = METHODS["ema"].config
    assert not study.followed(config, rows(values))
    assert study.followed(config, rows([*values, 0.96]))
    tuning = config.replace(seed=TUNING_SEEDS[0])
    assert [study.followed(tuning, rows(values[:n])) for n in (2, 3)] == [False, True]
    found = study.summary(rows([*values, 0.96]))
    expected = {"first_step": 30, "first_step_train": 20, "evaluations_after": 50, "of_these_at_threshold": 41}
    assert {name: found[name] for name in expected} == expected
    assert (found["last_step"], found["finite"], found["best_val_accuracy"]) == (530, True, 1.0)
    assert found["every_100_steps"]["val_accuracy"] == [1.0, 1.0, 1.0, 1.0, 0.5]
    failed = study.summary(rows([0.3, math.nan]))
    assert (failed["first_step"], failed["finite"], failed["best_val_accuracy"]) == (None, False, 0.3)
    assert study.summary(rows([math.nan]))["best_val_accuracy"] is None


def test_a_deleted_cell_is_made_again_the_same_and_another_cap_is_refused(tmp_path, toys):
    arguments = {"seeds": (0, 1), "methods": ("ema", "ma", "muon"), "cap": 240, "out": tmp_path / "study"}
    study.main(("methods",), **arguments)
    path = tmp_path / "study" / "methods.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    path.write_text("".join(lines[:3] + lines[4:]))
    study.main(("methods",), **arguments)
    assert path.read_text().splitlines(keepends=True) == [*lines[:3], *lines[4:], lines[3]]
    results = Results.load(path.parent)
    assert results.reported(Variant("ema", {}))["last_step"].max() <= 240
    assert set(results.reported(Variant("ema", {})).index) == {0, 1}
    with pytest.raises(UserError, match=r"study holds runs with --cap 240, not 80; pass it, or choose another --out"):
        study.main(("methods",), **arguments | {"cap": 80})
    with pytest.raises(UserError, match=r"--methods must be among adam, .* got sgd"):
        study.main(("methods",), methods=("sgd",))
    with pytest.raises(UserError, match=r"--group-size must be at least 1, got 0"):
        study.main(("methods",), group_size=0)
    with pytest.raises(UserError, match=r"--cap must be at least 1, got 0"):
        study.main(("methods",), cap=0)
    with pytest.raises(UserError, match=r"PARTS must be among methods, .*, tuned, got none"):
        study.main(())


def test_a_cell_of_two_parts_is_trained_once_and_groups_are_stored_run_by_run(tmp_path, toys):
    study.main(("methods", "lamb"), methods=("ema",), cap=8, out=tmp_path, group_size=4)
    stored = {path.name: len(list(cells.read(path))) for path in tmp_path.glob("*.jsonl")}
    assert stored == {"methods.jsonl": 1, "lamb.jsonl": 5}  # λ = 2 is that of the method
    results = Results.load(tmp_path)
    assert [len(results.reported(variant)) for variant in PARTS["lamb"]] == [1] * 6


def test_the_parts_of_the_tuning_follow_from_one_another_in_one_command(tmp_path, toys, monkeypatch):
    for module in (methods, study):
        monkeypatch.setattr(module, "TUNING_CAP", 4)
    for part, missing in (("finals", "tuning"), ("tuned", "tuning")):
        with pytest.raises(UserError, match=rf"lack ema with .* and seed 1000; run .*benchmarks.study {missing}"):
            study.main((part,), methods=("ema",), cap=8, out=tmp_path)
    # Needs no other method to have been tuned.
    study.main(("tuning", "finals", "tuned"), methods=("ema",), cap=8, out=tmp_path)
    found = {path.stem: [line.result["cell"] for line in cells.read(path)] for path in tmp_path.glob("*.jsonl")}
    assert {part: len(runs) for part, runs in found.items()} == {"tuning": 9, "finals": 3, "tuned": 1}
    assert {run["budget"] for run in found["tuning"] + found["finals"]} == {4}
    assert [run["budget"] for run in found["tuned"]] == [8]


def result(variant, seed, first_step, cap=5000, best=1.0, at=50, **changes):
    return {
        "cell": differences(variant.run(seed, cap)),
        "last_step": cap if first_step is None else first_step + 500,
        "finite": True,
        "first_step": first_step,
        "evaluations_after": 0 if first_step is None else 50,
        "of_these_at_threshold": 0 if first_step is None else at,
        "first_step_train": 100,
        "best_val_accuracy": best,
    } | changes


EMA = Variant("ema", {})


def numbers(*runs):
    return list(tables.numbers(Results(runs).reported(EMA), 5000).values())


def test_failures_count_as_later_than_any_step():
    runs = [result(EMA, seed, step) for seed, step in enumerate([1000, None, 3000, None, 2000])]
    assert numbers(*runs)[:4] == ["100", "3,000 (1,000 to > 5,000)", "> 5,000", "2 of 5"]
    runs = [result(EMA, seed, step) for seed, step in enumerate([1000, None, 3000, None, 2000, 1500])]
    assert numbers(*runs)[1] == "2,500 (1,250 to > 5,000)"
    runs = [result(EMA, seed, step, at=50 - seed) for seed, step in enumerate([1000, 1000])]
    assert numbers(*runs) == ["100", "1,000 (1,000 to 1,000)", "1,000", "0 of 2", "1 of 2 (99%)"]
    fails = result(EMA, 0, None, first_step_train=None)
    assert numbers(fails) == ["> 5,000", "> 5,000", "> 5,000", "1 of 1", ""]
    # Cut off by the cap: not known. No longer finite: below the threshold from there on.
    cut = {"evaluations_after": 10, "of_these_at_threshold": 10}
    assert numbers(result(EMA, 0, 4900, **cut))[-1] == ""
    assert numbers(result(EMA, 0, 4900, **cut, finite=False))[-1] == "0 of 1 (20%)"


def test_seeds_of_the_tuning_are_not_reported_and_of_two_equal_runs_the_first_counts():
    runs = [result(EMA, seed, 1000, cap=2000) for seed in (0, *TUNING_SEEDS)] + [result(EMA, 0, 500, cap=2000)]
    assert dict(Results(runs).reported(EMA)["first_step"]) == {0: 1000}


def cells_of(table):
    """The cells of the rows of a Markdown table."""
    return [[text.strip() for text in line.strip("|\n").split("|")] for line in table.splitlines()[2:]]


def test_methods_are_compared_seed_by_seed():
    by_method = {"ema": [1000, 2000, None, None, 600, 100], "adam-0.005": [2000, 1000, 500, None, 600]}
    runs = [result(Variant(n, {}), seed, first) for n, found in by_method.items() for seed, first in enumerate(found)]
    table = tables.pairs_table(Results(runs), methods.pairs("methods"))
    assert cells_of(table) == [["`ema`", "`adam-0.005`", "1", "2", "2", "1.00 (3)"]]


def test_the_interval_of_a_median_covers_it_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = statistics.interval(rng.exponential(size=25), 500)
        covered += low <= math.log(2) <= high
    assert 180 <= covered <= 199


def test_the_interval_is_that_of_scipy_where_all_steps_are_finite():
    values = np.random.default_rng(1).exponential(1000, size=8).round(-1)
    found = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    between = np.unique([np.median(pair) for pair in itertools.product(values, values)])  # the medians there can be
    for ours, theirs in zip(statistics.interval(values), found, strict=True):
        # The same resamples; SciPy may go on to the next median in part.
        assert abs(np.searchsorted(between, ours) - np.searchsorted(between, theirs)) <= 1
    assert statistics.interval(np.array([1.0, 1.0, 1.0, math.inf, math.inf, math.inf])) == (1.0, math.inf)


def test_a_method_is_named_without_its_weight_decay_where_that_may_be_another():
    names = {"adamw-1": "adamw", "ma+muon-1": "ma+muon", "adam-0.00167": "adam", "muon": "muon", "ema-0.95": "ema-0.95"}
    assert {name: Variant(name, {"weight_decay": 3.0}).name for name in names} == names
    assert Variant("adamw-1", {"lr": 0.003}).name == "adamw-1"
    assert len({Variant(name, {"weight_decay": 3.0}).name for name in TUNED}) == len(TUNED)


def test_tuning_takes_the_fastest_median_of_the_three_fastest_with_one_seed_then_the_best_accuracy():
    pairs = [variant for variant in PARTS["tuning"] if variant.method == "muon-1"]

    def runs(seed, chosen, steps, best=None):
        triples = zip(chosen, steps, best or [0.9] * len(chosen), strict=True)
        return [result(variant, seed, first, best=accuracy) for variant, first, accuracy in triples]

    def tuned_table(every):
        return tables.tuned_table(Results(every), statistics.all_tuned(Results(every)))

    first, second = TUNING_SEEDS
    every = runs(first, pairs, [None, 1900, 1800, None, 1000, None, None, None, 2000])
    assert {run["cell"]["budget"] for run in every} == {TUNING_CAP}
    finals = [pairs[4], pairs[2], pairs[1]]
    assert statistics.finalists(Results(every), "muon-1") == finals
    with pytest.raises(UserError, match=r"lack muon-1 with .* and seed 1001; run python -m benchmarks.study finals"):
        statistics.tuned(Results(every), "muon-1")
    assert tuned_table(every) == "Not measured yet.\n"
    every += runs(second, finals, [3000, 1900, None])  # medians 2,000, 1,850 and infinite
    assert statistics.tuned(Results(every), "muon-1") == pairs[2]
    every.append(result(pairs[2], 0, 1234))
    assert cells_of(tuned_table(every))[0][:2] == ["`muon`", "0.01 (edge), 0.3 (edge)"]
    assert "against" not in tuned_table(every)
    # Compared with a method that is tuned, too, each with its own pair.
    behind = [variant for variant in PARTS["tuning"] if variant.method == "ema+muon-1"]
    every += runs(first, behind, [100, 200, 300, *[None] * 6]) + runs(second, behind[:3], [200, 300, 100])
    every.append(result(behind[0], 0, 617))
    assert cells_of(tuned_table(every))[-1] == ["`ema+muon`", "`muon`", "1", "0", "0", "0.50 (1)"]
    drawn = pictures.of_study(Results(every))
    assert drawn["all_methods"] is None
    assert drawn["all_tuned"] is not None
    every = runs(first, pairs, [None] * 9, [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.4, 0.3])
    assert statistics.finalists(Results(every), "muon-1") == [pairs[7], pairs[8], pairs[5]]
    every = runs(first, pairs, [None] * 9, [0.1, None, 0.1, 0.1, 0.1, 0.2, 0.1, None, 0.3])  # None: never finite
    assert statistics.finalists(Results(every), "muon-1") == [pairs[8], pairs[5], pairs[0]]


def test_tables_and_pictures_are_made_from_the_results(tmp_path):
    chosen = [EMA, Variant("adamw-1", {}), *grid(["ema"], operation=["division"]), *grid(["ema"], lamb=[5.0])]
    runs = [
        result(variant, seed, 1000 + seed if variant.method == "ema" else None)
        for variant, seed in itertools.product(chosen, (0, 1))
    ]
    made = tables.tables(Results(runs))
    rows = cells_of(made["study_methods"])
    assert [row[0] for row in rows] == ["`adamw-1`", "`ema`"]
    assert rows[1][1:4] == ["Grokfast-EMA α 0.98 λ 2, Adam weight decay 0.005", "100", "1,000 (1,000 to 1,001)"]
    assert [row[:2] for row in cells_of(made["study_operations"])].count(["operation division", "`ema`"]) == 1
    # Compared within an operation only: the division has no control here.
    assert "against" not in made["study_operations"]
    assert made["study_tuned"] == made["study_snippet"] == "Not measured yet.\n"
    division = [
        result(*grid([name], operation=["division"]), 0, step) for name, step in (("ema", 900), ("adamw-1", 1000))
    ]
    made = tables.tables(Results(division))
    assert cells_of(made["study_operations"])[-1] == [
        "operation division",
        "`ema`",
        "`adamw-1`",
        "1",
        "0",
        "0",
        "0.90 (1)",
    ]
    # With the control that has the same rate and decay.
    rates = {("ma+adamw-1", 0.003, 3.0): 500, ("adamw-1", 0.003, 3.0): 1000, ("adamw-1", 0.001, 3.0): 100}
    rates |= {("adamw-1", 0.003, 1.0): 200}
    rate_runs = [
        result(Variant(name, {"lr": rate, "weight_decay": decay}), 0, first)
        for (name, rate, decay), first in rates.items()
    ]
    rows = cells_of(tables.tables(Results(rate_runs))["study_rate"])
    assert [row for row in rows if "`ma+adamw`" in row and "`adamw`" in row] == [
        ["learning rate 0.003, decay 3.0", "`ma+adamw`", "`adamw`", "1", "0", "0", "0.50 (1)"]
    ]
    drawn = {name: figure for name, figure in pictures.of_study(Results(runs)).items() if figure}
    assert drawn.keys() == {"hero", "fair_control", "before_adamw", "all_methods", "ablations"}
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
    none = Results([])
    assert set(tables.tables(none).values()) == {"Not measured yet.\n"}
    assert not any(pictures.of_study(none).values())


def texts(figure):
    """What is written in the first axes of a figure."""
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_picture_says_how_many_seeds_fail_and_draws_no_value_for_them():
    steps = {"ma": [900, 1100], "ema": [1000, None], "adam-0.01": [None, None]}
    runs = [result(Variant(name, {}), seed, first) for name, two in steps.items() for seed, first in enumerate(two)]
    figure = pictures.of_study(Results(runs))["fair_control"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["MA + Adam, decay 0.01", "EMA + Adam, decay 0.005", "Adam, decay 0.01"]  # sorted by their medians
    assert texts(figure) == ["× 1 of 2 fail", "× 0 of 2 reach it"]
    drawn = np.concatenate([line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "o"])
    assert sorted(drawn) == [900, 1000, 1100]


def test_the_hero_picture_has_the_share_of_all_seeds():
    runs = [result(Variant("ema", {}), seed, first) for seed, first in enumerate([1000, 500, None, None])]
    (line,) = pictures.hero(Results(runs)).axes[0].lines
    assert list(line.get_xdata()) == [0, 500, 1000, 1050]
    assert list(line.get_ydata()) == [0, 25, 50, 50]


def test_an_ablation_has_the_seeds_that_all_its_settings_have():
    single = [result(Variant(name, {}), 0, 1000) for name in ("ema", "ma", "adam-0.005")]
    assert pictures.ablation_picture(Results(single)) is None  # one setting of each method is no ablation
    two = [*single, result(Variant("adam", {}), 0, 2000)]
    found = pictures.ablation(Results(two), "decay")
    assert {line: steps.to_dict("list") for line, steps in found.items()} == {
        "no filter": {0.0: [2000], 0.005: [1000]},
    }
    more = [*two, result(Variant("adam", {}), 1, 2000)]
    pd.testing.assert_frame_equal(pictures.ablation(Results(more), "decay")["no filter"], found["no filter"])
    assert pictures.ablation(Results([*single, result(Variant("adam", {}), 1, 2000)]), "decay") == {}


def test_streamed_paths_give_the_principal_axes_of_all_points():
    rng = np.random.default_rng(0)
    points = np.cumsum(rng.normal(size=(90, 200)) * 0.9 ** np.arange(200), axis=0)
    paths = trajectories.StreamedPaths(rank=24)
    for block in np.split(points, [7, 30, 31, 60]):
        paths.add(block)
    found, shares = paths.principal()
    centred = points - points.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * singular[:2]
    signs = np.sign(np.sum(found * expected, axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_allclose(shares, singular[:2] ** 2 / np.sum(singular**2), rtol=0.01)
    noisy = trajectories.StreamedPaths(rank=24)  # what the axes that are kept leave out counts as variance too
    points += 0.5 * rng.normal(size=points.shape)
    for block in np.split(points, 9):
        noisy.add(block)
    singular = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(noisy.principal()[1], singular[:2] ** 2 / np.sum(singular**2), rtol=0.02)
    few = trajectories.StreamedPaths(rank=24)  # as many axes as points: nothing is lost
    few.add(points[:10])
    few.add(points[10:20])
    np.testing.assert_allclose(few.coordinates @ few.axes, points[:20], atol=1e-9)


def test_trajectories_measure_the_distances_of_a_run(tmp_path, toys):
    out = tmp_path / "paths.jsonl"
    arguments = {"seeds": (0, 1, 0), "methods": ("ema", "adamw-1"), "cap": 400, "every": 8, "out": out}
    trajectories.main(**arguments)
    before = out.read_text()
    assert before.count("\n") == 1 + 2
    trajectories.main(**arguments | {"seeds": (1,)})
    assert out.read_text() == before
    found = trajectories.load(out)[0]["paths"]
    assert list(found) == ["ema", "adamw-1"]
    for name, run in found.items():
        config = METHODS[name].config
        compiled, key = program(config.task), jax.random.key(0)
        at = {0: trajectories.vector(compiled.init(config.hyper, key).params)}
        for evaluation in evaluations(compiled, config.hyper, key):
            at[evaluation.step] = trajectories.vector(evaluation.state.params)
            if evaluation.step >= max(run["at"].values()):
                break
        a, b, c = (at[step] for step in (0, run["at"]["B"], run["at"]["C"]))
        for pair, distance in (("AB", b - a), ("BC", c - b), ("AC", c - a)):
            assert run["distances"][pair] == pytest.approx(np.linalg.norm(distance), rel=1e-6)
        # Two axes of a plane cannot hold more than there is, and hold most of it here.
        x = np.array(run["path"])
        drawn = np.linalg.norm(x[run["steps"].index(run["at"]["C"])] - x[0])
        assert 0.5 * run["distances"]["AC"] < drawn <= run["distances"]["AC"] + 2e-3
    rows = cells_of(trajectories.table(out))
    assert [row[:1] + row[-1:] for row in rows] == [["`adamw-1`", "0 of 2"], ["`ema`", "0 of 2"]]
    trajectories.picture(out).savefig(tmp_path / "paths.png")
    with pytest.raises(UserError, match=r"--methods must be among"):
        trajectories.main(methods=("sgd",))
    with pytest.raises(UserError, match=r"--every must be at least 1, got 0"):
        trajectories.main(every=0)
    for change in ({"methods": ("ma",)}, {"cap": 200}, {"every": 4}):
        with pytest.raises(UserError, match=r"paths.jsonl, line 2 was made with another --methods, --cap or --every"):
            trajectories.main(**arguments | change)


def test_a_path_or_spectrum_of_a_run_that_diverges_is_refused(tmp_path, toys, monkeypatch):
    preset = METHODS["ema"]
    monkeypatch.setitem(METHODS, "ema", preset._replace(config=preset.config.replace(lr=3e38, lr_warmup=0)))
    for module in (trajectories, spectra):
        with pytest.raises(UserError, match=r"ema, seed 0: the loss is no longer finite at step \d+; leave out"):
            module.main((0,), ("ema",), out=tmp_path / "results.jsonl")
        assert not (tmp_path / "results.jsonl").exists()


def test_recorded_gradients_are_those_that_come_in():
    tx = optax.chain(spectra.record(jnp.array([0, 4, 2]), 3), optax.sgd(1.0))
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    state = tx.init(params)
    for i in range(5):
        grads = {"a": jnp.arange(4.0).reshape(2, 2) + 10 * i, "b": jnp.arange(4.0, 6.0) + 10 * i}
        updates, state = tx.update(grads, state, params)
        assert (updates["b"] == -grads["b"]).all()
    assert optax.tree_utils.tree_get(state, "last").tolist() == [[10.0 * i + k for k in (0, 4, 2)] for i in (2, 3, 4)]


def test_spectrum_finds_a_sine_and_white_noise():
    steps = np.arange(500)[:, None]
    f, power = spectra.spectrum(np.sin(2 * np.pi * 0.1 * steps + np.arange(3)))
    assert f[np.argmax(power)] == pytest.approx(0.1)
    assert power[np.abs(f - 0.1) < 0.005].sum() > 0.999
    assert spectra.slow_share(f, power) < 1e-6
    f, power = spectra.spectrum(np.random.default_rng(0).normal(size=(500, 4000)))
    assert spectra.slow_share(f, power) == pytest.approx(0.02, rel=0.12)  # 5 of 251 frequencies, the first being half
    assert spectra.slow_share(*spectra.spectrum(np.ones((500, 2)))) > 0.999


def test_the_cosine_of_successive_gradients_is_that_of_their_spectrum():
    steps = np.arange(500)[:, None]
    wave = spectra.spectrum(np.sin(2 * np.pi * 0.1 * steps + np.arange(3)))
    assert spectra.successive_cosine(*wave) == pytest.approx(np.cos(0.2 * np.pi), rel=1e-3)
    noise = np.random.default_rng(0).normal(size=(501, 4000))
    assert spectra.successive_cosine(*spectra.spectrum(noise[1:])) == pytest.approx(0, abs=0.01)
    echoed = noise[1:] + 0.5 * noise[:-1]  # correlation 0.5 / (1 + 0.5²)
    direct = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.pairwise(echoed)])
    assert spectra.successive_cosine(*spectra.spectrum(echoed)) == pytest.approx(direct, abs=0.01)
    assert direct == pytest.approx(0.4, abs=0.01)


def test_sampling_noise_has_little_slow_power():
    noise = spectra.sampling_noise(signals=64)
    assert noise.shape == (500, 64)
    weights = np.array([512] * 9 + [48])
    np.testing.assert_allclose(weights @ noise[:10], 0, atol=1e-9)  # an epoch has every example once
    assert 0.007 < spectra.slow_share(*spectra.spectrum(noise)) < 0.012


def test_spectra_are_measured_window_by_window(tmp_path, toys):
    out = tmp_path / "spectra.jsonl"
    arguments = {"seeds": (0, 0), "methods": ("adam", "ema"), "windows": 2, "parameters": 4, "out": out}
    spectra.main(**arguments)
    before = out.read_text()
    spectra.main(**arguments)
    assert out.read_text() == before
    (windows,) = spectra.load(out)["ema"]
    assert [window["from_step"] for window in windows] == [0, 500]
    for window in windows:
        assert sum(window["power"]) == pytest.approx(1, abs=0.01)
        assert window["rms"] > 0
    noise, _, table = spectra.table(out).partition("\n\n")
    assert re.fullmatch(r"Sampling noise alone has 1\.0\d % of its power below 0.01, and a cosine of -0\.0\d\.", noise)
    assert [row[:3] for row in cells_of(table)] == [
        [f"`{name}`", "1", steps] for name in ("adam", "ema") for steps in ("0 to 499", "500 to 999")
    ]
    for change in ({"windows": 3}, {"windows": 10}, {"parameters": 3}):  # 10 windows are the steps of the base
        with pytest.raises(UserError, match=r"jsonl, line 2 was made with another --windows or --parameters; delete"):
            spectra.main(**arguments | change)
    with pytest.raises(UserError, match=r"--windows must be at least 1, got 0"):
        spectra.main(windows=0)
    spectra.picture(out).savefig(tmp_path / "spectra.png")
    spectra.responses_picture().savefig(tmp_path / "responses.png")


def test_many_seeds_and_numbers_train_in_one_program_as_alone():
    """The study's vmapped form, with the optimizer that treats matrices otherwise."""
    task = Modular(p=5, batch_size=8, dim=8, depth=1, heads=2)
    config = dataclasses.replace(METHODS["ema+muon"].config, task=task).replace(budget=3 * task.steps)
    configs = [config.replace(seed=i, lr=(1 + 2 * i) * 1e-3, weight_decay=1.0 - i) for i in (0, 1)]
    together, alone = (sorted(train_all(configs, size)) for size in (2, 1))
    for one, other in zip(together, alone, strict=True):
        found, expected = ([row["val_loss"] for row in run.rows] for run in (one, other))
        assert len(expected) == 3
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-3)
