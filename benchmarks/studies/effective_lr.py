"""By how much does a Grokfast filter before Adam raise the learning rate?

Adam divides by the root mean square of its input, so amplifying the whole gradient changes nothing. A filter amplifies
the slow part of the gradients by its dc gain, and white noise by the root of the sum of its squared impulse response.
Where gradients are mostly noise, Adam's updates therefore follow the slow part up to the quotient of the two times as
fast. `lr_multiplier` measures it: the dc gain times the root of Adam's second moment of the raw gradients over that of
the filtered ones, the median over parameters and evaluations.

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

from benchmarks import views
from benchmarks.filters import filter_name, grokfast, is_stable
from benchmarks.study import Study
from examples import modular, parity
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.plots import BLUE, GREEN, GREY, ORANGE
from examples.harness.tables import markdown
from examples.harness.task import Data
from examples.harness.train import TrainState
from grokfast_jax import dc_gain, impulse_response

LENGTH = 4_000  # of a filter's response


def track_second_moment(b2: float) -> optax.GradientTransformation:
    """Leave gradients as they are, and keep the second moment that Adam would have of them, as `raw_nu`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return updates, {"raw_nu": jax.tree.map(lambda nu, g: b2 * nu + (1 - b2) * g**2, state["raw_nu"], updates)}

    return optax.GradientTransformation(lambda params: {"raw_nu": jax.tree.map(jnp.zeros_like, params)}, update)


def filtered_adamw(lr: float, weight_decay: float, lamb: float, window: int) -> optax.GradientTransformation:
    """AdamW for sparse parity behind an MA of a window, or behind the EMA if the window is 0."""
    return optax.chain(track_second_moment(0.999), grokfast(window, lamb), parity.adamw(lr, weight_decay))


def filtered_adamw_mod97(lr: float, weight_decay: float, lamb: float, window: int) -> optax.GradientTransformation:
    """AdamW for mod 97 behind an MA of a window, or behind the EMA if the window is 0."""
    return optax.chain(track_second_moment(0.98), grokfast(window, lamb), modular.adamw(lr, weight_decay))


def rms_ratio(task: Any, state: TrainState, data: Data) -> dict[str, jax.Array]:
    """Root mean square of the raw gradients over that of the filtered ones, the median over the parameters."""
    del task, data
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("raw_nu", "nu")]
    if moments[0] is None:
        return {}
    ratios = jax.tree.map(lambda raw, filtered: jnp.ravel(jnp.sqrt(raw / filtered)), *moments)
    return {"rms_ratio": jnp.nanmedian(jnp.concatenate(jax.tree.leaves(ratios)))}


def median(values: list[float]) -> float:
    """The median over the evaluations, with four digits."""
    return float(f"{np.nanmedian(values):.4g}")


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
    """By how much the filter of some runs raises the learning rate, to three digits."""
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


STUDY = Study("effective_lr", runs, measure=rms_ratio, reduce=median)


@functools.cache
def white_noise_bound(window: int, lamb: float) -> float:
    """By what a filter raises the learning rate where the gradients are white noise, which is the most."""
    tx = grokfast(window, lamb)
    return float(dc_gain(tx, LENGTH) / jnp.linalg.norm(impulse_response(tx, LENGTH)))


def settings(frame: Any) -> Any:
    """One row per setting: its multiplier, and the steps with the filter and of its control."""
    rows = []
    for key, filtered in frame[frame["window"].notna()].groupby(SETTING, sort=False):
        multiplier = lr_multiplier(filtered)
        keys = {
            k: run.key[k] for run in control(filtered.iloc[0], multiplier)[:1] for k in ("task", "lr", "weight_decay")
        }
        alone = frame[frame["window"].isna() & (frame[list(keys)] == pd.Series(keys)).all(axis=1)]
        row = dict(zip(SETTING, key, strict=True)) | {"multiplier": multiplier, "cap": filtered["max_steps"].iloc[0]}
        if len(alone):
            rows.append(
                row | {"filtered": filtered["steps_to_95"].to_numpy(), "alone": alone["steps_to_95"].to_numpy()}
            )
    return pd.DataFrame(rows)


def table_of(found: Any) -> str:
    """A row per filter and λ; per learning rate and decay its multiplier, its steps and, in brackets, its control's."""
    rows = []
    for (window, lamb), cells in found.groupby(["window", "lamb"], sort=False):
        row = {
            "filter": f"{filter_name(window)}, λ {lamb:g}",
            "at most": views.two_digits(white_noise_bound(window, lamb)),
        }
        for cell in cells.itertuples():
            title = f"rate {cell.lr:g}, decay {cell.weight_decay:g}"
            row[f"{title}: raised by"] = views.two_digits(cell.multiplier)
            filtered, alone = (views.steps_and_failures(steps, cell.cap) for steps in (cell.filtered, cell.alone))
            row[f"{title}: steps (at the raised rate)"] = f"{filtered} ({alone})"
        rows.append(row)
    return markdown(rows)


@STUDY.table
def table(frame: pd.DataFrame) -> str:
    """Sparse parity, then mod 97."""
    found = settings(frame)
    return views.joined(*(table_of(found[found["task"] == task]) for task in ("Parity", "Modular")))


@STUDY.figure(
    "A stable filter before AdamW is slower than the higher rate that it amounts to",
    width=11,
    height=4.8,
    columns=2,
    sharex=True,
    sharey=True,
)
def figure(frame: pd.DataFrame, panels: Any) -> None:
    """Steps with the filter over those of the control; hollow where the filter is unstable."""
    found = settings(frame[frame["task"] == "Parity"])
    failed = 5_000  # where what most seeds do not reach is drawn
    middle = lambda steps: min(float(np.median(steps)), failed)
    found = found.assign(x=found["alone"].map(middle), y=found["filtered"].map(middle))
    colours = {0: GREY, 100: GREEN, 50: ORANGE, 25: BLUE}
    ticks = {500: "500", 1_000: "1,000", 2_000: "2,000", failed: "most fail"}
    for axes, (title, cells) in zip(panels, found.groupby(["lr", "weight_decay"]), strict=True):
        axes.plot([500, failed], [500, failed], ":", color="black", linewidth=1)
        axes.annotate("as long", (560, 560), rotation=38, xytext=(2, 6), textcoords="offset points")
        for window, line in cells.groupby("window"):
            axes.plot(line["x"], line["y"], "-", color=colours[window], alpha=0.4)
            for cell in line.itertuples():
                stable = is_stable(cell.window, cell.lamb, cell.lr * cell.weight_decay)
                inside = {} if stable else {"markerfacecolor": "white"}
                axes.plot(cell.x, cell.y, "o", color=colours[window], markersize=8, **inside)
                axes.annotate(f"{cell.lamb:g}", (cell.x, cell.y), xytext=(6, -11), textcoords="offset points")
        axes.set_title("rate {:g}, decay {:g}".format(*title), fontsize="large", loc="left")
        axes.set(xscale="log", yscale="log")
        views.label(axes, "steps of AdamW alone at the raised rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(list(ticks), list(ticks.values()))
            axis.minorticks_off()
    views.label(panels[0], panels[0].get_xlabel(), "steps with the filter")
    names = {filter_name(window): colour for window, colour in colours.items()}
    views.legend(panels[0].figure, names, title="filter; numbers: λ; hollow: unstable")
