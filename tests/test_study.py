"""The study: its methods and cells, its statistics, its paths and spectra."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import frequency, study, study_report, trajectories
from benchmarks.study import METHODS, PARTS, TUNED, TUNING_CAP, TUNING_SEEDS, Study, cell
from examples.harness.config import RunConfig
from examples.harness.errors import UserError
from examples.harness.optimizers import make_tx
from examples.harness.train import program
from examples.modular import Modular

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def toys(monkeypatch):
    """The methods on a task that compiles in no time."""
    names = {field.name for field in dataclasses.fields(RunConfig)} - {"lr"}
    for name, config in METHODS.items():
        config = toy.Config(**{key: getattr(config, key) for key in names}, lr=0.05)
        monkeypatch.setitem(METHODS, name, config)
    for module in (study, trajectories):
        monkeypatch.setattr(module, "THRESHOLD", 0.9)


def test_every_method_moves_all_parameters_and_is_like_no_other():
    params = {"matrix": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "vector": jnp.linspace(0.5, 1.5, 3)}
    ends = {}
    for name, config in METHODS.items():
        config = dataclasses.replace(config, window_size=2, filter_from=min(config.filter_from, 2), lr_warmup=0)
        tx = make_tx(config, config.hyper())
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
    base = dataclasses.replace(METHODS["ema"], lamb=0.0)
    amplified = dataclasses.replace(base, fast=3.0)
    weaker = dataclasses.replace(base, weight_decay=base.weight_decay / 3)
    ends = []
    for config in (amplified, weaker, base):
        tx, params = make_tx(config, config.hyper()), jnp.linspace(-1.0, 1.0, 12)
        state = tx.init(params)
        for i in range(30):
            updates, state = tx.update(0.01 * jnp.cos(params + i * i), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)
    assert np.abs(ends[0] - ends[2]).max() > 1e-3


def test_parts_are_made_of_valid_cells_each_of_which_is_named_once():
    for part, chosen in PARTS.items():
        names = [cell(variant, 0, 5000).name for variant in chosen]
        assert len(set(names)) == len(names), part
    assert cell(("ema", {"lamb": 2.0, "weight_decay": 0.01}), 3, 100).name == "method-ema_weight_decay-0.01_seed-3"
    # Shared by all parts: what is the same is named the same.
    assert cell(("ema", {"lamb": 2.0}), 3, 100) == cell(("ema", {}), 3, 100)
    assert cell(("ema", {"alpha": 0.95}), 3, 100) == cell(("ema-0.95", {}), 3, 100)
    assert cell(("adam-0.005", {"weight_decay": 0.0}), 3, 100) == cell(("adam", {}), 3, 100)
    every = {cell(variant, 0, 5000).name: cell(variant, 0, 5000).config for part in PARTS.values() for variant in part}
    assert len(set(every.values())) == len(every)
    config = cell(("ma", {"operation": "division"}), 3, 100).config
    assert (config.seed, config.budget, config.filter, config.operation) == (3, 100, "ma", "division")
    assert {name: sum(v[0] == name for v in PARTS["tuning"]) for name in TUNED} == dict.fromkeys(TUNED, 9)


def test_a_run_is_followed_after_its_first_time_at_the_threshold_and_summarised():
    def rows(values):
        accuracies = [{"train_accuracy": min(1.0, 2 * v), "val_accuracy": v} for v in values]
        return [{"step": 10 * i, "train_loss": 1.0, "val_loss": 1.0} | a for i, a in enumerate(accuracies, 1)]

    values = [0.1, 0.48, 0.95] + [1.0] * 40 + [0.5] * 9
    assert not study.followed(METHODS["ema"], rows(values))
    assert study.followed(METHODS["ema"], rows([*values, 0.96]))
    tuning = dataclasses.replace(METHODS["ema"], seed=TUNING_SEEDS[0])
    assert [study.followed(tuning, rows(values[:n])) for n in (2, 3)] == [False, True]
    found = study.summary(rows([*values, 0.96]))
    expected = {"first_step": 30, "first_step_train": 20, "evaluations_after": 50, "of_these_at_threshold": 41}
    assert {name: found[name] for name in expected} == expected
    assert (found["last_step"], found["finite"], found["best_val_accuracy"]) == (530, True, 1.0)
    assert found["every_100_steps"]["val_accuracy"] == [1.0, 1.0, 1.0, 1.0, 0.5]
    failed = study.summary(rows([0.3, math.nan]))
    assert (failed["first_step"], failed["finite"], failed["best_val_accuracy"]) == (None, False, 0.3)
    assert study.summary(rows([math.nan]))["best_val_accuracy"] is None


def test_a_deleted_cell_is_made_again_the_same_and_another_cap_is_refused(tmp_path, toys, monkeypatch):
    arguments = Study(("methods",), seeds=(0, 1), methods=("ema", "ma", "muon"), cap=240, out=tmp_path)
    study.run(arguments)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(files) == 6
    deleted = tmp_path / "method-ma_seed-1.json"
    deleted.unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    study.run(arguments)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again, before = json.loads(deleted.read_text()), json.loads(files[deleted.name])
    assert before.pop("group_seconds") >= 0
    assert again.pop("group_seconds") >= 0
    assert again == before
    assert again["last_step"] <= 240
    with pytest.raises(UserError, match=r"was made with another budget; delete it, or choose another --out"):
        study.run(dataclasses.replace(arguments, cap=80))
    with pytest.raises(UserError, match=r"--methods must be among adam, .* got sgd"):
        Study(("methods",), methods=("sgd",))
    with pytest.raises(UserError, match=r"--group-size must be at least 1, got 0"):
        Study(("methods",), group_size=0)
    with pytest.raises(UserError, match=r"PARTS must be among methods, .*, tuned, got none"):
        Study(())


def test_the_parts_of_the_tuning_follow_from_one_another_in_one_command(tmp_path, toys, monkeypatch):
    monkeypatch.setattr(study, "TUNING_CAP", 4)
    for part, missing in (("finals", "tuning"), ("tuned", "tuning")):
        with pytest.raises(UserError, match=rf"lacks method-ema_.*_seed-1000; run .*benchmarks.study {missing}"):
            study.run(Study((part,), methods=("ema",), cap=8, out=tmp_path))
    # Needs no other method to have been tuned.
    study.run(Study(("tuning", "finals", "tuned"), methods=("ema",), cap=8, out=tmp_path))
    budgets = [json.loads(path.read_text())["config"]["budget"] for path in tmp_path.glob("*_seed-100[01].json")]
    assert budgets == [4] * (9 + 3)
    assert len(list(tmp_path.iterdir())) == 9 + 3 + 1


def result(variant, seed, first_step, cap=5000, best=1.0, at=50):
    one = cell(variant, seed, cap)
    return {
        "axes": one.axes,
        "config": one.config.facts(),
        "device": "a device",
        "versions": {"jax": "0"},
        "last_step": cap if first_step is None else first_step + 500,
        "finite": True,
        "first_step": first_step,
        "evaluations_after": 0 if first_step is None else 50,
        "of_these_at_threshold": 0 if first_step is None else at,
        "first_step_train": 100,
        "best_val_accuracy": best,
        "min_val_loss": 0.1,
    }


def test_failures_count_as_later_than_any_step():
    runs = [result(("ema", {}), seed, step) for seed, step in enumerate([1000, None, 3000, None, 2000])]
    assert study_report.row(runs)[:5] == ["5", "100", "3,000 (1,000 to > 5,000)", "> 5,000", "2"]
    runs = [result(("ema", {}), seed, step) for seed, step in enumerate([1000, None, 3000, None, 2000, 1500])]
    assert study_report.row(runs)[2] == "2,500 (1,250 to > 5,000)"
    runs = [result(("ema", {}), seed, step, at=50 - seed) for seed, step in enumerate([1000, 1000])]
    assert study_report.row(runs) == ["2", "100", "1,000 (1,000 to 1,000)", "1,000", "0", "1 of 2", "99%"]
    never = result(("ema", {}), 0, None) | {"first_step_train": None}
    assert study_report.row([never])[1:] == ["> 5,000", "> 5,000", "> 5,000", "1", "", ""]
    # Cut off by the cap: not known. No longer finite: below the threshold from there on.
    cut = result(("ema", {}), 0, 4900) | {"evaluations_after": 10, "of_these_at_threshold": 10}
    assert study_report.row([cut])[-2:] == ["", ""]
    assert study_report.row([cut | {"finite": False}])[-2:] == ["0 of 1", "20%"]


def test_methods_are_compared_seed_by_seed():
    by_method = {"ema": [1000, 2000, None, None, 600, 100], "adam-0.005": [2000, 1000, 500, None, 600]}
    runs = [result((n, {}), seed, first) for n, found in by_method.items() for seed, first in enumerate(found)]
    table = study_report.pairs_table(runs)
    assert table.splitlines()[2:] == ["| `ema` | `adam-0.005` | 5 | 1 | 2 | 2 | 1.00 (3) |"]


def test_the_interval_of_a_median_covers_it_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = study_report.interval(rng.exponential(size=25), 500)
        covered += low <= math.log(2) <= high
    assert 180 <= covered <= 199


def test_a_method_is_named_without_its_weight_decay_where_that_may_be_another():
    names = {"adamw-1": "adamw", "ma+muon-1": "ma+muon", "adam-0.00167": "adam", "muon": "muon", "ema-0.95": "ema-0.95"}
    assert {name: study_report.name_of((name, {"weight_decay": 3.0})) for name in names} == names
    assert study_report.name_of(("adamw-1", {"lr": 0.003})) == "adamw-1"
    assert len({study_report.name_of((name, {"weight_decay": 3.0})) for name in TUNED}) == len(TUNED)


def test_tuning_takes_the_fastest_median_of_the_three_fastest_with_one_seed_then_the_best_accuracy(tmp_path):
    grid = [variant for variant in PARTS["tuning"] if variant[0] == "muon-1"]

    def tuned_table(results):
        return study_report.tuned_table(results, study_report.tuned_variants(results, tmp_path))

    def write(seed, chosen, steps, best=None):
        for variant, first, accuracy in zip(chosen, steps, best or [0.9] * len(chosen), strict=True):
            one = result(variant, seed, first, cap=TUNING_CAP, best=accuracy)
            (tmp_path / f"{cell(variant, seed, TUNING_CAP).name}.json").write_text(json.dumps(one))

    first, second = TUNING_SEEDS
    write(first, grid, [None, 1900, 1800, None, 1000, None, None, None, 2000])
    finals = [grid[4], grid[2], grid[1]]
    assert study.finalists(tmp_path, "muon-1", 5000) == finals
    with pytest.raises(UserError, match=r"lacks method-muon-1_.*_seed-1001; run python -m benchmarks.study finals"):
        study.tuned(tmp_path, "muon-1", 5000)
    every = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert tuned_table(every) == "Not measured yet.\n"
    write(second, finals, [3000, 1900, None])  # medians 2,000, 1,850 and never
    assert study.tuned(tmp_path, "muon-1", 5000) == grid[2]
    reported = result(grid[2], 0, 1234)
    every = [reported, *(json.loads(path.read_text()) for path in tmp_path.iterdir())]
    assert "| `muon` | 0.01 (edge) | 0.3 (edge) | 1 |" in tuned_table(every)
    assert "against" not in tuned_table(every)
    # Compared with a method that is tuned, too, each with its own pair.
    behind = [variant for variant in PARTS["tuning"] if variant[0] == "ema+muon-1"]
    write(first, behind, [100, 200, 300, *[None] * 6])
    write(second, behind[:3], [200, 300, 100])
    other = result(behind[0], 0, 617)
    every = [other, reported, *(json.loads(path.read_text()) for path in tmp_path.iterdir())]
    lines = tuned_table(every).splitlines()
    assert lines[-1] == "| `ema+muon` | `muon` | 1 | 1 | 0 | 0 | 0.50 (1) |"
    (tmp_path / "one.json").write_text(json.dumps(other))
    (tmp_path / "other.json").write_text(json.dumps(reported))
    tables = study_report.tables(tmp_path, tmp_path)
    assert tables["study_tuned"].endswith("(pictures/study_tuned.png)\n")
    assert (tmp_path / "study_tuned.png").read_bytes().startswith(b"\x89PNG")
    write(first, grid, [None] * 9, [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.4, 0.3])
    assert study.finalists(tmp_path, "muon-1", 5000) == [grid[7], grid[8], grid[5]]


def test_tables_and_pictures_are_made_from_the_files(tmp_path):
    (tmp_path / "study").mkdir()
    chosen = [("ema", {}), ("adamw-1", {}), ("ema", {"operation": "division"}), ("ema", {"lamb": 5.0})]
    for variant, seed in itertools.product(chosen, (0, 1)):
        text = json.dumps(result(variant, seed, 1000 + seed if variant[0] == "ema" else None))
        (tmp_path / "study" / f"{cell(variant, seed, 5000).name}.json").write_text(text)
    study_report.write_csv(tmp_path / "study", tmp_path / "study.csv")
    tables = study_report.tables(tmp_path / "study", tmp_path)
    lines = tables["study_methods"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| `adamw-1`", "| `ema`"]
    assert "| Grokfast-EMA α 0.98 λ 2, Adam weight decay 0.005 | 2 | 100 | 1,000 (1,000 to 1,001) |" in lines[3]
    operations = tables["study_operations"]
    assert operations.count("| division | `ema` | 2 |") == 1
    # Compared within an operation only: the division has no control here.
    assert "against" not in operations
    runs = [result((name, {"operation": "division"}), 0, steps) for name, steps in (("ema", 900), ("adamw-1", 1000))]
    table = study_report.filters_compared(runs, [{"operation": "addition"}, {"operation": "division"}])
    assert table.splitlines()[3:] == ["| division | `ema` | `adamw-1` | 1 | 1 | 0 | 0 | 0.90 (1) |"]
    assert tables["study_tuned"] == "Not measured yet.\n"
    # With the control that has the same rate and decay.
    rates = {("ma+adamw-1", 0.003, 3.0): 500, ("adamw-1", 0.003, 3.0): 1000, ("adamw-1", 0.001, 3.0): 100}
    rates |= {("adamw-1", 0.003, 1.0): 200}
    runs = [
        result((name, {"lr": rate, "weight_decay": decay}), 0, steps) for (name, rate, decay), steps in rates.items()
    ]
    lines = study_report.rate_table(runs).splitlines()
    assert [line for line in lines if "`ma+adamw` | `adamw`" in line] == [
        "| 0.003 | 3.0 | `ma+adamw` | `adamw` | 1 | 1 | 0 | 0 | 0.50 (1) |"
    ]
    for name in ("methods", "ablations"):
        assert (tmp_path / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(pictures/study_{name}.png)" in tables[f"study_{name}"]
    # One setting of each method is no ablation.
    single = [result((name, {}), 0, 1000) for name in ("ema", "ma", "adam-0.005")]
    assert study_report.ablation_picture(single) is None
    lines = study_report.ablation([*single, result(("adam", {}), 0, 2000)], "decay")
    assert lines == {"no filter": {0.0: 2000, 0.005: 1000}}
    # A seed that not all settings have is left out.
    lines = study_report.ablation([*single, *(result(("adam", {}), seed, 2000) for seed in (0, 1))], "decay")
    assert {setting: list(values) for setting, values in lines["no filter"].items()} == {0.0: [2000], 0.005: [1000]}
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 9
    assert study_report.tables(tmp_path / "none", tmp_path)["study_methods"] == "Not measured yet.\n"


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
    arguments = trajectories.Arguments((0, 1), ("ema", "adamw-1"), cap=400, every=8, out=tmp_path / "paths")
    trajectories.main(arguments)
    found = json.loads((tmp_path / "paths" / "seed-0.json").read_text())
    for name, run in found["methods"].items():
        config = METHODS[name]
        program = trajectories.program(config.task(), lambda hyper, config=config: make_tx(config, hyper))
        key, hyper = jax.random.key(0), config.hyper()
        state = program.init(hyper, key)
        at = {0: trajectories.vector(state.params)}
        for step in range(4, max(run["at"].values()) + 1, 4):
            state, _ = program.advance(hyper, key, state)
            at[step] = trajectories.vector(state.params)
        a, b, c = (at[step] for step in (0, run["at"]["B"], run["at"]["C"]))
        for pair, distance in (("AB", b - a), ("BC", c - b), ("AC", c - a)):
            assert run["distances"][pair] == pytest.approx(np.linalg.norm(distance), rel=1e-6)
        # Two axes of a plane cannot hold more than there is, and hold most of it here.
        x = np.array(run["path"])
        drawn = np.linalg.norm(x[run["steps"].index(run["at"]["C"])] - x[0])
        assert 0.5 * run["distances"]["AC"] < drawn <= run["distances"]["AC"] + 2e-3
    assert "| `ema` | 2 |" in trajectories.table(tmp_path / "paths")
    trajectories.picture(tmp_path / "paths").savefig(tmp_path / "paths.png")
    with pytest.raises(UserError, match=r"--methods must be among"):
        dataclasses.replace(arguments, methods=("sgd",))
    with pytest.raises(UserError, match=r"--every must be at least 1, got 0"):
        dataclasses.replace(arguments, every=0)
    with pytest.raises(
        UserError, match=r"seed-0.json was made with methods \['ema', 'adamw-1'\], not \['ma'\]; delete"
    ):
        trajectories.main(dataclasses.replace(arguments, methods=("ma",)))


def test_recorded_gradients_are_those_that_come_in():
    tx = optax.chain(frequency.record(jnp.array([0, 4, 2]), 3), optax.sgd(1.0))
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    state = tx.init(params)
    for i in range(5):
        grads = {"a": jnp.arange(4.0).reshape(2, 2) + 10 * i, "b": jnp.arange(4.0, 6.0) + 10 * i}
        updates, state = tx.update(grads, state, params)
        assert (updates["b"] == -grads["b"]).all()
    assert optax.tree_utils.tree_get(state, "last").tolist() == [[10.0 * i + k for k in (0, 4, 2)] for i in (2, 3, 4)]


def test_spectrum_finds_a_sine_and_white_noise():
    steps = np.arange(500)[:, None]
    f, power = frequency.spectrum(np.sin(2 * np.pi * 0.1 * steps + np.arange(3)))
    assert f[np.argmax(power)] == pytest.approx(0.1)
    assert power[np.abs(f - 0.1) < 0.005].sum() > 0.999
    assert frequency.slow_share(f, power) < 1e-6
    f, power = frequency.spectrum(np.random.default_rng(0).normal(size=(500, 4000)))
    assert frequency.slow_share(f, power) == pytest.approx(0.02, rel=0.12)  # 5 of 251 frequencies, the first being half
    assert frequency.slow_share(*frequency.spectrum(np.ones((500, 2)))) > 0.999


def test_sampling_noise_has_little_slow_power():
    noise = frequency.sampling_noise(signals=64)
    assert noise.shape == (500, 64)
    weights = np.array([512] * 9 + [48])
    np.testing.assert_allclose(weights @ noise[:10], 0, atol=1e-9)  # an epoch has every example once
    assert 0.007 < frequency.slow_share(*frequency.spectrum(noise)) < 0.012


def test_spectra_are_measured_window_by_window(tmp_path, toys):
    arguments = frequency.Arguments((0,), ("adam", "ema"), windows=2, parameters=4, out=tmp_path / "spectra")
    frequency.main(arguments)
    found = json.loads((tmp_path / "spectra" / "ema_seed-0.json").read_text())
    assert [window["from_step"] for window in found["windows"]] == [0, 500]
    for window in found["windows"]:
        assert sum(window["power"]) == pytest.approx(1, abs=0.01)
        assert window["rms"] > 0
    assert frequency.table(tmp_path / "spectra").count("`ema`") == 3
    with pytest.raises(UserError, match=r"was made with windows 2, not 3; delete it"):
        frequency.main(dataclasses.replace(arguments, windows=3))
    with pytest.raises(UserError, match=r"--windows must be at least 1, got 0"):
        dataclasses.replace(arguments, windows=0)
    frequency.spectra_picture(tmp_path / "spectra").savefig(tmp_path / "spectra.png")
    frequency.responses_picture().savefig(tmp_path / "responses.png")


def test_many_seeds_and_numbers_train_in_one_program_as_alone():
    """The study's vmapped form, with the optimizer that treats matrices otherwise."""
    config = METHODS["ema+muon"]
    task = Modular(p=5, batch_size=8, dim=8, depth=1, heads=2)
    make = lambda hyper: make_tx(config, hyper)
    hypers = [config.hyper() | {"lr": lr, "weight_decay": decay} for lr, decay in ((1e-3, 1.0), (3e-3, 0.0))]
    keys = [jax.random.key(seed) for seed in (0, 1)]
    hyper = {name: jnp.array([h[name] for h in hypers]) for name in hypers[0]}
    together = program(task, make, example=(hyper, jnp.stack(keys)))
    state = together.init(hyper, jnp.stack(keys))
    for _ in range(3):
        state, metrics = together.advance(hyper, jnp.stack(keys), state)
    alone = program(task, make)
    for i in (0, 1):
        one = alone.init(hypers[i], keys[i])
        for _ in range(3):
            one, expected = alone.advance(hypers[i], keys[i], one)
        np.testing.assert_allclose(metrics["val_loss"][i], expected["val_loss"], rtol=1e-3)
        assert np.isfinite(expected["val_loss"])
