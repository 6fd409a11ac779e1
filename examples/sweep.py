"""Many runs of one experiment, over presets, hyperparameters and seeds: `python -m examples.sweep --help`."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from . import imdb, mnist, modular, qm9, shakespeare
from .harness import plots
from .harness.config import RunConfig
from .harness.errors import UserError, plain_errors
from .harness.optimizers import HYPER, make_tx
from .harness.records import Row, best, is_finite, judged_by, step_reached, to_row, told
from .harness.run_folder import provenance, write_whole
from .harness.train import Program, Task, program

EXPERIMENTS: dict[str, ModuleType] = {
    "modular": modular,
    "mnist": mnist,
    "qm9": qm9,
    "imdb": imdb,
    "shakespeare": shakespeare,
}

Finished = Callable[[RunConfig, Sequence[Row]], bool]
Kept = Callable[[Sequence[Row]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train every preset with every combination of values and every seed.

    The results of a run are kept in OUT/runs/ as soon as it is done; the same command goes on where it was stopped. At
    the end OUT holds curves.csv (every record), runs.csv (one row a run), table.md and sweep.png.
    """

    experiment: Annotated[Literal["modular", "mnist", "qm9", "imdb", "shakespeare"], tyro.conf.Positional]
    """Which experiment to run."""
    out: Path
    """Folder for the results."""
    presets: tuple[str, ...]
    """Presets of the experiment to start from."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every combination."""
    grid: tuple[str, ...] = ()
    """Flags of the experiment and the value or values to combine, such as lamb=1,2,5 or budget=5000."""
    group_size: int = 1
    """Runs to train at once in one vmapped program; only seeds and numbers such as alpha, lamb, lr and weight_decay
    may differ within it. On a GPU as many as fit its memory; on a CPU 1 is as fast and stops earlier."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it stands in the grid, and its configuration."""

    axes: dict[str, str]
    config: RunConfig

    @property
    def name(self) -> str:
        """File name."""
        return "_".join([*(f"{k}-{v}" for k, v in self.axes.items()), f"seed-{self.config.seed}"]).replace("/", "-")


def cells(sweep: Sweep) -> list[Cell]:
    """All runs of a sweep; seeds vary fastest."""
    module = EXPERIMENTS[sweep.experiment]
    axes: list[tuple[str, list[str]]] = []
    for item in sweep.grid:
        name, _, values = item.partition("=")
        if not values or name not in {field.name for field in dataclasses.fields(module.Config)}:
            raise UserError(
                f"--grid must be FLAG=VALUE,VALUE with a flag of {sweep.experiment} such as lamb, got {item!r}"
            )
        if name == "seed" or name in dict(axes):
            raise UserError(f"--grid must name a flag once, and seeds by --seeds, got {item!r}")
        axes.append((name, values.split(",")))
    result = []
    for preset in sweep.presets:
        if preset not in module.PRESETS:
            raise UserError(f"--presets must be among {', '.join(module.PRESETS)}, got {preset!r}")
        for values in itertools.product(*(values for _, values in axes)):
            flags = [word for (name, _), value in zip(axes, values, strict=True) for word in (f"--{name}", value)]
            config = tyro.cli(
                module.Config, args=flags, default=module.PRESETS[preset], config=(tyro.conf.FlagConversionOff,)
            )
            for seed in sweep.seeds:
                place = {"preset": preset}
                place |= {name: v for (name, choice), v in zip(axes, values, strict=True) if len(choice) > 1}
                result.append(Cell(place, dataclasses.replace(config, seed=seed)))
    if not result:
        raise UserError("--presets and --seeds must name at least one each")
    if len({cell.name for cell in result}) < len(result):
        raise UserError("--presets, --seeds and --grid must not name anything twice")
    return result


def static(config: RunConfig) -> RunConfig:
    """`config` without what may differ within one compiled program."""
    return dataclasses.replace(config, seed=0, **dict.fromkeys(HYPER, 0.0))


@functools.lru_cache(maxsize=1)
def compiled_program(config: RunConfig, size: int) -> tuple[Task, Program]:
    """The task and the program of all groups of `size` runs with this static configuration."""
    task, make = config.task(), functools.partial(make_tx, config)
    if size == 1:
        return task, program(task, make)
    example = {name: jnp.zeros(size) for name in HYPER}, jnp.stack([jax.random.key(0)] * size)
    return task, program(task, make, example=example)


def groups(todo: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Runs that one vmapped program can train together."""
    key = lambda cell: repr(static(cell.config))
    for _, group in itertools.groupby(sorted(todo, key=key), key):
        members = list(group)
        for i in range(0, len(members), size):
            yield members[i : i + size]


def reached(config: RunConfig, rows: Sequence[Row]) -> bool:
    """Whether a run has got where it is to stop."""
    return config.stop_at is not None and step_reached(rows, config.stop_at, config.hold) is not None


def train_group(group: Sequence[Cell], bar: tqdm.tqdm, finished: Finished = reached) -> list[list[Row]]:
    """The records of each run of a group, trained until the budget is spent or all have finished or gone wrong."""
    config = group[0].config
    task, compiled = compiled_program(static(config), len(group))
    keys = [jax.random.key(cell.config.seed) for cell in group]
    hypers = [cell.config.hyper() for cell in group]
    if len(group) == 1:
        hyper, key = hypers[0], keys[0]
    else:
        hyper, key = {name: jnp.array([h[name] for h in hypers]) for name in HYPER}, jnp.stack(keys)
    state = compiled.init(hyper, key)
    records: list[list[Row]] = [[] for _ in group]
    done = [False] * len(group)
    for step in range(task.steps, config.budget + task.steps, task.steps):
        state, metrics = compiled.advance(hyper, key, state)
        metrics = jax.device_get({name: metric for name, metric in metrics.items() if name != "losses"})
        for i, rows in enumerate(records):
            if not done[i]:
                rows.append(to_row(step, {name: np.atleast_1d(metric)[i] for name, metric in metrics.items()}))
                done[i] = finished(config, rows) or not is_finite(rows[-1])
        bar.update(task.steps * len(group))
        now = told(judged_by(records[0][0]), best([rows[-1] for rows in records]))
        bar.set_postfix_str(f"{group[0].name} step {step:,} val {now}", refresh=False)
        if all(done):
            break
    return records


def summarise(results: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """One row a run: where it stands, where it got, and when it first reached each threshold."""
    table = []
    for result in results:
        rows = to_rows(result)
        finite, accuracy = [row for row in rows if is_finite(row)], judged_by(rows[0]) == "accuracy"
        table.append(
            {
                **result["axes"],
                "seed": result["config"]["seed"],
                "last_step": int(rows[-1]["step"]),
                "finite": is_finite(rows[-1]),
                **({"best_val_accuracy": best(finite) if finite else float("nan")} if accuracy else {}),
                "min_val_loss": min((row["val_loss"] for row in finite), default=float("nan")),
                **{f"steps_to_{100 * t:g}": step_reached(rows, t) for t in thresholds},
                "device": result["device"],
                "jax": result["versions"]["jax"],
            }
        )
    return table


def to_rows(result: dict[str, Any]) -> list[Row]:
    """The records in a result file, row by row."""
    columns = result["records"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def spread(values: Sequence[float | None], form: str, worst: float = math.inf) -> str:
    """Median and range; None or NaN stands for a run that has no such value, and counts as the `worst` there is."""
    values = [None if value is None or math.isnan(value) else value for value in values]
    numbers = sorted(worst if value is None else value for value in values)
    low, middle, high = (
        format(x, form) if math.isfinite(x) else "never" for x in (numbers[0], statistics.median(numbers), numbers[-1])
    )
    missed = sum(value is None for value in values)
    return (
        low
        if low == high
        else f"{middle} ({low} to {high})" + (f", {missed} of {len(values)} missed" if missed else "")
    )


def markdown(table: Sequence[dict[str, Any]], axes: Sequence[str], thresholds: Sequence[float]) -> str:
    """Median and range over the seeds of every combination, as a Markdown table."""
    columns = {f"steps_to_{100 * t:g}": (f"steps to {100 * t:g} %", 1, ",.0f", math.inf) for t in thresholds}
    if "best_val_accuracy" in table[0]:
        columns["best_val_accuracy"] = ("best val. accuracy (%)", 100, ".1f", -math.inf)
    columns["min_val_loss"] = ("lowest val. loss", 1, ".3g", math.inf)
    lines = [
        " | ".join(["", *axes, "seeds", *(title for title, *_ in columns.values()), ""]),
        "|---" * (len(axes) + len(columns) + 1) + "|",
    ]
    for place, group in itertools.groupby(table, lambda row: [row[axis] for axis in axes]):
        runs = list(group)
        spreads = [
            spread([None if run[name] is None else scale * run[name] for run in runs], form, worst)
            for name, (_, scale, form, worst) in columns.items()
        ]
        lines.append(" | ".join(["", *place, str(len(runs)), *spreads, ""]))
    return "\n".join(line.strip() for line in lines) + "\n"


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal columns as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def report(sweep: Sweep, results: Sequence[dict[str, Any]]) -> str:
    """Write curves.csv, runs.csv, table.md and sweep.png; returns the table."""
    thresholds = EXPERIMENTS[sweep.experiment].THRESHOLDS
    axes = list(results[0]["axes"])
    table = summarise(results, thresholds)
    lines = [{**r["axes"], "seed": r["config"]["seed"], **row} for r in results for row in to_rows(r)]
    write_whole(sweep.out / "curves.csv", to_csv(lines))
    write_whole(sweep.out / "runs.csv", to_csv(table))
    text = markdown(table, axes, thresholds)
    write_whole(sweep.out / "table.md", text)

    varied = [axis for axis in axes if len({row[axis] for row in table}) > 1]
    if len(varied) == 2 and "preset" not in varied:
        y, x = varied
        values = {axis: list(dict.fromkeys(row[axis] for row in table)) for axis in varied}
        if thresholds:
            name, what, form = f"steps_to_{100 * thresholds[-1]:g}", f"steps to {thresholds[-1]:.0%} accuracy", ",.0f"
        else:
            name, what, form = "min_val_loss", "lowest loss", ".3g"
        median = np.full((len(values[y]), len(values[x])), np.nan)
        for (i, row), (j, column) in itertools.product(enumerate(values[y]), enumerate(values[x])):
            median[i, j] = np.median([r[name] or np.inf for r in table if r[y] == row and r[x] == column])
        median[np.isinf(median)] = np.nan
        title = f"{sweep.experiment}: median {what} on the validation examples"
        figure = plots.heat_map(median, (x, values[x]), (y, values[y]), title, form)
    else:
        runs: dict[str, list[list[Row]]] = {}
        for result in results:
            label = ", ".join(v if k == "preset" else f"{k} {v}" for k, v in result["axes"].items() if k in varied)
            runs.setdefault(label or sweep.presets[0], []).append(to_rows(result))
        figure = plots.bands(runs, f"{sweep.experiment}: median and range of the seeds")
    plots.save(figure, sweep.out / "sweep.png")
    return text


def in_full(rows: Sequence[Row]) -> dict[str, Any]:
    """All records of a run, by column."""
    return {"records": {name: [row[name] for row in rows] for name in rows[0]}}


def load(files: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a run, None if it has not been trained yet; UserError if the file is of another configuration."""
    path = files / f"{cell.name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    facts = json.loads(json.dumps(cell.config.facts(), default=str))
    differs = [name for name, value in facts.items() if result["config"].get(name, value) != value]
    if differs:
        raise UserError(f"{path} was made with another {', '.join(differs)}; delete it, or choose another --out")
    return result


def train_missing(
    every: Sequence[Cell], files: Path, group_size: int, kept: Kept = in_full, finished: Finished = reached
) -> None:
    """Train the runs that have no file in `files` yet; what is `kept` of one's records is written once it is done."""
    todo = [cell for cell in every if load(files, cell) is None]
    with tqdm.tqdm(total=sum(cell.config.budget for cell in todo), unit="step", disable=not todo) as bar:
        for group in groups(todo, group_size):
            start = time.perf_counter()
            for cell, rows in zip(group, train_group(group, bar, finished), strict=True):
                result = {
                    "axes": cell.axes,
                    "config": cell.config.facts(),
                    **provenance(),
                    "group_size": len(group),
                    "group_seconds": round(time.perf_counter() - start, 1),
                    **kept(rows),
                }
                write_whole(files / f"{cell.name}.json", json.dumps(result, default=str) + "\n")


def run(sweep: Sweep) -> None:
    """Train what is missing, then report."""
    if sweep.group_size < 1:
        raise UserError(f"--group-size must be at least 1, got {sweep.group_size}")
    every = cells(sweep)
    parts = {name: value for name, value in dataclasses.asdict(sweep).items() if name not in ("out", "group_size")}
    plan = json.dumps(parts, indent=2) + "\n"
    plan_file = sweep.out / "sweep.json"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise UserError(f"{sweep.out} holds another sweep; repeat the command in {plan_file}, or choose another --out")
    if not plan_file.exists() and sweep.out.exists() and any(sweep.out.iterdir()):
        raise UserError(f"{sweep.out} exists already and holds no sweep; choose another --out")
    files = sweep.out / "runs"
    files.mkdir(parents=True, exist_ok=True)
    write_whole(plan_file, plan)
    train_missing(every, files, sweep.group_size)
    print(report(sweep, [result for cell in every if (result := load(files, cell))]))
    print(f"results in {sweep.out}")


def main() -> None:
    """Run the sweep of the command line."""
    run(tyro.cli(Sweep, prog="python -m examples.sweep"))


if __name__ == "__main__":
    sys.exit(plain_errors(main))
