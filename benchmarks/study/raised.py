"""By how much does a filter before Adam raise the learning rate? `python -m benchmarks.study.raised`.

Adam divides by the root mean square of what it gets, so it does not see by how much all of it is amplified. But a
filter amplifies what is slow by its dc gain, and white noise only by the root of the sum of its squared response. So
where the gradients are mostly noise, Adam's updates follow what is slow up to `white` times as fast, the quotient of
the two. By how much they do is measured: dc gain times the root of Adam's second moment of the gradients over that of
the filter's output, in the median of parameters and evaluations.

The control is AdamW without a filter at so many times the learning rate, with the weight decay divided by as much. The
task is sparse parity with batches of 64. Results are appended; what is there is not trained again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tqdm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import RESULTS, run_command
from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.harness.train import TrainState
from examples.parity import PRESETS, Parity
from grokfast_jax import dc_gain, grokfast_ema, grokfast_ma, impulse_response

from . import contest
from .cells import append, as_cell
from .contest import Chain, Job, missing, results
from .tables import MISSING, steps, two_digits
from .windows import limit

OUT = RESULTS / "raised.jsonl"
CAP = 4_000
LENGTH = 4_000  # of a filter's response
SETTINGS = ((0.003, 0.3), (0.003, 1.0))  # learning rates and weight decays
LAMBDAS = (2.0, 3.0, 5.0, 8.0)
SEEDS = tuple(range(16))
TITLE = "Behind a stable filter it takes longer than at the rate that it amounts to"
FAILED = 4_400  # where pictures draw what most seeds do not reach
Tx = optax.GradientTransformation
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing

# By name: a filter of λ, and its window
FILTERS: dict[str, tuple[Callable[[Any], Tx], float]] = {
    "EMA": (lambda lamb: grokfast_ema(0.98, lamb, start="debiased"), math.nan),
    "MA, w 100": (lambda lamb: grokfast_ma(100, lamb), 100),
    "MA, w 50": (lambda lamb: grokfast_ma(50, lamb), 50),
    "MA, w 25": (lambda lamb: grokfast_ma(25, lamb), 25),
}


def adamw(lr: Any, weight_decay: Any) -> Tx:
    """AdamW as the presets of parity have it."""
    optimization = PRESETS["adamw"].config.optimization
    return optax.adamw(lr, b1=optimization.beta1, b2=optimization.beta2, weight_decay=weight_decay)


def watched() -> Tx:
    """Leave gradients as they are, and keep the second moment that Adam would have of them, as `watched`."""
    beta2 = PRESETS["adamw"].config.optimization.beta2

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moment = jax.tree.map(lambda nu, g: beta2 * nu + (1 - beta2) * g**2, state["watched"], updates)
        return updates, {"watched": moment}

    return optax.GradientTransformation(lambda params: {"watched": jax.tree.map(jnp.zeros_like, params)}, update)


@jax.jit
def growth(state: TrainState) -> jax.Array:
    """Root mean square of the gradients of each run over that of what Adam gets, in the median of the parameters."""

    def of_run(of_gradients: Any, of_filtered: Any) -> jax.Array:
        quotients = jax.tree.map(lambda a, b: jnp.ravel(jnp.sqrt(a / b)), of_gradients, of_filtered)
        return jnp.nanmedian(jnp.concatenate(jax.tree.leaves(quotients)))

    return jax.vmap(of_run)(*(optax.tree_utils.tree_get(state.opt_state, name) for name in ("watched", "nu")))


@functools.cache
def white(name: str, lamb: float) -> float:
    """By what a filter raises the learning rate where the gradients are all white noise, which is the most."""
    tx = FILTERS[name][0](lamb)
    return float(dc_gain(tx, LENGTH) / jnp.linalg.norm(impulse_response(tx, LENGTH)))


@functools.cache
def behind(name: str) -> Chain:
    """AdamW behind a filter."""
    make = lambda lamb, lr, weight_decay: optax.chain(watched(), FILTERS[name][0](lamb), adamw(lr, weight_decay))
    return Chain(name, make, Parity())


ALONE = Chain("AdamW", adamw, Parity())


def jobs(name: str, lamb: float, lr: float, weight_decay: float) -> list[Job]:
    """The runs behind a filter."""
    numbers = {"lamb": lamb, "lr": lr, "weight_decay": weight_decay}
    return [Job(behind(name), numbers, seed, CAP) for seed in SEEDS]


def controls(factor: float, lr: float, weight_decay: float) -> list[Job]:
    """AdamW at a raised rate, with a decay that times the rate is the same."""
    numbers = {"lr": factor * lr, "weight_decay": weight_decay / factor}
    return [Job(ALONE, {key: float(f"{value:.4g}") for key, value in numbers.items()}, seed, CAP) for seed in SEEDS]


def train(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """The results of runs, of which those that are missing are trained, all in one vmapped program."""
    if todo := missing(jobs, out):
        found = contest.train(todo, tqdm.tqdm(disable=True), growth if "lamb" in todo[0].numbers else None)
        for one in found:
            if "measured" in one:
                one["growth"] = float(f"{np.nanmedian(one.pop('measured')):.4g}")
        append(out, *({"cell": job.cell, **one} for job, one in zip(todo, found, strict=True)), base=None)
    stored = results(out)
    return [stored[as_cell(job.cell)] for job in jobs]


def factor(runs: Sequence[Mapping[str, Any]], lamb: float) -> float:
    """By what a filter raises the learning rate, in the median of some runs, to three digits."""
    return float(f"{(1 + lamb) * np.median([run['growth'] for run in runs]):.3g}")


def main(out: Path = OUT) -> None:
    """Train what is missing.

    Args:
      out: File for the results.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for (lr, decay), name, lamb in tqdm.tqdm(list(itertools.product(SETTINGS, FILTERS, LAMBDAS)), unit="setting"):
        runs = train(jobs(name, lamb, lr, decay), out)
        train(controls(factor(runs, lamb), lr, decay), out)
    print(table(out))


def frame(path: Path) -> Frame:
    """A row for each setting that is done: what the filter raises the rate by, and its steps and the control's."""
    stored, rows = results(path), []
    for (lr, decay), name, lamb in itertools.product(SETTINGS, FILTERS, LAMBDAS):
        runs = [stored.get(as_cell(job.cell)) for job in jobs(name, lamb, lr, decay)]
        if None in runs:
            continue
        raised = factor(runs, lamb)
        alone = [stored.get(as_cell(job.cell)) for job in controls(raised, lr, decay)]
        if None in alone:
            continue
        row = {"lr": lr, "weight_decay": decay, "filter": name, "lamb": lamb, "factor": raised}
        for title, some in (("behind", runs), ("alone", alone)):
            taken = np.array([run["first_step"] or np.inf for run in some])
            row |= {title: np.median(taken), f"{title}_fail": int(np.isinf(taken).sum())}
        row["limit"] = limit(*("ema", math.nan) if name == "EMA" else ("ma", FILTERS[name][1]), lamb, lr * decay)
        rows.append(row | {"white": white(name, lamb)})
    return pd.DataFrame(rows)


def _taken(middle: float, fail: int) -> str:
    return "all fail" if fail == len(SEEDS) else steps(middle, CAP) + f", {fail} fail" * bool(fail)


def table(path: Path) -> str:
    """A row for each filter and λ; for each rate and decay the steps behind the filter and those of its control."""
    cells = frame(path)
    if not len(cells):
        return MISSING
    rows = []
    for (name, lamb), some in cells.groupby(["filter", "lamb"], sort=False):
        row = {"filter": f"{name}, λ {lamb:g}", "at most": two_digits(some["white"].iloc[0])}
        for cell in some.itertuples():
            behind, alone = _taken(cell.behind, cell.behind_fail), _taken(cell.alone, cell.alone_fail)
            row[f"decay {cell.weight_decay:g}: raised by"] = two_digits(cell.factor)
            row[f"decay {cell.weight_decay:g}: behind the filter (at the raised rate)"] = f"{behind} ({alone})"
        rows.append(row)
    return markdown(rows)


def picture(path: Path) -> Figure:
    """Steps behind a filter over those of AdamW at the rate that it raises to; hollow where the filter is unstable."""
    cells = frame(path)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    claim(figure, TITLE)
    panels = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    colours = {name: GREY if name == "EMA" else f"C{i}" for i, name in enumerate(FILTERS)}
    for axes, (lr, decay) in zip(panels, SETTINGS, strict=True):
        some = cells[(cells["lr"] == lr) & (cells["weight_decay"] == decay)]
        for name, colour in colours.items():
            line = some[some["filter"] == name]
            x, y = line["alone"].clip(upper=FAILED), line["behind"].clip(upper=FAILED)
            stable = line["limit"] >= 2
            axes.plot(x, y, "-", color=colour, alpha=0.4)
            axes.plot(x[stable], y[stable], "o", color=colour)
            axes.plot(x[~stable], y[~stable], "o", color=colour, markerfacecolor="white")
            for lamb, *at in zip(line["lamb"], x, y, strict=True):
                axes.annotate(f"{lamb:g}", at, xytext=(4, 3), textcoords="offset points", color=colour)
        axes.plot([500, FAILED], [500, FAILED], ":", color="black", linewidth=1)
        axes.set_title(f"rate {lr:g}, decay {decay:g}", fontsize="large", loc="left")
        axes.set_xlabel("steps of AdamW alone at the raised rate", fontsize="large")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("steps behind the filter", fontsize="large")
    handles = [
        Line2D([], [], color=GREY if n == "EMA" else f"C{i}", marker="o", label=n) for i, n in enumerate(FILTERS)
    ]
    handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="unstable"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.raised")
