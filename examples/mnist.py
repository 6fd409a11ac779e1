"""Delayed generalisation of an MLP on 1,000 MNIST images: `python -m examples.mnist`."""

import dataclasses
import functools
import gzip
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.harness.cli import main
from examples.harness.downloads import fetch
from examples.harness.errors import require
from examples.harness.experiment import Experiment
from examples.harness.methods import Alpha, Fast, Lamb, LearningRate, Tx, WeightDecay
from examples.harness.task import Batch, Data, Task
from examples.harness.torch_init import linear
from grokfast_jax import grokfast_ema

SOURCES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # SHA-256 of the four canonical files
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
CLASSES = 10


def read_idx(path: Path) -> np.ndarray:
    """Unpack an IDX file: two zero bytes, 8 for uint8, the number of axes, their lengths, the values."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Mnist(Task):
    """Delayed generalisation on MNIST: regression of one-hot classes on a few images, validated on the test images.

    The step of training is `step` in examples/harness/train.py.
    """

    thresholds = (0.80, 0.85, 0.88)
    max_steps = 100_000

    train_images: int = 1000  # Training images that are trained on, from the first on.
    batch_size: int = 200  # Images per batch.
    init_scale: float = 8.0  # Factor of all initial parameters: what delays generalisation here.
    epochs: int = 50  # Passes over the training images between two evaluations.
    data_dir: Path | None = None  # Folder with the four files of MNIST; None downloads them once.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train_images <= 60_000, "train_images", "from 1 to 60,000", self.train_images)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return self.train_images

    def model(self, key: jax.Array) -> nnx.Sequential:
        """784-200-200-10 with ReLU, freshly initialised as PyTorch does."""
        rngs = nnx.Rngs(params=key)
        first, second = linear(784, 200, rngs=rngs), linear(200, 200, rngs=rngs)
        return nnx.Sequential(first, nnx.relu, second, nnx.relu, linear(200, CLASSES, rngs=rngs))

    def load(self) -> dict[str, np.ndarray]:
        """Pixels in [0, 1], (images, 784), and classes, (images,), of the training images, then of all test images."""
        paths = fetch(FILES, SOURCES, self.data_dir)
        images, labels, test_images, test_labels = (read_idx(paths[name]) for name in FILES)
        pixels = np.concatenate([images[: self.train_images], test_images]).reshape(-1, 784)
        classes = np.concatenate([labels[: self.train_images], test_labels])
        return {"images": pixels.astype(np.float32) / 255, "labels": classes.astype(np.int32)}

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """The images to train on and to validate on, the same for every key."""
        del key
        images = jnp.arange(shared["labels"].shape[0])
        return {"train": images[: self.train_images], "val": images[self.train_images :]}

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Squared error (mean over the classes) and accuracy of each image of a batch."""
        output = self.with_params(params)(data["images"][batch["index"]])
        label = data["labels"][batch["index"]]
        loss = jnp.mean((output - jax.nn.one_hot(label, CLASSES, dtype=output.dtype)) ** 2, axis=-1)
        return {"loss": loss, "accuracy": (jnp.argmax(output, axis=-1) == label).astype(loss.dtype)}


def baseline(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.01) -> Tx:
    """The paper's baseline: AdamW without a filter."""
    return optax.adamw(lr, weight_decay=weight_decay)


def paper(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 2.0, alpha: Alpha = 0.8, lamb: Lamb = 0.1, fast: Fast = 1.0
) -> Tx:
    """The paper's filter and weight decay: Grokfast-EMA before AdamW."""
    return optax.chain(grokfast_ema(alpha, lamb, fast=fast), optax.adamw(lr, weight_decay=weight_decay))


METHODS = {
    "paper": paper,
    "decay-only": functools.partial(baseline, weight_decay=2.0),
    "filter-only": functools.partial(paper, weight_decay=0.01),
    "baseline": baseline,
}
EXPERIMENT = Experiment("mnist", Mnist(), METHODS, default="paper")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
