"""Does training at the edge of stability find what other training does not? `python -m benchmarks.study.edge`.

Sparse parity without noise: every step has the gradient of all training points. In place of Adam's first moment there
are memories whose stability limits differ. Measured along each run is the sharpness that Adam sees, the largest
eigenvalue of P^(-1/2) H P^(-1/2), with H the Hessian of the training loss and P = sqrt(nu) + eps. Training is stable
where it is below the limit divided by the learning rate. Results are appended; what is there is not trained again.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import lax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import RESULTS, run_command
from examples.harness.batches import Batch
from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.harness.task import Data
from examples.harness.train import TrainState
from examples.parity import Parity
from grokfast_jax import ema, grokfast_ema, grokfast_ma, stability_limit

from . import contest
from .cells import append
from .contest import Chain, Job, missing
from .memory import average, in_adamw, kernel
from .methods import check_among
from .tables import MISSING, steps, two_digits

OUT = RESULTS / "edge.jsonl"
CAP = 3_000
DECAY = 0.3
RATES = (0.003, 0.01, 0.03)
SEEDS = tuple(range(8))
ITERATIONS = 20  # of the power method, from the vector of the evaluation before
EPS = 1e-8  # of the preconditioner
TITLE = "The limit of its memory sets the sharpness that Adam comes to, and only flat runs generalise"
Tx = optax.GradientTransformation
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


@dataclasses.dataclass(frozen=True)
class FullBatch(Parity):
    """Trained with all training points at every step."""

    batch_size: int = 1_000

    def batches(self, data: Data, key: jax.Array) -> Batch:
        """All training points, again and again."""
        del data, key
        index = jnp.broadcast_to(jnp.arange(self.points), (self.steps, self.points))
        return Batch(index=index, weight=jnp.ones(index.shape, jnp.float32))


# By name: what stands in place of Adam's first moment
MEMORIES: dict[str, Callable[[], Tx]] = {
    "none": optax.identity,
    "EMA of 0.9, as in Adam": lambda: ema(0.9),
    "EMA, age 4": lambda: average(4.0),
    "Nesterov EMA, age 4": lambda: kernel("Nesterov EMA", 4.0),
    "gradient + 2 EMA, age 4": lambda: kernel("gradient + 2 EMA", 4.0),
    "MA, age 1": lambda: kernel("MA", 1.0),
    "MA, age 4": lambda: kernel("MA", 4.0),
    "triangular, age 4": lambda: kernel("triangular", 4.0),
    "Butterworth, age 4": lambda: kernel("Butterworth", 4.0),
    "MA, age 16": lambda: kernel("MA", 16.0),
    "published EMA, then 0.9": lambda: optax.chain(grokfast_ema(0.98, 2.0, normalize=True), ema(0.9)),
    "published MA, then 0.9": lambda: optax.chain(grokfast_ma(100, 5.0, normalize=True), ema(0.9)),
}


@functools.cache
def _limit(name: str) -> Callable[[float], jax.Array]:
    return jax.jit(lambda decay: stability_limit(MEMORIES[name](), 4_000, decay=decay))


def limit(name: str, lr: float) -> float:
    """Learning rate times sharpness up to which AdamW with a memory is stable."""
    return float(_limit(name)(lr * DECAY))


TASK = FullBatch()


@functools.cache
def chain(name: str) -> Chain:
    """AdamW with a memory."""
    return Chain(name, lambda lr: in_adamw(MEMORIES[name](), lr, DECAY), TASK)


def job(name: str, lr: float, seed: int) -> Job:
    """A run."""
    return Job(chain(name), {"lr": lr}, seed, CAP)


@functools.partial(jax.jit, static_argnums=0)
def sharpness(task: Parity, data: Data, params: Any, nu: Any, vector: Any) -> tuple[jax.Array, Any]:
    """The largest eigenvalue of the preconditioned Hessian of the training loss, and its vector.

    The power method starts from `vector`, a tree like the parameters. `nu` is Adam's second moment.
    """
    scale = jax.tree.map(lambda nu: 1 / jnp.sqrt(jnp.sqrt(nu) + EPS), nu)
    index = jnp.arange(task.points)
    points = Batch(index=index, weight=jnp.ones(index.shape, jnp.float32))
    gradient = jax.grad(lambda params: task.metrics(params, data, points)["loss"].mean())

    def product(v: Any) -> Any:
        scaled = jax.tree.map(jnp.multiply, scale, v)
        return jax.tree.map(jnp.multiply, scale, jax.jvp(gradient, (params,), (scaled,))[1])

    def iterate(_: int, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        norm = optax.tree_utils.tree_norm(carry[0])
        v = jax.tree.map(lambda leaf: leaf / norm, carry[0])
        w = product(v)
        return w, jnp.asarray(optax.tree_utils.tree_vdot(v, w))

    vector, value = lax.fori_loop(0, ITERATIONS, iterate, (vector, jnp.zeros(())))
    return value, vector


def train(job: Job, bar: tqdm.tqdm) -> dict[str, Any]:
    """Train a run until it is at the threshold, and measure its sharpness at every evaluation.

    Behind a filter the second moment is that of the gradients, which `raised.watched` keeps.
    """
    task: Any = job.chain.task
    shared, own = contest.program_of(job.chain, tuple(job.numbers), 1).draw(jax.random.key(job.seed))
    vector = None

    def measure(state: TrainState) -> jax.Array:
        nonlocal vector
        vector = jax.tree.map(jnp.ones_like, state.params) if vector is None else vector
        get = optax.tree_utils.tree_get
        nu = get(state.opt_state, "watched", default=get(state.opt_state, "nu"))
        value, vector = sharpness(task, {**shared, **own}, state.params, nu, vector)
        return value

    (found,) = contest.train([job], bar, measure)
    return found | {"sharpness": found.pop("measured")}


def main(seeds: tuple[int, ...] = SEEDS, rates: tuple[float, ...] = RATES, out: Path = OUT) -> None:
    """Train what is missing.

    Args:
      seeds: Seeds of every memory and learning rate.
      rates: Learning rates, of those of the study.
      out: File for the results.
    """
    check_among("--rates", tuple(map(str, rates)), tuple(map(str, RATES)))
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = missing((job(name, lr, seed) for seed in seeds for name in MEMORIES for lr in rates), out)
    with tqdm.tqdm(total=len(todo), unit="run", disable=not todo) as bar:
        for one in todo:
            append(out, {"cell": one.cell, **train(one, bar)}, base=None)
    print(table(out))


def late(sharpness: Sequence[float]) -> float:
    """A run's sharpness: the median over the second half of its evaluations."""
    return float(np.median(sharpness[len(sharpness) // 2 :]))


def frame(path: Path) -> Frame:
    """A row for each memory and learning rate: seeds, how many reach 95 %, medians of the steps and of the sharpness.

    The sharpness is in units of 1 / learning rate.
    """
    runs = contest.frame(path)
    if not len(runs):
        return runs
    runs["held"] = runs["lr"] * runs["sharpness"].map(late)
    by = runs.groupby(["chain", "lr"], sort=False)
    cells = by.agg(
        seeds=("seed", "size"),
        reach=("first_step", lambda first: int(np.isfinite(first).sum())),
        steps=("first_step", "median"),
        held=("held", "median"),
    ).reset_index()
    return cells.assign(limit=[limit(*key) for key in zip(cells["chain"], cells["lr"], strict=True)])


def table(path: Path) -> str:
    """A row for each memory, the lowest limit first, a column for each learning rate."""
    cells = frame(path)
    if not len(cells):
        return MISSING
    rows = []
    for name, some in sorted(cells.groupby("chain", sort=False), key=lambda group: group[1]["limit"].min()):
        row = {"memory": name, "limit": two_digits(some["limit"].iloc[0])}
        for cell in some.sort_values("lr").itertuples():
            reached = f"{cell.reach} of {cell.seeds}" + f", {steps(cell.steps, CAP)}" * (cell.reach > cell.seeds / 2)
            row[f"rate {cell.lr:g}"] = f"{reached} [{two_digits(cell.held)}]"
        rows.append(row)
    return markdown(rows)


def picture(path: Path) -> Figure:
    """The limit of every memory, a bar, with the sharpness times the rate, a dot; and who generalises, by sharpness."""
    cells = frame(path)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    claim(figure, TITLE)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(cells.groupby("chain")["limit"].min().sort_values().index)
    for i, rate in enumerate(RATES):
        some = cells[cells["lr"] == rate].set_index("chain").reindex(names)
        x, share = np.arange(len(names)) + 0.2 * (i - 1), 100 * some["reach"] / some["seeds"]
        generalise = share > 50
        for axes, where, height in ((left, x, some["held"]), (right, some["held"] / rate, share + 1.5 * (i - 1))):
            axes.plot(where, height, "o", color=f"C{i}", markerfacecolor="white", label=f"learning rate {rate:g}")
            axes.plot(where[generalise], height[generalise], "o", color=f"C{i}")
        left.hlines(some["limit"], x - 0.1, x + 0.1, color="black", linewidth=2)
    handles, _ = left.get_legend_handles_labels()
    handles.append(Line2D([], [], color="black", linewidth=2, label="stability limit"))
    handles.append(Line2D([], [], color=GREY, marker="o", linestyle="", label="most seeds reach 95 %"))
    left.legend(handles=handles, frameon=False, loc="lower right")
    left.set_yscale("log")
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    left.set_ylabel("learning rate × sharpness, median", fontsize="large")
    right.set_xscale("log")
    right.set_xlabel("sharpness, median", fontsize="large")
    right.set_ylabel("% of seeds that reach 95 %", fontsize="large")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.edge")
