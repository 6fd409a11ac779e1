"""Many runs of one experiment, over methods, hyperparameters and seeds: `python -m examples.sweep --help`."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from examples.harness import plots
from examples.harness.cli import parse
from examples.harness.engine import Results, as_text
from examples.harness.errors import UsageError, plain_errors, require
from examples.harness.experiment import Experiment, Run, find_experiment, nearest
from examples.harness.files import write_whole
from examples.harness.methods import parameters
from examples.harness.tables import markdown, median_and_range


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train every method with every combination of values and every seed.

    Each result is appended to OUT/results.jsonl as soon as its run is done. The same command continues where it was
    stopped, and several processes share the work. At the end OUT holds curves.csv (every record), runs.csv (one row per
    run), table.md and sweep.png.

    Example: python -m examples.sweep modular --methods ema ma --grid lamb=1,2,5 --seeds 0 1 2 --out runs/lamb
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """Which experiment to run: a name that python -m examples lists, or an importable module that has an EXPERIMENT."""
    out: Path
    """Folder for the results."""
    methods: tuple[str, ...]
    """Methods of the experiment."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every combination."""
    grid: tuple[str, ...] = ()
    """Flags of the experiment and the value or values to combine, such as lamb=1,2,5 or max-steps=5000."""
    group_size: int = 1
    """Runs to train at once in one vmapped program, which may differ in the seed and in numbers of the method. On a GPU
    as many as fit its memory; on a CPU 1 is as fast and stops earlier."""


def cells(sweep: Sweep, experiment: Experiment) -> list[tuple[dict[str, str], Run]]:
    """All runs of a sweep, each with its place in the grid; seeds vary fastest."""
    axes: dict[str, list[str]] = {}
    for item in sweep.grid:
        name, _, values = item.partition("=")
        if not values:
            raise UsageError(
                f"--grid must be FLAG=VALUE,VALUE with a flag of {experiment.name} such as lamb, got {item!r}"
            )
        if (name := name.replace("-", "_")) == "seed" or name in axes:
            raise UsageError(f"--grid must name a flag once, and seeds by --seeds, got {item!r}")
        axes[name] = values.split(",")
    require(bool(sweep.methods), "methods", "one or more methods", sweep.methods)
    require(bool(sweep.seeds), "seeds", "one or more seeds", sweep.seeds)
    found = []
    for label, *values in itertools.product(sweep.methods, *axes.values()):
        flags = dict(zip(axes, values, strict=True))
        run = run_of(experiment, label, flags)
        place = {"method": label} | {name: value for name, value in flags.items() if len(axes[name]) > 1}
        found += [(place, dataclasses.replace(run, seed=seed, group_size=sweep.group_size)) for seed in sweep.seeds]
    if len({as_text(run.key) for _, run in found}) < len(found):
        raise UsageError("--methods, --seeds and --grid must not name any run twice")
    return found


def run_of(experiment: Experiment, label: str, flags: dict[str, str]) -> Run:
    """The run of a method with some flags, given as text."""
    nearest("--methods", label, experiment.methods)
    task = [field.name for field in dataclasses.fields(experiment.task)]
    known = [*parameters(experiment.methods[label]), *task, "max_steps", "stop_at", "hold_evals"]
    for name in flags:
        nearest(f"a flag of --grid for {label}", name, known)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return parse(experiment, [label, *words])[0]


def table(frame: pd.DataFrame, axes: Sequence[str], thresholds: Sequence[float]) -> str:
    """Median and range over the seeds of every combination, as a Markdown table."""
    columns = {f"steps_to_{100 * t:g}": (f"steps to {100 * t:g} %", 1, ",.0f", np.inf) for t in thresholds}
    if "best_val_accuracy" in frame:
        columns["best_val_accuracy"] = ("best val. accuracy (%)", 100, ".1f", -np.inf)
    columns["min_val_loss"] = ("lowest val. loss", 1, ".3g", np.inf)
    lines = []
    for _, group in frame.groupby(list(axes), sort=False):
        values = {
            title: median_and_range(scale * group[name].astype(float).replace(np.inf, np.nan).to_numpy(), form, worst)
            for name, (title, scale, form, worst) in columns.items()
        }
        lines.append({**group.iloc[0][list(axes)], "seeds": len(group), **values})
    return markdown(lines)


def picture(experiment: Experiment, frame: pd.DataFrame, axes: Sequence[str]) -> Figure:
    """A map of the medians if two axes of numbers vary, the curves of every combination otherwise."""
    thresholds, varied = experiment.task.thresholds, [axis for axis in axes if len(set(frame[axis])) > 1]
    if len(varied) == 2 and "method" not in varied:
        name, shown, form = "min_val_loss", "lowest loss", ".3g"
        if thresholds:
            name, shown, form = f"steps_to_{100 * thresholds[-1]:g}", f"steps to {thresholds[-1]:.0%} accuracy", ",.0f"
        y, x = ([*dict.fromkeys(frame[axis])] for axis in varied)
        median = frame.pivot_table(name, varied[0], varied[1], "median", sort=False).loc[y, x].replace(np.inf, np.nan)
        return plots.heat_map(median, f"{experiment.name}: median {shown} on the validation examples", form)
    groups = {}
    for _, group in frame.groupby(list(axes), sort=False):
        first = group.iloc[0]
        label = ", ".join(first[axis] if axis == "method" else f"{axis} {first[axis]}" for axis in varied)
        groups[label or first["method"]] = [pd.DataFrame(curve).to_dict("records") for curve in group["curve"]]
    return plots.bands(groups, f"{experiment.name}: median and range of the seeds", experiment.task.metric)


def run(sweep: Sweep) -> None:
    """Train what is missing, then report: every record, a row per run, a table and a picture."""
    experiment = find_experiment(sweep.experiment)
    places, runs = zip(*cells(sweep, experiment), strict=True)
    results = Results(sweep.out / "results.jsonl", trains=True, keep_curves=True)
    if not results.path.exists() and sweep.out.exists() and any(sweep.out.iterdir()):
        raise UsageError(f"{sweep.out} exists already and holds no sweep; choose another --out")
    stored = results.by_key().values()
    if any(line["run"].get("task") != runs[0].key["task"] or "curve" not in line for line in stored):
        raise UsageError(f"{results.path} holds what no sweep of {experiment.name} made; choose another --out")
    frame, grid = results.of(runs), pd.DataFrame(places)
    axes = list(grid.columns)
    frame = frame.drop(columns=axes, errors="ignore").join(grid)
    place = lambda row: {axis: row[axis] for axis in (*axes, "seed")}
    curves = [pd.DataFrame(row["curve"]).assign(**place(row)) for row in frame.to_dict("records")]
    text = table(frame, axes, experiment.task.thresholds)
    write_whole(sweep.out / "curves.csv", pd.concat(curves).set_index([*axes, "seed", "step"]).to_csv())
    write_whole(sweep.out / "runs.csv", frame.drop(columns="curve").replace(np.inf, np.nan).to_csv(index=False))
    write_whole(sweep.out / "table.md", text)
    plots.save(picture(experiment, frame, axes), sweep.out / "sweep.png")
    print(f"{text}\nresults in {sweep.out}")


def main() -> None:
    """Run the sweep of the command line."""
    run(tyro.cli(Sweep, prog="python -m examples.sweep"))


if __name__ == "__main__":
    sys.exit(plain_errors(main))
