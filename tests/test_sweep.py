"""Sweeps: what they run, what they keep, what they report."""

import csv
import functools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import pytest

from examples import sweep
from examples.harness import engine, plots
from examples.harness.errors import UsageError
from examples.harness.experiment import Experiment
from examples.harness.methods import LearningRate, Tx
from examples.harness.tables import median_and_range
from examples.sweep import Sweep

from . import toy

pytestmark = pytest.mark.usefixtures("lenient", "shared_programs")


def make(out, **changes):
    arguments = {"experiment": "tests.toy", "methods": ("ema", "ma"), "seeds": (0, 1)}
    return Sweep(out=out, **(arguments | {"grid": ("lr=0.01,0.1", "max-steps=40")} | changes))


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def groups_trained(monkeypatch):
    trained, train_group = [], engine.train_group

    def spy(compiled, group, *rest, **options):
        trained.append(group)
        return train_group(compiled, group, *rest, **options)

    monkeypatch.setattr(engine, "train_group", spy)
    return trained


def test_every_combination_is_run_and_reported(tmp_path, capsys):
    sweep.run(make(tmp_path / "s"))
    runs = table(tmp_path / "s" / "runs.csv")
    assert [(r["method"], r["lr"], r["seed"]) for r in runs] == [
        (method, lr, seed) for method in ("ema", "ma") for lr in ("0.01", "0.1") for seed in "01"
    ]
    curves = table(tmp_path / "s" / "curves.csv")
    assert len(curves) == 8 * 10
    for run in runs:
        mine = [c for c in curves if all(c[k] == run[k] for k in ("method", "lr", "seed"))]
        assert [int(c["step"]) for c in mine] == list(range(4, 44, 4))
        assert float(run["best_val_accuracy"]) == max(float(c["val_accuracy"]) for c in mine)
        assert float(run["min_val_loss"]) == min(float(c["val_loss"]) for c in mine)
        for threshold in (0.5, 0.8):
            reached = [float(c["step"]) for c in mine if float(c["val_accuracy"]) >= threshold]
            assert float(run[f"steps_to_{100 * threshold:g}"] or "nan") == pytest.approx(
                [*reached, np.nan][0], nan_ok=True
            )
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "s" / "table.md").read_text() in capsys.readouterr().out
    origin, *results = map(json.loads, (tmp_path / "s" / "results.jsonl").read_text().splitlines())
    assert origin["versions"]["optax"]
    expected = {"method": "ma", "lr": 0.1, "max_steps": 40, "seed": 1, "weight_decay": 0.005}
    assert expected.items() <= results[-1]["run"].items()


def test_a_group_is_a_flag_and_its_results_are_others(tmp_path):
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    sweep.run(make(tmp_path / "many", methods=("ema",), group_size=4))
    one, many = table(tmp_path / "s" / "curves.csv"), table(tmp_path / "many" / "curves.csv")
    assert len(one) == 4 * 10
    for a, b in zip(one, many, strict=True):
        assert (a["method"], a["lr"], a["seed"], a["step"]) == (b["method"], b["lr"], b["seed"], b["step"])
        np.testing.assert_allclose(float(a["val_loss"]), float(b["val_loss"]), rtol=1e-5)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, groups_trained):
    sweep.run(make(tmp_path / "whole", methods=("ema",)))
    spy = engine.train_group

    def stop_at_the_third(*arguments, **options):
        if len(groups_trained) == 4 + 2:
            raise KeyboardInterrupt
        return spy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_group", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(make(tmp_path / "s", methods=("ema",)))
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    assert len(groups_trained) == 4 + 4
    assert (tmp_path / "s" / "curves.csv").read_text() == (tmp_path / "whole" / "curves.csv").read_text()
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    assert len(groups_trained) == 4 + 4


@pytest.mark.slow
def test_ctrl_c_while_xla_computes_exits_with_130_and_keeps_results(tmp_path):
    """Python crashes if it ends by KeyboardInterrupt then; the second run would take minutes."""
    flags = ["--methods", "adam", "--grid", "lr=0.1,0.0", "stop-at=0.8", "max-steps=1000000", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "examples.sweep", "tests.toy", *flags]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, and what it starts, would ignore it
    root, results = Path(__file__).parents[1], tmp_path / "results.jsonl"
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not results.exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "interrupted; what was complete is kept" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert [json.loads(line).get("steps_to_80") for line in results.read_text().splitlines()][1] > 0


def test_a_larger_sweep_keeps_what_a_smaller_one_trained(tmp_path, groups_trained):
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    sweep.run(make(tmp_path / "s", methods=("ema",), seeds=(0, 1, 2)))
    assert len(groups_trained) == 4 + 2
    assert len(table(tmp_path / "s" / "runs.csv")) == 6
    sweep.run(make(tmp_path / "s", methods=("ema",), seeds=(2,), grid=("lr=0.01", "max-steps=40")))
    (run,) = table(tmp_path / "s" / "runs.csv")
    assert (run["seed"], run["lr"]) == ("2", "0.01")
    assert len((tmp_path / "s" / "results.jsonl").read_text().splitlines()) == 1 + 6
    assert len(groups_trained) == 6


def test_a_method_with_another_default_is_another_run(tmp_path, monkeypatch, groups_trained):
    """A method may change between the start of a sweep and its end; its name on the command line does not."""
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    monkeypatch.setitem(toy.EXPERIMENT.methods, "ema", functools.partial(toy.ema, alpha=0.5))
    sweep.run(make(tmp_path / "s", methods=("ema",)))
    assert len(groups_trained) == 8
    assert {run["alpha"] for run in table(tmp_path / "s" / "runs.csv")} == {"0.5"}


def test_a_sweep_starts_beside_a_process_that_has_no_result_yet(tmp_path):
    (tmp_path / ".results.0123456789ab.lock").touch()
    sweep.run(make(tmp_path, methods=("ema",), seeds=(0,), grid=()))
    assert len(table(tmp_path / "runs.csv")) == 1


def nesterov(lr: LearningRate = 0.01, nesterov: bool = False) -> Tx:
    """Adam, whose momentum may be Nesterov's."""
    return optax.adam(lr, nesterov=nesterov)


def test_flags_without_a_value_can_be_combined():
    experiment = Experiment("tests.toy", toy.Toy(), {"nesterov": nesterov}, "nesterov")
    for value in (True, False):
        assert sweep.run_of(experiment, "nesterov", {"nesterov": str(value)}).hyperparams["nesterov"] is value


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(UsageError, match="exists already and holds no sweep; choose another --out"):
        sweep.run(make(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1 / 0", r"ZeroDivisionError: division by zero, .*faulty\.py, line 1\)"),
        ("import json\ndef", r"SyntaxError: invalid syntax \(faulty\.py, line 2\)\)"),
        ("EXPERIMENT = 3", r"EXPERIMENT is of type int\)"),
        ("", r"EXPERIMENT is of type NoneType\)"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module', .*faulty\.py, line 1\)"),
    ],
)
def test_a_module_that_fails_says_why_and_where_in_one_line(content, message, tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    with pytest.raises(UsageError, match=rf"^the experiment must be one of .*, got 'faulty' \({message}$"):
        sweep.run(make(tmp_path / "s", experiment="faulty"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": ""}, "the experiment must be one of imdb, .* got '' .ValueError: Empty module name"),
        (
            {"experiment": "..modular"},
            "the experiment must be one of .* got '..modular' .TypeError: .* relative import",
        ),
        ({"methods": ("foo",)}, "--methods must be one of ema, ma, adam, got 'foo'"),
        ({"methods": ("adan",)}, r"got 'adan'; did you mean adam\?"),
        ({"grid": ("lamb",)}, r"--grid must be FLAG=VALUE,VALUE, .* got 'lamb'"),
        ({"grid": ("foo=1",)}, "a flag of --grid for ema must be one of lr, .*, max_steps, .* got 'foo'"),
        ({"methods": ("adam",), "grid": ("lamb=1",)}, "a flag of --grid for adam must be one of lr, .* got 'lamb'"),
        ({"grid": ("out=x",)}, "a flag of --grid for ema must be one of .* got 'out'"),
        ({"grid": ("alpha=2",)}, r"--alpha must be in \[0, 1\), got 2.0"),
        ({"grid": ("seed=0,1",)}, "--grid must be .* and --seeds for seeds, got 'seed=0,1'"),
        ({"grid": ("lamb=1", "lamb=2")}, "--grid must be .*, each flag once, .* got 'lamb=2'"),
        ({"grid": ("lamb=1,1",)}, "must name one run or more, and none twice"),
        ({"grid": ("lamb=1,1.0",)}, "must name one run or more, and none twice"),
        ({"seeds": (0, 0)}, "must name one run or more, and none twice"),
        ({"methods": ("ema", "ema")}, "must name one run or more, and none twice"),
        ({"seeds": ()}, "must name one run or more"),
        ({"seeds": (-1,)}, "--seed must be in .*, got -1"),
        ({"methods": ()}, "must name one run or more"),
        ({"group_size": 0}, "--group-size must be at least 1, got 0"),
    ],
)
def test_bad_plans_make_no_folder(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sweep.run(make(tmp_path / "s", **changes))
    assert not (tmp_path / "s").exists()


def test_a_run_that_diverges_is_kept_as_such(tmp_path):
    sweep.run(make(tmp_path / "s", methods=("ema",), seeds=(0,), grid=("lr=0.1,3e38",)))
    good, bad = table(tmp_path / "s" / "runs.csv")
    assert (good["finite"], bad["finite"]) == ("True", "False")
    assert int(bad["last_step"]) == 4
    assert bad["steps_to_80"] == ""
    assert "fails" in (tmp_path / "s" / "table.md").read_text().splitlines()[3]


def test_a_task_with_a_loss_alone_is_reported_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "EXPERIMENT", Experiment("tests.toy", toy.LossToy(), {"ma": toy.ma}, "ma"))
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure.axes[0]))
    sweep.run(make(tmp_path / "curves", methods=("ma",), grid=("max-steps=40",)))
    lines = (tmp_path / "curves" / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "method", "seeds", "lowest val. loss", ""]
    losses = np.array([float(run["min_val_loss"]) for run in table(tmp_path / "curves" / "runs.csv")])
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells == ["", "ma", "2", median_and_range(losses, ".3g"), ""]
    assert figures[0].get_ylabel() == "loss"


def test_a_failure_counts_as_the_worst_value():
    nan = math.nan
    spread = lambda values, *rest: median_and_range(np.array(values, float), *rest)
    assert spread([3, 1, 2], ",.0f") == "2 (1 to 3)"
    assert spread([1000.0], ",.0f") == "1,000"
    assert spread([nan, nan], ",.0f") == "fails"
    assert spread([3, nan, 1], ",.0f") == "3 (1 to fails), 1 of 3 failed"
    assert spread([nan, nan, 1], ",.0f") == "fails (1 to fails), 2 of 3 failed"
    assert spread([88.1, 90.2, nan], ".1f", -math.inf) == "88.1 (fails to 90.2), 1 of 3 failed"
