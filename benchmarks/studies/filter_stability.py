"""From which λ on is a Grokfast filter before AdamW unstable, and does training then fail?

The MA with four windows and the EMA, over λ, before AdamW on sparse parity, at a low and at a high learning rate. The
stability limit follows from the filter, Adam's first moment and the weight decay alone; nothing is fitted.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import views
from benchmarks.methods import filter_name, is_stable
from benchmarks.study import Frame, Results, Run, Study, product
from examples import parity

SETTINGS = ((0.003, 0.3), (0.003, 1.0), (0.03, 0.3))  # learning rates and weight decays


def runs(_results: Results) -> Iterator[Run]:
    """Every filter and λ at every setting, with sixteen seeds."""
    for lr, weight_decay in SETTINGS:
        settings = {"lr": lr, "weight_decay": weight_decay, "lamb": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}
        settings |= {"seed": range(16), "max_steps": 4_000, "group_size": 16}
        yield from product(parity.Parity(), parity.ma, window_size=[25, 50, 100, 200], **settings)
        yield from product(parity.Parity(), parity.ema, **settings)


STUDY = Study("filter_stability", runs)


@STUDY.figure(
    "Training changes near the λ where a window becomes unstable",
    width=7.6,
    height=7.4,
    rows=3,
    sharex=True,
)
def figure(frame: Frame, panels: Any) -> None:
    """The share of the seeds that reach 95 % by filter and λ, with a line around the unstable filters."""
    cells = frame.assign(window=frame["window_size"].fillna(0), reaches=np.isfinite(frame["steps_to_95"]))
    for axes, (lr, decay) in zip(panels, SETTINGS, strict=True):
        chosen = cells[(cells["lr"] == lr) & (cells["weight_decay"] == decay)]
        shares = chosen.pivot_table("reaches", "window", "lamb").reindex([25, 50, 100, 200, 0])
        unstable = np.array([[not is_stable(window, lamb, lr * decay) for lamb in shares] for window in shares.index])
        views.share_map(axes, shares.rename(filter_name), unstable, "Oranges")
        axes.set_title(f"learning rate {lr:g}, weight decay {decay:g}", fontsize="large", loc="left")
    key = "λ\nNumbers: % of 16 seeds that reach 95 % in 4,000 steps. Inside the line: unstable."
    panels[-1].figure.supxlabel(key, fontsize="large")
