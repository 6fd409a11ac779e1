"""Our mod-97 experiment against the same in PyTorch, in turn in one run: `python -m benchmarks.vs_torch`.

Needs the extra "bench". Both sides start from the same weights and see the same batches; that their first losses agree
is checked before anything is timed. An epoch is ten steps and an evaluation of all validation pairs.

- `ours`: the compiled harness.
- `torch`: eager PyTorch, `torch.optim.Adam`, filters of the package pytorch_optimizer.
- `torch, frugal`: the same with the arithmetic of our model, which computes `x op` once for each x, and the last block
  at the last position only.
- `torch.compile`: `torch` with the model compiled, where that works; `torch.compile, frugal` likewise.
- `grokfast-pytorch`: `torch` with that package's AdamW, which has the EMA inside.
"""

import dataclasses
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from examples.harness.optimizers import make_tx
from examples.harness.run_folder import provenance, write_whole
from examples.harness.train import Program, program
from examples.modular import PRESETS, Config, Modular

from .timing import in_turn, ratios, spread

OUT = Path(__file__).parent / "results" / "vs_torch.json"
COMPILATIONS = 3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the mod-97 experiment here and in PyTorch."""

    presets: tuple[str, ...] = ("baseline", "ema", "ma")
    """Presets whose epochs are timed."""
    rounds: int = 15
    """Timed rounds; each contender trains one epoch a round."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the whole runs to 95 % validation accuracy, with the EMA and the MA; none to leave them out."""
    out: Path = OUT
    """File for the results."""


class Ours:
    """A run of the harness, epoch by epoch."""

    def __init__(self, config: Config, seed: int, compiled: Program | None = None):
        self.config, self.key = config, jax.random.key(seed)
        self.compiled = compiled or program(config.task(), functools.partial(make_tx, config))
        self.state = self.compiled.init(config.hyper(), self.key)
        self.losses = np.array([])

    def epoch(self) -> float:
        """Train ten steps; the validation accuracy after them."""
        self.state, metrics = self.compiled.advance(self.config.hyper(), self.key, self.state)
        self.losses = np.asarray(metrics["losses"])
        return float(metrics["val_accuracy"])


class Torch:
    """A run in PyTorch with the weights and batches of `Ours`, epoch by epoch."""

    def __init__(self, config: Config, seed: int, **options: bool):
        self.task: Modular = config.task()
        init_key, split_key, self.batch_key = jax.random.split(jax.random.key(seed), 3)
        self.data = jax.jit(self.task.split)(split_key)
        self.trainer = importlib.import_module("benchmarks.torch_mod97").Trainer(
            config, jax.tree.map(np.asarray, jax.jit(self.task.init)(init_key)), **options
        )
        self.batches = jax.jit(lambda key: self.task.batches(self.data, key))
        self.validation = self.tensors(jax.jit(self.task.validation)(self.data))
        self.epochs = 0
        self.losses = np.array([])

    def tensors(self, batches: Any) -> list[Any]:
        """Tokens and answers of each batch, without its padding."""
        result = []
        for index, weight in zip(*map(np.asarray, (batches["index"], batches["weight"])), strict=True):
            pairs = index[weight > 0]
            x, y = self.task.operands(pairs)
            tokens = np.stack([x, np.full_like(x, self.task.p + 1), y, np.full_like(x, self.task.p)], axis=-1)
            result.append((self.trainer.tensor(tokens), self.trainer.tensor(np.asarray(self.task.answer(pairs)))))
        return result

    def epoch(self) -> float:
        """Train ten steps; the validation accuracy after them."""
        batches = self.tensors(self.batches(jax.random.fold_in(self.batch_key, self.epochs)))
        losses = [self.trainer.step(*batch) for batch in batches]
        self.epochs += 1
        accuracy = self.trainer.accuracy(self.validation)
        self.losses = np.array([float(loss) for loss in losses])
        return accuracy

    def forward_gflop(self) -> float:
        """Operations of the matrix products of a forward pass of one batch, by PyTorch's count."""
        with importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False) as counter:
            self.trainer.forward(self.validation[0][0])
        return counter.get_total_flops() / 1e9


def check_agreement(ours: Ours, other: Torch) -> float:
    """The largest difference of the losses of the first epoch; they must agree."""
    ours.epoch()
    other.epoch()
    difference = float(np.max(np.abs(ours.losses - other.losses)))
    if not difference < 1e-3:
        raise RuntimeError(f"the two sides do not do the same: losses {ours.losses} here, {other.losses} in PyTorch")
    return difference


def compile_seconds(config: Config) -> float:
    """Seconds to trace and compile a run: those of its first epoch, less those of its second."""
    jax.clear_caches()
    start = time.perf_counter()
    ours = Ours(config, 0)
    ours.epoch()
    middle = time.perf_counter()
    ours.epoch()
    return (middle - start) - (time.perf_counter() - middle)


def time_epochs(name: str, rounds: int) -> dict[str, Any]:
    """Seconds to compile, and seconds a step, evaluation included, of each contender."""
    config = PRESETS[name]
    compiling = spread([compile_seconds(config) for _ in range(COMPILATIONS)])
    ours = Ours(config, 0)
    torch_run = Torch(config, 0)
    difference = check_agreement(Ours(config, 0, ours.compiled), torch_run)
    contenders: dict[str, Callable[[], object]] = {"ours": ours.epoch, "torch": torch_run.epoch}
    frugal = Torch(config, 0, frugal=True)
    check_agreement(Ours(config, 0, ours.compiled), frugal)
    contenders["torch, frugal"] = frugal.epoch
    failed = {}
    for side, options in (("torch.compile", {}), ("torch.compile, frugal", {"frugal": True})):
        try:
            compiled_run = Torch(config, 0, compiled=True, **options)
            compiled_run.epoch()
            contenders[side] = compiled_run.epoch
        except Exception as error:  # whatever torch.compile lacks here, such as a C++ compiler
            failed[side] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if config.filter == "ema":
        contenders["grokfast-pytorch"] = Torch(config, 0, grokfast_pytorch=True).epoch
    steps = config.task().steps
    if config.filter == "ma":  # its cost in PyTorch grows until the window is full
        for _ in range(config.window_size // steps):
            for epoch in contenders.values():
                epoch()
    seconds = in_turn(contenders, rounds)
    return {
        "first_losses_differ_by": difference,
        "compile_seconds": compiling,
        "forward_gflop": {"torch": torch_run.forward_gflop(), "torch, frugal": frugal.forward_gflop()},
        "seconds_a_step": {n: spread([v / steps for v in values]) for n, values in seconds.items()},
        "ratio_to_ours": {n: ratios(values, seconds["ours"]) for n, values in seconds.items()},
        "failed": failed,
    }


def time_to_grok(name: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Steps and seconds to 95 % validation accuracy, evaluation included and compilation not, here and in PyTorch."""
    config = PRESETS[name]
    compiled = Ours(config, 0).compiled
    Ours(config, 0, compiled).epoch()
    steps = config.task().steps
    rows = []
    for seed in seeds:
        for side, run in (("ours", Ours(config, seed, compiled)), ("torch", Torch(config, seed))):
            start = time.perf_counter()
            epoch = 0
            accuracy = 0.0
            while accuracy < 0.95 and epoch * steps < config.budget:
                accuracy = run.epoch()
                epoch += 1
            row = {"preset": name, "seed": seed, "side": side, "seconds": time.perf_counter() - start}
            rows.append({**row, "steps": epoch * steps, "reached": accuracy >= 0.95})
            print(rows[-1])
    return rows


def whole_run_ratios(rows: list[dict[str, Any]]) -> list[str]:
    """By preset, the seconds of PyTorch over ours: median and range of the seeds."""
    texts = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        seconds = {
            side: [row["seconds"] for row in rows if (row["preset"], row["side"]) == (preset, side)]
            for side in ("ours", "torch")
        }
        times = sorted(other / one for one, other in zip(seconds["ours"], seconds["torch"], strict=True))
        texts.append(f"{statistics.median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f}) times as long ({preset})")
    return texts


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    versions = result["versions"]
    lines = [
        f"{result['device']}; jax {versions['jax']}, torch {versions['torch']}; {result['rounds']} rounds in turn; "
        "medians (quartiles). A step counts a tenth of the evaluation after each ten.",
        "",
        "| preset | side | ms a step | times ours |",
        "|---|---|---|---|",
    ]
    for name, cell in result["epochs"].items():
        for side, seconds in cell["seconds_a_step"].items():
            ms = {key: 1e3 * value for key, value in seconds.items()}
            ratio = cell["ratio_to_ours"][side]
            lines.append(
                f"| {name} | {side} | {ms['median']:.1f} ({ms['low']:.1f} to {ms['high']:.1f}) "
                f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) |"
            )
        lines += [f"| {name} | {side} | does not run here: {why} | |" for side, why in cell["failed"].items()]
    if result["to_95"]:
        lines += ["", "| preset | seed | side | steps to 95 % | seconds |", "|---|---|---|---|---|"]
        for row in result["to_95"]:
            steps = f"{row['steps']:,}" if row["reached"] else f"not within {row['steps']:,}"
            lines.append(f"| {row['preset']} | {row['seed']} | {row['side']} | {steps} | {row['seconds']:.1f} |")
        lines += ["", f"PyTorch took {', '.join(whole_run_ratios(result['to_95']))}."]
    compiling = ", ".join(f"{c['compile_seconds']['median']:.1f} s ({name})" for name, c in result["epochs"].items())
    flop = next(iter(result["epochs"].values()))["forward_gflop"]
    lines += [
        "",
        f"The matrix products of a forward pass of one batch: {flop['torch']:.2f} GFLOP for `torch`, "
        f"{flop['torch, frugal']:.2f} for `torch, frugal` and for ours.",
    ]
    lines += ["", f"Tracing and compiling, not counted above, median of {COMPILATIONS}: {compiling}."]
    return "\n".join(lines) + "\n"


def main(arguments: Arguments) -> None:
    """Time epochs, then whole runs; the file is written after each part."""
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    result = {**provenance(), "rounds": arguments.rounds, "epochs": {}, "to_95": []}
    try:
        result["versions"] |= {name: version(name) for name in ("torch", "pytorch_optimizer", "grokfast-pytorch")}
    except PackageNotFoundError as error:
        raise SystemExit(f"error: {error.name} is missing; pip install -e '.[bench]'") from error
    for name in arguments.presets:
        result["epochs"][name] = time_epochs(name, arguments.rounds)
        write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    for name in ("ema", "ma"):
        result["to_95"] += time_to_grok(name, arguments.seeds)
        write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
