"""The training loop, the run folder, and the surprises a run must survive."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.harness import loop, optimizers, plots
from examples.harness.cli import main, parse
from examples.harness.errors import RunInterruptedError, UsageError, UserError, plain_errors
from examples.harness.files import commit, write_whole
from examples.harness.loop import evaluations, stack
from examples.harness.optimizers import Filtering, Optimization, describe, make_filter, make_tx
from examples.harness.records import step_reached, to_row
from examples.harness.run_folder import RunFolder, read_config
from examples.harness.runner import train
from examples.harness.train import keys, program
from grokfast_jax import grokfast_ma

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


def toy_main(*argv, experiment=toy.EXPERIMENT):
    train(experiment, *parse(experiment, [str(word) for word in argv]))


def parameters(folder):
    """What the last checkpoint of a run folder holds."""
    base = toy.EXPERIMENT.base
    config = base.replace(**{name: value for name, value in read_config(folder).items() if name in base.flat()})
    state = program(config.task).init(config.hyper, jax.random.key(config.run.seed))
    return RunFolder.open(folder).restore(state)


def assert_same_run(folder, expected):
    assert (folder / "metrics.csv").read_text() == (expected / "metrics.csv").read_text()
    chex.assert_trees_all_equal(parameters(folder), parameters(expected))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        toy_main("--preset", "ma", "--out", folder)
    return folder


def test_a_run_leaves_its_configuration_metrics_picture_and_checkpoint(undisturbed, capsys):
    lines = (undisturbed / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,val_loss,val_accuracy"
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(4, 84, 4))
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = read_config(undisturbed)
    assert (config["filter"], config["window_size"], config["experiment"]) == ("ma", 7, "toy")
    assert config["versions"]["jax"] == jax.__version__
    assert parameters(undisturbed).chunk == 20
    files = {"config.json", "metrics.csv", "curves.png", "checkpoints", ".lock"}
    assert {path.name for path in undisturbed.iterdir()} == files
    assert not [path for path in undisturbed.parent.iterdir() if path.name.startswith(".")]


def test_the_same_command_gives_the_same_run(undisturbed, tmp_path):
    toy_main("--preset", "ma", "--out", tmp_path / "again")
    assert_same_run(tmp_path / "again", undisturbed)
    toy_main("--preset", "ma", "--out", tmp_path / "other", "--seed", 1)
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
                toy_main("--preset", "ma", "--out", folder, "--checkpoint-every", 3)
        else:
            toy_main("--preset", "ma", "--out", folder, "--checkpoint-every", 3)
    with (folder / "metrics.csv").open("ab") as file:
        file.write(torn)
    toy_main("--resume", folder)
    assert_same_run(folder, undisturbed)


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
        with pytest.raises(RunInterruptedError, match=f"interrupted after step 28; continue with --resume {folder}"):
            toy_main("--preset", "ma", "--out", folder)
    assert signal.getsignal(number) is before
    assert (folder / "curves.png").exists()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 8
    toy_main("--resume", folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("checkpoint_every", "limit"), [(1000, 600), (2, 600), (2, 300)])
def test_a_full_disk_loses_nothing(checkpoint_every, limit, undisturbed, tmp_path, capsys):
    """A limit on the size of files stands for the full disk: a record, or a checkpoint, is cut off in the middle."""
    folder = tmp_path / "full"
    assert (undisturbed / "metrics.csv").stat().st_size > 600
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    toy_main("--preset", "ma", "--out", folder, "--budget", 80, "--stop-at", 0.01)
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "update_config", lambda self, changes: None)
            flags = ["--resume", folder, "--stop-at", "None", "--checkpoint-every", checkpoint_every]
            status = plain_errors(lambda: toy_main(*flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    messages = capsys.readouterr().err
    assert "error: " in messages
    assert "Traceback" not in messages
    assert "ile too large" in messages
    assert "--resume" in messages
    toy_main("--resume", folder, "--stop-at", "None")
    assert_same_run(folder, undisturbed)


def test_an_existing_folder_is_left_alone(undisturbed, tmp_path):
    content = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"whole exists already; continue its run with --resume .*whole, or"):
        toy_main("--out", undisturbed)
    assert content == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    toy_main("--out", tmp_path / "empty", "--budget", 4)
    assert (tmp_path / "empty" / "metrics.csv").exists()


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is a file; choose another --out"):
        toy_main("--out", tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot make .*run: (Not a directory|File exists); choose another --out"):
        toy_main("--out", tmp_path / "file" / "run")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"cannot make .*run: Permission denied; choose another --out"):
        toy_main("--out", tmp_path / "run")


def test_resume_refuses_what_it_cannot_go_on_with(undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"whole holds a run of toy; continue it by python -m examples.toy --resume"):
        toy_main("--resume", undisturbed, experiment=dataclasses.replace(toy.EXPERIMENT, name="other"))
    with pytest.raises(UsageError, match="--preset starts a run and --resume continues one"):
        toy_main("--resume", undisturbed, "--preset", "none")


def test_resume_refuses_other_data(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    split = toy.Toy.split
    with monkeypatch.context() as patch:
        patch.setattr(toy.Toy, "split", lambda *a: split(*a) | {"y": 1 - split(*a)["y"]})
        with pytest.raises(UserError, match=r"the data are not those that the run in .*run was started with; pass the"):
            toy_main("--resume", tmp_path / "run", "--budget", 120)
    assert_same_run(tmp_path / "run", undisturbed)
    toy_main("--resume", tmp_path / "run", "--budget", 120)


def test_what_may_change_on_resume_is_kept(undisturbed, tmp_path):
    toy_main("--preset", "ma", "--out", tmp_path / "run", "--budget", 8)
    toy_main("--resume", tmp_path / "run", "--budget", 80)
    toy_main("--resume", tmp_path / "run")
    assert read_config(tmp_path / "run") == read_config(undisturbed)
    assert_same_run(tmp_path / "run", undisturbed)


def test_resume_takes_the_flags_of_the_run(undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"--lamb is 5.0 in the run in .*whole and must stay so, got 3.0; start"):
        toy_main("--resume", undisturbed, "--lamb", 3)
    with pytest.raises(UserError, match=r"is no run folder \(it has no config.json\)"):
        toy_main("--resume", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--out starts a run and --resume continues one"):
        toy_main("--resume", undisturbed, "--out", tmp_path / "x")
    toy_main("--preset", "ma", "--out", tmp_path / "longer", "--budget", 120)
    shutil.copytree(undisturbed, tmp_path / "resumed")
    toy_main("--resume", tmp_path / "resumed", "--budget", 120)
    assert_same_run(tmp_path / "resumed", tmp_path / "longer")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "1"], r"--alpha must be in \[0, 1\), got 1.0"),
        (["--window-size", "0"], "--window-size must be at least 1, got 0"),
        (["--preset", "ma", "--stride", "2"], r"--stride must be a divisor of --window-size \(7\), got 2"),
        (["--lr", "-1"], "--lr must be a finite number of at least 0, got -1.0"),
        (["--weight-decay", "-1"], "--weight-decay must be a finite number of at least 0, got -1.0"),
        (["--beta2", "1"], r"--beta2 must be in \[0, 1\), got 1.0"),
        (["--budget", "0"], "--budget must be at least 1, got 0"),
        (["--stop-at", "95"], r"--stop-at must be in \(0, 1\], or None, got 95.0"),
        (["--seed", "-1"], r"--seed must be in \[0, 2\*\*32\), got -1"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--lamb", "nan"], "--lamb must be a finite number, got nan"),
        (["--devices", "4"], r"--devices must be a divisor of the batch size \(6\), got 4"),
        (["--filter", "none", "--lamb", "3"], "--lamb has no effect with --filter none; leave it out, or choose"),
        (
            ["--filter", "ma", "--alpha", "0.5", "--start", "zero"],
            "--alpha, --start have no effect with --filter ma; leave them out",
        ),
        (["--stride", "2"], "--stride has no effect with --filter ema; leave it out, or choose --filter ma"),
        (["--no-collect"], "--no-collect has no effect without --filter-from; leave it out"),
    ],
)
def test_bad_values_make_no_folder(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        toy_main("--out", tmp_path / "run", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--filter", "foo"], ["--preset", "foo"], ["--lamb", "x"], ["--preset"], ["--x", "1"]]
)
def test_flags_that_cannot_be_read_name_themselves(flags, capsys):
    try:
        status = main(toy.EXPERIMENT, flags)
    except SystemExit as error:
        status = error.code
    text = capsys.readouterr()
    assert status == 2
    assert flags[0] in text.out + text.err


def test_help_says_what_each_preset_is_and_groups_the_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(toy.EXPERIMENT, ["--help"])
    text = capsys.readouterr().out
    assert "Example: python -m examples.toy --preset none" in text
    assert "ma    The MA: Grokfast-MA w 7 λ 5, Adam weight decay 0.005" in text
    groups = [text.index(f"{name} options") for name in ("task", "filtering", "optimization", "run", "output")]
    assert groups == sorted(groups)


def test_another_filter_says_which_numbers_it_keeps(capsys):
    parse(toy.EXPERIMENT, ["--filter", "ma"])
    assert "note: --filter ma keeps --lamb 2 and --weight-decay 0.005 of the preset ema" in capsys.readouterr().err
    for flags in (["--filter", "ma", "--lamb", "5"], ["--filter", "none"], ["--preset", "ma"]):
        parse(toy.EXPERIMENT, flags)
        assert not capsys.readouterr().err


def test_plain_errors_give_a_message_and_a_status(capsys):
    def fail(error):
        raise error

    assert plain_errors(lambda: fail(UserError("what to do"))) == 1
    assert capsys.readouterr().err == "error: what to do\n"
    assert plain_errors(lambda: fail(OSError(28, "No space left on device", "x.csv"))) == 1
    assert "x.csv: No space left on device" in capsys.readouterr().err
    assert plain_errors(lambda: fail(UsageError("how to"))) == 2
    for error in (KeyboardInterrupt(), RunInterruptedError("interrupted after step 3")):
        capsys.readouterr()
        assert plain_errors(lambda error=error: fail(error)) == 130
        assert capsys.readouterr().err.startswith("interrupted")
    assert plain_errors(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        plain_errors(lambda: fail(ZeroDivisionError()))


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path):
    # Adam's first step has the size of the learning rate, so the second loss overflows.
    with pytest.raises(UserError, match=r"no longer finite at step 2; .*run. Try a smaller --lr or --lamb"):
        toy_main("--out", tmp_path / "run", "--lr", "3e38", "--optimizer", "adamw", "--lr-warmup", "0")


def test_a_run_stops_once_the_accuracy_is_reached_and_held(tmp_path, capsys):
    toy_main("--out", tmp_path / "whole", "--budget", 400)
    rows = RunFolder.open(tmp_path / "whole")
    rows.restore(parameters(tmp_path / "whole"))
    for hold in (0, 5):
        reached = step_reached(rows.rows, 0.9, hold)
        toy_main("--out", tmp_path / f"stop{hold}", "--budget", 400, "--stop-at", 0.9, "--hold", hold)
        last = (tmp_path / f"stop{hold}" / "metrics.csv").read_text().splitlines()[-1]
        assert int(last.split(",")[0]) == reached + 4 * hold
        assert f"Validation accuracy reached 90.0% after {reached} steps and " in capsys.readouterr().out


def test_step_reached():
    rows = [{"step": 10 * i, "val_accuracy": a} for i, a in enumerate([0.1, 0.9, 0.8, 0.9, 0.95, 0.9], start=1)]
    assert step_reached(rows, 0.9) == 20
    assert step_reached(rows, 0.9, hold=1) == 40
    assert step_reached(rows, 0.9, hold=2) == 40
    assert step_reached(rows, 0.9, hold=3) is None
    assert step_reached(rows, 0.96) is None
    assert step_reached([], 0.5) is None
    losses = [{"step": i, "val_loss": loss} for i, loss in enumerate([3.0, 1.0, 2.0, 0.5, 0.4], start=1)]
    assert (step_reached(losses, 1.0), step_reached(losses, 1.0, hold=1), step_reached(losses, 0.1)) == (2, 4, None)


def test_a_task_with_a_loss_alone_is_judged_by_it(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure.axes[0]))
    loss_main = lambda *argv: toy_main(*argv, experiment=toy.LOSS)
    loss_main("--out", tmp_path / "whole")
    rows = [line.split(",") for line in (tmp_path / "whole" / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["step", "train_loss", "val_loss"]
    val_loss = [float(row[2]) for row in rows[1:]]
    assert f"The best validation loss was {min(val_loss):.4g} in 80 steps" in capsys.readouterr().out
    (axes,) = drawn
    assert (axes.get_ylabel(), axes.get_yscale()) == ("loss", "log")
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), val_loss)

    stop_at = val_loss[9] + 1e-6
    reached = 4 * (1 + next(i for i, loss in enumerate(val_loss) if loss <= stop_at))
    loss_main("--out", tmp_path / "stop", "--stop-at", stop_at)
    assert f"Validation loss reached {stop_at:.4g} after {reached} steps" in capsys.readouterr().out
    loss_main("--out", tmp_path / "missed", "--stop-at", 1e-9)
    assert f"did not reach 1e-09: it is {val_loss[-1]:.4g} after 80 steps" in capsys.readouterr().out


def test_stride_and_dtype_of_the_ring_reach_the_filter():
    filtering = Filtering(filter="ma", window_size=6, stride=3, buffer_dtype="bfloat16")
    filtered, expected = (tx.init(jnp.zeros(2)) for tx in (make_filter(filtering), grokfast_ma(6, stride=3)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.uint16 else x, filtered)
    chex.assert_trees_all_equal_shapes_and_dtypes(wide, expected)
    assert filtered.lowpass.ring.dtype == jnp.uint16  # the bits of bfloat16


@pytest.mark.parametrize(("start", "second"), [("gradient", 1 / 2), ("zero", 1 / 4), ("debiased", 1 / 3)])
def test_the_start_of_the_average_reaches_the_filter(start, second):
    filtering = Filtering(filter="ema", alpha=0.5, lamb=1.0, start=start)
    tx = make_filter(filtering)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    out, _ = tx.update(jnp.zeros(2), state)
    np.testing.assert_allclose(out, second, rtol=1e-6)
    named = "" if start == "gradient" else f" start {start}"
    assert describe(filtering, Optimization()) == f"Grokfast-EMA α 0.5 λ 1{named}, Adam weight decay 0.005"


@pytest.mark.parametrize("gradient_filter", ["ema", "ma"])
@pytest.mark.parametrize("collect", [True, False])
def test_a_filter_switched_on_late_has_collected_or_is_empty(gradient_filter, collect):
    numbers = {"window_size": 5, "alpha": 0.9, "lamb": 3.0, "fast": 0.5}
    filtering = Filtering(filter=gradient_filter, **numbers, filter_from=20, collect=collect)
    tx = make_filter(filtering)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)), jnp.float32)

    def updates(tx, grads):
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    always = make_filter(dataclasses.replace(filtering, filter_from=0))
    out = updates(tx, grads)
    np.testing.assert_array_equal(out[:20], grads[:20])
    expected = updates(always, grads)[20:] if collect else updates(always, grads[20:])
    np.testing.assert_allclose(out[20:], expected, rtol=1e-6)


def test_clipping_comes_before_the_filter():
    filtering = Filtering(filter="ema", alpha=0.5, lamb=1.0)
    tx = make_tx((filtering, Optimization(clip_norm=5.0, optimizer="adamw", weight_decay=0.0)))
    params = jnp.zeros(2)
    _, state = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "slow"), [3.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "muon-hidden"])
def test_muon_on_stacked_arrays_is_muon(optimizer, x64, monkeypatch):
    shapes = {"blocks": [{"w": (3, 4), "b": (4,)}, {"w": (3, 4), "v": (4, 3), "b": (4,)}], "head": {"w": (4, 3)}}

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda node: isinstance(node, tuple))

    def trained():
        tx, params = make_tx((Filtering("none"), Optimization(optimizer, 0.1, 0.3))), draw(0)
        state = tx.init(params)
        for seed in range(1, 5):
            updates, state = tx.update(draw(seed), state, params)
            params = optax.apply_updates(params, updates)
        return params

    stacked = jax.jit(trained)()
    monkeypatch.setattr(optimizers, "stacked_muon", optax.contrib.muon)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), stacked, jax.jit(trained)())
    jax.tree.map(lambda a, b: np.testing.assert_array_less(1e-4, np.abs(a - b).max()), stacked, draw(0))


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


@pytest.mark.parametrize("preset", toy.EXPERIMENT.presets)
def test_vmapped_runs_equal_single_runs_in_one_compilation(preset):
    """Eight seeds and as many hyperparameters; floating-point sums may be ordered differently, hence 1e-5."""
    config = toy.EXPERIMENT.preset(preset)
    each = [jax.random.key(seed) for seed in range(8)]
    hypers = [config.replace(lamb=0.5 * seed, weight_decay=0.01 * seed).hyper for seed in range(8)]
    hyper, key = stack(hypers), stack(each)
    many = program(config.task, example=(hyper, key))
    rows = []
    for _, evaluation in zip(range(10), evaluations(many, hyper, key), strict=False):
        rows.append((evaluation.step, evaluation.rows))
    assert many.advance._cache_size() == 1
    one = program(config.task)
    for i in range(8):
        for (step, found), expected in zip(rows, evaluations(one, hypers[i], each[i]), strict=False):
            assert step == expected.step
            for name, value in expected.rows[0].items():
                np.testing.assert_allclose(found[i][name], value, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, i=i: p[i], evaluation.state.params), expected.state.params, rtol=1e-5, atol=1e-6
        )
    assert one.advance._cache_size() == 1


def test_a_run_that_diverges_leaves_the_others_of_its_program_alone():
    config = toy.EXPERIMENT.preset("none").replace(optimizer="adamw", lr_warmup=0)
    hypers = [config.hyper, config.replace(lr=3e38).hyper]
    hyper, key = stack(hypers), stack([jax.random.key(0)] * 2)
    evaluation = next(evaluations(program(config.task, example=(hyper, key)), hyper, key))
    assert evaluation.diverged_at == [None, 2]
    alone = next(evaluations(program(config.task), hypers[0], jax.random.key(0)))
    assert alone.diverged_at == [None]
    np.testing.assert_allclose(evaluation.rows[0]["val_loss"], alone.rows[0]["val_loss"], rtol=1e-5)


def test_a_chunk_is_the_plain_loop():
    """The loop against ten lines of Python that do the same."""
    config = toy.EXPERIMENT.preset("ma")
    task, key, tx = config.task, jax.random.key(3), make_tx(config.hyper)
    params, data = task.init(keys(key).init), task.split({}, keys(key).split)
    opt_state = tx.init(params)
    for chunk, evaluation in zip(range(3), evaluations(program(task), config.hyper, key), strict=False):
        batches = task.batches(data, jax.random.fold_in(keys(key).batch, chunk))
        correct, losses = [], []
        for step in range(task.steps):
            batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
            x, y = data["x"][batch["index"]], data["y"][batch["index"]]
            weight = batch["weight"]

            def loss_fn(params, x=x, y=y, weight=weight):
                logit = x @ params["w"] + params["b"]
                return jnp.sum(weight * (jnp.logaddexp(0.0, logit) - y * logit)) / weight.sum()

            correct += list(((x @ params["w"] + params["b"] > 0) == (y > 0))[weight > 0])
            loss, grads = jax.value_and_grad(loss_fn)(params)
            losses.append(loss * weight.sum())
            updates, opt_state = tx.update(grads, opt_state, params)
            params = jax.tree.map(jnp.add, params, updates)
        assert len(correct) == 20
        (row,) = evaluation.rows
        np.testing.assert_allclose(row["train_accuracy"], np.mean(correct), rtol=1e-6)
        np.testing.assert_allclose(row["train_loss"], np.sum(losses) / 20, rtol=1e-5)
        x, y = data["x"][:10], data["y"][:10]
        accuracy = np.mean((x @ params["w"] + params["b"] > 0) == (y > 0))
        np.testing.assert_allclose(row["val_accuracy"], accuracy, rtol=1e-6)
        chex.assert_trees_all_close(evaluation.state.params, params, rtol=1e-5, atol=1e-6)


def test_tensorboard_gets_the_records(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
    toy_main("--out", tmp_path / "run", "--budget", 8, "--tensorboard")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"val/accuracy") == content.count(b"train/loss") == 2


def test_wandb_gets_the_records_offline_and_on_resume(tmp_path):
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    run = f"""
from examples.harness.cli import main
from tests import toy
main(toy.EXPERIMENT, ["--out", {str(tmp_path / "run")!r}, "--budget", "8", "--wandb"])
main(toy.EXPERIMENT, ["--resume", {str(tmp_path / "run")!r}, "--budget", "16", "--wandb"])
"""
    # In a process of its own: wandb leaves threads and sockets whose warnings would fail whatever test comes next.
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__SERVICE_WAIT": "120"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", run], check=True, cwd=root, env=environment, capture_output=True, timeout=240)
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    logs = list((tmp_path / "run").rglob(f"run-{run_id}.wandb"))
    assert len(logs) == 2
    assert all(b"val_accuracy" in log.read_bytes() for log in logs)


def test_a_missing_logger_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"--tensorboard needs the package tensorboardX; pip install 'grokfast_jax\["):
        toy_main("--out", tmp_path / "run", "--budget", 8, "--tensorboard")


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
