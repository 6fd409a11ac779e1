"""One run in a run folder: train, record, checkpoint, draw; resume."""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax
import tqdm
import tyro

from . import loggers
from .config import Config, Experiment, title
from .errors import RunInterruptedError, UsageError, UserError, require
from .loop import evaluations
from .processes import in_any_process, is_primary_process
from .records import Row, best, format_metric, selection_metric, step_reached, to_row
from .run_folder import RunFolder, fingerprint
from .sweep import reached
from .train import check_memory, keep_compiled, program

MAY_CHANGE = ("budget", "stop_at", "hold", "data_dir", "devices")  # when a run is resumed


@dataclasses.dataclass(frozen=True)
class Output:
    """What is kept of a run, and where."""

    out: Path | None = None
    """Run folder, a new one; None makes runs/EXPERIMENT-FILTER-seedN-TIME."""
    resume: Path | None = None
    """Continue the run in this folder, with its flags."""
    checkpoint_every: int = 50
    """Records between two checkpoints."""
    tensorboard: bool = False
    """Log to TensorBoard too (extra "tensorboard")."""
    wandb: bool = False
    """Log to Weights & Biases too (extra "wandb"; WANDB_MODE=offline needs no account)."""
    compilation_cache: bool = True
    """Keep the compiled program in the user's cache, for a faster start the next time."""
    measure: tyro.conf.Fixed[tyro.conf.Suppress[str | None]] = None
    """A name of the experiment's measures, which its command line has as a flag if there are any."""

    def __post_init__(self) -> None:
        """Validate the flags."""
        require(self.checkpoint_every >= 1, "checkpoint_every", "at least 1", self.checkpoint_every)
        if self.out is not None and self.resume is not None:
            raise UsageError("--out starts a run and --resume continues one; pass one of them")


def train(experiment: Experiment, config: Config, output: Output) -> RunFolder:
    """Train one run to its end, or continue it; then print what came out."""
    started = time.perf_counter()
    if output.compilation_cache:
        keep_compiled()
    compiled = program(config.task, devices=config.run.devices)
    key = jax.random.key(config.run.seed)
    check_memory(compiled, config.hyper, key)
    data = compiled.draw(key)
    folder = open_folder(experiment, config, output, fingerprint(data))
    run, name = config.run, output.measure if output.resume is None else folder.config.get("measure")
    measure = None if name is None else experiment.measures[name]

    def finished() -> bool:
        return reached(config, folder.rows) or (bool(folder.rows) and folder.rows[-1]["step"] >= run.budget)

    def draw(kind: type[BaseException] | None, *_: object) -> None:
        # An earlier error is the one to report.
        from . import plots  # Matplotlib takes a second to import, which the first step need not wait for

        pictures = {"curves": plots.curves} | ({} if measure is None else {name: measure.picture})
        for what, picture in pictures.items() if folder.rows and is_primary_process() else ():
            with folder.writing(f"{what}.png") if kind is None else contextlib.suppress(OSError):
                plots.save(picture(folder.rows, title(experiment.name, config)), folder.path / f"{what}.png")

    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.locked())
        state = compiled.init(config.hyper, key)
        if output.resume is not None:
            state = folder.restore(state)
        started -= folder.seconds
        step = int(folder.rows[-1]["step"]) if folder.rows else 0
        logs = []
        if output.tensorboard and is_primary_process():
            logs.append(loggers.tensorboard(stack, folder.path, step + 1))
        if output.wandb and is_primary_process():
            logs.append(loggers.wandb(stack, folder.path, folder.config))
        stack.push(draw)
        interrupts = stack.enter_context(deferred_interrupts())
        bar = stack.enter_context(progress_bar(run.budget, step))
        records = evaluations(compiled, config.hyper, key, data=data, state=state)
        while not finished():
            evaluation = next(records)
            (row,), (diverged_at,), state = evaluation.rows, evaluation.diverged_at, evaluation.state
            if diverged_at is not None:
                raise UserError(
                    f"the loss is no longer finite at step {diverged_at:,}; the records before it are in "
                    f"{folder.path}. Try a smaller --lr or --lamb."
                )
            if measure is not None and len(folder.rows) % measure.every == 0:
                columns = jax.jit(measure.columns, static_argnums=0)  # the same function again, compiled once
                found = jax.device_get(columns(config.task, state.params, {**data[0], **data[1]}))
                row = {**row, **to_row(evaluation.step, {f"{name}_{column}": x for column, x in found.items()})}
            folder.append(row)
            for log in logs:
                log(row)
            show_progress(bar, row)
            interrupted = in_any_process(bool(interrupts))
            if len(folder.rows) % output.checkpoint_every == 0 or interrupted or finished():
                folder.save(state, time.perf_counter() - started)
            if interrupted and not finished():
                raise RunInterruptedError(
                    f"interrupted after step {evaluation.step:,}; continue with --resume {folder.path}"
                )
    print(summary(config, folder, time.perf_counter() - started))
    if experiment.show is not None:
        print(experiment.show(config.task, state.params))
    return folder


def new_path(experiment: Experiment, config: Config) -> Path:
    """The run folder of a command line without --out."""
    name = f"{experiment.name}-{config.filtering.filter}-seed{config.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / name


def open_folder(experiment: Experiment, config: Config, output: Output, data: str) -> RunFolder:
    """A new run folder, or that of the run to resume, whose data must have the same fingerprint."""
    if output.resume is None:
        path = output.out or new_path(experiment, config)
        about = {"experiment": experiment.name, **config.flat(), "measure": output.measure, "data": data}
        return RunFolder.create(path, about)
    folder = RunFolder.open(output.resume)
    if output.measure not in (None, folder.config.get("measure")):
        raise UsageError(
            f"--measure is {folder.config.get('measure')} in the run in {output.resume} and must stay so, got "
            f"{output.measure}; start a new run for it"
        )
    if folder.config.get("data", data) != data:
        raise UsageError(
            f"the data are not those that the run in {output.resume} was started with; "
            "pass the --data-dir that holds them, or start a new run"
        )
    folder.update_config({name: value for name, value in config.flat().items() if name in MAY_CHANGE})
    return folder


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Put the first Ctrl-C (or SIGTERM) into a list, so that the chunk is finished; a second one strikes at once."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def progress_bar(budget: int, step: int = 0) -> tqdm.tqdm:
    """A bar over optimizer steps; in a file a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm.tqdm(total=budget, initial=step, unit="step", mininterval=interval, desc="compiling")


def show_progress(bar: tqdm.tqdm, row: Row) -> None:
    """Move the bar to a record."""
    metric = selection_metric(row)
    train_now, val_now = (format_metric(metric, row[f"{part}_{metric}"]) for part in ("train", "val"))
    bar.set_description(f"{metric}: train {train_now:>6}, val {val_now:>6}", refresh=False)
    bar.update(int(row["step"]) - bar.n)


def summary(config: Config, folder: RunFolder, seconds: float) -> str:
    """What came out, in one line, and where it lies."""
    last, stop_at = folder.rows[-1], config.run.stop_at
    steps, metric = int(last["step"]), selection_metric(last)
    if stop_at is None:
        text = f"The best validation {metric} was {format_metric(metric, best(folder.rows))} in {steps:,} steps"
    elif (step := step_reached(folder.rows, stop_at, config.run.hold)) is not None:
        text = f"Validation {metric} reached {format_metric(metric, stop_at)} after {step:,} steps"
    else:
        text = f"Validation {metric} did not reach {format_metric(metric, stop_at)}: "
        text += f"it is {format_metric(metric, last[f'val_{metric}'])} after {steps:,} steps"
    text += f" and {seconds:.0f} seconds, compilation included."
    return f"{text}\n{folder.path / 'curves.png'} shows it, {folder.path / 'metrics.csv'} has the numbers."
