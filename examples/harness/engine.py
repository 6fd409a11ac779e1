"""Many runs: train those that a file lacks, one JSON line per run, and read them as one frame."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pandas as pd
import tqdm

from .errors import UserError
from .experiment import Run, make_run
from .files import fingerprint, provenance
from .loop import evaluations, progress_bar, stack
from .methods import Method
from .records import Row, is_finished, outcome
from .task import Data, Task
from .train import Program, TrainState, program


def product(task: Task, method: Method, **values: Any) -> list[Run]:
    """Runs with all combinations of values, the last of which varies fastest.

    Hyperparameters of the method and the fields of `Rule` have one value each, or a list, range or tuple of values.
    """
    axes = [value if isinstance(value, list | range | tuple) else [value] for value in values.values()]
    return [make_run(task, method, **dict(zip(values, point, strict=True))) for point in itertools.product(*axes)]


def as_text(key: Mapping[str, Any]) -> str:
    """A key in its one spelling: 1 and 1.0 are the same number."""
    is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps({name: float(v) if is_number(v) else v for name, v in key.items()}, sort_keys=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The results in a file, and the runs that it lacks.

    The file has one JSON object per line. One kind says where results come from (device, versions, commit), with an id.
    The other has the key of a `run`, what is stored of it, and that id as its `provenance`.
    """

    path: Path
    _: dataclasses.KW_ONLY
    trains: bool = False  # whether `of` trains runs that the file lacks
    keep_curves: bool = False  # whether the records of every evaluation are stored
    # A pure function of task, state and data to numbers by name, which are measured at every evaluation.
    measure: Callable[[Task, TrainState, Data], dict[str, jax.Array]] | None = None
    reduce: Callable[[list[Any]], Any] = list  # of the values of one such number over a run, what is stored
    # A run, its record and state after every evaluation, and its data, to what is stored; for runs that are trained
    # alone. The next evaluation overwrites the state.
    observe: Callable[[Run, Iterator[tuple[Row, TrainState]], Data], dict[str, Any]] | None = None

    def of(self, runs: Iterable[Run]) -> pd.DataFrame:
        """The results of some runs, one row per run in their order; rows of runs without a result are left out."""
        runs = list(runs)
        if self.trains:
            self._train(runs)
        rows = self.by_key()
        keys = dict.fromkeys(as_text(run.key) for run in runs)
        found = [rows[key] for key in keys if key in rows]
        return to_frame(found) if found else pd.DataFrame(columns=[*runs[0].key] if runs else [])

    def frame(self) -> pd.DataFrame:
        """All results in the file, one row per run."""
        return to_frame(self.by_key().values())

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs without a result, each once."""
        stored = self.by_key()
        return [run for key, run in {as_text(run.key): run for run in runs}.items() if key not in stored]

    def by_key(self) -> dict[str, dict[str, Any]]:
        """All results by the text of their key; of two results of one run, the later."""
        return {as_text(line["run"]): line for line in self._lines() if "run" in line}

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Append results in one write: the key of each `run`, and its outcome; of runs of one group, as one line."""
        origin = provenance()
        name = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:8]
        with filelock.FileLock(f"{self.path}.lock"), self.path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # drop a line that a crash left incomplete
            known = any("run" not in line and line["provenance"] == name for line in self._lines())
            lines = [] if known else [{"provenance": name, **origin}]
            lines += [{**line, "provenance": name} for line in stacked(results)]
            file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def check_data(self, run: Run, data: str) -> None:
        """UserError if the file has results of the run's task on other data, which the keys of runs do not tell."""
        task = {name: value for name, value in run.key.items() if name in ("task", *vars(run.task))}
        for line in self.by_key().values():
            if task.items() <= line["run"].items() and line.get("data", data) != data:
                raise UserError(
                    f"{self.path} has results of {task['task']} on other data; name their folder with --data-dir, "
                    "or keep these results in another file"
                )

    def _lines(self) -> Iterator[dict[str, Any]]:
        text = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(text.split(b"\n")[:-1], 1):
            try:
                content = json.loads(line)
                content["provenance"]
                results = unstacked(content)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path}, line {number} is damaged; delete the line, and its run is trained again"
                ) from error
            yield from results

    def _train(self, runs: Sequence[Run]) -> None:
        """Train what is missing, program by program; other processes may do the same beside this one."""
        todo, compiled, ours = self.missing(runs), {}, []
        with progress_bar(len(todo), "run", disable=not todo) as bar:
            # First what no other process trains, then what others have not finished.
            for wait, group in itertools.product((False, True), grouped(todo)):
                if group in ours:
                    continue
                with self._claimed(group, wait=wait) as is_ours:
                    if is_ours and self.missing(group):
                        if group[0].program_key not in compiled:
                            compiled = {group[0].program_key: program(group[0])}
                        results = train_group(compiled[group[0].program_key], group, bar, self)
                        self.append([{"run": run.key, **found} for run, found in zip(group, results, strict=True)])
                        ours.append(group)
                        bar.update(len(group))

    @contextlib.contextmanager
    def _claimed(self, group: Sequence[Run], *, wait: bool) -> Iterator[bool]:
        """Keep other processes from training a group; False if another one trains it, and `wait` is False."""
        digest = hashlib.sha256("".join(as_text(run.key) for run in group).encode()).hexdigest()[:12]
        path = self.path.with_name(f".{self.path.stem}.{digest}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path, timeout=-1 if wait else 0):
                yield True
                path.unlink(missing_ok=True)
        except filelock.Timeout:
            yield False


def stacked(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Results of runs that were trained at once, as one line; results of runs that were trained alone, as they are.

    What differs between the runs is a list within `run`, and the other fields are lists with an entry for each run.
    """
    keys = [result["run"] for result in results]
    if len(keys) < 2 or any(key["group_size"] == 1 for key in keys):
        return list(results)
    columns = {name: [key[name] for key in keys] for name in keys[0]}
    run = {name: values[0] if len(set(values)) == 1 else values for name, values in columns.items()}
    names = dict.fromkeys(name for result in results for name in result if name != "run")
    return [{"run": run} | {name: [result.get(name) for result in results] for name in names}]


def unstacked(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results in a line, one for each run."""
    run = line.get("run", {})
    varied = {name: values for name, values in run.items() if isinstance(values, list)}
    if not varied:
        return [dict(line)]
    stored = {name: values for name, values in line.items() if name not in ("run", "provenance")}
    entry = lambda columns, i: {name: values[i] for name, values in columns.items()}
    return [
        {"run": run | entry(varied, i), **entry(stored, i), "provenance": line["provenance"]}
        for i in range(len(next(iter(varied.values()))))
    ]


def to_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Results as a frame; the steps to a threshold that was not reached are infinite."""
    frame = pd.DataFrame([line["run"] | {k: v for k, v in line.items() if k != "run"} for line in results])
    steps = [name for name in frame if name.startswith("steps_to_") or name == "fit_steps"]
    return frame.assign(**{name: frame[name].astype(float).fillna(np.inf) for name in steps})


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that one program trains at once, in their order."""
    by_program: dict[Any, list[Run]] = {}
    for run in runs:
        by_program.setdefault((run.program_key, run.max_steps, run.stop_at, run.hold_evals), []).append(run)
    return [
        members[first : first + members[0].group_size]
        for members in by_program.values()
        for first in range(0, len(members), members[0].group_size)
    ]


def train_group(compiled: Program, group: Sequence[Run], bar: tqdm.tqdm, results: Results) -> list[dict[str, Any]]:
    """Train the runs of a group to their ends, and return what is stored of each.

    A run ends by its rule, or when its loss is no longer finite. A group that lacks runs is filled with its last run:
    all groups of one size then have the same program and the same rounding.
    """
    filled = [*group, *[group[-1]] * (group[0].group_size - len(group))]
    hypers, keys = [run.traced for run in filled], [jax.random.key(run.seed) for run in filled]
    hyper, key = (hypers[0], keys[0]) if len(filled) == 1 else (stack(hypers), stack(keys))
    data = compiled.draw(key)
    files = {"data": fingerprint(data[0])} if data[0] else {}  # the arrays that the task read from files
    if files:
        results.check_data(group[0], files["data"])
    rows: list[list[Row]] = [[] for _ in group]
    measured: list[dict[str, list[Any]]] = [{} for _ in group]
    done = [False] * len(group)

    def history() -> Iterator[tuple[Row, TrainState]]:
        for evaluation in evaluations(compiled, hyper, key, data=data):
            numbers = {}
            if results.measure is not None:
                numbers = jax.device_get(compiled.per_run(results.measure)(evaluation.state, *data))
            for i, run in enumerate(group):
                if not done[i]:
                    rows[i].append(evaluation.rows[i])
                    for name, value in numbers.items():
                        measured[i].setdefault(name, []).append(four_digits(value if len(filled) == 1 else value[i]))
                    done[i] = is_finished(run, rows[i]) or evaluation.diverged_at[i] is not None
            bar.set_postfix_str(f"{len(group)} at once, step {evaluation.step:,}", refresh=False)
            bar.update(0)
            yield evaluation.rows[0], evaluation.state
            if all(done):
                return

    states, observed = history(), {}
    if results.observe is not None:
        if len(filled) > 1:
            raise ValueError(f"group_size must be 1 where runs are observed, got {len(filled)}")
        with jax.default_matmul_precision("float32"):
            observed = results.observe(group[0], states, {**data[0], **data[1]})
    for _ in states:
        pass
    found = []
    for run, run_rows, numbers in zip(group, rows, measured, strict=True):
        curve = {"curve": {name: [row[name] for row in run_rows] for name in run_rows[0]}}
        reduced = {name: results.reduce(values) for name, values in numbers.items()}
        found.append(outcome(run, run_rows) | (curve if results.keep_curves else {}) | observed | reduced | files)
    return found


def four_digits(value: Any) -> Any:
    """A number, or an array as nested lists, with four significant digits."""
    if np.ndim(value):
        return [four_digits(one) for one in value]
    return float(f"{value:.4g}")
