"""Several devices or processes train what one would, and a job that loses a process continues from its checkpoint."""

import multiprocessing
import sys
import threading
import time

import jax
import numpy as np
import pytest

from examples import launch
from examples.harness.cli import parse
from examples.harness.engine import product
from examples.harness.errors import UsageError, UserError
from examples.harness.loop import evaluations
from examples.harness.run_folder import RunFolder
from examples.harness.runner import train
from examples.harness.train import program
from examples.modular import Modular

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")
FLAGS = ["ma", "--window-size", "6", "--max-steps", "60"]


def strike(folder):
    """Kill the second process once a run has written four records."""
    before = set(multiprocessing.active_children())

    def watch():
        metrics = folder / "metrics.csv"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            time.sleep(0.01)
        sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)[1].kill()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
def test_two_processes_one_killed_and_the_job_resumed_train_what_one_does(tmp_path):
    folder = tmp_path / "run"
    strike(folder)
    with pytest.raises(UserError, match=rf"a process was killed.* continue with python -m examples\.resume {folder}"):
        launch.launch(2, "tests.toy", [*FLAGS, "--out", str(folder), "--checkpoint-every", "2"])
    assert not multiprocessing.active_children()
    records = (folder / "metrics.csv").read_text().splitlines()
    assert 5 <= len(records) < 16
    launch.launch(2, "resume", [str(folder)])

    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[: len(records) - 2] == records[:-2]
    assert (folder / "curves.png").exists()
    run, options = parse(toy.EXPERIMENT, [*FLAGS, "--out", str(tmp_path / "alone")])
    alone = train(toy.EXPERIMENT, run, options)
    rows = np.array([[float(x) for x in line.split(",")] for line in lines[1:]])
    np.testing.assert_allclose(rows, [list(row.values()) for row in alone.rows], rtol=1e-4)
    like = program(run).init(run.traced, jax.random.key(0))
    found = RunFolder(folder).restore(like), RunFolder(alone.path).restore(like)
    for actual, expected in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


SMALL = Modular(p=5, batch_size=6, dim=8, depth=1, heads=2)


@pytest.mark.parametrize("task", [toy.Toy(), pytest.param(SMALL, marks=pytest.mark.slow)])
def test_several_devices_train_what_one_does(task):
    (run,) = product(task, toy.ma)
    key = jax.random.key(0)
    runs = [evaluations(program(run, devices=devices), run.traced, key) for devices in (1, 3)]
    for _, one, many in zip(range(3), *runs, strict=False):
        for name, value in one.rows[0].items():
            np.testing.assert_allclose(many.rows[0][name], value, rtol=1e-4)
    assert all(leaf.sharding.num_devices == 3 for leaf in jax.tree.leaves(many.state))


def test_the_batches_are_divided_among_the_devices():
    (run,) = product(toy.Toy(), toy.adam)
    compiled, key = program(run, devices=3), jax.random.key(0)
    state = compiled.init(run.traced, key)
    text = compiled.advance.lower(run.traced, key, *compiled.draw(key), state).compile().as_text()
    assert "all-reduce" in text  # of the sums over the examples, which each device has a third of


def test_devices_that_are_not_there_are_refused(tmp_path, monkeypatch):
    (run,) = product(toy.Toy(), toy.ma)
    with pytest.raises(UsageError, match=r"--devices must be at most 8, the number of devices here, got 16; JAX_NUM_"):
        program(run, devices=16)
    monkeypatch.setattr(launch, "ProcessPoolExecutor", None)  # no process is started
    with pytest.raises(UsageError, match=r"--devices must be a divisor of the batch size \(6\), got 4"):
        launch.launch(4, "tests.toy", ["--out", str(tmp_path / "run")])
    for flags in (["--devices", "4"], ["--devices=2"]):
        with pytest.raises(UsageError, match="--devices must be left out, because PROCESSES is their number, got --d"):
            launch.launch(2, "tests.toy", flags)
    with pytest.raises(UsageError, match=r"got 'toy'"):
        launch.launch(2, "toy", [])
    with pytest.raises(UsageError, match="nowhere is not a run folder"):
        launch.launch(2, "resume", ["nowhere"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [[], ["2"], ["x", "tests.toy"], ["0", "tests.toy"], ["-1", "tests.toy"]])
def test_a_command_without_processes_is_told_its_usage(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch", *argv])
    with pytest.raises(UsageError, match=r"usage: python -m examples\.launch PROCESSES EXPERIMENT .* positive number"):
        launch.main()
