"""The one host loop: it runs a compiled program chunk by chunk and yields records. All training goes through it."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from .records import Row, is_finite, to_row
from .train import Data, Program, TrainState


class Evaluation(NamedTuple):
    """The metrics of all runs of a program after a chunk."""

    step: int
    rows: Sequence[Row]  # one for each run
    diverged_at: list[int | None]  # for each run, the first step of the chunk whose loss is not finite, None if all are
    state: TrainState  # of all runs; donated to the next chunk


def evaluations(
    program: Program,
    hyper: Any,
    key: jax.Array,
    *,
    data: tuple[Data, Data] | None = None,
    state: TrainState | None = None,
) -> Iterator[Evaluation]:
    """Train indefinitely; yield the metrics after each chunk.

    `hyper` and `key` are those of one run, or stacked ones of many. Data and state are drawn from them unless given,
    for a run that is resumed.
    """
    shared, own = program.draw(key) if data is None else data
    # JAX may wait forever for one output of a program whose other outputs did not fit in memory; for all, it raises.
    current: TrainState = jax.block_until_ready(program.init(hyper, key) if state is None else state)
    steps, many = program.task.steps, key.ndim > 0
    for chunk in itertools.count(int(current.chunk) + 1):
        with jax.debug_nans(False), jax.debug_infs(False):  # which say no more than `diverged_at`
            current, metrics = jax.block_until_ready(program.advance(hyper, key, shared, own, current))
        metrics = jax.device_get(metrics)
        runs = [metrics] if not many else [{k: v[i] for k, v in metrics.items()} for i in range(len(key))]
        step = steps * chunk
        rows = [to_row(step, {name: value for name, value in run.items() if name != "losses"}) for run in runs]
        diverged_at = [
            _first_bad_step(row, step - steps + 1, run["losses"]) for row, run in zip(rows, runs, strict=True)
        ]
        yield Evaluation(step, rows, diverged_at, current)


def _first_bad_step(row: Row, first: int, losses: np.ndarray) -> int | None:
    """The first step whose loss is not finite; the last step where only the evaluation is not finite."""
    bad = np.flatnonzero(~np.isfinite(losses))
    return first + int(bad[0]) if bad.size else None if is_finite(row) else int(row["step"])


def stack(runs: Sequence[Any]) -> Any:
    """Hyperparameters or keys of many runs, each leaf with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *runs)


def progress_bar(total: int, unit: str, **options: Any) -> tqdm.tqdm:
    """A bar; in a file, a line every ten seconds."""
    return tqdm.tqdm(total=total, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)
