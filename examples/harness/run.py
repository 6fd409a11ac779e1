"""One run of an experiment from the command line: train, record, checkpoint, draw."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tqdm
import tyro
from jax.experimental import multihost_utils

from . import loggers, plots
from .config import RunConfig
from .errors import UserError
from .optimizers import NAMES, OptimizerConfig, make_tx
from .records import best, is_finite, judged_by, step_reached, to_row, told
from .run_folder import RunFolder, leads
from .train import Program, program

MAY_CHANGE = ("budget", "stop_at", "hold", "data_dir", "processes")

Show = Callable[[Any, Any], str]  # task and trained parameters to what is printed of them


@dataclasses.dataclass(frozen=True)
class Output:
    """What is kept of a run, and where."""

    out: Path | None = None
    """Run folder, a new one; None makes runs/EXPERIMENT-FILTER-seedN-TIME."""
    resume: Path | None = None
    """Go on with the run in this folder, with its flags."""
    checkpoint_every: int = 50
    """Records between two checkpoints."""
    tensorboard: bool = False
    """Log to TensorBoard too (extra "tensorboard")."""
    wandb: bool = False
    """Log to Weights & Biases too (extra "wandb"; WANDB_MODE=offline needs no account)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.checkpoint_every < 1:
            raise UserError(f"--checkpoint-every must be at least 1, got {self.checkpoint_every}")
        if self.out is not None and self.resume is not None:
            raise UserError("--out starts a run and --resume goes on with one; pass one of them")


def parse(
    experiment: str, presets: Mapping[str, RunConfig], default: str, argv: Sequence[str]
) -> tuple[RunConfig, Output]:
    """The configuration and the output options of a command line.

    The defaults of the flags are those of the preset, or of the run that is resumed; so both are looked up first.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--resume", type=Path)
    try:
        choice = early.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # a flag without its value, of which tyro tells below
        choice = argparse.Namespace(preset=None, resume=None)
    base = presets.get(choice.preset, presets[default])
    stored = {}
    if choice.resume is not None:
        if choice.preset is not None:
            raise UserError("--preset starts a run and --resume goes on with one; pass one of them")
        everything = RunFolder.open(choice.resume).config
        if everything["experiment"] != experiment:
            raise UserError(
                f"{choice.resume} holds a run of {everything['experiment']}; go on with it by "
                f"python -m examples.{everything['experiment']} --resume {choice.resume}"
            )
        names = {field.name for field in dataclasses.fields(base)}
        stored = {name: value for name, value in everything.items() if name in names}
        if stored.get("data_dir") is not None:
            stored["data_dir"] = Path(stored["data_dir"])
        base = dataclasses.replace(base, **stored)

    def command(config: Any, output: Any, preset: Any = default) -> tuple[Any, Output]:
        del preset
        return config, output

    help_ = "Published run or control that the other flags start from."
    command.__annotations__ = {
        "config": Annotated[type(base), tyro.conf.arg(name="")],
        "output": Annotated[Output, tyro.conf.arg(name="")],
        "preset": Annotated[Literal[tuple(presets)], tyro.conf.arg(help=help_)],
    }
    command.__defaults__ = (base, Output(), default)
    config, output = tyro.cli(
        command, prog=f"python -m examples.{experiment}", args=argv, description=type(base).__doc__
    )
    for name, value in stored.items():
        if getattr(config, name) != value and name not in MAY_CHANGE:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {value} in the run in {output.resume} and must stay so, got {getattr(config, name)}; "
                "start a new run for it"
            )
    return config, output


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Put the first Ctrl-C (or SIGTERM) into a list, so that the chunk is finished; a second one strikes at once."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in this process, or in any that trains together with it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag


def train(
    experiment: str,
    config: RunConfig,
    output: Output,
    *,
    show: Show | None = None,
    build: Callable[..., Program] = program,
) -> RunFolder:
    """Train one run to its end, or go on with it; then print what came out and what `show` says.

    `build` is `program` or does the same otherwise.
    """
    task, hyper, key = config.task(), config.hyper(), jax.random.key(config.seed)
    data = fingerprint(task.split(key))
    if output.resume is None:
        name = f"{experiment}-{config.filter}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = output.out or Path("runs") / name
        folder = RunFolder.create(path, {"experiment": experiment, **dataclasses.asdict(config), "data": data})
    else:
        folder = RunFolder.open(output.resume)
        if folder.config.get("data", data) != data:
            raise UserError(
                f"the data are not those that the run in {output.resume} was started with; "
                "pass the --data-dir that holds them, or start a new run"
            )
        folder.update_config({name: value for name, value in dataclasses.asdict(config).items() if name in MAY_CHANGE})

    start = time.perf_counter()
    compiled = build(task, functools.partial(make_tx, config))
    state = compiled.init(hyper, key)
    if output.resume is not None:
        restored = folder.restore(state)
        state = state if restored is None else restored
    step = int(folder.rows[-1]["step"]) if folder.rows else 0

    def finished() -> bool:
        reached = config.stop_at is not None and step_reached(folder.rows, config.stop_at, config.hold) is not None
        return reached or step >= config.budget

    def draw() -> None:
        if folder.rows and leads():
            plots.save(plots.curves(folder.rows, title(experiment, config)), folder.path / "curves.png")

    with contextlib.ExitStack() as stack:
        logs = []
        if output.tensorboard and leads():
            logs.append(loggers.tensorboard(stack, folder.path, step + 1))
        if output.wandb and leads():
            logs.append(loggers.wandb(stack, folder.path, folder.config))
        stack.callback(draw)
        interrupts = stack.enter_context(deferred_interrupts())
        seldom = 0.1 if sys.stderr.isatty() else 10.0
        bar = stack.enter_context(tqdm.tqdm(total=config.budget, initial=step, unit="step", mininterval=seldom))
        bar.set_description("compiling")
        while not finished():
            state, metrics = compiled.advance(hyper, key, state)
            metrics = dict(jax.device_get(metrics))
            bad = np.flatnonzero(~np.isfinite(metrics.pop("losses")))
            row = to_row(step + task.steps, metrics)
            if bad.size or not is_finite(row):
                where = step + 1 + bad[0] if bad.size else row["step"]
                raise UserError(
                    f"the loss is no longer finite at step {where:,}; the records before it are in {folder.path}. "
                    "Try a smaller --lr or --lamb."
                )
            folder.append(row)
            step += task.steps
            for log in logs:
                log(row)
            metric = judged_by(row)
            train_now, val_now = (told(metric, row[f"{part}_{metric}"]) for part in ("train", "val"))
            bar.set_description(f"{metric}: train {train_now:>6}, val {val_now:>6}", refresh=False)
            bar.update(task.steps)
            interrupted = in_any_process(bool(interrupts))
            if len(folder.rows) % output.checkpoint_every == 0 or interrupted or finished():
                folder.save(state)
            if interrupted and not finished():
                raise UserError(f"interrupted after step {step:,}; go on with --resume {folder.path}")
    print(summary(config, folder, time.perf_counter() - start))
    if show is not None:
        print(show(task, state.params))
    return folder


def fingerprint(data: Any) -> str:
    """A hash of arrays, which tells whether a run is resumed with the data it was started with."""
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(data)):
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def described(config: OptimizerConfig) -> str:
    """A run's filter and optimizer, in words."""
    gradient_filter = {
        "none": "no filter",
        "ema": f"Grokfast-EMA α {config.alpha:g} λ {config.lamb:g}",
        "ma": f"Grokfast-MA w {config.window_size} λ {config.lamb:g}",
    }[config.filter]
    if config.filter == "ema" and config.start != "gradient":
        gradient_filter += f" start {config.start}"
    if config.filter != "none":
        gradient_filter += f" fast {config.fast:g}" * (config.fast != 1) + " normalized" * config.normalize
        if config.filter_from:
            gradient_filter += f" from step {config.filter_from:,}" + " (empty)" * (not config.collect)
    optimizer = NAMES[config.optimizer]
    return f"{gradient_filter}, {optimizer} weight decay {config.weight_decay:g}"


def title(experiment: str, config: RunConfig) -> str:
    """The title of a run's picture."""
    return f"{experiment}: {described(config)}, seed {config.seed}"


def summary(config: RunConfig, folder: RunFolder, seconds: float) -> str:
    """What came out, in one line, and where it lies."""
    last = folder.rows[-1]
    steps, metric = int(last["step"]), judged_by(last)
    if config.stop_at is None:
        text = f"The best validation {metric} was {told(metric, best(folder.rows))} in {steps:,} steps"
    elif (reached := step_reached(folder.rows, config.stop_at, config.hold)) is not None:
        text = f"Validation {metric} reached {told(metric, config.stop_at)} after {reached:,} steps"
    else:
        text = f"Validation {metric} did not reach {told(metric, config.stop_at)}: "
        text += f"it is {told(metric, last[f'val_{metric}'])} after {steps:,} steps"
    text += f" and {seconds:.0f} seconds, compilation included."
    return f"{text}\n{folder.path / 'curves.png'} shows it, {folder.path / 'metrics.csv'} has the numbers."


def main(
    experiment: str,
    presets: Mapping[str, RunConfig],
    default: str,
    argv: Sequence[str] | None = None,
    show: Show | None = None,
) -> None:
    """Run an experiment as a command line says."""
    config, output = parse(experiment, presets, default, sys.argv[1:] if argv is None else argv)
    train(experiment, config, output, show=show)
