"""Gradients as signals: what the filters let pass, and where the power of real gradients is.

`python -m benchmarks.frequency --seeds 0 1 2` records the gradients of a random part of the parameters while the mod-97
model trains, and measures their power spectrum in windows of 500 steps: before the training examples are memorised, and
after. `python -m benchmarks.report` draws it, with the responses of the filters.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.signal
import tqdm
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure

from examples.harness.errors import UserError, plain_errors
from examples.harness.optimizers import make_tx
from examples.harness.run_folder import provenance, write_whole
from examples.harness.train import Hyper, program
from examples.modular import Config
from examples.sweep import spread
from grokfast_jax import ema, frequency_response, impulse_response, lfilter, moving_average

from .study import METHODS, check_methods, check_positive, made_before

OUT = Path(__file__).parent / "results" / "spectra"
WINDOW = 500  # steps
EDGE = 0.01  # cycles a step: the first zero of the mean of 100 gradients


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
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, tx in filters().items():
        left.plot(impulse_response(tx, 250), label=name)
        f, response = frequency_response(tx, 4096, frequencies=np.geomspace(1e-4, 0.5, 2000))
        right.plot(f, np.abs(response), label=name)
    left.set(xlabel="steps after the gradient", ylabel="weight of the gradient")
    right.set(xlabel="cycles a step", ylabel="gain", xscale="log", yscale="log", ylim=(1e-4, 1.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    return figure


class Recorded(NamedTuple):
    """Gradients as they came in."""

    last: jax.Array  # (length, parameters), the newest last


def record(which: jax.Array, length: int) -> optax.GradientTransformation:
    """Pass gradients on, and keep those of some parameters, numbered through all arrays, of the last `length` steps."""

    def init(params: Any) -> Recorded:
        del params
        return Recorded(jnp.zeros((length, len(which))))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Recorded]:
        del params
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)])
        return updates, Recorded(jnp.concatenate([state.last[1:], flat[which][None]]))

    return optax.GradientTransformation(init, update)


def spectrum(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of signals (steps, signals) at each frequency, of a sum of 1; their means are kept."""
    steps = len(gradients)
    hann = np.sin(np.pi * np.arange(steps) / steps)[:, None] ** 2
    power = np.mean(np.abs(np.fft.rfft(hann * gradients, axis=0)) ** 2, axis=1)
    return np.fft.rfftfreq(steps), power / power.sum()


def slow_share(f: np.ndarray, power: np.ndarray) -> float:
    """The share of the power below `EDGE`."""
    return float(power[f < EDGE].sum() / power.sum())


def sampling_noise(signals: int = 512) -> np.ndarray:
    """Gradients of a window that differ by nothing but which examples are in a batch: (steps, signals).

    Each example's gradient is the same throughout, and their mean is 0; the batches are drawn as in training.
    """
    task, rng = Config().task(), np.random.default_rng(0)
    examples = rng.normal(size=(task.train_pairs, signals))
    examples -= examples.mean(axis=0)
    starts = range(0, task.train_pairs, task.batch_size)
    epochs = [rng.permutation(examples) for _ in range(WINDOW // task.steps)]
    return np.array([epoch[i : i + task.batch_size].mean(axis=0) for epoch in epochs for i in starts])


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the spectrum of gradients."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds: start, split, batches, and which parameters are recorded."""
    methods: tuple[str, ...] = ("adam", "adam-0.005", "ema")
    """Methods, as python -m benchmarks.study --help names them."""
    windows: int = 6
    """Windows of 500 steps to train."""
    parameters: int = 4096
    """How many parameters are recorded."""
    out: Path = OUT
    """Folder for the results, a file a run; a run whose file is there is not made again."""

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        check_methods(self.methods)
        check_positive(windows=self.windows, parameters=self.parameters)


def measure(name: str, seed: int, arguments: Arguments, bar: tqdm.tqdm) -> list[dict[str, Any]]:
    """The spectrum of the gradients in each window of a run."""
    config = METHODS[name]
    task = config.task()
    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))]
    which = jax.random.choice(jax.random.key(seed), sum(sizes), (min(arguments.parameters, sum(sizes)),), replace=False)

    def make(hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(record(which, task.steps), make_tx(config, hyper))

    compiled = program(task, make)
    hyper, key = config.hyper(), jax.random.key(seed)
    state = compiled.init(hyper, key)
    found = []
    for window in range(arguments.windows):
        gradients, rows = [], []
        for _ in range(WINDOW // task.steps):
            state, metrics = compiled.advance(hyper, key, state)
            gradients.append(np.asarray(optax.tree_utils.tree_get(state.opt_state, "last")))
            rows.append({k: float(np.mean(metrics[k])) for k in ("train_accuracy", "val_accuracy")})
            bar.update(task.steps)
        gradients = np.concatenate(gradients)
        if not np.isfinite(gradients).all():
            raise UserError(
                f"{name}, seed {seed}: gradients are no longer finite before step {(window + 1) * WINDOW:,}"
            )
        f, power = spectrum(gradients)
        found.append(
            {
                "from_step": window * WINDOW,
                "train_accuracy": [round(rows[i]["train_accuracy"], 4) for i in (0, -1)],
                "val_accuracy": [round(rows[i]["val_accuracy"], 4) for i in (0, -1)],
                "rms": float(np.sqrt(np.mean(gradients.astype(np.float64) ** 2))),
                "slow_share": round(slow_share(f, power), 5),
                "power": [float(f"{p:.3g}") for p in power],
            }
        )
    return found


def main(arguments: Arguments) -> None:
    """Measure what is missing."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = lambda name, seed: arguments.out / f"{name}_seed-{seed}.json"
    facts = {"windows": arguments.windows, "parameters": arguments.parameters}
    todo = [(n, s) for s in arguments.seeds for n in arguments.methods if not made_before(path(n, s), facts)]
    with tqdm.tqdm(total=len(todo) * arguments.windows * WINDOW, unit="step") as bar:
        for name, seed in todo:
            result = {
                **provenance(),
                "arguments": facts,
                "method": name,
                "seed": seed,
                "window": WINDOW,
                "windows": measure(name, seed, arguments, bar),
            }
            write_whole(path(name, seed), json.dumps(result) + "\n")


def load_all(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All results, by method."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["method"], []).append(result)
    return {name: results[name] for name in METHODS if name in results}


def table(folder: Path) -> str:
    """The slow share of the power, window by window, as Markdown."""
    results = load_all(folder)
    if not results:
        return "Not measured yet.\n"
    windows = min(len(run["windows"]) for runs in results.values() for run in runs)
    spans = [f"steps {i * WINDOW:,} to {(i + 1) * WINDOW - 1:,}" for i in range(windows)]
    lines = [f"| method | seeds | | {' | '.join(spans)} |", "|---" * (windows + 3) + "|"]
    kinds = {
        "power below 0.01 (%)": (lambda w: 100 * w["slow_share"], ".2g"),
        "training accuracy at the end (%)": (lambda w: 100 * w["train_accuracy"][1], ".0f"),
        "validation accuracy at the end (%)": (lambda w: 100 * w["val_accuracy"][1], ".0f"),
    }
    noise = f"{100 * slow_share(*spectrum(sampling_noise())):.2f}"
    lines.append(f"| none: sampling noise | | power below 0.01 (%) | {' | '.join([noise] * windows)} |")
    for name, runs in results.items():
        for kind, (value, form) in kinds.items():
            cells = [spread([value(run["windows"][i]) for run in runs], form) for i in range(windows)]
            lines.append(f"| `{name}` | {len(runs)} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spectra_picture(folder: Path) -> Figure:
    """Power over frequency in each window, the mean of the seeds; a panel a method."""
    results = load_all(folder)
    figure = Figure(figsize=(3.4 * len(results), 3.4), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(results), sharey=True))
    noise = spectrum(sampling_noise())[1]
    for axes, (name, runs) in zip(panels, results.items(), strict=True):
        windows = min(len(run["windows"]) for run in runs)
        for i in range(windows):
            power = np.mean([run["windows"][i]["power"] for run in runs], axis=0)
            f = np.arange(len(power)) / WINDOW
            axes.plot(
                f[1:], power[1:] * len(power), color=colormaps["viridis"](0.9 * i / max(1, windows - 1)), linewidth=0.8
            )
            axes.lines[-1].set_label(f"from step {i * WINDOW:,}")
        f = np.arange(len(noise)) / WINDOW
        axes.plot(f[1:], noise[1:] * len(noise), color="black", linestyle="--", linewidth=0.8, label="sampling noise")
        axes.axvline(EDGE, color="grey", linestyle=":", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="cycles a step")
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("power (white noise: 1)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.frequency"))))
