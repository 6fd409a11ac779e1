"""One training loop for every task: a pure function of task, optimizer factory, hyperparameters and key."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

Hyper = Mapping[str, jax.Array | float]
MakeTx = Callable[[Hyper], optax.GradientTransformation]


class Task(Protocol):
    """An experiment's model and data. All methods are pure and have outputs of static shape."""

    @property
    def steps(self) -> int:
        """Optimizer steps between two evaluations: one chunk."""
        ...

    def init(self, key: jax.Array) -> Any:
        """The initial parameters."""
        ...

    def split(self, key: jax.Array) -> Any:
        """The data, divided into what is trained on and what is not; the division may depend on the key."""
        ...

    def batches(self, data: Any, key: jax.Array) -> Any:
        """The batches of one chunk: arrays whose leading axis has length `steps`."""
        ...

    def validation(self, data: Any) -> Any:
        """The batches of validation examples: arrays with any leading axis."""
        ...

    def measure(self, params: Any, data: Any, batch: Any) -> dict[str, jax.Array]:
        """Sums over the examples of a batch: `count`, `loss` and what else is of interest (`accuracy`)."""
        ...


class TrainState(NamedTuple):
    """All that changes during a run."""

    params: Any
    opt_state: optax.OptState
    chunk: jax.Array  # () int32, chunks trained so far


def init(task: Task, make_tx: MakeTx, hyper: Hyper, key: jax.Array) -> TrainState:
    """The state before the first step."""
    params = task.init(_keys(key)[0])
    return TrainState(params, make_tx(hyper).init(params), jnp.zeros((), jnp.int32))


def advance(
    task: Task, make_tx: MakeTx, hyper: Hyper, key: jax.Array, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Train one chunk, then evaluate.

    Returns the new state and the metrics: `train_*` are means over the chunk's examples, each taken before the update
    it led to; `val_*` are taken after the chunk; `losses` holds the loss of each step.
    """
    _, split_key, batch_key = _keys(key)
    tx = optax.with_extra_args_support(make_tx(hyper))
    data = task.split(split_key)

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = task.measure(params, data, batch)
        return sums["loss"] / sums["count"], sums

    def step(carry: tuple[Any, optax.OptState], batch: Any) -> tuple[tuple[Any, optax.OptState], Any]:
        params, opt_state = carry
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, sums)

    batches = task.batches(data, jax.random.fold_in(batch_key, state.chunk))
    (params, opt_state), (losses, sums) = lax.scan(step, (state.params, state.opt_state), batches)
    train = jax.tree.map(jnp.sum, sums)
    evaluate = functools.partial(task.measure, params, data)
    val = jax.tree.map(jnp.sum, lax.map(evaluate, task.validation(data)))
    metrics = {
        f"{part}_{name}": total / part_sums["count"]
        for part, part_sums in (("train", train), ("val", val))
        for name, total in part_sums.items()
        if name != "count"
    }
    return TrainState(params, opt_state, state.chunk + 1), metrics | {"losses": losses}


class Program(NamedTuple):
    """`init` and `advance` of one task and optimizer, compiled."""

    init: Callable[[Hyper, jax.Array], TrainState]
    advance: Callable[[Hyper, jax.Array, TrainState], tuple[TrainState, dict[str, jax.Array]]]  # donates the state


def program(
    task: Task,
    make_tx: MakeTx,
    *,
    example: tuple[Hyper, jax.Array] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Program:
    """Compile `init` and `advance`; given an example of many hyperparameters and keys, vmapped over their first axis.

    `sharding` says where state and metrics are kept; None is the first device.

    Step counters are the same in all runs of a vmapped program. They stay unbatched, which keeps ring buffers updated
    in place: a counter for each run would turn a slice update into a scatter.
    """

    def init_fn(hyper: Hyper, key: jax.Array) -> TrainState:
        return init(task, make_tx, hyper, key)

    def advance_fn(hyper: Hyper, key: jax.Array, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        return advance(task, make_tx, hyper, key, state)

    if example is not None:
        one = jax.tree.map(lambda x: x[0], example)
        axes = jax.tree.map(
            lambda x: None if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) else 0,
            jax.eval_shape(init_fn, *one),
        )
        init_fn = jax.vmap(init_fn, out_axes=axes)
        advance_fn = jax.vmap(advance_fn, in_axes=(0, 0, axes), out_axes=(axes, 0))
    return Program(
        jax.jit(init_fn, out_shardings=sharding), jax.jit(advance_fn, out_shardings=sharding, donate_argnums=2)
    )


def _keys(key: jax.Array) -> jax.Array:
    """The keys of the parameters, of the data split and of the batches."""
    return jax.random.split(key, 3)
