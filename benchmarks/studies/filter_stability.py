"""From which λ on is a Grokfast filter before AdamW unstable, and does training then fail?

The MA with four windows and the EMA, over λ, before AdamW on sparse parity, at a low and at a high learning rate. The
stability limit follows from the filter, Adam's first moment and the weight decay alone; nothing is fitted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import views
from benchmarks.filters import adamw_stability_limit, filter_name
from benchmarks.study import Study
from examples import parity
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.plots import BLUE, GREEN, GREY, ORANGE, PURPLE
from examples.harness.tables import markdown

SETTINGS = ((0.003, 0.3), (0.003, 1.0), (0.03, 0.3))  # learning rates and weight decays
COLOURS = {25: BLUE, 50: ORANGE, 100: GREEN, 200: PURPLE, 0: GREY}  # by window; the EMA's is 0
CAP = 4_000  # steps


def runs(results: Results) -> Iterator[Run]:
    """Every filter and λ at every setting, with sixteen seeds."""
    del results
    for lr, weight_decay in SETTINGS:
        settings = {"lr": lr, "weight_decay": weight_decay, "lamb": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}
        settings |= {"seed": range(16), "max_steps": CAP, "group_size": 16}
        yield from product(parity.Parity(), parity.ma, window_size=[25, 50, 100, 200], **settings)
        yield from product(parity.Parity(), parity.ema, **settings)


STUDY = Study("filter_stability", runs)


def cells(frame: pd.DataFrame, lr: float, weight_decay: float) -> Any:
    """At one setting, per filter and λ: the steps of all seeds, and the stability limit."""
    chosen: Any = frame[(frame["lr"] == lr) & (frame["weight_decay"] == weight_decay)].fillna({"window_size": 0})
    rows = [
        {"window": window, "lamb": lamb, "steps": runs["steps_to_95"].to_numpy(float)}
        | {"limit": adamw_stability_limit(window, lamb, lr * weight_decay)}
        for (window, lamb), runs in chosen.groupby(["window_size", "lamb"])
    ]
    return pd.DataFrame(rows, columns=["window", "lamb", "steps", "limit"])


def table_of(frame: pd.DataFrame, lr: float, weight_decay: float) -> str:
    """Median steps, failures and, in brackets, the limit: a row for each λ and a column for each filter."""
    rows: dict[float, dict[str, str]] = {}
    found = cells(frame, lr, weight_decay)
    for window in COLOURS:
        for cell in found[found["window"] == window].itertuples():
            text = f"{views.steps_and_failures(cell.steps, CAP)} [{views.two_digits(cell.limit)}]"
            rows.setdefault(cell.lamb, {"λ": f"{cell.lamb:g}"})[filter_name(window)] = text
    return markdown([rows[lamb] for lamb in sorted(rows)])


@STUDY.table
def low_lr(frame: pd.DataFrame) -> str:
    """At a learning rate at which AdamW alone fails."""
    return table_of(frame, 0.003, 0.3)


@STUDY.table
def strong_decay(frame: pd.DataFrame) -> str:
    """At that learning rate with a stronger weight decay."""
    return table_of(frame, 0.003, 1.0)


@STUDY.table
def high_lr(frame: pd.DataFrame) -> str:
    """At a learning rate near the best one of AdamW alone."""
    return table_of(frame, 0.03, 0.3)


@STUDY.figure(
    "An unstable window works at a low learning rate and fails at a high one",
    width=10,
    height=4.4,
    columns=3,
    sharey=True,
)
def figure(frame: pd.DataFrame, panels: Any) -> None:
    """Seeds that reach 95 % over λ, a line for each filter; hollow where the filter is unstable."""
    for axes, setting in zip(panels, SETTINGS, strict=True):
        axes.set_title("learning rate {:g}, decay {:g}".format(*setting), fontsize="large", loc="left")
        for i, (window, line) in enumerate(cells(frame, *setting).groupby("window")):
            reached = line["steps"].map(lambda steps: 100 * np.isfinite(steps).mean())
            reached += 1.2 * (2 - i)  # side by side where they are equal
            axes.plot(line["lamb"], reached, "-", color=COLOURS[window], alpha=0.6)
            for is_stable, points in line.groupby(line["limit"] >= 2):
                inside = {} if is_stable else {"markerfacecolor": "white"}
                axes.plot(points["lamb"], reached[points.index], "o", color=COLOURS[window], **inside)
        views.label(axes, "λ", "% of seeds that reach 95 %" if axes is panels[0] else "")
    views.legend(panels[0].figure, {filter_name(w): colour for w, colour in COLOURS.items()}, title="hollow: unstable")
