"""The training loop, the run folder, and the surprises a run must survive."""

import dataclasses
import math
import os
import resource
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from matplotlib.figure import Figure

from examples import resume
from examples.harness import loop, plots, runner
from examples.harness.cli import parse
from examples.harness.engine import product
from examples.harness.errors import RunInterruptedError, UserError, plain_errors
from examples.harness.experiment import Measure
from examples.harness.files import commit, write_whole
from examples.harness.loop import evaluations, stack
from examples.harness.methods import Lamb, LearningRate, Tx
from examples.harness.records import is_finished, outcome, steps_to, to_row
from examples.harness.run_folder import RunFolder
from examples.harness.runner import stored, train
from examples.harness.train import keys, program

from . import toy

pytestmark = pytest.mark.usefixtures("lenient", "shared_programs")


def start(*argv, experiment=toy.EXPERIMENT):
    return train(experiment, *parse(experiment, [str(word) for word in argv]))


def go_on(*argv):
    return train(*resume.parse([str(word) for word in argv]), resume=True)


def parameters(folder):
    """The state in the last checkpoint of a run folder."""
    _, run, _ = stored(folder)
    state = runner.program(run).init(run.traced, jax.random.key(run.seed))
    return RunFolder(folder).restore(state)


def assert_same_run(folder, expected):
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    chex.assert_trees_all_equal(parameters(folder), parameters(expected))


@pytest.fixture(scope="module")
def undisturbed(shared_programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        start("ma", "--out", folder)
    return folder


def test_a_run_leaves_its_configuration_metrics_picture_and_checkpoint(undisturbed):
    lines = (undisturbed / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,val_loss,val_accuracy"
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(4, 84, 4))
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = RunFolder(undisturbed).config
    assert (config["method"], config["window_size"], config["experiment"]) == ("ma", 7, "tests.toy")
    assert config["versions"]["jax"] == jax.__version__
    assert parameters(undisturbed).chunk == 20
    files = {"config.json", "metrics.csv", "curves.png", "checkpoint", ".lock"}
    assert {path.name for path in undisturbed.iterdir()} == files
    assert not [path for path in undisturbed.parent.iterdir() if path.name.startswith(".")]


def test_the_same_command_gives_the_same_run(undisturbed, tmp_path):
    start("ma", "--out", tmp_path / "again")
    assert_same_run(tmp_path / "again", undisturbed)
    start("ma", "--out", tmp_path / "other", "--seed", 1)
    assert (tmp_path / "other" / "metrics.csv").read_text() != (undisturbed / "metrics.csv").read_text()


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    ("records", "torn"), [(0, b"ste"), (1, b""), (3, b"1"), (8, b"36,0.1"), (20, b"84,0.1,0.2,0.3,0.4")]
)
def test_a_killed_run_is_resumed_bit_for_bit(records, torn, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    append = RunFolder.append

    def append_until_killed(self, row):
        if len(self.rows) == records:
            raise Killed
        append(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append_until_killed)
        if records < 20:
            with pytest.raises(Killed):
                start("ma", "--out", folder, "--checkpoint-every", 3)
        else:
            start("ma", "--out", folder, "--checkpoint-every", 3)
    with (folder / "metrics.csv").open("ab") as file:
        file.write(torn)
    (folder / ".checkpoint.half").mkdir()
    go_on(folder)
    assert_same_run(folder, undisturbed)
    assert not (folder / ".checkpoint.half").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_resumed_bit_for_bit(number, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "interrupted"

    def to_row_and_interrupt(step, metrics):
        if step == 28:
            os.kill(os.getpid(), number)
        return to_row(step, metrics)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "to_row", to_row_and_interrupt)
        message = rf"interrupted after step 28; continue with python -m examples\.resume {folder}"
        with pytest.raises(RunInterruptedError, match=message):
            start("ma", "--out", folder)
    assert signal.getsignal(number) is before
    assert (folder / "curves.png").exists()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 8
    go_on(folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize(("checkpoint_every", "limit"), [(1000, 600), (2, 600), (2, 300)])
def test_a_full_disk_loses_nothing(checkpoint_every, limit, undisturbed, tmp_path, monkeypatch, capsys):
    """A limit on the size of files replaces the full disk: it cuts off a record, or a checkpoint, in the middle."""
    folder = tmp_path / "full"
    assert (undisturbed / "metrics.csv").stat().st_size > 600
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    start("ma", "--out", folder, "--max-steps", 4, "--checkpoint-every", checkpoint_every)
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "update_config", lambda self, changes: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            status = plain_errors(lambda: go_on(folder, "--max-steps", 80))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    messages = capsys.readouterr().err
    assert "error: " in messages
    assert "Traceback" not in messages
    assert "ile too large" in messages
    assert "python -m examples.resume" in messages
    go_on(folder, "--max-steps", 80)
    assert_same_run(folder, undisturbed)


def test_an_existing_folder_is_left_alone(undisturbed, tmp_path):
    content = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    message = r"whole exists already; continue its run with python -m examples\.resume .*whole, or"
    with pytest.raises(UserError, match=message):
        start("ma", "--out", undisturbed)
    assert content == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(UserError, match=r"other exists already and holds no run; choose another --out$"):
        start("ma", "--out", other)
    with pytest.raises(
        UserError, match=r"other is not a run folder \(it has no config\.json\); name one, or start a run"
    ):
        go_on(other)
    (tmp_path / "empty").mkdir()
    start("ma", "--out", tmp_path / "empty", "--max-steps", 4)
    assert (tmp_path / "empty" / "metrics.csv").exists()


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make .*file: Not a directory; choose another --out"):
        start("ma", "--out", tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot make .*run: (Not a directory|File exists); choose another --out"):
        start("ma", "--out", tmp_path / "file" / "run")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"cannot make .*run: Permission denied; choose another --out"):
        start("ma", "--out", tmp_path / "run")


def test_a_run_without_out_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = start("ma", "--seed", 3, "--max-steps", 4)
    assert folder.path.parts[0] == "runs"
    assert folder.path.name.startswith("tests.toy-ma-seed3-")
    _, run, _ = stored(folder.path)
    assert len({runner.new_path(toy.EXPERIMENT, run) for _ in range(20)}) == 20  # in one second
    assert (folder.path / "metrics.csv").exists()


def test_records_that_were_deleted_or_replaced_during_a_run(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    rows = [{"step": step, "val_loss": 0.5} for step in (4, 8)]
    folder.append(rows[0])
    (folder.path / "metrics.csv").unlink()
    folder.append(rows[1])
    assert (folder.path / "metrics.csv").read_text() == "step,val_loss\n4,0.5\n8,0.5\n"
    (folder.path / "metrics.csv").unlink()
    (folder.path / "metrics.csv").mkdir()
    with pytest.raises(UserError, match=r"\(Is a directory\); what was there before is kept. Make it writable and"):
        folder.append(rows[1])


def test_a_run_that_goes_on_elsewhere_says_so_and_keeps_both(tmp_path, capsys):
    folder = start("ma", "--out", tmp_path / "run", "--max-steps", 4)
    here = folder.config["device"]
    folder.update_config({"device": "another"})
    for steps in (8, 12):
        go_on(folder.path, "--max-steps", steps)
        note = f"may differ from an undisturbed one, because it was trained with device another, now {here}\n"
        assert (note in capsys.readouterr().err) == (steps == 8)
    assert folder.config["device"] == "another"
    (resumed,) = folder.config["resumed"]
    assert resumed["device"] == here


def test_resume_refuses_other_data(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    with monkeypatch.context() as patch:
        split = toy.Toy.split
        patch.setattr(toy.Toy, "split", lambda *a: split(*a) | {"y": 1 - split(*a)["y"]})
        patch.setattr(runner, "program", program)
        with pytest.raises(UserError, match=r"the data are not those that the run in .*run was started with; pass the"):
            go_on(tmp_path / "run", "--max-steps", 120)
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_finished_run_goes_on_to_more_steps(undisturbed, tmp_path):
    start("ma", "--out", tmp_path / "run", "--max-steps", 8)
    go_on(tmp_path / "run", "--max-steps", 80)
    go_on(tmp_path / "run")  # which is finished
    now, expected = (
        {**RunFolder(path).config, "commit": "", "checksum": ""} for path in (tmp_path / "run", undisturbed)
    )
    assert now == expected
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path):
    # Adam's first step has the size of the learning rate, so the second loss overflows.
    with pytest.raises(UserError, match=r"no longer finite at step 2; .*run. Try a smaller --lr or --lamb\.$"):
        start("ma", "--out", tmp_path / "run", "--lr", "3e38")
    with pytest.raises(UserError, match=r"\. Try a smaller --lr\.$"):
        start("adam", "--out", tmp_path / "alone", "--lr", "3e38")


def test_a_run_stops_once_the_accuracy_is_reached_and_followed(undisturbed, tmp_path, capsys):
    folder = RunFolder(undisturbed)
    folder.restore(parameters(undisturbed))
    reached = steps_to(folder.rows, 0.8, "accuracy")
    assert reached is not None
    at_it = [row["val_accuracy"] >= 0.8 for row in folder.rows if row["step"] > reached]
    for hold in (0, 5):
        start("ma", "--out", tmp_path / f"stop{hold}", "--stop-at", 0.8, "--hold-evals", hold)
        last = (tmp_path / f"stop{hold}" / "metrics.csv").read_text().splitlines()[-1]
        assert int(last.split(",")[0]) == reached + 4 * hold
        printed = capsys.readouterr().out
        assert f"Validation accuracy reached 80.0% after {reached} steps" in printed
        assert (f"was at it in {sum(at_it[:5])} of the 5 evaluations after that" in printed) == (hold > 0)
    # Also beyond --max-steps, and when it is resumed
    start("ma", "--out", tmp_path / "late", "--stop-at", 0.8, "--max-steps", reached)
    late = go_on(tmp_path / "late", "--hold-evals", 3)
    assert late.rows == folder.rows[: reached // 4 + 3]


ACCURACIES = [0.1, 0.9, 0.8, 0.9, 0.95, 0.9]


def rows_of(accuracies):
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return [{"step": 10 * i} | dict.fromkeys(names, a) for i, a in enumerate(accuracies, start=1)]


def test_steps_to_a_threshold():
    rows = rows_of(ACCURACIES)
    assert steps_to(rows, 0.9, "accuracy") == 20
    assert steps_to(rows, 0.91, "accuracy") == 50
    assert steps_to(rows, 0.96, "accuracy") is None
    assert steps_to([], 0.5, "accuracy") is None
    assert steps_to(rows, 0.85, "loss") == 10
    assert steps_to(rows, 0.05, "loss", "train") is None


@pytest.mark.parametrize(
    ("rule", "end"),
    [
        ({}, None),
        ({"max_steps": 30}, 3),
        ({"max_steps": 25}, 3),  # rounded up to whole evaluations
        ({"stop_at": 0.9}, 2),
        ({"stop_at": 0.9, "hold_evals": 2}, 4),
        ({"stop_at": 0.9, "hold_evals": 2, "max_steps": 20}, 4),  # the steps are for the runs that do not reach it
        ({"stop_at": 0.95, "max_steps": 40}, 4),
        ({"stop_at": 0.9, "hold_evals": 10}, None),
    ],
)
def test_when_a_run_is_finished(rule, end):
    (run,) = product(toy.Toy(), toy.ma, **{"max_steps": 100, **rule})
    rows = rows_of(ACCURACIES)
    finished = [is_finished(run, rows[:i]) for i in range(len(rows) + 1)]
    first = len(rows) + 1 if end is None else end
    assert finished[:first] == [False] * first
    assert all(finished[first : first + 1])


def test_the_outcome_of_a_run_by_hand():
    (run,) = product(toy.Toy(), toy.ma, stop_at=0.9, hold_evals=4)
    assert outcome(run, rows_of(ACCURACIES)) == {
        "steps_to_50": 20,
        "steps_to_80": 20,
        "fit_steps": 20,
        "followed_evals": 4,
        "held_evals": 3,
        "best_val_accuracy": 0.95,
        "min_val_loss": 0.1,
        "last_step": 60,
        "finite": True,
    }
    diverged = [*rows_of([0.1, 0.6]), {**rows_of([0.0] * 3)[-1], "val_loss": float("nan")}]
    found = outcome(run, diverged)
    assert (found["finite"], found["last_step"], found["best_val_accuracy"], found["min_val_loss"]) == (
        False,
        30,
        0.6,
        0.1,
    )
    assert (found["steps_to_50"], found["steps_to_80"], found["fit_steps"]) == (20, None, None)
    assert "held_evals" not in found
    never = outcome(run, [{**rows_of([0.1])[0], "train_loss": float("inf")}])
    assert (never["finite"], never["best_val_accuracy"], never["min_val_loss"]) == (False, None, None)


def test_a_task_with_a_loss_alone_is_judged_by_it(tmp_path, capsys, monkeypatch):
    experiment = dataclasses.replace(toy.EXPERIMENT, task=toy.LossToy())
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure.axes[0]))
    whole = start("ma", "--out", tmp_path / "whole", experiment=experiment)
    assert (tmp_path / "whole" / "metrics.csv").read_text().startswith("step,train_loss,val_loss\n")
    val_loss = [row["val_loss"] for row in whole.rows]
    assert f"The best validation loss was {min(val_loss):.4g} in 80 steps" in capsys.readouterr().out
    (axes,) = drawn
    assert (axes.get_ylabel(), axes.get_yscale()) == ("loss", "log")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), val_loss)

    stop_at = val_loss[9] + 1e-6
    reached = 4 * (1 + next(i for i, loss in enumerate(val_loss) if loss <= stop_at))
    start("ma", "--out", tmp_path / "stop", "--stop-at", stop_at, experiment=experiment)
    assert f"Validation loss reached {stop_at:.4g} after {reached} steps" in capsys.readouterr().out
    start("ma", "--out", tmp_path / "missed", "--stop-at", 1e-9, experiment=experiment)
    assert f"The best validation loss was {min(val_loss):.4g} in 80 steps" in capsys.readouterr().out


def test_a_measure_adds_columns_and_a_picture(tmp_path, monkeypatch, undisturbed):
    seen = []
    columns = lambda task, params, data: {"norm": jnp.linalg.norm(params["w"]), "points": data["y"].shape[0]}
    measure = Measure(columns, lambda rows, title: seen.append((rows, title)) or Figure(), every=3)
    experiment = dataclasses.replace(toy.EXPERIMENT, measures={"size": measure})
    flags = ("--measure", "size", "--max-steps", 76)
    folder = start("ma", "--out", tmp_path / "run", *flags, experiment=experiment)
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,val_loss,val_accuracy,size_norm,size_points"
    plain = (undisturbed / "metrics.csv").read_text().splitlines()
    for i, (line, expected) in enumerate(zip(lines[1:], plain[1:-1], strict=True)):
        assert line.startswith(expected)
        assert line.endswith(",30.0" if i % 3 == 0 else ",,")
    norm = np.linalg.norm(parameters(tmp_path / "run").params["w"])
    assert folder.rows[18]["size_norm"] == pytest.approx(norm, rel=1e-6)
    assert (tmp_path / "run" / "size.png").exists()
    ((rows, title),) = seen
    assert len(rows) == 19
    assert title == "tests.toy: ma, lr 0.01, weight_decay 0.005, lamb 5, seed 0"


def test_a_measure_has_the_precision_of_the_run(tmp_path):
    seen = []

    def columns(task, params, data):
        seen.append(jax.config.jax_default_matmul_precision)
        return {"norm": jnp.linalg.norm(params["w"])}

    measure = Measure(columns, lambda rows, title: Figure(), every=3)
    experiment = dataclasses.replace(toy.EXPERIMENT, measures={"size": measure})
    flags = ("--measure", "size", "--max-steps", 8, "--out")
    start("ma", *flags, tmp_path / "one", experiment=experiment)
    start("ma", "--matmul-precision", "default", *flags, tmp_path / "two", experiment=experiment)
    assert seen == ["float32", "default"]


def noisy(lr: LearningRate = 0.01) -> optax.GradientTransformation:
    """Adam on noisy gradients, whose state has a random key."""
    return optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(lr))


def test_a_random_key_in_the_state_is_kept(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, methods={"noisy": noisy}, default="noisy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "EXPERIMENT", experiment)
        start("noisy", "--max-steps", 16, "--out", tmp_path / "whole", experiment=experiment)
        start("noisy", "--max-steps", 8, "--out", tmp_path / "parts", experiment=experiment)
        go_on(tmp_path / "parts", "--max-steps", 16)
    texts = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 5


def test_a_refused_resume_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with RunFolder(tmp_path / "run").locked(), pytest.raises(UserError, match="another process trains the run"):
        go_on(tmp_path / "run", "--max-steps", 160)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_that_diverged_is_drawn_up_to_a_cross():
    good = pd.Series([2.0, 1.0, 0.5, 0.4], [10, 20, 30, 40])
    bad = pd.Series([4.0, 3.0, math.nan, math.nan], good.index)
    axes = plots.curves({"one": [bad], "two": [good]}, "title", "loss").axes[0]
    cross, line = axes.lines[:2]
    np.testing.assert_array_equal(cross.get_xydata(), [[30, 3.0]])
    np.testing.assert_array_equal(line.get_ydata(), [4.0, 3.0, 3.0, math.nan])


def test_records_keep_every_bit_of_a_float32():
    value = np.float32(1) / 3
    row = to_row(7, {"val_loss": value, "train_accuracy": value, "train_loss": value, "val_accuracy": value})
    assert list(row) == ["step", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert np.float32(str(row["val_loss"])) == value
    assert len(str(row["val_loss"])) <= 12


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def guarded(lr: LearningRate = 1e-2, lamb: Lamb = 2.0) -> Tx:
    """The MA before Adam; steps that are not finite are skipped, and counted for each run."""
    return optax.apply_if_finite(toy.ma(lr, lamb=lamb), max_consecutive_errors=3)


@pytest.mark.parametrize("method", [toy.ema, toy.ma, guarded])
def test_vmapped_runs_equal_single_runs_in_one_compilation(method):
    """Four seeds, each with its own hyperparameters; floating-point sums may be ordered differently, hence 1e-5."""
    runs = [
        run
        for i in range(4)
        for run in product(toy.Toy(), method, seed=i, lr=0.001 * (1 + i), lamb=i / 2, group_size=4)
    ]
    hyper, key = stack([run.traced for run in runs]), stack([jax.random.key(run.seed) for run in runs])
    many = program(runs[0])  # not shared: its compilations are counted
    rows = []
    for _, evaluation in zip(range(10), evaluations(many, hyper, key), strict=False):
        rows.append((evaluation.step, evaluation.rows))
    assert many.advance._cache_size() == 1
    one = program(dataclasses.replace(runs[0], group_size=1))
    for i, run in enumerate(runs):
        for (step, found), expected in zip(rows, evaluations(one, run.traced, key[i]), strict=False):
            assert step == expected.step
            for name, value in expected.rows[0].items():
                np.testing.assert_allclose(found[i][name], value, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, i=i: p[i], evaluation.state.params), expected.state.params, rtol=1e-5, atol=1e-6
        )
    assert one.advance._cache_size() == 1


def lowered(run, **options):
    """The program of a run or a group of them, lowered for shapes."""
    made = program(run, **options)
    hyper, key = run.traced, jax.random.key(0)
    if run.group_size > 1:
        hyper, key = stack([hyper] * run.group_size), stack([key] * run.group_size)
    shared, own = jax.eval_shape(made.draw, key)
    return made.advance.lower(hyper, key, shared, own, jax.eval_shape(made.init, hyper, key))


def test_the_ring_of_a_group_is_updated_in_place(usual_options):
    """A counter per run would make the write to the ring a scatter, and the ring of all runs would be copied."""
    (run,) = product(toy.Toy(), toy.ma, window_size=10_000, group_size=3)
    compiled = lowered(run).compile(usual_options)
    assert "scatter(" not in compiled.as_text()
    ring = 3 * 6 * 10_001 * 4  # bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > ring
    assert memory.temp_size_in_bytes < ring / 10


@pytest.mark.parametrize(("options", "expected"), [({}, "HIGHEST"), ({"precision": "default"}, "DEFAULT")])
def test_matrix_products_are_float32_unless_a_flag_says_otherwise(options, expected):
    (run,) = product(toy.Toy(), toy.adam)
    products = [line for line in lowered(run, **options).as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 2
    assert all(f"precision = [{expected}, {expected}]" in line for line in products)


def test_all_shapes_are_static_and_types_a_fixed_point():
    (run,) = product(toy.Toy(), toy.ma, group_size=3)
    text = lowered(run).as_text()
    assert "tensor<?" not in text
    assert "dynamic_reshape" not in text
    made = program(run)
    hyper, key = stack([run.traced] * 3), stack([jax.random.key(0)] * 3)
    shared, own = jax.eval_shape(made.draw, key)
    before = jax.eval_shape(made.init, hyper, key)
    after, _ = jax.eval_shape(made.advance, hyper, key, shared, own, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


def test_a_run_that_diverges_leaves_the_others_of_its_program_alone():
    runs = product(toy.Toy(), toy.ema, lr=[0.01, 3e38, 0.02, 1e38], group_size=4)
    hyper, key = stack([run.traced for run in runs]), stack([jax.random.key(0)] * 4)
    evaluation = next(evaluations(runner.program(runs[0]), hyper, key))
    assert evaluation.diverged_at == [None, 2, None, 2]
    alone = next(
        evaluations(runner.program(dataclasses.replace(runs[0], group_size=1)), runs[0].traced, jax.random.key(0))
    )
    assert alone.diverged_at == [None]
    np.testing.assert_allclose(evaluation.rows[0]["val_loss"], alone.rows[0]["val_loss"], rtol=1e-5)


def test_a_chunk_is_the_plain_loop():
    """The loop against ten lines of Python that do the same."""
    (run,) = product(toy.Toy(), toy.ma, seed=3)
    task, key, tx, compiled = run.task, jax.random.key(3), toy.ma(), runner.program(run)
    data, params = compiled.draw(key)[1], compiled.init(run.traced, key).params
    opt_state, batches_of = tx.init(params), jax.jit(task.batches)

    @jax.jit
    def step(params, opt_state, batch):
        x, y, weight = data["x"][batch["index"]], data["y"][batch["index"]], batch["weight"]

        def loss_fn(params):
            logit = x @ params["w"] + params["b"]
            return jnp.sum(weight * (jnp.logaddexp(0.0, logit) - y * logit)) / weight.sum()

        correct = weight @ ((x @ params["w"] + params["b"] > 0) == (y > 0)).astype(float)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, correct, loss * weight.sum(), weight.sum()

    records = evaluations(compiled, run.traced, key)
    for chunk, evaluation in zip(range(3), records, strict=False):
        batches = batches_of(data, jax.random.fold_in(keys(key).batch, chunk))
        sums = []
        for i in range(task.steps):
            params, opt_state, *found = step(params, opt_state, jax.tree.map(lambda leaf, i=i: leaf[i], batches))
            sums.append(found)
        correct, loss, count = np.sum(sums, axis=0)
        assert count == 20
        (row,) = evaluation.rows
        np.testing.assert_allclose(row["train_accuracy"], correct / 20, rtol=1e-6)
        np.testing.assert_allclose(row["train_loss"], loss / 20, rtol=1e-5)
        x, y = data["x"][:10], data["y"][:10]
        accuracy = np.mean((x @ params["w"] + params["b"] > 0) == (y > 0))
        np.testing.assert_allclose(row["val_accuracy"], accuracy, rtol=1e-6)
        chex.assert_trees_all_close(evaluation.state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs Git")
def test_the_commit_of_a_checkout_is_named(tmp_path):
    assert commit(tmp_path) is None
    git = lambda *command: (
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *command],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    git("init")
    assert commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    named = commit(tmp_path)
    assert named is not None
    assert git("rev-parse", "HEAD").startswith(named)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{named}-dirty"


def test_tensorboard_gets_the_records(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
    start("ma", "--out", tmp_path / "run", "--max-steps", 8, "--tensorboard")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"val/accuracy") == content.count(b"train/loss") == 2


def test_a_missing_logger_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"--tensorboard needs a package; pip install 'grokfast_jax\["):
        start("ma", "--out", tmp_path / "run", "--max-steps", 8, "--tensorboard")
