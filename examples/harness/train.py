"""Training as pure functions of task, hyperparameters, key and data, and as one compiled program."""

import functools
import os
import platform
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pooch
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .errors import UsageError
from .experiment import Run
from .task import Data, Task


class Keys(NamedTuple):
    """What is random in a run."""

    init: jax.Array  # the initial parameters
    split: jax.Array  # the data split
    batch: jax.Array  # the order of the batches, folded with the number of the chunk


def keys(key: jax.Array) -> Keys:
    """The keys of a run, from that of its seed."""
    return Keys(*jax.random.split(key, 3))


class TrainState(NamedTuple):
    """All that changes during a run."""

    params: Any
    opt_state: optax.OptState
    chunk: jax.Array  # () int32, chunks trained so far


def init(task: Task, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    params = task.init(keys(key).init)
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def weighted_sums(task: Task, data: Data, params: Any, batch: Any) -> dict[str, jax.Array]:
    """The sum of the weights of a batch, `count`, and the weighted sum of each metric."""
    values = task.metrics(params, data, batch)
    weight = batch["weight"].astype(values["loss"].dtype)
    return {"count": weight.sum()} | {name: weight @ value for name, value in values.items()}


def step(
    task: Task, tx: optax.GradientTransformation, data: Data, carry: tuple[Any, optax.OptState], batch: Any
) -> tuple[tuple[Any, optax.OptState], tuple[jax.Array, dict[str, jax.Array]]]:
    """Update parameters and optimizer state by one batch; return them, and the loss and the sums before the update."""

    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = weighted_sums(task, data, params, batch)
        return sums["loss"] / sums["count"], sums

    params, opt_state = carry
    (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), (loss, sums)


def advance(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    data: Data,
    state: TrainState,
    divide: Callable[[Any], Any] = lambda batches: batches,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Train one chunk, then evaluate.

    Returns the new state and the metrics: `train_*` are means over the chunk's examples, each taken before the update
    it led to; `val_*` are taken after the chunk; `losses` holds the loss of each step. `divide` may say where the
    batches are kept.
    """
    tx = optax.with_extra_args_support(tx)
    batches = divide(task.batches(data, jax.random.fold_in(keys(key).batch, state.chunk)))
    update = functools.partial(step, task, tx, data)
    (params, opt_state), (losses, sums) = lax.scan(update, (state.params, state.opt_state), batches)
    evaluate = functools.partial(weighted_sums, task, data, params)
    metrics = {"losses": losses}
    for part, batch_sums in (("train", sums), ("val", lax.map(evaluate, divide(task.validation(data))))):
        total = jax.tree.map(jnp.sum, batch_sums)
        metrics |= {f"{part}_{name}": total[name] / total["count"] for name in total if name != "count"}
    return TrainState(params, opt_state, state.chunk + 1), metrics


def keep_compiled() -> None:
    """Keep compiled programs in the user's cache, for the next process; where JAX is configured to, if it is."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        # By machine, for a home directory may be shared by machines with other instruction sets.
        folder = pooch.os_cache("grokfast_jax") / "compiled" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


Precision = Literal["float32", "default"]


class Program(NamedTuple):
    """A task and its optimizer, compiled, for one run or many at once."""

    task: Task
    draw: Callable[[jax.Array], tuple[Data, Data]]  # by key: the arrays that all runs share, and those of each run
    init: Callable[[Any, jax.Array], TrainState]  # by hyperparameters and key
    advance: Any  # by hyperparameters, key, both kinds of data and state, which is donated
    # A function of the task and one run's state and data, as a compiled one of all runs' state and both kinds of data.
    per_run: Callable[[Callable[[Task, TrainState, Data], Any]], Callable[[TrainState, Data, Data], Any]]


def program(run: Run, *, devices: int = 1, precision: Precision = "float32") -> Program:
    """Load the data and compile `init` and `advance` for all runs that share the program of one.

    With a group size above 1 they are vmapped: hyperparameters, keys, data and state have a leading axis.
    Step counters are the same in all runs of a group. They stay unbatched, which keeps ring buffers updated in place: a
    counter per run would turn a slice update into a scatter. Where an optimizer's counters depend on the data, as in
    `optax.apply_if_finite`, each run has its own. Batches are divided among the devices; all else is copied to each.
    """
    task, make_tx = run.task, run.make_tx
    shared = task.load()
    whole, divide = _placement(devices)

    def split_fn(key: jax.Array) -> dict[str, jax.Array]:
        return task.split(shared, keys(key).split)

    def init_fn(hyper: Any, key: jax.Array) -> TrainState:
        return init(task, make_tx(hyper), key)

    def advance_fn(hyper: Any, key: jax.Array, shared: Data, own: Data, state: TrainState) -> Any:
        with jax.default_matmul_precision(precision):
            return advance(task, make_tx(hyper), key, {**shared, **own}, state, divide)

    vmap = jax.vmap if run.group_size > 1 else lambda function, **_: function
    state = jax.eval_shape(init_fn, run.traced, jax.random.key(0))
    needed = run.group_size * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e9
    if needed > (limit := _memory()):
        raise UsageError(
            f"parameters and optimizer state need {needed:,.3g} GB of memory, and there are {limit:,.3g}; choose a "
            "smaller model, window or group"
        )
    axes = jax.tree.map(lambda x: None if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) else 0, state)

    def mapped() -> tuple[Any, Any]:
        return vmap(init_fn, out_axes=axes), vmap(advance_fn, in_axes=(0, 0, None, 0, axes), out_axes=(axes, 0))

    if run.group_size > 1:
        hyper, key = jax.tree.map(lambda x: jnp.stack([x] * run.group_size), (run.traced, jax.random.key(0)))
        init_all, advance_all = mapped()
        try:
            states = jax.eval_shape(init_all, hyper, key)
            jax.eval_shape(advance_all, hyper, key, shared, jax.eval_shape(vmap(split_fn), key), states)
        except ValueError:  # a counter is not the same in all runs
            axes = axes._replace(opt_state=0)

    @functools.cache
    def per_run(function: Callable[[Task, TrainState, Data], Any]) -> Callable[[TrainState, Data, Data], Any]:
        def function_fn(state: TrainState, shared: Data, own: Data) -> Any:
            with jax.default_matmul_precision(precision):
                return function(task, state, {**shared, **own})

        return jax.jit(vmap(function_fn, in_axes=(axes, None, 0)))

    jit = functools.partial(jax.jit, out_shardings=whole)
    draw_fn = jit(vmap(split_fn))
    draw = lambda key: (jax.device_put(shared, whole), draw_fn(key))
    init_all, advance_all = mapped()
    return Program(task, draw, jit(init_all), jit(advance_all, donate_argnums=4), per_run)


def _memory() -> float:
    """Gigabytes of this process's first device, or of this machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else float("inf")


def _placement(devices: int) -> tuple[NamedSharding | None, Callable[[Any], Any]]:
    """Where state and metrics are kept, and what divides batches, (steps, batch_size, ...), among the devices."""
    if devices == 1:
        return None, lambda batches: batches
    if devices > jax.device_count():
        raise UsageError(
            f"--devices must be at most {jax.device_count()}, the number of devices here, got {devices}; "
            f"JAX_NUM_CPU_DEVICES={devices} in the environment makes as many of a CPU"
        )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    divided = NamedSharding(mesh, P(None, "data"))

    def divide(batches: Any) -> Any:
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, divided) if x.ndim > 1 else x, batches)

    return NamedSharding(mesh, P()), divide


def is_primary_process() -> bool:
    """Whether this process is the one that writes what all of them know."""
    return jax.process_index() == 0


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in this process, or in any that trains together with it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag
