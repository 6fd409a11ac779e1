"""One run in a run folder: train, record, checkpoint, draw; resume."""

import contextlib
import dataclasses
import datetime
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import tqdm
import typeguard

from . import loggers
from .errors import RunInterruptedError, UsageError, UserError, require
from .experiment import Experiment, Measure, Run, find_experiment, title
from .files import provenance
from .loop import evaluations
from .methods import base, hyperparams, parameters
from .records import Row, after_reaching, best, format_metric, is_finished, reaches, steps_to, to_row
from .run_folder import RunFolder, fingerprint, read_config
from .train import Precision, fitted, in_any_process, is_primary_process, keep_compiled, program


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is trained, and what is kept of it."""

    out: Path | None = None
    """Run folder, a new one; None makes runs/EXPERIMENT-METHOD-seedN-TIME."""
    devices: int = 1
    """Devices among which every batch is divided; the batch size must be a multiple of it."""
    matmul_precision: Precision = "float32"
    """Precision of matrix products; "default" is the device's own, which on a TPU is bfloat16 and on most GPUs TF32."""
    measure: str | None = None
    """Measure this too, into metrics.csv and a picture of its name: one of the experiment's measures."""
    checkpoint_every: int = 50
    """Records between two checkpoints."""
    tensorboard: bool = False
    """Log to TensorBoard too (extra "tensorboard")."""
    wandb: bool = False
    """Log to Weights & Biases too (extra "wandb"; WANDB_MODE=offline needs no account)."""
    compilation_cache: bool = True
    """Keep the compiled program in the user's cache, for a faster start the next time."""

    def __post_init__(self) -> None:
        """Validate the flags."""
        require(self.checkpoint_every >= 1, "checkpoint_every", "at least 1", self.checkpoint_every)


def train(experiment: Experiment, run: Run, options: Options, *, resume: bool = False) -> RunFolder:
    """Train one run to its end, or continue it; then print its outcome.

    Args:
      experiment: The experiment of the run.
      run: The run.
      options: How it is trained; with `resume`, `options.out` is the folder of the run to continue.
      resume: Whether to continue.
    """
    started = time.perf_counter()
    validate(experiment, run, options)
    measure = None if options.measure is None else experiment.measures[options.measure]
    if options.compilation_cache:
        keep_compiled()
    key = jax.random.key(run.seed)
    compiled = fitted(program(run, devices=options.devices, precision=options.matmul_precision), run.traced, key)
    data = compiled.draw(key)
    folder = open_folder(experiment, run, options, fingerprint(data), resume=resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.locked())
        state = compiled.init(run.traced, key)
        if resume:
            state = folder.restore(state)
        started -= folder.seconds
        callbacks = [stack.enter_context(callback) for callback in callbacks_for(experiment, run, options, folder)]
        interrupts = stack.enter_context(deferred_interrupts())
        records = evaluations(compiled, run.traced, key, data=data, state=state)
        while not is_finished(run, folder.rows):
            evaluation = next(records)
            (row,), (diverged_at,), state = evaluation.rows, evaluation.diverged_at, evaluation.state
            if diverged_at is not None:
                raise UserError(
                    f"the loss is no longer finite at step {diverged_at:,}; the records before it are in "
                    f"{folder.path}. Try a smaller --lr or --lamb."
                )
            if measure is not None and len(folder.rows) % measure.every == 0:
                row = {**row, **measured(measure, options.measure or "", run, state.params, data, evaluation.step)}
            folder.append(row)
            for callback in callbacks:
                callback(row)
            interrupted = in_any_process(bool(interrupts))
            if len(folder.rows) % options.checkpoint_every == 0 or interrupted or is_finished(run, folder.rows):
                folder.save(state, time.perf_counter() - started)
            if interrupted and not is_finished(run, folder.rows):
                raise RunInterruptedError(
                    f"interrupted after step {evaluation.step:,}; continue with python -m examples.resume {folder.path}"
                )
    print(summary(run, folder, time.perf_counter() - started))
    if experiment.show is not None:
        print(experiment.show(run.task, state.params))
    return folder


def validate(experiment: Experiment, run: Run, options: Options) -> None:
    """Refuse what cannot be trained, before anything is compiled."""
    find_experiment(experiment.name)  # as examples.resume will
    path = str((options.out or Path()).absolute())
    is_text = path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)
    require(is_text, "out", "a path in UTF-8", path, "choose another, or set PYTHONUTF8=1 in the environment")
    batch_size = run.task.batch_size
    divides = options.devices >= 1 and batch_size % options.devices == 0
    require(divides, "devices", f"a divisor of the batch size ({batch_size})", options.devices)
    known = ", ".join(experiment.measures) or f"left out, for {experiment.name} has no measure"
    require(options.measure in (None, *experiment.measures), "measure", known, options.measure)


def measured(measure: Measure, name: str, run: Run, params: Any, data: Any, step: int) -> Row:
    """The columns that a measure adds to a record."""
    columns = jax.jit(measure.columns, static_argnums=0)  # the same function again, compiled once
    found = jax.device_get(columns(run.task, params, {**data[0], **data[1]}))
    return to_row(step, {f"{name}_{column}": value for column, value in found.items()})


Callback = Callable[[Row], None]  # called with every new record


def callbacks_for(
    experiment: Experiment, run: Run, options: Options, folder: RunFolder
) -> Sequence[contextlib.AbstractContextManager[Callback]]:
    """What follows a run, as context managers; the last one that is entered is the first to end."""
    if not is_primary_process():
        return []
    step = int(folder.rows[-1]["step"]) if folder.rows else 0
    chosen = [pictures(experiment, run, options, folder), progress(run, step)]
    if options.tensorboard:
        chosen.append(loggers.tensorboard(folder.path, step + 1))
    if options.wandb:
        chosen.append(loggers.wandb(folder.path, folder.config))
    return chosen


@contextlib.contextmanager
def pictures(experiment: Experiment, run: Run, options: Options, folder: RunFolder) -> Iterator[Callback]:
    """Draw the pictures of a run when it ends, by an error too."""
    error: BaseException | None = None
    try:
        yield lambda row: None
    except BaseException as caught:
        error = caught
        raise
    finally:
        from . import plots  # Matplotlib takes a second to import, which the first step need not wait for

        drawn: dict[str, Callable[..., Any]] = {"curves": lambda rows, text: plots.curves(rows, text, run.task.metric)}
        if options.measure is not None:
            drawn[options.measure] = experiment.measures[options.measure].picture
        for name, picture in drawn.items() if folder.rows else ():
            with folder.writing(f"{name}.png") if error is None else contextlib.suppress(OSError):
                plots.save(picture(folder.rows, title(experiment.name, run)), folder.path / f"{name}.png")


@contextlib.contextmanager
def progress(run: Run, step: int) -> Iterator[Callback]:
    """Show a bar over optimizer steps; in a file, a line every ten seconds."""
    metric, interval = run.task.metric, 0.1 if sys.stderr.isatty() else 10.0
    with tqdm.tqdm(total=run.max_steps, initial=step, unit="step", mininterval=interval, desc="compiling") as bar:

        def show(row: Row) -> None:
            train_now, val_now = (format_metric(metric, row[f"{part}_{metric}"]) for part in ("train", "val"))
            bar.set_description(f"{metric}: train {train_now:>6}, val {val_now:>6}", refresh=False)
            bar.update(int(row["step"]) - bar.n)

        yield show


def open_folder(experiment: Experiment, run: Run, options: Options, data: str, *, resume: bool) -> RunFolder:
    """A new run folder, or that of the run to resume, whose data must have the same fingerprint."""
    kept = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "out"}
    where = {name: getattr(run.task, name) for name in ("data_dir",) if hasattr(run.task, name)}
    about = {"experiment": experiment.name, **run.key, **where, **kept, "data": data}
    if not resume:
        return RunFolder.create(options.out or new_path(experiment, run), about)
    assert options.out is not None
    folder = RunFolder.open(options.out)
    config = folder.config
    if config.get("data", data) != data:
        raise UsageError(
            f"the data are not those that the run in {options.out} was started with; "
            "pass the --data-dir that holds them, or start a new run"
        )
    now, before = provenance(), [config, *config.get("resumed", [])]
    if changed := [
        f"{name} {before[-1].get(name)}, now {now[name]}"
        for name in ("device", "versions")
        if before[-1].get(name) != now[name]
    ]:
        print(
            f"note: the run may differ from an undisturbed one, because it was trained with {'; '.join(changed)}",
            file=sys.stderr,
        )
        about["resumed"] = [*before[1:], now]
    folder.update_config(about)
    return folder


def new_path(experiment: Experiment, run: Run) -> Path:
    """The run folder of a command line without --out."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs may start in the same second
    return Path("runs") / f"{experiment.name}-{base(run.method).__name__}-seed{run.seed}-{now}"


def stored(folder: Path) -> tuple[Experiment, Run, Options]:
    """The experiment, run and options of a run folder."""
    config = read_config(folder)

    def given(cls: type, names: Iterable[str]) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        return {name: typeguard.check_type(config[name], hints[name]) for name in names}

    def known(cls: type) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.name in config]

    try:
        if config.get("data_dir") is not None:
            config["data_dir"] = Path(config["data_dir"])
        experiment = find_experiment(config["experiment"])
        kind, method = type(experiment.task), experiment.method(config["method"])
        values = hyperparams(method, **{name: config[name] for name in parameters(method)})
        rule = given(Run, ("seed", "max_steps", "stop_at", "hold_evals"))
        run = Run(kind(**given(kind, known(kind))), method, values, **rule)
        options = Options(out=folder, **given(Options, known(Options)))
    except (LookupError, TypeError, ValueError, UserError, typeguard.TypeCheckError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{folder / 'config.json'} describes no run that can be continued here ({reason}); put it back from a "
            "copy, or start a new run"
        ) from error
    return experiment, run, options


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


def summary(run: Run, folder: RunFolder, seconds: float) -> str:
    """The outcome in one line, and the files that show it."""
    rows, metric, stop_at = folder.rows, run.task.metric, run.stop_at
    steps, after = int(rows[-1]["step"]), after_reaching(run, rows)
    if stop_at is None:
        text = f"The best validation {metric} was {format_metric(metric, best(rows, metric))} in {steps:,} steps"
    elif after is not None:
        reached = steps_to(rows, stop_at, metric)
        text = f"Validation {metric} reached {format_metric(metric, stop_at)} after {reached:,} steps"
        if after:
            held = sum(reaches(row, stop_at, metric) for row in after)
            text += f", was at it in {held} of the {len(after)} evaluations after that,"
    else:
        text = f"Validation {metric} did not reach {format_metric(metric, stop_at)}: "
        text += f"it is {format_metric(metric, rows[-1][f'val_{metric}'])} after {steps:,} steps"
    text += f" and {seconds:.0f} seconds, compilation included."
    return f"{text}\n{folder.path / 'curves.png'} shows it, {folder.path / 'metrics.csv'} has the numbers."
