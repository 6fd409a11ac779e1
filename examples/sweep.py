"""Many runs of one experiment, over presets, hyperparameters and seeds: `python -m examples.sweep --help`."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro

from .harness import plots
from .harness.config import Config, Experiment, find_experiment
from .harness.errors import UsageError, UserError, plain_errors, require
from .harness.files import provenance, write_whole
from .harness.records import Row, best, is_finite, selection_metric, step_reached
from .harness.sweep import train_all
from .harness.tables import markdown, median_and_range


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train every preset with every combination of values and every seed.

    The results of a run are kept in OUT/runs/ as soon as it is done; the same command continues where it was stopped.
    At the end OUT holds curves.csv (every record), runs.csv (one row per run), table.md and sweep.png.

    Example: python -m examples.sweep modular --presets ema ma --seeds 0 1 2 --grid lr=0.001,0.003 --out runs/rates
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """Which experiment to run: a name that python -m examples lists, or an importable module with an EXPERIMENT."""
    out: Path
    """Folder for the results."""
    presets: tuple[str, ...]
    """Presets of the experiment to start from."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every combination."""
    grid: tuple[str, ...] = ()
    """Flags of the experiment and the value or values to combine, such as lamb=1,2,5 or budget=5000."""
    group_size: int = 1
    """Runs to train at once in one vmapped program; only seeds and alpha, lamb, fast, lr and weight_decay may differ
    within it. On a GPU as many as fit its memory; on a CPU 1 is as fast and stops earlier."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it stands in the grid, and its configuration."""

    axes: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """File name."""
        return "_".join([*(f"{k}-{v}" for k, v in self.axes.items()), f"seed-{self.config.run.seed}"]).replace("/", "-")


def cells(sweep: Sweep, experiment: Experiment) -> list[Cell]:
    """All runs of a sweep; seeds vary fastest."""
    axes: dict[str, list[str]] = {}
    for item in sweep.grid:
        name, _, values = item.partition("=")
        if not values or name not in experiment.base.flat():
            raise UsageError(
                f"--grid must be FLAG=VALUE,VALUE with a flag of {experiment.name} such as lamb, got {item!r}"
            )
        if name == "seed" or name in axes:
            raise UsageError(f"--grid must name a flag once, and seeds by --seeds, got {item!r}")
        axes[name] = values.split(",")
    result = []
    for preset, *values in itertools.product(sweep.presets, *axes.values()):
        if preset not in experiment.presets:
            raise UsageError(f"--presets must be among {', '.join(experiment.presets)}, got {preset!r}")
        flags = dict(zip(axes, values, strict=True))
        config = with_flags(experiment.preset(preset), flags)
        varied = {name: value for name, value in flags.items() if len(axes[name]) > 1}
        result += [Cell({"preset": preset, **varied}, config.replace(seed=seed)) for seed in sweep.seeds]
    if not result:
        raise UsageError("--presets and --seeds must name at least one each")
    if len({cell.name for cell in result}) < len(result):
        raise UsageError("--presets, --seeds and --grid must not name anything twice")
    return result


def with_flags(config: Config, flags: dict[str, str]) -> Config:
    """A configuration with some flags given as text."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    return tyro.cli(type(config), args=words, default=config, config=options)


def to_rows(result: dict[str, Any]) -> list[Row]:
    """The records in a result file, row by row."""
    columns = result["records"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load(path: Path, config: Config) -> dict[str, Any] | None:
    """The result of a run, None if it has not been trained yet; UserError if the file is of another configuration."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
        stored, rows = result["config"], to_rows(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it, and the run is trained again"
        ) from error
    facts = json.loads(json.dumps(config.facts(), default=str))
    differs = sorted(name for name in facts.keys() | stored.keys() if facts.get(name) != stored.get(name))
    if differs or not rows:
        raise UserError(f"{path} was made with another {', '.join(differs)}; delete it, or choose another --out")
    return result


def summarise(results: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> pd.DataFrame:
    """One row per run: where it stands, where it got, and when it first reached each threshold."""
    table = []
    for result in results:
        rows = to_rows(result)
        finite = [row for row in rows if is_finite(row)]
        line = {**result["axes"], "seed": result["config"]["seed"]}
        line |= {"last_step": int(rows[-1]["step"]), "finite": is_finite(rows[-1])}
        if selection_metric(rows[0]) == "accuracy":
            line["best_val_accuracy"] = best(finite) if finite else np.nan
        line["min_val_loss"] = min((row["val_loss"] for row in finite), default=np.nan)
        line |= {f"steps_to_{100 * t:g}": step_reached(rows, t) for t in thresholds}
        table.append(line | {"device": result["device"], "jax": result["versions"]["jax"]})
    frame = pd.DataFrame(table)
    return frame.astype({name: "Int64" for name in frame if name.startswith("steps_to_")})


def table(runs: pd.DataFrame, axes: Sequence[str], thresholds: Sequence[float]) -> str:
    """Median and range over the seeds of every combination, as a Markdown table."""
    columns = {f"steps_to_{100 * t:g}": (f"steps to {100 * t:g} %", 1, ",.0f", np.inf) for t in thresholds}
    if "best_val_accuracy" in runs:
        columns["best_val_accuracy"] = ("best val. accuracy (%)", 100, ".1f", -np.inf)
    columns["min_val_loss"] = ("lowest val. loss", 1, ".3g", np.inf)
    lines = []
    for _, group in runs.groupby(list(axes), sort=False):
        values = {
            title: median_and_range(scale * group[name].to_numpy(float, na_value=np.nan), form, worst)
            for name, (title, scale, form, worst) in columns.items()
        }
        lines.append({**group.iloc[0][list(axes)], "seeds": len(group), **values})
    return markdown(lines)


def report(sweep: Sweep, experiment: Experiment, results: Sequence[dict[str, Any]]) -> str:
    """Write curves.csv, runs.csv, table.md and sweep.png; returns the table."""
    axes = list(results[0]["axes"])
    runs = summarise(results, experiment.thresholds)
    places = [{**result["axes"], "seed": result["config"]["seed"]} for result in results]
    records = [pd.DataFrame(result["records"]).astype({"step": int}) for result in results]
    curves = pd.concat(records, keys=[tuple(place.values()) for place in places], names=[*places[0]]).droplevel(-1)
    write_whole(sweep.out / "curves.csv", curves.to_csv())
    write_whole(sweep.out / "runs.csv", runs.to_csv(index=False))
    text = table(runs, axes, experiment.thresholds)
    write_whole(sweep.out / "table.md", text)

    varied = [axis for axis in axes if len(set(runs[axis])) > 1]
    if len(varied) == 2 and "preset" not in varied:
        y, x = varied
        name, what, form = "min_val_loss", "lowest loss", ".3g"
        if experiment.thresholds:
            last = experiment.thresholds[-1]
            name, what, form = f"steps_to_{100 * last:g}", f"steps to {last:.0%} accuracy", ",.0f"
        order = {axis: list(dict.fromkeys(runs[axis])) for axis in varied}
        values = runs.assign(value=runs[name].astype(float).fillna(np.inf))
        median = values.pivot_table("value", y, x, "median", sort=False).loc[order[y], order[x]]
        title = f"{experiment.name}: median {what} on the validation examples"
        figure = plots.heat_map(median.replace(np.inf, np.nan), title, form)
    else:
        labelled: dict[str, list[list[Row]]] = {}
        for result in results:
            label = ", ".join(v if k == "preset" else f"{k} {v}" for k, v in result["axes"].items() if k in varied)
            labelled.setdefault(label or sweep.presets[0], []).append(to_rows(result))
        figure = plots.bands(labelled, f"{experiment.name}: median and range of the seeds")
    plots.save(figure, sweep.out / "sweep.png")
    return text


def run(sweep: Sweep) -> None:
    """Train what is missing, then report."""
    require(sweep.group_size >= 1, "group_size", "at least 1", sweep.group_size)
    experiment = find_experiment(sweep.experiment)
    every = cells(sweep, experiment)
    parts = {name: value for name, value in dataclasses.asdict(sweep).items() if name not in ("out", "group_size")}
    plan, plan_file = json.dumps(parts, indent=2) + "\n", sweep.out / "sweep.json"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise UsageError(f"{sweep.out} holds another sweep; repeat the command in {plan_file}, or choose another --out")
    if not plan_file.exists() and sweep.out.exists() and any(sweep.out.iterdir()):
        raise UsageError(f"{sweep.out} exists already and holds no sweep; choose another --out")
    file = lambda cell: sweep.out / "runs" / f"{cell.name}.json"
    (sweep.out / "runs").mkdir(parents=True, exist_ok=True)
    write_whole(plan_file, plan)
    todo = [cell for cell in every if load(file(cell), cell.config) is None]
    for trained in train_all([cell.config for cell in todo], sweep.group_size):
        cell = todo[trained.number]
        result = {
            "axes": cell.axes,
            "config": cell.config.facts(),
            **provenance(),
            "group_size": trained.group_size,
            "group_seconds": trained.group_seconds,
            "records": {name: [row[name] for row in trained.rows] for name in trained.rows[0]},
        }
        write_whole(file(cell), json.dumps(result, default=str) + "\n")
    print(report(sweep, experiment, [result for cell in every if (result := load(file(cell), cell.config))]))
    print(f"results in {sweep.out}")


def main() -> None:
    """Run the sweep of the command line."""
    run(tyro.cli(Sweep, prog="python -m examples.sweep"))


if __name__ == "__main__":
    sys.exit(plain_errors(main))
