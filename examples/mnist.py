"""Delayed generalisation of an MLP on 1,000 MNIST images: `python -m examples.mnist`."""

import dataclasses
import functools
import gzip
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .harness.batches import Batch, in_batches, shuffled_epochs, steps_per_epoch
from .harness.config import RunConfig
from .harness.errors import plain_errors
from .harness.files import fetch
from .harness.optimizers import Optimizer
from .harness.run import main
from .harness.torch_init import linear

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


class MLP(nnx.Module):
    """784-200-200-10 with ReLU."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([linear(m, n, rngs=rngs) for m, n in ((784, 200), (200, 200), (200, CLASSES))])

    def __call__(self, x_bd: jax.Array) -> jax.Array:
        """One output a class."""
        for layer in self.layers[:-1]:
            x_bd = jax.nn.relu(layer(x_bd))
        return self.layers[-1](x_bd)


def load(data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [0, 1], (70000, 784) float32, and classes, (70000,) int32, of MNIST's training and test images."""
    paths = fetch(FILES, SOURCES, data_dir)
    images, labels, test_images, test_labels = (read_idx(paths[name]) for name in FILES)
    pixels = np.concatenate([images, test_images]).reshape(-1, 784).astype(np.float32) / 255
    return pixels, np.concatenate([labels, test_labels]).astype(np.int32)


def read_idx(path: Path) -> np.ndarray:
    """Unpack an IDX file: two zero bytes, 8 for uint8, the number of axes, their lengths, the values."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Mnist:
    """Task: regression of one-hot classes on the first images, validated on the others."""

    images: np.ndarray  # (examples, 784) float32 in [0, 1], training images first
    labels: np.ndarray  # (examples,) int32
    train_images: int = 1000
    batch_size: int = 200
    init_scale: float = 8.0
    epochs: int = 50  # between two evaluations

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations."""
        return self.epochs * steps_per_epoch(self.train_images, self.batch_size)

    def model(self, key: jax.Array) -> MLP:
        """The model, freshly initialised as PyTorch does."""
        return MLP(rngs=nnx.Rngs(params=key))

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef[MLP]:
        """The model without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, all scaled up: what delays generalisation here."""
        return jax.tree.map(lambda p: self.init_scale * p, nnx.to_pure_dict(nnx.state(self.model(key))))

    def split(self, key: jax.Array) -> dict[str, jax.Array]:
        """The images and labels; the same for every key."""
        del key
        return {"images": jnp.asarray(self.images), "labels": jnp.asarray(self.labels)}

    def batches(self, data: dict[str, jax.Array], key: jax.Array) -> Batch:
        """Epochs of shuffled training images."""
        del data
        return shuffled_epochs(key, jnp.arange(self.train_images), self.batch_size, self.epochs)

    def validation(self, data: dict[str, jax.Array]) -> Batch:
        """The test images."""
        return in_batches(jnp.arange(self.train_images, data["labels"].shape[0]), self.batch_size)

    def measure(self, params: Any, data: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        """Sums of squared error (mean over the classes) and correct answers over a batch."""
        output = nnx.merge(self.graphdef, params)(data["images"][batch["index"]])
        label = data["labels"][batch["index"]]
        loss = jnp.mean((output - jax.nn.one_hot(label, CLASSES, dtype=output.dtype)) ** 2, axis=-1)
        correct = (jnp.argmax(output, axis=-1) == label).astype(loss.dtype)
        weight = batch["weight"].astype(loss.dtype)
        return {"count": weight.sum(), "loss": weight @ loss, "accuracy": weight @ correct}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Delayed generalisation on MNIST."""

    filter: Literal["none", "ema", "ma"] = "ema"
    """Low-pass filter whose output is amplified."""
    alpha: float = 0.8
    """EMA: weight of the past, in [0, 1)."""
    lamb: float = 0.1
    """Amplification of the slow part of the gradients."""
    optimizer: Optimizer = "adamw"
    """adam has coupled L2, the decay being added to the filtered gradient; the others have decoupled weight decay."""
    weight_decay: float = 2.0
    """Weight decay."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises from 0; 0 for none."""
    budget: int = 100_000
    """Optimizer steps at most, rounded up to whole evaluations."""
    stop_at: float | None = None
    """Stop when the validation accuracy reaches this; None to use the whole budget."""
    data_dir: Path | None = None
    """Folder with the four files of MNIST; None downloads them once."""

    def task(self) -> Mnist:
        """The task of this run: 1,000 training images, and all test images to validate on."""
        images, labels = load(self.data_dir)
        keep = np.r_[0:1000, 60_000:70_000]
        return Mnist(images[keep], labels[keep])


THRESHOLDS = (0.80, 0.85, 0.88)  # validation accuracies whose first crossing is reported

PRESETS = {
    # The paper's two runs, and what tells the effect of the filter from that of the weight decay
    "baseline": Config(filter="none", weight_decay=0.01),
    "filter-only": Config(weight_decay=0.01),
    "decay-only": Config(filter="none"),
    "paper": Config(),
}

if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main("mnist", PRESETS, default="paper")))
