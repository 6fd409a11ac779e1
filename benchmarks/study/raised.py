"""By how much does a filter before Adam raise the learning rate? `python -m benchmarks.study.raised`.

Adam divides by the root mean square of what it gets, so it does not see by how much all of it is amplified. But a
filter amplifies what is slow by its dc gain, and white noise only by the root of the sum of its squared response. So
where the gradients are mostly noise, Adam's updates follow what is slow up to `white` times as fast, the quotient of
the two. By how much they do is measured: dc gain times the root of Adam's second moment of the gradients over that of
the filter's output, in the median of parameters and evaluations.

The control is AdamW without a filter at so many times the learning rate, with the weight decay divided by as much.
Results are appended; what is there is not trained again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tqdm
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import RESULTS, run_command
from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.harness.task import Task
from examples.harness.train import TrainState
from examples.modular import Modular
from examples.parity import Parity
from grokfast_jax import dc_gain, grokfast_ema, grokfast_ma, impulse_response

from . import board, contest
from .cells import append, as_cell
from .contest import Chain, Job, missing, results
from .methods import check_among
from .tables import MISSING, steps_and_failures, two_digits
from .windows import limit

OUT = RESULTS / "raised.jsonl"
LENGTH = 4_000  # of a filter's response
TITLE = "A stable filter before AdamW is slower than the higher rate that it amounts to"
Tx = optax.GradientTransformation
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing

# By name: a filter of λ, and its window
FILTERS: dict[str, tuple[Callable[[Any], Tx], float]] = {
    "EMA": (lambda lamb: grokfast_ema(0.98, lamb, start="debiased"), math.nan),
    "MA, w 100": (lambda lamb: grokfast_ma(100, lamb), 100),
    "MA, w 50": (lambda lamb: grokfast_ma(50, lamb), 50),
    "MA, w 25": (lambda lamb: grokfast_ma(25, lamb), 25),
}


class Setup(NamedTuple):
    """What is trained of a task."""

    task: Task
    adamw: Callable[..., Tx]  # of a learning rate and a weight decay, as the task's other studies have it
    beta2: float
    cap: int  # steps at most
    seeds: Sequence[int]
    together: bool  # all seeds in one vmapped program
    rates: Sequence[tuple[float, float]]  # learning rates and weight decays
    filters: Sequence[tuple[str, float]]  # and their λ


class Setting(NamedTuple):
    """A filter at a learning rate."""

    task: str
    lr: float
    weight_decay: float
    filter: str
    lamb: float


SETUPS = {
    "parity": Setup(
        Parity(),
        lambda lr, weight_decay: optax.adamw(lr, 0.9, 0.999, weight_decay=weight_decay),
        beta2=0.999,
        cap=4_000,
        seeds=range(16),
        together=True,
        rates=((0.003, 0.3), (0.003, 1.0)),
        filters=tuple(itertools.product(FILTERS, (2.0, 3.0, 5.0, 8.0))),
    ),
    "modular": Setup(
        Modular(),
        board.adamw,
        beta2=0.98,
        cap=3_000,
        seeds=range(8),
        together=False,
        rates=((0.001, 1.0),),
        filters=(("EMA", 2.0), ("MA, w 100", 5.0)),
    ),
}


def watched(beta2: float) -> Tx:
    """Leave gradients as they are, and keep the second moment that Adam would have of them, as `watched`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moment = jax.tree.map(lambda nu, g: beta2 * nu + (1 - beta2) * g**2, state["watched"], updates)
        return updates, {"watched": moment}

    return optax.GradientTransformation(lambda params: {"watched": jax.tree.map(jnp.zeros_like, params)}, update)


@functools.partial(jax.jit, static_argnames="many")
def growth(state: TrainState, *, many: bool) -> jax.Array:
    """Root mean square of a run's gradients over that of what Adam gets, in the median of the parameters."""

    def of_run(of_gradients: Any, of_filtered: Any) -> jax.Array:
        quotients = jax.tree.map(lambda a, b: jnp.ravel(jnp.sqrt(a / b)), of_gradients, of_filtered)
        return jnp.nanmedian(jnp.concatenate(jax.tree.leaves(quotients)))

    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("watched", "nu")]
    return (jax.vmap(of_run) if many else of_run)(*moments)


@functools.cache
def white(name: str, lamb: float) -> float:
    """By what a filter raises the learning rate where the gradients are all white noise, which is the most."""
    tx = FILTERS[name][0](lamb)
    return float(dc_gain(tx, LENGTH) / jnp.linalg.norm(impulse_response(tx, LENGTH)))


@functools.cache
def behind(task: str, name: str) -> Chain:
    """AdamW behind a filter."""
    setup = SETUPS[task]

    def make(lamb: Any, lr: Any, weight_decay: Any) -> Tx:
        return optax.chain(watched(setup.beta2), FILTERS[name][0](lamb), setup.adamw(lr, weight_decay))

    return Chain(f"{task}, {name}", make, setup.task)


def settings(tasks: Iterable[str]) -> list[Setting]:
    """Every setting of some tasks."""
    found = []
    for task in tasks:
        setup = SETUPS[task]
        found += [Setting(task, *rate, *one) for rate, one in itertools.product(setup.rates, setup.filters)]
    return found


def jobs(one: Setting) -> list[Job]:
    """The runs behind the filter."""
    setup, numbers = SETUPS[one.task], {"lamb": one.lamb, "lr": one.lr, "weight_decay": one.weight_decay}
    return [Job(behind(one.task, one.filter), numbers, seed, setup.cap) for seed in setup.seeds]


def controls(one: Setting, factor: float) -> list[Job]:
    """AdamW at a raised rate, with a decay that times the rate is the same."""
    setup, numbers = SETUPS[one.task], {"lr": factor * one.lr, "weight_decay": one.weight_decay / factor}
    numbers = {key: float(f"{value:.4g}") for key, value in numbers.items()}
    return [Job(Chain(f"{one.task}, AdamW", setup.adamw, setup.task), numbers, seed, setup.cap) for seed in setup.seeds]


def train(jobs: Sequence[Job], out: Path, *, together: bool) -> list[dict[str, Any]]:
    """The results of runs, of which those that are missing are trained."""
    todo = missing(jobs, out)
    for group in [todo] * bool(todo) if together else [[job] for job in todo]:
        measure = functools.partial(growth, many=len(group) > 1) if "lamb" in group[0].numbers else None
        found = contest.train(group, tqdm.tqdm(disable=True), measure)
        for one in found:
            if "measured" in one:
                one["growth"] = float(f"{np.nanmedian(one.pop('measured')):.4g}")
        append(out, *({"cell": job.cell, **one} for job, one in zip(group, found, strict=True)), base=None)
    stored = results(out)
    return [stored[as_cell(job.cell)] for job in jobs]


def factor(runs: Sequence[Mapping[str, Any]], lamb: float) -> float:
    """By what a filter raises the learning rate, in the median of some runs, to three digits."""
    return float(f"{(1 + lamb) * np.median([run['growth'] for run in runs]):.3g}")


def main(tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(SETUPS), out: Path = OUT) -> None:
    """Train what is missing.

    Args:
      tasks: Which of parity and modular.
      out: File for the results.
    """
    check_among("TASKS", tasks, SETUPS)
    out.parent.mkdir(parents=True, exist_ok=True)
    for one in tqdm.tqdm(settings(tasks), unit="setting"):
        together = SETUPS[one.task].together
        runs = train(jobs(one), out, together=together)
        train(controls(one, factor(runs, one.lamb)), out, together=together)
    for task in tasks:
        print(table(out, task))


def frame(path: Path, task: str) -> Frame:
    """A row for each setting that is done: what the filter raises the rate by, and its steps and the control's."""
    stored, rows = results(path), []

    def found(jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The results of runs; none if one is missing."""
        cells = [as_cell(job.cell) for job in jobs]
        return [stored[cell] for cell in cells] if stored.keys() >= set(cells) else []

    for one in settings([task]):
        if not (runs := found(jobs(one))):
            continue
        raised = factor(runs, one.lamb)
        if not (alone := found(controls(one, raised))):
            continue
        row = one._asdict() | {"factor": raised, "white": white(one.filter, one.lamb)}
        for title, some in (("behind", runs), ("alone", alone)):
            taken = np.array([run["first_step"] or np.inf for run in some])
            row |= {title: np.median(taken), f"{title}_fail": int(np.isinf(taken).sum()), "seeds": len(taken)}
        window = FILTERS[one.filter][1]
        row["limit"] = limit("ema" if math.isnan(window) else "ma", window, one.lamb, one.lr * one.weight_decay)
        rows.append(row)
    return pd.DataFrame(rows)


def table(path: Path, task: str) -> str:
    """A row for each filter and λ; for each rate and decay the steps behind the filter and those of its control."""
    cells, cap = frame(path, task), SETUPS[task].cap
    if not len(cells):
        return MISSING

    def taken(cell: Any, title: str) -> str:
        return steps_and_failures(cell[title], cell[f"{title}_fail"], cell["seeds"], cap)

    rows = []
    for (name, lamb), some in cells.groupby(["filter", "lamb"], sort=False):
        row = {"filter": f"{name}, λ {lamb:g}", "at most": two_digits(some["white"].iloc[0])}
        for _, cell in some.iterrows():
            title = f"rate {cell['lr']:g}, decay {cell['weight_decay']:g}"
            row[f"{title}: raised by"] = two_digits(cell["factor"])
            row[f"{title}: steps (at the raised rate)"] = f"{taken(cell, 'behind')} ({taken(cell, 'alone')})"
        rows.append(row)
    return markdown(rows)


def picture(path: Path) -> Figure:
    """Steps behind a filter over those of AdamW at the rate that it raises to; hollow where the filter is unstable."""
    cells, setup = frame(path, "parity"), SETUPS["parity"]
    failed = 1.25 * setup.cap  # where what most seeds do not reach is drawn
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    claim(figure, TITLE)
    panels = figure.subplots(1, len(setup.rates), sharex=True, sharey=True)
    colours = {name: GREY if name == "EMA" else f"C{i}" for i, name in enumerate(FILTERS)}
    ticks = {500: "500", 1_000: "1,000", 2_000: "2,000", failed: "most fail"}
    for axes, (lr, decay) in zip(panels, setup.rates, strict=True):
        some = cells[(cells["lr"] == lr) & (cells["weight_decay"] == decay)]
        axes.plot([500, failed], [500, failed], ":", color="black", linewidth=1)
        axes.annotate("as long", (560, 560), rotation=38, xytext=(2, 6), textcoords="offset points")
        for name, colour in colours.items():
            line = some[some["filter"] == name].replace(math.inf, failed)
            axes.plot(line["alone"], line["behind"], "-", color=colour, alpha=0.4)
            for cell in line.itertuples():
                hollow = {} if cell.limit >= 2 else {"markerfacecolor": "white"}
                axes.plot(cell.alone, cell.behind, "o", color=colour, markersize=8, **hollow)
                at = (cell.alone, cell.behind)
                axes.annotate(f"{cell.lamb:g}", at, xytext=(6, -11), textcoords="offset points", color=colour)
        axes.set_title(f"rate {lr:g}, decay {decay:g}", fontsize="large", loc="left")
        axes.set_xlabel("steps of AdamW alone at the raised rate", fontsize="large")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(list(ticks), list(ticks.values()))
            axis.minorticks_off()
    panels[0].set_ylabel("steps behind the filter", fontsize="large")
    handles = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="unstable"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, title="filter; numbers: λ")
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.raised")
