"""One run in a run folder: train, record, checkpoint, draw; resume."""

import contextlib
import dataclasses
import datetime
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import pandas as pd

from .errors import RunInterruptedError, UsageError, UserError, require
from .experiment import RULE, Experiment, Run, find_experiment, make_run
from .files import fingerprint, provenance
from .loggers import tensorboard
from .loop import evaluations, progress_bar
from .methods import base, parameters
from .records import Row, best, format_metric, is_finished, outcome, steps_to, to_row
from .run_folder import RunFolder
from .train import Precision, in_any_process, is_primary_process, keep_compiled, program


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is trained, and what is kept of it."""

    out: Path | None = None  # Run folder, a new one; None makes runs/EXPERIMENT-METHOD-seedN-TIME.
    devices: int = 1  # Devices among which every batch is divided; the batch size must be a multiple of it.
    # Precision of matrix products; "default" is the device's own, which on a TPU is bfloat16 and on most GPUs TF32.
    matmul_precision: Precision = "float32"
    # Measure this too, into metrics.csv and a picture of its name: one of the experiment's measures.
    measure: str | None = None
    tensorboard: bool = False  # Log to TensorBoard, too (extra "tensorboard").
    checkpoint_every: int = 50  # Records between two checkpoints.


def train(experiment: Experiment, run: Run, options: Options, *, resume: bool = False) -> RunFolder:
    """Train one run to its end, or continue the one in `options.out`; then print its outcome."""
    started = time.perf_counter()
    validate(experiment, run, options)
    keep_compiled()
    key = jax.random.key(run.seed)
    compiled = program(run, devices=options.devices, precision=options.matmul_precision)
    data, state = jax.block_until_ready((compiled.draw(key), compiled.init(run.traced, key)))
    measure, metric = experiment.measures.get(options.measure or ""), run.task.metric
    columns_of = measure and compiled.per_run(lambda task, state, data: measure.columns(task, state.params, data))
    folder, about = open_folder(experiment, run, options, fingerprint(data), resume=resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.locked())
        if resume:
            folder.update_config(about)
            state = folder.restore(state)
        started -= folder.seconds
        stack.callback(draw, experiment, run, options, folder)
        step = int(folder.rows[-1]["step"]) if folder.rows else 0
        shown = {"initial": step, "desc": "compiling", "disable": not is_primary_process()}
        bar = stack.enter_context(progress_bar(run.max_steps, "step", **shown))
        interrupts, log = stack.enter_context(deferred_interrupts()), lambda row: None
        if options.tensorboard and is_primary_process():
            log = stack.enter_context(tensorboard(folder.path, step + 1))
        records = evaluations(compiled, run.traced, key, data=data, state=state)
        while not is_finished(run, folder.rows):
            evaluation = next(records)
            (row,), (diverged_at,), state = evaluation.rows, evaluation.diverged_at, evaluation.state
            if diverged_at is not None:
                cure = " or ".join(f"--{name}" for name in ("lr", "lamb") if name in run.hyperparams)
                raise UserError(
                    f"the loss is no longer finite at step {diverged_at:,}; the records before it are in {folder.path}."
                    + f" Try a smaller {cure}." * bool(cure)
                )
            if measure and columns_of and len(folder.rows) % measure.every == 0:
                columns = jax.device_get(columns_of(state, *data))
                named = {f"{options.measure}_{name}": value for name, value in columns.items()}
                row = {**row, **to_row(evaluation.step, named)}
            folder.append(row)
            log(row)
            values = (format_metric(metric, row[f"{part}_{metric}"]) for part in ("train", "val"))
            bar.set_description("{}: train {:>6}, val {:>6}".format(metric, *values), refresh=False)
            bar.update(evaluation.step - bar.n)
            interrupted, finished = in_any_process(bool(interrupts)), is_finished(run, folder.rows)
            if len(folder.rows) % options.checkpoint_every == 0 or interrupted or finished:
                folder.save(state, time.perf_counter() - started)
            if interrupted and not finished:
                raise RunInterruptedError(
                    f"interrupted after step {evaluation.step:,}; continue with python -m examples.resume {folder.path}"
                )
    print(summary(run, folder, time.perf_counter() - started))
    return folder


def validate(experiment: Experiment, run: Run, options: Options) -> None:
    """Validate the configuration before anything is compiled."""
    find_experiment(experiment.name)  # as examples.resume will
    require(options.checkpoint_every >= 1, "checkpoint_every", "at least 1", options.checkpoint_every)
    batch_size = run.task.batch_size
    divides = options.devices >= 1 and batch_size % options.devices == 0
    require(divides, "devices", f"a divisor of the batch size ({batch_size})", options.devices)
    known = ", ".join(experiment.measures) or f"left out, for {experiment.name} has no measure"
    require(options.measure in (None, *experiment.measures), "measure", known, options.measure)


def draw(experiment: Experiment, run: Run, options: Options, folder: RunFolder) -> None:
    """Draw the pictures of a run."""
    from . import plots  # Matplotlib takes a second to import, which the first step need not wait for

    numbers = ", ".join(f"{name} {value:g}" for name, value in run.traced.items())
    title = f"{experiment.name}: {base(run.method).__name__}, {numbers}, seed {run.seed}"

    def curves(rows: Sequence[Row], title: str) -> Any:
        records: Any = pd.DataFrame(rows).set_index("step")
        metric = run.task.metric
        groups = {"validation": [records[f"val_{metric}"]], "training": [records[f"train_{metric}"]]}
        return plots.curves(groups, title, metric)

    pictures: dict[str, Any] = {"curves": curves}
    if options.measure is not None:
        pictures[options.measure] = experiment.measures[options.measure].picture
    for name, picture in pictures.items() if folder.rows and is_primary_process() else ():
        with folder.writing(f"{name}.png"):
            plots.save(picture(folder.rows, title), folder.path / f"{name}.png")


def open_folder(
    experiment: Experiment, run: Run, options: Options, data: str, *, resume: bool
) -> tuple[RunFolder, dict[str, Any]]:
    """A new run folder, or that of the run to resume, whose data must have the same fingerprint; and its entries."""
    about = {"experiment": experiment.name, **run.key, **dataclasses.asdict(options), "data": data}
    about["data_dir"] = getattr(run.task, "data_dir", None)
    del about["out"]
    if not resume or options.out is None:
        return RunFolder.create(options.out or new_path(experiment, run), about), about
    folder = RunFolder(options.out)
    config = folder.config
    if config.get("data", data) != data:
        raise UsageError(
            f"the data are not those that the run in {options.out} was started with; "
            "pass the --data-dir that holds them, or start a new run"
        )
    now, resumed = provenance(), config.get("resumed", [])
    before = resumed[-1] if resumed else config
    if changed := [name for name in ("device", "versions") if before.get(name) != now[name]]:
        places = "; ".join(f"{name} {before.get(name)}, now {now[name]}" for name in changed)
        print(
            f"note: the run may differ from an undisturbed one, because it was trained with {places}", file=sys.stderr
        )
        about["resumed"] = [*resumed, now]
    return folder, about


def new_path(experiment: Experiment, run: Run) -> Path:
    """The run folder of a command line without --out."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs may start in the same second
    return Path("runs") / f"{experiment.name}-{base(run.method).__name__}-seed{run.seed}-{now}"


def stored(folder: Path) -> tuple[Experiment, Run, Options]:
    """The experiment, run and options of a run folder."""
    config = RunFolder(folder).config
    try:
        experiment = find_experiment(config["experiment"])
        task, method = experiment.task, experiment.method(config["method"])
        fields = {field.name: config[field.name] for field in dataclasses.fields(task)}
        if fields.get("data_dir") is not None:
            fields["data_dir"] = Path(fields["data_dir"])
        settings = {name: config[name] for name in (*parameters(method), *RULE)}
        run = make_run(dataclasses.replace(task, **fields), method, **settings)
        kept = {field.name: config[field.name] for field in dataclasses.fields(Options) if field.name != "out"}
    except (LookupError, TypeError, ValueError, UserError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{folder / 'config.json'} describes no run that can be continued here ({reason}); put it back from a "
            "copy, or start a new run"
        ) from error
    return experiment, run, Options(folder, **kept)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Put the first Ctrl-C (or SIGTERM) into a list, so that the chunk is finished; a second one strikes at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def summary(run: Run, folder: RunFolder, seconds: float) -> str:
    """The outcome in one line, and the files that show it."""
    rows, metric, found = folder.rows, run.task.metric, outcome(run, folder.rows)
    reached = None if run.stop_at is None else steps_to(rows, run.stop_at, metric)
    if run.stop_at is None or reached is None:
        best_value = format_metric(metric, best(rows, metric))
        text = f"The best validation {metric} was {best_value} in {found['last_step']:,} steps"
    else:
        text = f"Validation {metric} reached {format_metric(metric, run.stop_at)} after {reached:,} steps"
        if "held_evals" in found:
            text += f", was at it in {found['held_evals']} of the {found['followed_evals']} evaluations after that,"
    text += f" and {seconds:.0f} seconds, compilation included."
    return f"{text}\n{folder.path / 'curves.png'} shows it, {folder.path / 'metrics.csv'} has the numbers."
