"""Several processes train what one would, and a job that loses a process goes on from its checkpoint."""

import dataclasses
import functools
import multiprocessing
import threading
import time

import jax
import numpy as np
import pytest
from jax import lax

from examples import modular, multi_process
from examples.harness.batches import in_batches
from examples.harness.errors import UserError
from examples.harness.optimizers import make_tx
from examples.harness.run import Output, train
from examples.harness.run_folder import RunFolder
from examples.harness.train import program

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


class DividedToy(toy.Toy):
    def batches(self, data, key):
        return lax.with_sharding_constraint(super().batches(data, key), multi_process.over_all_devices(None, "data"))

    def validation(self, data):
        return lax.with_sharding_constraint(super().validation(data), multi_process.over_all_devices(None, "data"))


@dataclasses.dataclass(frozen=True)
class Config(multi_process.Config):
    """The toy in place of the Transformer, which takes far longer to compile."""

    filter: str = "ma"
    window_size: int = 6
    stride: int = 2
    lr: float = 1e-2
    budget: int = 60
    stop_at: float | None = None

    def __post_init__(self):
        pass  # it has no pairs to check

    def task(self):
        return DividedToy()


def strike(folder):
    """Kill the second process once a run has written four records."""
    before = set(multiprocessing.active_children())

    def watch():
        metrics = folder / "metrics.csv"
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            time.sleep(0.01)
        sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.pid)[1].kill()

    threading.Thread(target=watch, daemon=True).start()


def test_two_processes_one_killed_and_the_job_resumed_train_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_process, "PRESETS", {"ema": Config()})
    folder = tmp_path / "run"
    strike(folder)
    with pytest.raises(UserError, match=rf"a process was killed.* go on with --resume {folder}"):
        multi_process.main(["--out", str(folder), "--checkpoint-every", "2"])
    assert not multiprocessing.active_children()
    records = (folder / "metrics.csv").read_text().splitlines()
    assert 5 <= len(records) < 16
    multi_process.main(["--resume", str(folder), "--checkpoint-every", "5"])

    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[: len(records) - 2] == records[:-2]
    assert (folder / "curves.png").exists()
    config = toy.Config(filter="ma", window_size=6, stride=2, budget=60)
    alone = train("toy", config, Output(out=tmp_path / "alone", checkpoint_every=99))
    rows = np.array([[float(x) for x in line.split(",")] for line in lines[1:]])
    np.testing.assert_allclose(rows, [list(row.values()) for row in alone.rows], rtol=1e-4)
    like = program(toy.Toy(), functools.partial(make_tx, config)).init(config.hyper(), jax.random.key(0))
    states = [jax.tree.leaves(RunFolder.open(path).restore(like)) for path in (folder, alone.path)]
    for actual, expected in zip(*states, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_the_task_is_that_of_one_process():
    changed = {"p": 7, "operation": "division", "train_fraction": 0.3, "batch_size": 8, "embedding_std": 0.02}
    task = multi_process.Config(**changed).task()
    assert dataclasses.asdict(task) == dataclasses.asdict(modular.Config(**changed).task())


def test_the_batches_of_the_transformer_are_divided_among_all_devices():
    task, plain = multi_process.Config().task(), multi_process.modular.Config().task()
    data, key = task.split(jax.random.key(0)), jax.random.key(1)
    divided = multi_process.over_all_devices(None, "data")
    for batch, expected in (
        (task.batches(data, key), plain.batches(data, key)),
        (task.validation(data), in_batches(data["val"], 512)),
    ):
        for name in ("index", "weight"):
            assert batch[name].sharding.is_equivalent_to(divided, 2)
            np.testing.assert_array_equal(batch[name], expected[name])


def test_batches_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match=r"--batch-size must be a multiple of --processes \(3\), got 512"):
        multi_process.Config(processes=3)
