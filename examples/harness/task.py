"""What an experiment is: a model, its data and its numbers, in one frozen dataclass."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .errors import require

Metric = Literal["accuracy", "loss"]
Data = Mapping[str, jax.Array]


class Batch(TypedDict):
    """Numbers of examples, and weights that are 0 where a short batch is padded."""

    index: jax.Array  # (..., batch_size) int32
    weight: jax.Array  # (..., batch_size) float32
    dropout: NotRequired[jax.Array]  # (...,) a key for each batch that is trained on, where the model has dropout


def in_batches(examples: jax.Array, batch_size: int) -> Batch:
    """One pass over `examples` (1-D) in their order, the last batch padded: (steps, batch_size)."""
    padding = -len(examples) % batch_size
    index = jnp.pad(examples, (0, padding))
    weight = jnp.pad(jnp.ones(len(examples), jnp.float32), (0, padding))
    return Batch(index=index.reshape(-1, batch_size), weight=weight.reshape(-1, batch_size))


def shuffled(key: jax.Array, examples: jax.Array, batch_size: int) -> Batch:
    """One pass over `examples` (1-D) in random order, the last batch padded: (steps, batch_size)."""
    return in_batches(jax.random.permutation(key, examples), batch_size)


class Task:
    """Model and data of an experiment; the fields of a subclass are flags of the command line.

    A subclass is a frozen dataclass and gives `model`, `load`, `split`, `train_size` and `metrics`; batches and
    validation follow from the arrays `train` and `val` of `split`. All methods but `load` are pure, with outputs of
    static shape.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    metric: ClassVar[Metric] = "accuracy"  # what runs are selected by, on the validation examples
    thresholds: ClassVar[tuple[float, ...]] = ()  # values of the metric; the steps to each are an outcome of a run
    max_steps: ClassVar[int] = 10_000  # of a run, unless it says otherwise
    stop_at: ClassVar[float | None] = None  # value of the metric at which a run stops, unless it says otherwise
    batch_size: int
    epochs = 1  # passes over the training examples between two evaluations
    init_scale = 1.0  # factor of all initial parameters

    def __post_init__(self) -> None:
        """Validate the whole numbers; XLA counts in int32 and aborts beyond. A subclass adds what else must hold."""
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool):
                require(1 <= value <= 10**8, name, "from 1 to 100,000,000", value)

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        raise NotImplementedError

    def model(self, key: jax.Array) -> nnx.Module:
        """The model, freshly initialised."""
        raise NotImplementedError

    def load(self) -> dict[str, np.ndarray]:
        """Arrays that all runs share, read from files; UserError if they cannot be had."""
        return {}

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """Arrays that depend on the seed: the examples of `train` and `val` by number, and what follows from these."""
        raise NotImplementedError

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """`loss`, and what else is of interest (`accuracy`), of each example of a batch: (batch_size,) each."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one chunk."""
        return self.epochs * -(-self.train_size // self.batch_size)

    def batches(self, data: Data, key: jax.Array) -> Batch:
        """The batches of one chunk: arrays whose leading axis has length `steps`."""
        shuffle = lambda key: shuffled(key, data["train"], self.batch_size)
        passes = jax.vmap(shuffle)(jax.random.split(key, self.epochs))
        return jax.tree.map(lambda x: x.reshape(-1, self.batch_size), passes)

    def validation(self, data: Data) -> Batch:
        """The batches of validation examples: arrays with any leading axis."""
        return in_batches(data["val"], self.batch_size)

    def init(self, key: jax.Array) -> Any:
        """The initial parameters, a nested dict."""
        params = nnx.to_pure_dict(nnx.state(self.model(key)))
        return params if self.init_scale == 1 else jax.tree.map(lambda p: self.init_scale * p, params)

    def with_params(self, params: Any) -> Any:
        """The model with these parameters."""
        return nnx.merge(self._graphdef, params)

    @functools.cached_property
    def _graphdef(self) -> nnx.GraphDef[nnx.Module]:
        return nnx.split(nnx.eval_shape(lambda: self.model(jax.random.key(0))))[0]
