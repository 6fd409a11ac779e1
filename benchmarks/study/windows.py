"""From which λ on the MA loses its stability, and whether training fails there.

Sparse parity at one learning rate and decay behind the MA of several windows, and behind the EMA, over λ. The runs are
those of `examples.sweep`; what is predicted comes from the filters alone.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.harness.plots import GREY, claim
from examples.harness.tables import markdown
from examples.parity import PRESETS
from grokfast_jax import dc_gain, ema, grokfast_ema, grokfast_ma, stability_limit

from .tables import MISSING, steps, two_digits

RATE, DECAY, CAP = 0.03, 0.3, 4_000  # of all runs
Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


def limit(filter_name: str, window: float, lamb: float, decay: float = RATE * DECAY) -> float:
    """The stability limit of a filter and Adam's first moment, times the gain, which AdamW does not see.

    `decay` is the learning rate times the weight decay.
    """
    tx = grokfast_ma(int(window), lamb) if filter_name == "ma" else grokfast_ema(lamb=lamb)
    beta1 = PRESETS["adamw"].config.optimization.beta1
    bears = stability_limit(optax.chain(tx, ema(beta1)), 4_000, decay=decay)
    return float(bears * dc_gain(tx, 4_000))


def load(path: Path) -> Frame:
    """For each filter, window and λ the median of the steps to 95 %, failures, seeds and the limit."""
    runs = pd.read_csv(path)
    runs["filter"] = runs["preset"].str.removesuffix("+adamw")
    runs["steps_to_95"] = runs["steps_to_95"].fillna(math.inf)
    by = runs.groupby(["filter", "window_size", "lamb"], dropna=False)["steps_to_95"]
    cells = by.agg(steps="median", fail=lambda taken: int(np.isinf(taken).sum()), seeds="size").reset_index()
    keys = cells[["filter", "window_size", "lamb"]].itertuples(index=False)
    return cells.assign(limit=[limit(*key) for key in keys])


def title(filter_name: str, window: float) -> str:
    """What a filter is called."""
    return f"MA, w {window:g}" if filter_name == "ma" else "EMA"


def table(path: Path) -> str:
    """Steps, failures and the limit, a row for each λ and a column for each filter."""
    if not path.exists():
        return MISSING
    rows: dict[float, dict[str, str]] = {}
    for cell in load(path).sort_values(["filter", "window_size"], ascending=[False, True]).itertuples():
        taken = (
            "all fail" if cell.fail == cell.seeds else steps(cell.steps, CAP) + f", {cell.fail} fail" * bool(cell.fail)
        )
        row = rows.setdefault(cell.lamb, {"λ": f"{cell.lamb:g}"})
        row[title(cell.filter, cell.window_size)] = f"{taken} [{two_digits(cell.limit)}]"
    return markdown([rows[lamb] for lamb in sorted(rows)])


def picture(path: Path) -> Figure:
    """Steps over λ, a line for each filter; hollow where the limit is below that of the gradients themselves."""
    cells = load(path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    claim(figure, "A filter fails from about the λ that makes it unstable")
    axes = figure.add_subplot()
    handles = []
    for i, ((name, window), line) in enumerate(cells.groupby(["filter", "window_size"], dropna=False)):
        line = line.sort_values("lamb")
        # Side by side where they fail
        height = line["steps"].where(np.isfinite(line["steps"]), CAP * 1.1 ** (i + 1))
        colour = GREY if name == "ema" else f"C{i - 1}"
        axes.plot(line["lamb"], height, "-", color=colour, alpha=0.6)
        stable = line["limit"] >= 2
        axes.plot(line["lamb"][stable], height[stable], "o", color=colour)
        axes.plot(line["lamb"][~stable], height[~stable], "o", color=colour, markerfacecolor="white")
        handles.append(Line2D([], [], color=colour, marker="o", label=title(str(name), float(window))))
    handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label="unstable"))
    axes.axhline(CAP, color=GREY, linestyle=":")
    axes.set_yscale("log")
    axes.set_yticks([300, 1_000, 3_000, CAP * 1.3], ["300", "1,000", "3,000", "fails"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("λ", fontsize="large")
    axes.set_ylabel("steps to 95 %, median", fontsize="large")
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure
