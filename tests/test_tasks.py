"""What holds of every experiment: its methods and their defaults, its data without a network."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import requests

from examples import imdb, mnist, qm9, shakespeare
from examples.harness import downloads
from examples.harness.downloads import fetch
from examples.harness.errors import UserError
from examples.harness.experiment import Experiment, find_experiment, task_names
from examples.harness.methods import base, hyperparams, parameters, ranges


@pytest.mark.parametrize("task", task_names())
def test_every_method_can_be_called_with_its_defaults_and_says_what_it_is(task):
    experiment = find_experiment(task)
    assert isinstance(experiment, Experiment)
    assert experiment.name == task
    assert json.loads(json.dumps(experiment.run().key))["seed"] == 0
    for name, method in experiment.methods.items():
        assert isinstance(method(**hyperparams(method)), optax.GradientTransformation)
        assert base(method).__doc__, name
        for key, parameter in parameters(method).items():  # which --help says of each
            assert ranges(parameter.annotation) or f" {key}: " in base(method).__doc__ or task == "shakespeare", name
        assert experiment.method(base(method).__name__) is base(method) or name == base(method).__name__


@pytest.mark.parametrize(
    ("task", "decays", "filter_numbers", "lr", "fields", "max_steps"),
    [
        ("mnist", (0.01, 2.0), (0.8, 0.1), 1e-3, {"batch_size": 200, "init_scale": 8}, 100_000),
        ("imdb", (1.0, 10.0), (0.98, 2.0), 3e-4, {"batch_size": 50, "init_scale": 6}, 10_000),
        ("qm9", (0.0, 0.01), (0.9, 1.0), 1e-3, {"batch_size": 32, "init_scale": 3}, 100_000),
    ],
)
def test_methods_are_filter_and_decay_two_by_two(task, decays, filter_numbers, lr, fields, max_steps):
    experiment = find_experiment(task)
    assert {name: getattr(experiment.task, name) for name in fields} == fields
    assert (experiment.task.max_steps, experiment.task.stop_at) == (max_steps, None)
    for name, method in experiment.methods.items():
        numbers = hyperparams(method)
        assert numbers["lr"] == lr
        assert numbers["weight_decay"] == decays[name in ("decay-only", "paper")]
        has_filter = name in ("filter-only", "paper")
        assert base(method).__name__ == ("paper" if has_filter else "baseline")
        if has_filter:
            assert (numbers["alpha"], numbers["lamb"]) == filter_numbers
    assert list(experiment.methods) == ["paper", "decay-only", "filter-only", "baseline"]


@pytest.mark.usefixtures("lenient")
def test_imdb_clips_gradients_before_the_filter():
    params = {"w": jnp.ones(4)}
    steps = {}
    for size in (2.5, 5.0, 500.0):  # per entry; their norm is twice that
        tx = imdb.paper(weight_decay=0.0)
        state = tx.init(params)
        for scale in (1.0, -0.5):  # the first gradient is clipped, the second one too if it is large
            updates, state = tx.update({"w": jnp.full(4, scale * size)}, state, params)
        slow = optax.tree_utils.tree_get(state, "slow")
        steps[size] = np.concatenate([jax.tree.leaves(updates)[0], jax.tree.leaves(slow)[0]])
    np.testing.assert_allclose(steps[5.0][4:], 0.98 * 2.5 - 0.02 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(steps[5.0], steps[500.0], rtol=1e-6)
    assert not np.allclose(steps[2.5], steps[5.0])


@pytest.mark.parametrize("module", [mnist, imdb, qm9, shakespeare])
def test_without_a_network_it_says_what_to_do(module, monkeypatch):
    asked = []

    def fail(url, known_hash, fname, path):
        asked.append((url, known_hash))
        raise requests.ConnectionError("a long story")

    monkeypatch.setattr(downloads.pooch, "retrieve", fail)
    files = getattr(module, "FILES", None) or {imdb.ARCHIVE: imdb.MD5}
    name, digest = next(iter(files.items()))
    with pytest.raises(UserError, match=rf"(?s)could not download {name}.*no connection.*--data-dir FOLDER"):
        module.EXPERIMENT.task.load()
    sources = getattr(module, "SOURCES", (imdb.SOURCE,))
    assert asked == [(source + name, digest) for source in sources]
    assert len(digest or "") in (0, 4 + 32, 64)


def test_a_damaged_file_in_the_users_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("right")
    known = hashlib.sha256(b"right").hexdigest()
    assert fetch({"a": known}, ["https://example.org/"], tmp_path) == {"a": tmp_path / "a"}
    (tmp_path / "a").write_text("wrong")
    with pytest.raises(
        UserError, match=r"a is damaged \(its hash is not .*\); get it again from https://example.org/a"
    ):
        fetch({"a": known}, ["https://example.org/"], tmp_path)
    with pytest.raises(UserError, match=r"b is missing; put it there \(from https://example.org/b\) or leave out"):
        fetch({"b": None}, ["https://example.org/"], tmp_path)


def test_every_archive_has_a_hash_but_for_one_and_no_address_moves():
    files = mnist.FILES | shakespeare.FILES | qm9.FILES | {imdb.ARCHIVE: imdb.MD5}
    assert [name for name, known in files.items() if known is None] == ["qm9.zip"]
    addresses = (*mnist.SOURCES, *shakespeare.SOURCES, *qm9.SOURCES, imdb.SOURCE)
    assert not [address for address in addresses if "/master/" in address or "/main/" in address]
