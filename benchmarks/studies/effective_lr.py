"""By how much does a Grokfast filter before Adam raise the learning rate?

Adam divides by the root mean square of its input, so amplifying the whole gradient changes nothing. A filter amplifies
the slow part of the gradients by its dc gain, and white noise by the root of the sum of its squared impulse response.
Where gradients are mostly noise, Adam's updates therefore follow the slow part up to the quotient of the two times as
fast. `lr_multiplier` measures it: the dc gain times the root mean square of raw over filtered gradients, from Adam's
second moments, the median over parameters and evaluations.

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
from benchmarks.filters import filter_name, grokfast, is_stable
from benchmarks.statistics import Frame, paired
from benchmarks.study import Study
from examples import modular, parity
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
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


def settings(frame: Frame) -> Any:
    """A row per setting that has its control: the multiplier, both sides' runs, and their comparison.

    A comparison counts as decided if it is significant at 5 % by Benjamini and Hochberg's adjustment over all settings.
    """
    rows = []
    for key, filtered in frame[frame["window"].notna()].groupby(SETTING, sort=False):
        row = dict(zip(SETTING, key, strict=True)) | {"filtered": filtered, "multiplier": lr_multiplier(filtered)}
        raised = control(filtered.iloc[0], row["multiplier"])[0].key
        is_alone = (frame[SETTING[:3]] == [raised[name] for name in SETTING[:3]]).all(axis=1)
        row["alone"] = frame[is_alone & frame["window"].isna()]
        if len(row["alone"]):
            row["stable"] = is_stable(row["window"], row["lamb"], row["lr"] * row["weight_decay"])
            rows.append(row | {"compared": paired(filtered, row["alone"])})
    adjusted = scipy.stats.false_discovery_control([row["compared"].p for row in rows])
    return pd.DataFrame(rows).assign(decided=adjusted < 0.05)


@STUDY.table
def table(frame: Frame) -> str:
    """Every setting on sparse parity, then on mod 97."""
    tables: dict[str, list[dict[str, str]]] = {"Parity": [], "Modular": []}
    for cell in settings(frame).itertuples():
        row = {"learning rate, weight decay": f"{cell.lr:g}, {cell.weight_decay:g}"}
        row["filter"] = f"{filter_name(cell.window)}, λ {cell.lamb:g}" + ", unstable" * (not cell.stable)
        row["raised by"] = views.two_digits(cell.multiplier)
        row["for white noise"] = views.two_digits(white_noise_bound(cell.window, cell.lamb))
        for side, runs in (("steps with the filter", cell.filtered), ("at the raised rate", cell.alone)):
            row[side] = views.steps_and_failures(runs["steps_to_95"].to_numpy(), runs["max_steps"].iloc[0])
        tables[cell.task].append(row | {"seeds with fewer : more steps": views.seed_counts(cell.compared)})
    return views.joined(*(markdown(rows) for rows in tables.values() if rows))


@STUDY.table
def verdicts(frame: Frame) -> str:
    """Sparse parity: by weight decay and kind of filter, in how many settings which side needs fewer steps."""
    found = settings(frame[frame["task"] == "Parity"])
    unstable = {True: "unstable, MA with window 25 or 50", False: "unstable, EMA or MA with window 100"}
    kind = found["window"].isin([25, 50]).map(unstable).mask(found["stable"], "stable").rename("filters")
    rows = []
    for (decay, filters), cells in found.groupby(["weight_decay", kind], sort=False):
        fewer = cells["compared"].map(lambda one: one.fewer > one.more)
        raised = dict.fromkeys(map(views.two_digits, cells["multiplier"].agg(["min", "max"])))
        row = {"weight decay": f"{decay:g}", "filters": filters, "settings": len(cells)}
        row |= {
            "raise the learning rate by": " to ".join(raised),
            "filter needs fewer steps": (fewer & cells["decided"]).sum(),
        }
        rows.append(row | {"raised learning rate needs fewer": (~fewer & cells["decided"]).sum()})
    return markdown(rows)


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
    found, fails = found[found["weight_decay"] == 0.3], 5_000
    for axes, (window, cells) in zip(panels.flat, found.groupby("window"), strict=True):
        axes.set_title(filter_name(window), fontsize="large", loc="left")
        for side, colour, shift in (("alone", views.NO_FILTER, 0.07), ("filtered", views.FILTER, -0.07)):
            steps = np.minimum([runs["steps_to_95"] for runs in cells[side]], fails)
            x, medians = np.arange(len(steps)) + shift, np.median(steps, axis=1)
            axes.plot(x, steps, "_", color=colour, alpha=0.4)
            axes.plot(x, medians, "o-", color=colour, linewidth=2, markersize=8)
            if side == "filtered":
                axes.plot(x[~cells["stable"]], medians[~cells["stable"]], "o", color="white", markersize=5)
        axes.set_xticks(range(len(cells)), [f"{lamb:g}" for lamb in cells["lamb"]])
        axes.set_yscale("log")
        axes.set_yticks([500, 1_000, 2_000, fails], ["500", "1,000", "2,000", "fails"])
        axes.minorticks_off()
    views.label(panels[1, 0], "λ", "steps to 95 %")
    views.label(panels[0, 0], "", "steps to 95 %")
    views.label(panels[1, 1], "λ")
    names = {
        "with the filter (hollow: unstable)": views.FILTER,
        "AdamW alone at the raised learning rate": views.NO_FILTER,
    }
    views.legend(panels[0, 0].figure, names, fontsize="large")
