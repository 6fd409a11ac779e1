"""How much faster do Adam's updates follow the slow part of the gradients with a Grokfast filter?

Adam divides by the root mean square of its input, so amplifying the whole gradient changes nothing. A filter amplifies
the slow part more than the rest, so Adam's updates follow it faster. `lr_multiplier` measures how much: the dc gain
times the root mean square of raw over filtered gradients, from Adam's second moments, the median over parameters and
evaluations.

The control is AdamW without a filter, at the learning rate times the multiplier and the weight decay over it.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.stats

from benchmarks import views
from benchmarks.methods import filter_name, grokfast, is_stable
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples import modular, parity
from examples.harness.engine import four_digits
from examples.harness.task import Data
from examples.harness.train import TrainState


def track_second_moment(b2: float) -> optax.GradientTransformation:
    """Leave gradients as they are, and keep the second moment that Adam would have of them, as `raw_nu`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return updates, {"raw_nu": jax.tree.map(lambda nu, g: b2 * nu + (1 - b2) * g**2, state["raw_nu"], updates)}

    return optax.GradientTransformation(lambda params: {"raw_nu": jax.tree.map(jnp.zeros_like, params)}, update)


def filtered_adamw(lr: float, weight_decay: float, lamb: float, window: int) -> optax.GradientTransformation:
    """AdamW for sparse parity with an MA of a window, or with the EMA if the window is 0."""
    return optax.chain(track_second_moment(0.999), grokfast(window, lamb), parity.adamw(lr, weight_decay))


def filtered_adamw_mod97(lr: float, weight_decay: float, lamb: float, window: int) -> optax.GradientTransformation:
    """AdamW for mod 97 with an MA of a window, or with the EMA if the window is 0."""
    return optax.chain(track_second_moment(0.98), grokfast(window, lamb), modular.adamw(lr, weight_decay))


def rms_ratio(task: Any, state: TrainState, data: Data) -> dict[str, jax.Array]:
    """Root mean square of raw over filtered gradients, the median over the parameters."""
    del task, data
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("raw_nu", "nu")]
    if moments[0] is None:
        return {}
    ratios = jax.tree.map(lambda raw, filtered: jnp.ravel(jnp.sqrt(raw / filtered)), *moments)
    return {"rms_ratio": jnp.nanmedian(jnp.concatenate(jax.tree.leaves(ratios)))}


on_parity = functools.partial(product, parity.Parity(), max_steps=4_000, group_size=16)
on_mod97 = functools.partial(product, modular.Modular(), max_steps=3_000)
SETTING = ["task", "lr", "weight_decay", "window", "lamb"]


def filtered_runs() -> list[Run]:
    """The runs with a filter."""
    grid = {"lr": 0.003, "weight_decay": [0.3, 1.0], "window": [0, 100, 50, 25], "lamb": [2.0, 3.0, 5.0, 8.0]}
    runs = on_parity(filtered_adamw, **grid, seed=range(16))
    for window, lamb in ((0, 2.0), (100, 5.0)):
        setting = {"lr": 0.001, "weight_decay": 1.0, "window": window, "lamb": lamb}
        runs += on_mod97(filtered_adamw_mod97, **setting, seed=range(8))
    return runs


def lr_multiplier(runs: Any) -> float:
    """How much faster updates follow the slow part with the filter of some runs, to three digits."""
    return float(f"{(1 + runs['lamb'].iloc[0]) * runs['rms_ratio'].median():.3g}")


def control(setting: Any, multiplier: float) -> list[Run]:
    """AdamW without a filter at the raised learning rate; learning rate times weight decay stays the same."""
    lr, decay = (float(f"{x:.4g}") for x in (multiplier * setting.lr, setting.weight_decay / multiplier))
    if setting.task == "Parity":
        return on_parity(parity.adamw, lr=lr, weight_decay=decay, seed=range(16))
    return on_mod97(modular.adamw, lr=lr, weight_decay=decay, seed=range(8))


def runs(results: Results) -> Iterator[Run]:
    """The runs with a filter, then each setting's control."""
    yield from filtered_runs()
    found: Any = results.of(filtered_runs())
    for _, of_setting in found.groupby(SETTING, sort=False):
        yield from control(of_setting.iloc[0], lr_multiplier(of_setting))


STUDY = Study("effective_lr", runs, measure=rms_ratio, reduce=lambda values: four_digits(np.nanmedian(values)))


def settings(frame: Frame) -> Any:
    """A row per setting that has its control: the multiplier, both sides' runs, and their comparison.

    A comparison counts as decided if it is significant at 5 % by Benjamini and Hochberg's adjustment over all settings.
    """
    rows = []
    for key, filtered in frame[frame["window"].notna()].groupby(SETTING, sort=False):
        row = dict(zip(SETTING, key, strict=True)) | {"filtered": filtered, "multiplier": lr_multiplier(filtered)}
        raised = control(filtered.iloc[0], row["multiplier"])[0]
        row["alone"] = views.runs_of(frame, raised.method, task=row["task"], **raised.hyperparams)
        if len(row["alone"]):
            row["stable"] = is_stable(row["window"], row["lamb"], row["lr"] * row["weight_decay"])
            rows.append(row | paired(filtered, row["alone"])._asdict())
    found = pd.DataFrame(rows)
    return found.assign(decided=scipy.stats.false_discovery_control(found["p"]) < 0.05)


@STUDY.table
def verdicts(frame: Frame) -> Rows:
    """Sparse parity: by weight decay and kind of filter, in how many settings which side needs fewer steps."""
    found = settings(frame[frame["task"] == "Parity"])
    unstable = {True: "unstable, MA with window 25 or 50", False: "unstable, EMA or MA with window 100"}
    kind = found["window"].isin([25, 50]).map(unstable).mask(found["stable"], "stable")
    for (decay, filters), cells in found.groupby(["weight_decay", kind], sort=False):
        fewer = cells["fewer"] > cells["more"]
        raised = dict.fromkeys(f"{x:.2g}" for x in (cells["multiplier"].min(), cells["multiplier"].max()))
        yield {
            "weight decay": f"{decay:g}",
            "filters": filters,
            "settings": len(cells),
            "updates follow faster by": " to ".join(raised),
            "filter needs fewer steps": (cells["decided"] & fewer).sum(),
            "raised learning rate needs fewer": (cells["decided"] & ~fewer).sum(),
        }


@STUDY.figure(
    "A stable filter needs more steps than a raised learning rate;\n"
    "an unstable short window needs fewer (weight decay 0.3)",
    width=7.6,
    height=6,
    columns=2,
    rows=2,
    sharex=True,
    sharey=True,
)
def figure(frame: Frame, panels: Any) -> None:
    """On sparse parity at one decay: steps over λ with each filter and of its control; hollow where it is unstable."""
    found = settings(frame[frame["task"] == "Parity"])
    for axes, (window, cells) in zip(panels.flat, found[found["weight_decay"] == 0.3].groupby("window"), strict=True):
        x, lines = np.arange(len(cells)), {}
        for side, colour, shift in (("alone", views.NO_FILTER, 0.07), ("filtered", views.FILTER, -0.07)):
            lines[side] = (x + shift, [runs["steps_to_95"] for runs in cells[side]], "o-", colour)
        views.step_lines(axes, lines, fails=5_000, ticks=(500, 1_000, 2_000))
        unstable = axes.lines[-1].get_xydata()[~cells["stable"]]
        axes.plot(*unstable.T, "o", color="white", markersize=4)
        axes.set_title(filter_name(window), fontsize="large", loc="left")
        axes.set_xticks(x, [f"{lamb:g}" for lamb in cells["lamb"]])
        views.label(axes, "λ" if axes in panels[1] else "", "steps to 95 %" if axes in panels[:, 0] else "")
    names = {
        "with the filter (hollow: unstable)": views.FILTER,
        "AdamW alone at the raised learning rate": views.NO_FILTER,
    }
    views.legend(panels[0, 0].figure, names, fontsize="large")
