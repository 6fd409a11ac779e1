"""At which frequencies is the power of gradients, and what of it do the filters let pass?

The gradients of 4,096 random parameters are recorded while mod 97 is trained. Their power spectrum is measured in
windows of 500 steps, before the training pairs are memorised and after.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from benchmarks import views
from benchmarks.study import Study
from examples import modular
from examples.harness import plots
from examples.harness.engine import Results, four_digits, product
from examples.harness.experiment import Run
from examples.harness.methods import Lamb, LearningRate, WeightDecay
from examples.harness.records import Row
from examples.harness.tables import markdown
from examples.harness.task import Data
from examples.harness.train import TrainState
from examples.modular import Modular
from grokfast_jax import ema, frequency_response, impulse_response, moving_average

CHUNK = Modular().steps  # steps between two evaluations
WINDOW = 500  # steps
PARAMETERS = 4_096
EDGE = 0.01  # cycles per step: the first zero of the mean of 100 gradients


def record_gradients(length: int) -> optax.GradientTransformation:
    """Leave gradients as they are, and keep those of the last `length` steps, the step n in row n mod length."""

    def init(params: Any) -> dict[str, Any]:
        return {
            "row": jnp.zeros((), jnp.int32),
            "recorded": jax.tree.map(lambda p: jnp.zeros((length, *p.shape)), params),
        }

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        recorded = jax.tree.map(lambda rows, g: rows.at[state["row"]].set(g), state["recorded"], updates)
        return updates, {"row": (state["row"] + 1) % length, "recorded": recorded}

    return optax.GradientTransformation(init, update)


def recorded_ema(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.005, lamb: Lamb = 2.0
) -> optax.GradientTransformation:
    """Grokfast-EMA before Adam, which with λ 0 is Adam alone; records the gradients between two evaluations."""
    return optax.chain(record_gradients(CHUNK), modular.ema(lr, weight_decay, lamb=lamb))


def runs(results: Results) -> Iterator[Run]:
    """Adam without and with weight decay, and the EMA."""
    del results
    for setting in ({"lamb": 0.0, "weight_decay": 0.0}, {"lamb": 0.0}, {}):
        yield from product(Modular(), recorded_ema, **setting, seed=range(3), max_steps=3_000, stop_at=None)


@jax.jit
def chosen(recorded: Any, index: jax.Array) -> jax.Array:
    """The recorded gradients of some parameters, numbered through all arrays: (steps, parameters)."""
    return jnp.concatenate([rows.reshape(len(rows), -1) for rows in jax.tree.leaves(recorded)], axis=1)[:, index]


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, Any]:
    """The spectrum of the gradients in each window, their root mean square, and the accuracies at its end."""
    del data
    total = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run.task.init, jax.random.key(0))))
    index = jax.random.choice(jax.random.key(run.seed), total, (min(PARAMETERS, total),), replace=False)
    windows, gradients = [], []
    for row, state in history:
        gradients.append(np.array(chosen(optax.tree_utils.tree_get(state.opt_state, "recorded"), index)))
        if len(gradients) == WINDOW // CHUNK:
            signals, gradients = np.concatenate(gradients).astype(np.float64), []
            f, power = spectrum(signals)
            windows.append(
                {
                    "rms": four_digits(np.sqrt(np.mean(signals**2))),
                    "slow_share": round(slow_share(f, power), 5),
                    **{f"window_{part}_accuracy": round(row[f"{part}_accuracy"], 4) for part in ("train", "val")},
                    "power": [float(f"{p:.3g}") for p in power],
                }
            )
    return {name: [window[name] for window in windows] for name in windows[0]} if windows else {}


STUDY = Study("gradient_spectra", runs, observe=observe)


def spectrum(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, and the mean power of signals (steps, signals) at each, of a sum of 1; their means are kept."""
    steps = len(gradients)
    hann = np.sin(np.pi * np.arange(steps) / steps)[:, None] ** 2
    power = np.mean(np.abs(np.fft.rfft(hann * gradients, axis=0)) ** 2, axis=1)
    return np.fft.rfftfreq(steps), power / power.sum()


def slow_share(f: np.ndarray, power: np.ndarray) -> float:
    """The share of the power below `EDGE`."""
    return float(power[f < EDGE].sum() / power.sum())


def successive_cosine(f: np.ndarray, power: np.ndarray) -> float:
    """The cosine of the angle between the gradients of successive steps, the mean weighted by their squared norms.

    Σ P cos 2πf / Σ P over positive and negative frequencies (Wiener and Khinchin): 0 for white noise.
    """
    both = np.where((f == 0) | (f == 0.5), power, 2 * power)
    return float(both @ np.cos(2 * np.pi * f) / both.sum())


def sampling_noise(signals: int = 512) -> np.ndarray:
    """Gradients of a window that differ only by which examples are in a batch: (steps, signals).

    Each example's gradient is constant, and their mean is 0; the batches are drawn as in training.
    """
    task, rng = Modular(), np.random.default_rng(0)
    examples = rng.normal(size=(task.train_size, signals))
    examples -= examples.mean(axis=0)
    starts = range(0, task.train_size, task.batch_size)
    epochs = [rng.permutation(examples) for _ in range(WINDOW // task.steps)]
    return np.array([epoch[i : i + task.batch_size].mean(axis=0) for epoch in epochs for i in starts])


def by_method(frame: Any) -> dict[str, Any]:
    """The runs of each method that did not diverge, by its name in words; the EMA has Adam's weight decay."""
    parts = {}
    for (lamb, decay), part in frame[frame["finite"].astype(bool)].groupby(["lamb", "weight_decay"]):
        parts["EMA + Adam" if lamb else "Adam" if decay else "Adam, no decay"] = part
    return parts


@STUDY.table
def table(frame: pd.DataFrame) -> str:
    """The slow share of the power and the cosine of successive gradients, window by window; the means of the seeds."""
    groups, f, rows = by_method(frame), np.fft.rfftfreq(WINDOW), []
    for i in range(len(frame["power"].iloc[0])):
        shares = {name: 100 * np.mean([run[i] for run in part["slow_share"]]) for name, part in groups.items()}
        cosine = lambda part, i=i: np.mean([successive_cosine(f, np.array(run[i])) for run in part["power"]])
        row = {"steps": f"{i * WINDOW:,} to {(i + 1) * WINDOW - 1:,}"}
        row |= {f"slow power (%): {name}": f"{share:.2g}" for name, share in shares.items()}
        rows.append(row | {f"cosine: {name}": f"{cosine(part):.2f}" for name, part in groups.items()})
    return markdown(rows)


@STUDY.figure("With weight decay, slow power fades during training", width=9, height=3.8, columns=3, sharey=True)
def figure(frame: pd.DataFrame, panels: Any) -> None:
    """Power over frequency in the first and the last window, the mean of the seeds; a panel per method."""
    noise = spectrum(sampling_noise())[1]
    for axes, (name, part) in zip(panels, by_method(frame).items(), strict=True):
        colour, windows = views.FILTER if "EMA" in name else views.NO_FILTER, np.mean(part["power"].tolist(), axis=0)
        styles = {"first": {"alpha": 0.45}, "last": {"linewidth": 2}, "noise": {"linestyle": "--"}}
        drawn = ((windows[0], colour, "first"), (windows[-1], colour, "last"), (noise, views.GREY, "noise"))
        for power, of_line, kind in drawn:
            axes.plot(np.arange(1, len(power)) / WINDOW, power[1:] * len(power), color=of_line, **styles[kind])
        ticks = [0.002, EDGE, 0.1, 0.5]
        axes.set(xscale="log", yscale="log", xlim=(0.5, 0.002))
        axes.set_xticks(ticks, [f"{1 / tick:.0f}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_title(name, fontsize="large", color=colour)
        views.label(axes, "period (steps)")
    views.label(panels[0], "period (steps)", "power (white noise: 1)")
    panels[0].annotate("last 500 steps", (0.03, 3), color=views.NO_FILTER)
    panels[0].annotate("first 500 steps", (0.4, 0.13), color=views.NO_FILTER, alpha=0.6)
    panels[1].annotate("sampling noise", (0.03, 0.75), color=views.GREY)


@STUDY.figure("Both filters of the paper pass slow gradients\nand block fast ones", width=8, height=4, columns=2)
def responses(frame: pd.DataFrame, panels: Any) -> None:
    """Impulse and frequency responses of the filters."""
    del frame
    filters = {"EMA, α 0.98": (ema(0.98), plots.ORANGE), "MA, window 100": (moving_average(100), plots.PURPLE)}
    places = {"EMA, α 0.98": ((12, 0.017), (6, 0.25)), "MA, window 100": ((103, 0.0096), (9, 0.8))}
    for name, (tx, colour) in filters.items():
        panels[0].plot(impulse_response(tx, 250), color=colour, linewidth=2)
        f, response = frequency_response(tx, 4096, frequencies=np.geomspace(5e-4, 0.5, 2000))
        panels[1].plot(1 / f, np.abs(response), color=colour, linewidth=2)
        for axes, place in zip(panels, places[name], strict=True):
            axes.annotate(name, place, color=colour, fontsize="large")
    panels[1].set_xscale("log")
    panels[1].set_xticks([2, 10, 100, 1000], ["2", "10", "100", "1,000"])
    views.label(panels[0], "age of the gradient (steps)", "weight")
    views.label(panels[1], "period (steps)", "gain")
