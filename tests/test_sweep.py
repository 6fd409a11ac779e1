"""Sweeps: what they run, what they keep, what they report."""

import csv
import json
import math

import numpy as np
import pytest

from examples import sweep
from examples.harness import plots
from examples.harness import sweep as groups
from examples.harness.config import Preset, find_experiment
from examples.harness.errors import UsageError, UserError
from examples.harness.tables import median_and_range
from examples.sweep import Sweep

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


def make(out, **changes):
    arguments = {"presets": ("ema", "none"), "seeds": (0, 1), "grid": ("lr=0.01,0.1", "budget=40")}
    return Sweep("tests.toy", out, **(arguments | changes))


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_combination_is_run_and_reported(tmp_path, capsys):
    sweep.run(make(tmp_path / "s"))
    runs = table(tmp_path / "s" / "runs.csv")
    assert [(r["preset"], r["lr"], r["seed"]) for r in runs] == [
        (preset, lr, seed) for preset in ("ema", "none") for lr in ("0.01", "0.1") for seed in "01"
    ]
    curves = table(tmp_path / "s" / "curves.csv")
    assert len(curves) == 8 * 10
    for run in runs:
        mine = [c for c in curves if all(c[k] == run[k] for k in ("preset", "lr", "seed"))]
        assert [int(c["step"]) for c in mine] == list(range(4, 44, 4))
        assert float(run["best_val_accuracy"]) == max(float(c["val_accuracy"]) for c in mine)
        assert float(run["min_val_loss"]) == min(float(c["val_loss"]) for c in mine)
        for threshold in (0.5, 0.8):
            reached = [c["step"] for c in mine if float(c["val_accuracy"]) >= threshold]
            assert run[f"steps_to_{100 * threshold:g}"] == (reached[0] if reached else "")
    result = json.loads((tmp_path / "s" / "runs" / "preset-none_lr-0.1_seed-1.json").read_text())
    assert (result["config"]["filter"], result["config"]["lr"], result["config"]["budget"]) == ("none", 0.1, 40)
    assert result["versions"]["optax"]
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s" / "table.md").read_text() in capsys.readouterr().out


def test_groups_give_what_single_runs_give(tmp_path):
    sweep.run(make(tmp_path / "one"))
    sweep.run(make(tmp_path / "many", group_size=3))
    one, many = table(tmp_path / "one" / "curves.csv"), table(tmp_path / "many" / "curves.csv")
    for a, b in zip(one, many, strict=True):
        assert (a["preset"], a["lr"], a["seed"], a["step"]) == (b["preset"], b["lr"], b["seed"], b["step"])
        np.testing.assert_allclose(float(a["val_loss"]), float(b["val_loss"]), rtol=1e-5)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    sweep.run(make(tmp_path / "whole"))
    train_group, calls = groups.train_group, []

    def stop_at_the_fourth(group, *rest):
        calls.append(group)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_group(group, *rest)

    monkeypatch.setattr(groups, "train_group", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(make(tmp_path / "s"))
    assert len(list((tmp_path / "s" / "runs").iterdir())) == 3
    sweep.run(make(tmp_path / "s"))
    assert len(calls) == 4 + 5
    assert (tmp_path / "s" / "curves.csv").read_text() == (tmp_path / "whole" / "curves.csv").read_text()
    sweep.run(make(tmp_path / "s", group_size=2))
    assert len(calls) == 4 + 5


def test_another_sweep_does_not_overwrite(tmp_path):
    sweep.run(make(tmp_path / "s"))
    with pytest.raises(
        UserError, match=r"s holds another sweep; repeat the command in .*sweep.json, or choose another"
    ):
        sweep.run(make(tmp_path / "s", seeds=(0, 1, 2)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="other exists already and holds no sweep; choose another --out"):
        sweep.run(make(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ("foo",)}, "--presets must be among none, ema, ma, got 'foo'"),
        ({"grid": ("lamb",)}, "--grid must be FLAG=VALUE,VALUE .* got 'lamb'"),
        ({"grid": ("foo=1",)}, "--grid must be FLAG=VALUE,VALUE .* got 'foo=1'"),
        ({"grid": ("alpha=2",)}, r"--alpha must be in \[0, 1\), got 2.0"),
        ({"grid": ("seed=0,1",)}, "--grid must name a flag once, and seeds by --seeds, got 'seed=0,1'"),
        ({"grid": ("lamb=1", "lamb=2")}, "--grid must name a flag once, .* got 'lamb=2'"),
        ({"grid": ("lamb=1,1",)}, "must not name anything twice"),
        ({"seeds": (0, 0)}, "must not name anything twice"),
        ({"presets": ("ema", "ema")}, "must not name anything twice"),
        ({"seeds": ()}, "--presets and --seeds must name at least one each"),
        ({"group_size": 0}, "--group-size must be at least 1, got 0"),
    ],
)
def test_bad_plans_make_no_folder(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep.run(make(tmp_path / "s", **changes))
    assert not (tmp_path / "s").exists()


def test_a_run_that_diverges_is_kept_as_such(tmp_path):
    sweep.run(
        make(tmp_path / "s", presets=("none",), seeds=(0,), grid=("lr=0.1,3e38", "lr_warmup=0", "optimizer=adamw"))
    )
    good, bad = table(tmp_path / "s" / "runs.csv")
    assert (good["finite"], bad["finite"]) == ("True", "False")
    assert int(bad["last_step"]) == 4
    assert "fails" in (tmp_path / "s" / "table.md").read_text().splitlines()[3]


def test_two_numeric_axes_make_a_heat_map(tmp_path, monkeypatch):
    drawn = []

    def heat_map(table, title, form):
        drawn.append(table)
        return plots_heat_map(table, title, form)

    plots_heat_map = plots.heat_map
    monkeypatch.setattr(plots, "heat_map", heat_map)
    sweep.run(make(tmp_path / "s", presets=("ema",), grid=("lr=0.01,0.1", "lamb=0,1,2", "budget=40")))
    (drawn_table,) = drawn
    x, y = drawn_table.columns, drawn_table.index
    assert (x.name, [*x], y.name, [*y]) == ("lamb", ["0", "1", "2"], "lr", ["0.01", "0.1"])
    values = drawn_table.to_numpy()
    runs = table(tmp_path / "s" / "runs.csv")
    for i, lr in enumerate(y):
        for j, lamb in enumerate(x):
            steps = [float(r["steps_to_80"] or "inf") for r in runs if (r["lr"], r["lamb"]) == (lr, lamb)]
            median = np.median(steps)
            assert values[i, j] == median or (np.isnan(values[i, j]) and np.isinf(median))


def test_a_task_with_a_loss_alone_is_reported_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "EXPERIMENT", toy.LOSS)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure.axes[0]))
    sweep.run(make(tmp_path / "curves", presets=("loss",), grid=("budget=40",)))
    lines = (tmp_path / "curves" / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "preset", "seeds", "lowest val. loss", ""]
    losses = np.array([float(run["min_val_loss"]) for run in table(tmp_path / "curves" / "runs.csv")])
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells == ["", "loss", "2", median_and_range(losses, ".3g"), ""]
    assert figures[0].get_ylabel() == "validation loss"
    sweep.run(make(tmp_path / "map", presets=("loss",), grid=("lr=0.01,0.1", "lamb=0,2", "budget=40")))
    assert "lowest loss" in figures[1].get_title()


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path, monkeypatch):
    """A preset may change between the start of a sweep and its end; its name in the plan does not."""
    sweep.run(make(tmp_path / "s"))
    table = (tmp_path / "s" / "table.md").read_text()
    (tmp_path / "s" / "runs" / "preset-ema_lr-0.1_seed-1.json").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(toy.EXPERIMENT.presets, "ema", Preset(toy.BASE.replace(alpha=0.5), ""))
        with pytest.raises(UserError, match=r"seed-0.json was made with another alpha; delete it, or choose another"):
            sweep.run(make(tmp_path / "s"))
    assert not (tmp_path / "s" / "runs" / "preset-ema_lr-0.1_seed-1.json").exists()
    sweep.run(make(tmp_path / "s"))
    assert (tmp_path / "s" / "table.md").read_text() == table


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b'{"records": {}, "config": {}}', b"\xff"])
def test_a_damaged_result_is_named_with_its_cure(damage, tmp_path):
    sweep.run(make(tmp_path / "s"))
    file = tmp_path / "s" / "runs" / "preset-ema_lr-0.1_seed-1.json"
    file.write_bytes(damage)
    with pytest.raises(UserError, match=r"seed-1.json (is damaged|was made with another).*; delete it"):
        sweep.run(make(tmp_path / "s"))


def test_an_experiment_is_a_name_or_an_importable_module():
    assert find_experiment("modular").name == "modular"
    assert find_experiment("tests.toy") is toy.EXPERIMENT
    for name in ("foo", "json"):
        with pytest.raises(UsageError, match=rf"must be one of imdb, .*, or an importable module .* got '{name}'"):
            find_experiment(name)


def test_a_failure_counts_as_the_worst_value():
    nan = math.nan
    spread = lambda values, *rest: median_and_range(np.array(values, float), *rest)
    assert spread([3, 1, 2], ",.0f") == "2 (1 to 3)"
    assert spread([1000.0], ",.0f") == "1,000"
    assert spread([nan, nan], ",.0f") == "fails"
    assert spread([3, nan, 1], ",.0f") == "3 (1 to fails), 1 of 3 failed"
    assert spread([nan, nan, 1], ",.0f") == "fails (1 to fails), 2 of 3 failed"
    assert spread([88.1, 90.2, nan], ".1f", -math.inf) == "88.1 (fails to 90.2), 1 of 3 failed"
