"""Gradients as signals: what the filters let pass, and where the power of real gradients is.

`python -m benchmarks.study.spectra --seeds 0 1 2` records the gradients of a random part of the parameters while the
mod-97 model trains, and measures their power spectrum in windows of 500 steps: before the training examples are
memorised, and after. `python -m benchmarks.report` draws it, with the responses of the filters.
"""

import itertools
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.signal
import tqdm
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks import RESULTS, run_command
from examples.harness.config import Config
from examples.harness.optimizers import make_tx
from examples.harness.plots import COLOURS, claim
from examples.harness.tables import markdown, median_and_range
from examples.harness.train import program
from examples.modular import Modular
from grokfast_jax import ema, frequency_response, impulse_response, lfilter, moving_average

from .cells import BASE, append, as_cell, differences, read
from .methods import METHODS, Variant, check_flags, method_of
from .runs import stored, train

OUT = RESULTS / "spectra.jsonl"
WINDOW = 500  # steps
EDGE = 0.01  # cycles per step: the first zero of the mean of 100 gradients
ACCURACIES = {"training accuracy at the end (%)": "train", "validation accuracy at the end (%)": "val"}


def filters() -> dict[str, optax.GradientTransformation]:
    """Low-pass filters side by side; the Butterworth filter has the EMA's cutoff, where half of the power passes."""
    cutoff = np.arccos(1 - (1 - 0.98) ** 2 / (2 * 0.98)) / (2 * np.pi)
    butter = cast(tuple[np.ndarray, np.ndarray], scipy.signal.butter(2, 2 * cutoff))
    return {
        "EMA α 0.98": ema(0.98),
        "MA w 100": moving_average(100),
        "cascade of two EMAs α 0.98": optax.chain(ema(0.98), ema(0.98)),
        f"Butterworth, order 2, cutoff {cutoff:.4f}": lfilter(*butter),
    }


def responses_picture() -> Figure:
    """Impulse and frequency responses of the filters."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    claim(figure, "Both filters of the paper pass only what is slow")
    left, right = figure.subplots(1, 2)
    for (name, tx), colour in zip(filters().items(), COLOURS, strict=False):
        left.plot(impulse_response(tx, 250), label=name, color=colour, linewidth=2)
        f, response = frequency_response(tx, 4096, frequencies=np.geomspace(1e-4, 0.5, 2000))
        right.plot(f, np.abs(response), label=name, color=colour, linewidth=2)
    left.set(xlabel="steps after the gradient", ylabel="weight of the gradient")
    right.set(xlabel="cycles per step", ylabel="gain", xscale="log", yscale="log", ylim=(1e-4, 1.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def record(which: jax.Array, length: int) -> optax.GradientTransformation:
    """Pass gradients on, and keep those of some parameters, numbered through all arrays, of the last `length` steps.

    The state's `last` is (length, parameters), the newest last.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        return updates, {"last": jnp.concatenate([state["last"][1:], flat[which][None]])}

    return optax.GradientTransformation(lambda params: {"last": jnp.zeros((length, len(which)))}, update)


def spectrum(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of signals (steps, signals) at each frequency, of a sum of 1; their means are kept."""
    steps = len(gradients)
    hann = np.sin(np.pi * np.arange(steps) / steps)[:, None] ** 2
    power = np.mean(np.abs(np.fft.rfft(hann * gradients, axis=0)) ** 2, axis=1)
    return np.fft.rfftfreq(steps), power / power.sum()


def slow_share(f: np.ndarray, power: np.ndarray) -> float:
    """The share of the power below `EDGE`."""
    return float(power[f < EDGE].sum() / power.sum())


def successive_cosine(f: np.ndarray, power: np.ndarray) -> float:
    """The cosine of the angle between the gradients of successive steps, in the mean weighted by their squared norms.

    Σ P cos 2πf / Σ P over positive and negative frequencies (Wiener and Khinchin): 0 for white noise.
    """
    both = np.where((f == 0) | (f == 0.5), power, 2 * power)
    return float(both @ np.cos(2 * np.pi * f) / both.sum())


def sampling_noise(signals: int = 512) -> np.ndarray:
    """Gradients of a window that differ by nothing but which examples are in a batch: (steps, signals).

    Each example's gradient is the same throughout, and their mean is 0; the batches are drawn as in training.
    """
    task, rng = Modular(), np.random.default_rng(0)
    examples = rng.normal(size=(task.train_size, signals))
    examples -= examples.mean(axis=0)
    starts = range(0, task.train_size, task.batch_size)
    epochs = [rng.permutation(examples) for _ in range(WINDOW // task.steps)]
    return np.array([epoch[i : i + task.batch_size].mean(axis=0) for epoch in epochs for i in starts])


def measure(config: Config, parameters: int, bar: tqdm.tqdm) -> list[dict[str, Any]]:
    """The spectrum of the gradients of some parameters in each window of a run."""
    task, seed = config.task, config.run.seed
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))]
    which = jax.random.choice(jax.random.key(seed), sum(sizes), (min(parameters, sum(sizes)),), replace=False)
    compiled = program(task, lambda hyper: optax.chain(record(which, task.steps), make_tx(hyper)))
    windows, gradients, rows = [], [], []
    for evaluation in train(compiled, config, bar):
        rows += evaluation.rows
        gradients.append(np.array(optax.tree_utils.tree_get(evaluation.state.opt_state, "last")))
        if len(rows) == WINDOW // task.steps:
            signals = np.concatenate(gradients)
            f, power = spectrum(signals)
            window: dict[str, Any] = {"from_step": evaluation.step - len(signals)}
            window |= {k: [round(rows[i][k], 4) for i in (0, -1)] for k in ("train_accuracy", "val_accuracy")}
            window["rms"] = float(np.sqrt(np.mean(signals.astype(np.float64) ** 2)))
            window |= {"slow_share": round(slow_share(f, power), 5), "power": [float(f"{p:.3g}") for p in power]}
            windows.append(window)
            gradients, rows = [], []
    return windows


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[str, ...] = ("adam", "adam-0.005", "ema"),
    windows: int = 6,
    parameters: int = 4096,
    out: Path = OUT,
) -> None:
    """Measure the spectrum of gradients.

    Args:
      seeds: Seeds: start, split, batches, and which parameters are recorded.
      methods: Methods, as python -m benchmarks.study --help names them.
      windows: Windows of 500 steps to train.
      parameters: How many parameters are recorded.
      out: File for the results, a line a run; a run that is there is not made again.
    """
    check_flags(methods, windows=windows, parameters=parameters)
    run = {"budget": windows * WINDOW, "stop_at": None}
    configs = [METHODS[name].config.replace(seed=seed, **run) for seed, name in itertools.product(seeds, methods)]
    settings = {name: value for name, value in run.items() if value != BASE[name]}
    same = lambda cell: {name: value for name, value in cell.items() if name not in run} | settings
    expected = lambda result: {"cell": same(result["cell"]), "parameters": parameters}
    done = {as_cell(result["cell"]) for result in stored(out, "--windows or --parameters", expected)}
    todo = {cell: config for config in configs if (cell := as_cell(differences(config))) not in done}
    with tqdm.tqdm(total=len(todo) * run["budget"], unit="step") as bar:
        for config in todo.values():
            measured = measure(config, parameters, bar)
            append(out, {"cell": differences(config), "parameters": parameters, "windows": measured})


def load(path: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """The windows of all runs, by method."""
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in METHODS}
    for line in read(path):
        results[method_of(line.result["cell"])].append(line.result["windows"])
    return {name: runs for name, runs in results.items() if runs}


def table(path: Path) -> str:
    """The slow share of the power and the cosine of successive gradients, window by window, as Markdown."""
    rows, frequencies = [], np.fft.rfftfreq(WINDOW)
    for name, runs in load(path).items():
        for windows in zip(*runs, strict=True):
            first = windows[0]["from_step"]
            row = {"method": f"`{name}`", "seeds": str(len(runs)), "steps": f"{first:,} to {first + WINDOW - 1:,}"}
            power = np.array([100 * window["slow_share"] for window in windows])
            row["power below 0.01 (%)"] = median_and_range(power, ".2g")
            cosine = np.array([successive_cosine(frequencies, np.array(window["power"])) for window in windows])
            row["cosine of successive gradients"] = median_and_range(cosine, ".2f")
            for title, part in ACCURACIES.items():
                accuracy = np.array([100 * window[f"{part}_accuracy"][1] for window in windows])
                row[title] = median_and_range(accuracy, ".0f")
            rows.append(row)
    if not rows:
        return "Not measured yet.\n"
    noise = spectrum(sampling_noise())
    noise = (
        f"Sampling noise alone has {100 * slow_share(*noise):.2f} % of its power below {EDGE}, and a cosine of "
        f"{successive_cosine(*noise):.2f}.\n"
    )
    return f"{noise}\n{markdown(rows)}"


def picture(path: Path) -> Figure:
    """Power over frequency in each window, the mean of the seeds; a panel per method."""
    results = load(path)
    figure = Figure(figsize=(2.9 * len(results), 4), layout="constrained")
    claim(figure, "With weight decay little power is slow")
    panels = np.ravel(figure.subplots(1, len(results), sharey=True))
    for axes, (name, runs) in zip(panels, results.items(), strict=True):
        lines = []
        for i, windows in enumerate(zip(*runs, strict=True)):
            colour = colormaps["viridis"](0.9 * i / max(1, len(runs[0]) - 1))
            power = np.mean([window["power"] for window in windows], axis=0)
            lines.append((power, {"color": colour, "label": f"from step {windows[0]['from_step']:,}"}))
        noise = spectrum(sampling_noise())[1]
        for power, style in [*lines, (noise, {"color": "black", "linestyle": "--", "label": "sampling noise"})]:
            axes.plot(np.arange(1, len(power)) / WINDOW, power[1:] * len(power), linewidth=0.8, **style)
        axes.axvline(EDGE, color="grey", linestyle=":", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="cycles per step")
        axes.set_title(Variant(name, {}).in_words, fontsize="large")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("power (white noise: 1)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.spectra")
