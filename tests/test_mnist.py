"""The MNIST experiment: its facts, its files, and what happens when they are missing or damaged."""

import gzip
import hashlib
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import requests

from examples import mnist
from examples.harness import downloads
from examples.harness.errors import UserError
from examples.harness.methods import hyperparams
from examples.mnist import METHODS, Mnist

pytestmark = pytest.mark.usefixtures("lenient")

DATA = Path(__file__).parents[2] / "shared" / "data" / "mnist"
RNG = np.random.default_rng(0)


def load(folder):
    """Pixels and classes of all images."""
    return Mnist(train_images=60_000, data_dir=folder).load().values()


def idx(array):
    return gzip.compress(struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Four small files of MNIST's kind, and their hashes in place of the true ones."""
    arrays = {
        "train-images-idx3-ubyte.gz": RNG.integers(0, 256, (20, 28, 28), np.uint8),
        "train-labels-idx1-ubyte.gz": RNG.integers(0, 10, 20, np.uint8),
        "t10k-images-idx3-ubyte.gz": RNG.integers(0, 256, (10, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte.gz": RNG.integers(0, 10, 10, np.uint8),
    }
    assert set(arrays) == set(mnist.FILES)
    hashes = {}
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
        hashes[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setattr(mnist, "FILES", hashes)
    return tmp_path, arrays


def test_files_are_read(data_dir):
    folder, arrays = data_dir
    images, labels = load(folder)
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    for i, name in enumerate(["train", "t10k"]):
        part = slice(0, 20) if i == 0 else slice(20, 30)
        np.testing.assert_allclose(
            images[part] * 255, arrays[f"{name}-images-idx3-ubyte.gz"].reshape(-1, 784), rtol=1e-6
        )
        np.testing.assert_array_equal(labels[part], arrays[f"{name}-labels-idx1-ubyte.gz"])


def test_a_missing_or_damaged_file_is_named(data_dir):
    folder, _ = data_dir
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        UserError, match=r"t10k-images-idx3-ubyte.gz is damaged \(its hash is not .*get it again from http"
    ):
        load(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz is missing; put it there \(from http"):
        load(folder)


def test_downloads_are_cached_and_tried_elsewhere(data_dir, monkeypatch):
    folder, _ = data_dir
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        assert known_hash == mnist.FILES[fname]
        assert Path(path).name == "grokfast_jax"
        if url.startswith(mnist.SOURCES[0]):
            raise requests.ConnectionError
        return str(folder / fname)

    monkeypatch.setattr(downloads.pooch, "retrieve", retrieve)
    images, _ = load(None)
    assert images.shape == (30, 784)
    assert len(asked) == 8


@pytest.mark.skipif(not DATA.exists(), reason="MNIST (12 MB) is not part of the repository")
def test_the_real_files():
    images, labels = load(DATA)
    assert images.shape == (70_000, 784)
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_allclose((images[:60_000].mean(), images[:60_000].std()), (0.1307, 0.3081), atol=1e-4)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels[60_000:60_010].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    task = Mnist(data_dir=DATA)
    shared = task.load()
    np.testing.assert_array_equal(shared["labels"], np.r_[labels[:1000], labels[60_000:]])
    np.testing.assert_array_equal(shared["images"][1000], images[60_000])
    data = task.split(shared, jax.random.key(0))
    np.testing.assert_array_equal(data["train"], np.arange(1000))
    validation = task.validation(data)
    assert validation["weight"].sum() == 10_000
    assert validation["index"].min() == 1000


def test_facts_of_the_task():
    task = Mnist()
    params = jax.jit(task.init)(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 784 * 200 + 200 + 200 * 200 + 200 + 200 * 10 + 10
    for layer, fan_in in zip(params["layers"].values(), (784, 200, 200), strict=True):
        for leaf in layer.values():
            assert 0.8 * 8 * fan_in**-0.5 < jnp.abs(leaf).max() <= 8 * fan_in**-0.5
    assert (task.train_size, task.steps) == (1000, 250)
    batches = jax.jit(task.batches)({"train": jnp.arange(1000)}, jax.random.key(1))
    assert batches["index"].shape == (250, 200)
    epochs = np.asarray(batches["index"]).reshape(50, 1000)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(1000), (50, 1)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert (batches["weight"] == 1).all()


def test_loss_and_accuracy_by_hand():
    task = Mnist(train_images=20, batch_size=10)
    images = RNG.uniform(size=(30, 784)).astype(np.float32)
    shared = {"images": images, "labels": RNG.integers(0, 10, 30).astype(np.int32)}
    params, data = jax.jit(task.init)(jax.random.key(0)), task.split(shared, jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[0], task.validation(data))
    metrics = jax.jit(task.metrics)(params, jax.tree.map(jnp.asarray, {**shared, **data}), batch)
    x = images[20:].astype(np.float64)
    for i, layer in enumerate(params["layers"].values()):
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.maximum(x, 0) if i < 2 else x
    label = shared["labels"][20:]
    assert batch["weight"].tolist() == [1.0] * 10
    np.testing.assert_allclose(metrics["loss"], np.mean((x - np.eye(10)[label]) ** 2, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(metrics["accuracy"], x.argmax(axis=1) == label)


@pytest.mark.parametrize("name", METHODS)
def test_the_optimizer_is_adamw_with_or_without_the_ema(name):
    params, numbers = jnp.array([1.0, -2.0, 3.0]), hyperparams(METHODS[name])
    assert numbers["weight_decay"] == (2.0 if name in ("paper", "decay-only") else 0.01)
    grads = [jnp.array([0.1, 0.2, -0.3]) * step for step in range(1, 6)]
    filtered, slow = [], grads[0]
    for grad in grads:
        slow = 0.8 * slow + 0.2 * grad
        filtered.append(grad + 0.1 * slow if name in ("paper", "filter-only") else grad)

    def train(tx, params, grads):
        state = tx.init(params)
        for grad in grads:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    plain = optax.adamw(1e-3, 0.9, 0.999, weight_decay=numbers["weight_decay"])
    found = train(METHODS[name](), params, grads)
    np.testing.assert_allclose(found, train(plain, params, filtered), rtol=1e-6)
