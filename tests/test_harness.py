"""The training loop, the run folder, and the surprises a run must survive."""

import dataclasses
import functools
import gc
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

from examples.harness import plots
from examples.harness import run as run_module
from examples.harness.errors import UserError, plain_errors
from examples.harness.optimizers import make_filter, make_tx
from examples.harness.records import step_reached, to_row
from examples.harness.run import described, main
from examples.harness.run_folder import RunFolder, commit, write_whole
from examples.harness.train import program
from grokfast_jax import grokfast_ma

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


def toy_main(*argv):
    main("toy", toy.PRESETS, "ema", [str(word) for word in argv])


def parameters(folder):
    """What the last checkpoint of a run folder holds."""
    config = toy.PRESETS["ema"]
    known = {name: value for name, value in RunFolder.open(folder).config.items() if hasattr(config, name)}
    config = toy.Config(**known)
    state = program(config.task(), functools.partial(make_tx, config)).init(config.hyper(), jax.random.key(config.seed))
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
    config = RunFolder.open(undisturbed).config
    assert (config["filter"], config["window_size"], config["experiment"]) == ("ma", 7, "toy")
    assert config["versions"]["jax"] == jax.__version__
    assert parameters(undisturbed).chunk == 20
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
    to_row_ = run_module.to_row

    def to_row_and_interrupt(step, metrics):
        if step == 28:
            os.kill(os.getpid(), number)
        return to_row_(step, metrics)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "to_row", to_row_and_interrupt)
        with pytest.raises(UserError, match=f"interrupted after step 28; go on with --resume {folder}"):
            toy_main("--preset", "ma", "--out", folder)
    assert signal.getsignal(number) is before
    assert (folder / "curves.png").exists()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 8
    toy_main("--resume", folder)
    assert_same_run(folder, undisturbed)


# Orbax drops the futures of a write that failed. They are collected at its end, or a later test would be blamed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("checkpoint_every", "limit"), [(1000, 600), (2, 600), (2, 300)])
def test_a_full_disk_loses_nothing(checkpoint_every, limit, undisturbed, tmp_path, capsys):
    """A limit on the size of files stands for the full disk: a record, or a checkpoint, is cut off in the middle."""
    folder = tmp_path / "full"
    assert (undisturbed / "metrics.csv").stat().st_size > 600
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    toy_main("--preset", "ma", "--out", folder, "--budget", 80, "--stop-at", 0.01)
    rewritten = (folder / "config.json").read_text().replace('"stop_at": 0.01', '"stop_at": null')
    (folder / "config.json").write_text(rewritten)
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "update_config", lambda self, changes: None)
            status = plain_errors(lambda: toy_main("--resume", folder, "--checkpoint-every", checkpoint_every))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    messages = capsys.readouterr().err
    assert "error: " in messages
    assert "Traceback" not in messages
    assert "ile too large" in messages
    assert "--resume" in messages
    toy_main("--resume", folder, "--budget", 80)
    assert_same_run(folder, undisturbed)
    gc.collect()


def test_an_existing_folder_is_left_alone(undisturbed, tmp_path):
    content = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"whole exists already; go on with it by --resume .*whole, or choose another"):
        toy_main("--out", undisturbed)
    assert content == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    toy_main("--out", tmp_path / "empty", "--budget", 4)
    assert (tmp_path / "empty" / "metrics.csv").exists()


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make .*run: (Not a directory|File exists); choose another --out"):
        toy_main("--out", tmp_path / "file" / "run")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"cannot make .*run: Permission denied; choose another --out"):
        toy_main("--out", tmp_path / "run")


def test_resume_refuses_what_it_cannot_go_on_with(undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"whole holds a run of toy; go on with it by python -m examples.toy --resume"):
        main("other", toy.PRESETS, "ema", ["--resume", str(undisturbed)])
    with pytest.raises(UserError, match="--preset starts a run and --resume goes on with one"):
        toy_main("--resume", undisturbed, "--preset", "none")
    shutil.copytree(undisturbed, tmp_path / "short")
    metrics = tmp_path / "short" / "metrics.csv"
    for kept in (0, 1, 15):
        metrics.write_text("".join((undisturbed / "metrics.csv").read_text().splitlines(keepends=True)[:kept]))
        with pytest.raises(UserError, match=r"metrics.csv lacks records before step 80, that of the checkpoint; put"):
            toy_main("--resume", tmp_path / "short", "--budget", 120)


def test_resume_refuses_other_data(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    split = toy.Toy.split
    with monkeypatch.context() as patch:
        patch.setattr(toy.Toy, "split", lambda self, key: split(self, key) | {"y": 1 - split(self, key)["y"]})
        with pytest.raises(UserError, match=r"the data are not those that the run in .*run was started with; pass the"):
            toy_main("--resume", tmp_path / "run", "--budget", 120)
    assert_same_run(tmp_path / "run", undisturbed)
    toy_main("--resume", tmp_path / "run", "--budget", 120)


def test_what_may_change_on_resume_is_kept(undisturbed, tmp_path):
    toy_main("--preset", "ma", "--out", tmp_path / "run", "--budget", 8)
    toy_main("--resume", tmp_path / "run", "--budget", 80)
    toy_main("--resume", tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config == RunFolder.open(undisturbed).config
    assert_same_run(tmp_path / "run", undisturbed)


def test_resume_takes_the_flags_of_the_run(undisturbed, tmp_path):
    with pytest.raises(UserError, match=r"--lamb is 5.0 in the run in .*whole and must stay so, got 3.0; start"):
        toy_main("--resume", undisturbed, "--lamb", 3)
    with pytest.raises(UserError, match=r"is no run folder \(it has no config.json\)"):
        toy_main("--resume", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--out starts a run and --resume goes on with one"):
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
    ],
)
def test_bad_values_make_no_folder(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        toy_main("--out", tmp_path / "run", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--filter", "foo"], ["--preset", "foo"], ["--lamb", "x"], ["--preset"], ["--x", "1"]]
)
def test_flags_that_cannot_be_read_name_themselves(flags, capsys):
    with pytest.raises(SystemExit):
        toy_main(*flags)
    text = capsys.readouterr()
    assert flags[0] in text.out + text.err


def test_plain_errors_give_a_message_and_a_status(capsys):
    def fail(error):
        raise error

    assert plain_errors(lambda: fail(UserError("what to do"))) == 1
    assert capsys.readouterr().err == "error: what to do\n"
    assert plain_errors(lambda: fail(OSError(28, "No space left on device", "x.csv"))) == 1
    assert "x.csv: No space left on device" in capsys.readouterr().err
    assert plain_errors(lambda: fail(KeyboardInterrupt())) == 1
    assert "interrupted" in capsys.readouterr().err
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
    loss_main = lambda *argv: main("toy", {"loss": toy.LossConfig()}, "loss", [str(word) for word in argv])
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
    config = toy.Config(filter="ma", window_size=6, stride=3, buffer_dtype="bfloat16")
    filtered, expected = (
        tx.init(jnp.zeros(2)) for tx in (make_filter(config, config.hyper()), grokfast_ma(6, stride=3))
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.uint16 else x, filtered)
    chex.assert_trees_all_equal_shapes_and_dtypes(wide, expected)
    assert filtered.lowpass.ring.dtype == jnp.uint16  # the bits of bfloat16


@pytest.mark.parametrize(("start", "second"), [("gradient", 1 / 2), ("zero", 1 / 4), ("debiased", 1 / 3)])
def test_the_start_of_the_average_reaches_the_filter(start, second):
    config = toy.Config(filter="ema", alpha=0.5, lamb=1.0, start=start)
    tx = make_filter(config, config.hyper())
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    out, _ = tx.update(jnp.zeros(2), state)
    np.testing.assert_allclose(out, second, rtol=1e-6)
    told = "" if start == "gradient" else f" start {start}"
    assert described(config) == f"Grokfast-EMA α 0.5 λ 1{told}, Adam weight decay 0.005"


@pytest.mark.parametrize("gradient_filter", ["ema", "ma"])
@pytest.mark.parametrize("collect", [True, False])
def test_a_filter_switched_on_late_has_collected_or_is_empty(gradient_filter, collect):
    config = toy.Config(
        filter=gradient_filter, window_size=5, alpha=0.9, lamb=3.0, fast=0.5, filter_from=20, collect=collect
    )
    tx = make_filter(config, config.hyper())
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2)), jnp.float32)

    def updates(tx, grads):
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    always = make_filter(dataclasses.replace(config, filter_from=0), config.hyper())
    out = updates(tx, grads)
    np.testing.assert_array_equal(out[:20], grads[:20])
    expected = updates(always, grads)[20:] if collect else updates(always, grads[20:])
    np.testing.assert_allclose(out[20:], expected, rtol=1e-6)


def test_clipping_comes_before_the_filter():
    config = toy.Config(filter="ema", alpha=0.5, lamb=1.0, clip_norm=5.0, optimizer="adamw", weight_decay=0.0)
    tx = make_tx(config, config.hyper())
    params = jnp.zeros(2)
    _, state = tx.update(jnp.array([30.0, 40.0]), tx.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "slow"), [3.0, 4.0], rtol=1e-6)


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


@pytest.mark.parametrize("preset", toy.PRESETS)
def test_vmapped_runs_equal_single_runs_in_one_compilation(preset):
    """Eight seeds and as many hyperparameters; floating-point sums may be ordered differently, hence 1e-5."""
    config = toy.PRESETS[preset]
    task, make = config.task(), functools.partial(make_tx, config)
    keys = [jax.random.key(seed) for seed in range(8)]
    hypers = [config.hyper() | {"lamb": 0.5 * seed, "weight_decay": 0.01 * seed} for seed in range(8)]
    together = {name: jnp.array([hyper[name] for hyper in hypers]) for name in hypers[0]}, jnp.stack(keys)
    many = program(task, make, example=together)
    states = many.init(*together)
    losses = []
    for _ in range(10):
        states, metrics = many.advance(*together, states)
        losses.append(metrics["losses"])
    assert many.advance._cache_size() == 1
    one = program(task, make)
    for i, (hyper, key) in enumerate(zip(hypers, keys, strict=True)):
        state = one.init(hyper, key)
        for step in range(10):
            state, metrics = one.advance(hyper, key, state)
            np.testing.assert_allclose(losses[step][i], metrics["losses"], rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, i=i: p[i], states.params), state.params, rtol=1e-5, atol=1e-6
        )
    assert one.advance._cache_size() == 1


def test_a_chunk_is_the_plain_loop():
    """The loop against ten lines of Python that do the same."""
    config = toy.PRESETS["ma"]
    task, key, tx = config.task(), jax.random.key(3), make_tx(config, config.hyper())
    compiled = program(task, functools.partial(make_tx, config))
    state = compiled.init(config.hyper(), key)
    init_key, split_key, batch_key = jax.random.split(key, 3)
    params, data = task.init(init_key), task.split(split_key)
    opt_state = tx.init(params)
    for chunk in range(3):
        state, metrics = compiled.advance(config.hyper(), key, state)
        batches = task.batches(data, jax.random.fold_in(batch_key, chunk))
        correct = []
        for step in range(task.steps):
            batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
            x, y = data["x"][batch["index"]], data["y"][batch["index"]]
            weight = batch["weight"]

            def loss_fn(params, x=x, y=y, weight=weight):
                logit = x @ params["w"] + params["b"]
                return jnp.sum(weight * (jnp.logaddexp(0.0, logit) - y * logit)) / weight.sum()

            correct += list(((x @ params["w"] + params["b"] > 0) == (y > 0))[weight > 0])
            loss, grads = jax.value_and_grad(loss_fn)(params)
            np.testing.assert_allclose(metrics["losses"][step], loss, rtol=1e-5)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = jax.tree.map(jnp.add, params, updates)
        assert len(correct) == 20
        np.testing.assert_allclose(metrics["train_accuracy"], np.mean(correct), rtol=1e-6)
        x, y = data["x"][:10], data["y"][:10]
        np.testing.assert_allclose(
            metrics["val_accuracy"], np.mean((x @ params["w"] + params["b"] > 0) == (y > 0)), rtol=1e-6
        )
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)


def test_tensorboard_gets_the_records(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
    toy_main("--out", tmp_path / "run", "--budget", 8, "--tensorboard")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"val/accuracy") == content.count(b"train/loss") == 2


def test_wandb_gets_the_records_offline_and_on_resume(tmp_path):
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    run = f"""
from examples.harness.run import main
from tests import toy
main("toy", toy.PRESETS, "ema", ["--out", {str(tmp_path / "run")!r}, "--budget", "8", "--wandb"])
main("toy", toy.PRESETS, "ema", ["--resume", {str(tmp_path / "run")!r}, "--budget", "16", "--wandb"])
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
