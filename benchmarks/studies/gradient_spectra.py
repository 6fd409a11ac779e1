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

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, product
from examples import modular
from examples.harness import plots
from examples.harness.methods import Lamb, LearningRate, WeightDecay
from examples.harness.records import Row
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


def runs(_results: Results) -> Iterator[Run]:
    """Adam without and with weight decay, and the EMA."""
    for setting in ({"lamb": 0.0, "weight_decay": 0.0}, {"lamb": 0.0}, {}):
        yield from product(Modular(), recorded_ema, **setting, seed=range(3), max_steps=3_000, stop_at=None)


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, Any]:
    """The spectrum of the gradients of `PARAMETERS` random parameters in each window, and its slow share."""
    del data
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run.task.init, jax.random.key(0))))
    index = np.array(jax.random.choice(jax.random.key(run.seed), size, (PARAMETERS,), replace=False))
    chunks = []
    for _, state in history:
        leaves = jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "recorded"))
        chunks.append(np.concatenate([np.reshape(rows, (CHUNK, -1)) for rows in leaves], axis=1)[:, index])
    gradients = np.concatenate(chunks).astype(np.float64)
    windows = [spectrum(gradients[end - WINDOW : end]) for end in range(WINDOW, len(gradients) + 1, WINDOW)]
    power = [[float(f"{p:.3g}") for p in window] for window in windows]
    return {"power": power, "slow_share": [round(slow_share(window), 5) for window in windows]}


STUDY = Study("gradient_spectra", runs, observe=observe)


def spectrum(gradients: np.ndarray) -> np.ndarray:
    """The mean power of signals (steps, signals) at each frequency, of a sum of 1; their means are kept."""
    steps = len(gradients)
    hann = np.sin(np.pi * np.arange(steps) / steps)[:, None] ** 2
    power = np.mean(np.abs(np.fft.rfft(hann * gradients, axis=0)) ** 2, axis=1)
    return power / power.sum()


def slow_share(power: Any) -> float:
    """The share of the power below `EDGE`."""
    is_slow = np.fft.rfftfreq(2 * len(power) - 2) < EDGE
    return float(np.sum(power, where=is_slow) / np.sum(power))


def by_method(frame: Frame, column: str) -> dict[str, np.ndarray]:
    """A stored column with an entry per window, by method: the mean of the seeds."""
    names = {(0.0, 0.0): "Adam, no decay", (0.0, 0.005): "Adam", (2.0, 0.005): "EMA + Adam"}
    groups = dict(iter(frame.groupby(["lamb", "weight_decay"])[column]))
    return {name: np.mean(groups[key].to_list(), axis=0) for key, name in names.items()}


@STUDY.table
def table(frame: Frame) -> Rows:
    """The slow share of the power, window by window; the means of the seeds."""
    shares = by_method(frame, "slow_share")
    for i in range(len(frame["slow_share"].iloc[0])):
        row = {f"slow power (%): {name}": f"{100 * windows[i]:.2g}" for name, windows in shares.items()}
        yield {"steps": f"{i * WINDOW:,} to {(i + 1) * WINDOW - 1:,}"} | row


@STUDY.figure("With weight decay, the slow share of the power falls", width=9, height=3.8, columns=3, sharey=True)
def figure(frame: Frame, panels: Any) -> None:
    """Power over the period in the first and the last window, the mean of the seeds; a panel per method."""
    for axes, (name, windows) in zip(panels, by_method(frame, "power").items(), strict=True):
        colour = views.FILTER if "EMA" in name else views.NO_FILTER
        periods = WINDOW / np.arange(1, windows.shape[1])
        axes.plot(periods, windows[0, 1:] * windows.shape[1], color=colour, alpha=0.45)
        axes.plot(periods, windows[-1, 1:] * windows.shape[1], color=colour, linewidth=2)
        axes.set(xscale="log", yscale="log", xlim=(2, 500))
        axes.set_xticks([2, 10, 100, 500], ["2", "10", "100", "500"])
        axes.minorticks_off()
        axes.set_title(name, fontsize="large", color=colour)
        views.label(axes, "period (steps)", "power (white noise: 1)" if axes is panels[0] else "")
    panels[0].annotate("last 500 steps", (33, 3), color=views.NO_FILTER)
    panels[0].annotate("first 500 steps", (2.5, 0.13), color=views.NO_FILTER, alpha=0.6)


@STUDY.figure("Both filters of the paper pass slow gradients\nand block fast ones", width=8, height=4, columns=2)
def responses(frame: Frame, panels: Any) -> None:
    """Impulse and frequency responses of the filters."""
    del frame
    for name, tx, colour, places in (
        ("EMA, α 0.98", ema(0.98), plots.ORANGE, ((12, 0.017), (6, 0.25))),
        ("MA, window 100", moving_average(100), plots.PURPLE, ((103, 0.0096), (9, 0.8))),
    ):
        panels[0].plot(impulse_response(tx, 250), color=colour, linewidth=2)
        f, response = frequency_response(tx, 4096, frequencies=np.geomspace(5e-4, 0.5, 2000))
        panels[1].plot(1 / f, np.abs(response), color=colour, linewidth=2)
        for axes, place in zip(panels, places, strict=True):
            axes.annotate(name, place, color=colour, fontsize="large")
    panels[1].set_xscale("log")
    panels[1].set_xticks([2, 10, 100, 1000], ["2", "10", "100", "1,000"])
    views.label(panels[0], "age of the gradient (steps)", "weight")
    views.label(panels[1], "period (steps)", "gain")
