"""Whatever happens to a run folder ends in a message or in the run that it held."""

import contextlib
import dataclasses
import multiprocessing
import queue
import re
import shutil
import subprocess
import sys
import threading

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import resume
from examples.harness import runner
from examples.harness.cli import main, parse
from examples.harness.engine import Results, product
from examples.harness.errors import UsageError, UserError, plain_errors
from examples.harness.methods import Tx
from examples.harness.run_folder import RunFolder
from examples.harness.runner import train

from . import toy

pytestmark = pytest.mark.usefixtures("lenient", "shared_programs")


def go_on(*argv):
    return plain_errors(lambda: train(*resume.parse([str(word) for word in argv]), resume=True))


@pytest.fixture(scope="module")
def undisturbed(shared_programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        train(toy.EXPERIMENT, *parse(toy.EXPERIMENT, ["--out", str(folder), "--max-steps", "24"]))
    with (folder / "metrics.csv").open("a") as file:
        file.write("28,0.5,0.5,0.5,0.5\n32,0.1")  # killed after the checkpoint
    return folder


@pytest.fixture(scope="module")
def like(shared_programs):
    (run,) = product(toy.Toy(), toy.ema)
    with jax.numpy_dtype_promotion("standard"):
        return runner.program(run).init(run.traced, jax.random.key(0))


def content(path, like):
    """All that a run is resumed from."""
    folder = RunFolder(path)
    state = [np.asarray(leaf) for leaf in jax.tree.leaves(folder.restore(like))]
    return folder.config, folder.rows, state


@pytest.fixture(scope="module")
def undisturbed_content(undisturbed, like, tmp_path_factory):
    return content(undisturbed_copy(undisturbed, tmp_path_factory.mktemp("read")), like)


def files(path):
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_any_damage_ends_in_a_message_or_in_the_same_run(examples, undisturbed, undisturbed_content, like, tmp_path):
    damage = given(data=st.data())(damage_and_read)
    settings(deadline=None, max_examples=examples)(damage)(undisturbed, undisturbed_content, like, tmp_path)


def damage_and_read(undisturbed, undisturbed_content, like, tmp_path, data):
    shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
    shutil.copytree(undisturbed, tmp_path / "damaged")
    name = data.draw(st.sampled_from(files(undisturbed)))
    file = tmp_path / "damaged" / name
    before = file.read_bytes()
    place = data.draw(st.integers(0, max(0, len(before) - 1)))
    junk = data.draw(st.binary(min_size=1, max_size=3))
    kind = data.draw(st.sampled_from(["replace", "cut", "insert", "remove"]))
    match kind:
        case "replace":
            file.write_bytes(before[:place] + junk + before[place + len(junk) :])
        case "cut":
            file.write_bytes(before[:place])
        case "insert":
            file.write_bytes(before[:place] + junk + before[place:])
        case "remove":
            file.unlink()
    with contextlib.suppress(UserError):
        config, rows, state = content(tmp_path / "damaged", like)
        expected = undisturbed_content
        if kind == "remove" and name.name == "checkpoint":  # then the run is trained again from its start
            expected = config, [], jax.tree.leaves(like)
        assert config == expected[0], name
        assert rows == expected[1], name
        assert all(map(np.array_equal, state, expected[2])), name


def undisturbed_copy(undisturbed, tmp_path):
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return shutil.copytree(undisturbed, tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda text: "", r"config.json is damaged; put it back from a copy, or start a new run"),
        ("config.json", lambda text: text[:100], "config.json is damaged"),
        ("config.json", lambda text: "[1, 2]", "config.json is damaged"),
        ("config.json", lambda text: text.replace('"lr": 0.01', '"lr": "x"'), "config.json is damaged"),
        ("config.json", lambda text: text.replace('"lr": 0.01', '"lr": 0.02'), "config.json is damaged"),
        ("checkpoint", lambda text: text[:100], "checkpoint is damaged; put it back from a copy, or start a new run"),
        ("checkpoint", lambda text: text.replace("12", "13", 1), "checkpoint is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_cure(name, damage, message, undisturbed, like, tmp_path, capsys):
    folder = undisturbed_copy(undisturbed, tmp_path)
    before = (folder / name).read_bytes().decode("latin-1")
    damaged = damage(before).encode("latin-1")
    (folder / name).write_bytes(damaged)
    assert damaged.decode("latin-1") != before
    with pytest.raises(UserError, match=message):
        content(folder, like)
    assert go_on(folder) == 1
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: ")
    assert (folder / name).read_bytes() == damaged


@pytest.mark.parametrize("damage", [b"", b"step,", b"step,train_loss\n12,x\n", b"\xff"])
def test_the_records_are_set_back_to_those_of_the_checkpoint(damage, undisturbed, like, tmp_path):
    folder = undisturbed_copy(undisturbed, tmp_path)
    before = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_bytes(damage)
    content(folder, like)
    assert (folder / "metrics.csv").read_text() == before[: before.index("28,")]


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(undisturbed, tmp_path):
    folder = undisturbed_copy(undisturbed, tmp_path)
    code = "import filelock, sys, time; a = filelock.FileLock(sys.argv[1]); a.acquire(); print('held'); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-u", "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    try:
        with (
            pytest.raises(UserError, match=r"another process trains the run in .*copy; wait for it to end"),
            RunFolder(folder).locked(),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with RunFolder(folder).locked(), pytest.raises(filelock.Timeout):
        filelock.FileLock(folder / ".lock", timeout=0).acquire()


def start(folder, barrier, results):
    barrier.wait()
    try:
        RunFolder.create(folder, {"experiment": "tests.toy"})
        results.put("made")
    except UserError as error:
        results.put(str(error))


SPAWN = multiprocessing.get_context("spawn")
THREADS = (threading.Thread, threading.Barrier, queue.Queue)
PROCESSES = (SPAWN.Process, SPAWN.Barrier, SPAWN.Queue)


@pytest.mark.parametrize("kinds", [THREADS, pytest.param(PROCESSES, marks=pytest.mark.slow)])
def test_of_two_starts_into_one_folder_one_wins(kinds, tmp_path):
    worker, barrier_of, queue_of = kinds
    barrier, results = barrier_of(2), queue_of()
    both = [worker(target=start, args=(tmp_path / "run", barrier, results)) for _ in range(2)]
    for one in both:
        one.start()
    said = sorted(results.get(timeout=120) for _ in both)
    for one in both:
        one.join()
    assert "exists already; continue its run with python -m examples.resume" in said[0]
    assert said[1] == "made"
    assert RunFolder(tmp_path / "run").config["experiment"] == "tests.toy"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_cannot_fit_is_a_message_and_makes_no_folder(tmp_path, capsys):
    def huge(lr: float = 0.1) -> Tx:
        """A state of petabytes."""
        return optax.GradientTransformation(
            lambda params: jnp.zeros((2**20, 2**30)), lambda u, state, _=None: (u, state)
        )

    experiment = dataclasses.replace(toy.EXPERIMENT, methods={"huge": huge}, default="huge")
    assert main(experiment, ["--out", str(tmp_path / "run")]) == 2
    message = r"parameters and optimizer state need 4.5e\+06 GB of memory, and there are .*; choose a smaller model"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=message):
        Results(tmp_path / "r.jsonl", trains=True).of(product(toy.Toy(), huge))


def test_the_time_of_a_resumed_run_is_that_of_the_whole_run(undisturbed, tmp_path, like, capsys):
    folder = RunFolder(undisturbed_copy(undisturbed, tmp_path))
    state = folder.restore(like)
    assert 0 < folder.seconds < 600
    folder.rows.append({**folder.rows[-1], "step": 28})
    folder.save(state, 1000.0)
    assert go_on(folder.path, "--max-steps", 24) == 0
    seconds = int(capsys.readouterr().out.split(" seconds")[0].split()[-1])
    assert 1000 <= seconds < 1600
