"""From which λ on a filter loses its stability, and what training comes to there.

Sparse parity at a low and at a high learning rate, behind the MA of several windows and behind the EMA, over λ. The
runs are those of `examples.sweep`; what is predicted comes from the filters alone.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.parity import PRESETS
from grokfast_jax import ema, grokfast_ema, grokfast_ma, stability_limit

from .tables import MISSING, steps_and_failures, two_digits

SETTINGS = ((0.003, 0.3), (0.003, 1.0), (0.03, 0.3))  # learning rates and weight decays
CAP = 4_000
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


@functools.cache
def _limit(window: int | None) -> Callable[[float, float], jax.Array]:
    make = functools.partial(grokfast_ma, window) if window else functools.partial(grokfast_ema, 0.98)
    beta1 = PRESETS["adamw"].config.optimization.beta1

    def of(lamb: float, decay: float) -> jax.Array:
        return stability_limit(optax.chain(make(lamb, normalize=True), ema(beta1)), 4_000, decay=decay)

    return jax.jit(of)


def limit(filter_name: str, window: float, lamb: float, decay: float) -> float:
    """The stability limit of a filter of gain 1, for AdamW does not see the gain, and Adam's first moment.

    `decay` is the learning rate times the weight decay. The window counts for `filter_name` "ma".
    """
    return float(_limit(int(window) if filter_name == "ma" else None)(lamb, decay))


def load(path: Path, rate: float, decay: float) -> Frame:
    """At a rate and decay, for each filter, window and λ: the median of the steps, failures, seeds and the limit."""
    runs: Frame = pd.read_csv(path)
    runs = runs[(runs["lr"] == rate) & (runs["weight_decay"] == decay)].copy()
    runs["filter"] = runs["preset"].str.removesuffix("+adamw")
    runs["steps_to_95"] = runs["steps_to_95"].fillna(math.inf)
    by = runs.groupby(["filter", "window_size", "lamb"], dropna=False)["steps_to_95"]
    cells = by.agg(steps="median", fail=lambda taken: int(np.isinf(taken).sum()), seeds="size").reset_index()
    keys = cells[["filter", "window_size", "lamb"]].itertuples(index=False)
    return cells.assign(limit=[limit(*key, decay=rate * decay) for key in keys])


def title(filter_name: str, window: float) -> str:
    """What a filter is called."""
    return f"MA, w {window:g}" if filter_name == "ma" else "EMA"


def table(path: Path, rate: float, decay: float) -> str:
    """Steps, failures and the limit at a rate and decay, a row for each λ and a column for each filter."""
    if not path.exists():
        return MISSING
    rows: dict[float, dict[str, str]] = {}
    for cell in load(path, rate, decay).sort_values(["filter", "window_size"], ascending=[False, True]).itertuples():
        taken = steps_and_failures(cell.steps, cell.fail, cell.seeds, CAP)
        row = rows.setdefault(cell.lamb, {"λ": f"{cell.lamb:g}"})
        row[title(cell.filter, cell.window_size)] = f"{taken} [{two_digits(cell.limit)}]"
    return markdown([rows[lamb] for lamb in sorted(rows)])


def picture(path: Path) -> Figure:
    """Seeds that reach 95 % over λ, a line for each filter; hollow where its limit is below that of the gradients."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    claim(figure, "A window that is unstable works at a low rate and fails at a high one")
    panels = figure.subplots(1, len(SETTINGS), sharey=True)
    handles: list[Line2D] = []
    for axes, (rate, decay) in zip(panels, SETTINGS, strict=True):
        axes.set_title(f"rate {rate:g}, decay {decay:g}", fontsize="large", loc="left")
        handles = _lines(axes, load(path, rate, decay))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("λ", fontsize="large")
    panels[0].set_ylabel("% of seeds that reach 95 %", fontsize="large")
    handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="unstable"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def _lines(axes: Axes, cells: Frame) -> list[Line2D]:
    handles = []
    for i, ((name, window), line) in enumerate(cells.groupby(["filter", "window_size"], dropna=False)):
        line = line.sort_values("lamb")
        height = 100 * (1 - line["fail"] / line["seeds"]) + 1.2 * (2 - i)  # side by side where they are equal
        colour = GREY if name == "ema" else f"C{i}"
        axes.plot(line["lamb"], height, "-", color=colour, alpha=0.6)
        stable = line["limit"] >= 2
        axes.plot(line["lamb"][stable], height[stable], "o", color=colour)
        axes.plot(line["lamb"][~stable], height[~stable], "o", color=colour, markerfacecolor="white")
        handles.append(Line2D([], [], color=colour, marker="o", label=title(str(name), float(window))))
    return handles
