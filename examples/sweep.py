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

from examples.harness import plots
from examples.harness.cli import parse
from examples.harness.engine import Results, as_text
from examples.harness.errors import UsageError, plain_errors
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

    experiment: Annotated[str, tyro.conf.Positional]  # Name of an experiment, or of a module that has an EXPERIMENT.
    out: Path  # Folder for the results.
    methods: tuple[str, ...]  # Methods of the experiment.
    seeds: tuple[int, ...] = (0,)  # Seeds of every combination.
    grid: tuple[str, ...] = ()  # Flags and the values to combine, such as lamb=1,2,5 or max-steps=5000.
    group_size: int = 1  # Runs to train at once, vmapped: on a GPU as many as fit; on a CPU 1 is as fast.


def cells(sweep: Sweep, experiment: Experiment) -> list[tuple[dict[str, str], Run]]:
    """All runs of a sweep, each with its place in the grid; seeds vary fastest."""
    axes: dict[str, list[str]] = {}
    for item in sweep.grid:
        flag, _, values = item.partition("=")
        name = flag.replace("-", "_")
        if not values or name == "seed" or name in axes:
            raise UsageError(f"--grid must be FLAG=VALUE,VALUE, each flag once, and --seeds for seeds, got {item!r}")
        axes[name] = values.split(",")
    found = []
    for label, *values in itertools.product(sweep.methods, *axes.values()):
        flags = dict(zip(axes, values, strict=True))
        run = run_of(experiment, label, flags)
        place = {"method": label} | {name: value for name, value in flags.items() if len(axes[name]) > 1}
        found += [(place, dataclasses.replace(run, seed=seed, group_size=sweep.group_size)) for seed in sweep.seeds]
    if not found or len({as_text(run.key) for _, run in found}) < len(found):
        raise UsageError("--methods, --seeds and --grid must name one run or more, and none twice")
    return found


def run_of(experiment: Experiment, label: str, flags: dict[str, str]) -> Run:
    """The run of a method with some flags, given as text."""
    nearest("--methods", label, experiment.methods)
    task = [field.name for field in dataclasses.fields(experiment.task)]
    for name in flags:
        known = [*parameters(experiment.methods[label]), *task, "max_steps", "stop_at", "hold_evals"]
        nearest(f"a flag of --grid for {label}", name, known)
    return parse(experiment, [label, *itertools.starmap(flag_of, flags.items())])[0]


def flag_of(name: str, value: str) -> str:
    """A flag of the command line; one that is a bool takes no value."""
    flag = name.replace("_", "-")
    return {"True": f"--{flag}", "False": f"--no-{flag}"}.get(value, f"--{flag}={value}")


def table(frame: pd.DataFrame, axes: Sequence[str], thresholds: Sequence[float]) -> str:
    """Median and range over the seeds of every combination, as a Markdown table."""
    columns = {f"steps_to_{100 * t:g}": (f"steps to {100 * t:g} %", 1, ",.0f", np.inf) for t in thresholds}
    if "best_val_accuracy" in frame:
        columns["best_val_accuracy"] = ("best val. accuracy (%)", 100, ".1f", -np.inf)
    columns["min_val_loss"] = ("lowest val. loss", 1, ".3g", np.inf)
    lines = []
    for _, group in frame.groupby(list(axes), sort=False):
        values = {
            title: median_and_range(scale * group[name].to_numpy(float), form, worst)
            for name, (title, scale, form, worst) in columns.items()
        }
        lines.append({**group.iloc[0][list(axes)], "seeds": len(group), **values})
    return markdown(lines)


def run(sweep: Sweep) -> None:
    """Train what is missing, then report: every record, a row per run, a table and a picture."""
    experiment = find_experiment(sweep.experiment)
    places, runs = zip(*cells(sweep, experiment), strict=True)
    results = Results(sweep.out / "results.jsonl", trains=True, keep_curves=True)
    found = sweep.out.iterdir() if sweep.out.exists() and not results.path.exists() else ()
    if any(path.suffix != ".lock" for path in found):  # another process of this sweep may have locked its first runs
        raise UsageError(f"{sweep.out} exists already and holds no sweep; choose another --out")
    frame, grid = results.of(runs), pd.DataFrame(places)
    axes = list(grid.columns)
    frame = frame.drop(columns=axes, errors="ignore").join(grid)
    curves = frame.set_index([*axes, "seed"])["curve"].map(pd.DataFrame)
    records = pd.concat(curves.to_dict(), names=[*axes, "seed"]).droplevel(-1).set_index("step", append=True)
    text = table(frame, axes, experiment.task.thresholds)
    write_whole(sweep.out / "curves.csv", records.to_csv())
    write_whole(sweep.out / "runs.csv", frame.drop(columns="curve").replace(np.inf, np.nan).to_csv(index=False))
    write_whole(sweep.out / "table.md", text)
    labels = np.array([", ".join(f"{axis} {value}" for axis, value in place.items()) for place in places])
    metric, groups = experiment.task.metric, {}
    for label, group in curves.groupby(labels, sort=False):
        groups[str(label)] = [curve.set_index("step")[f"val_{metric}"] for curve in group]
    title = f"{experiment.name}: validation {metric}, median and range of the seeds"
    plots.save(plots.curves(groups, title, metric), sweep.out / "sweep.png")
    print(f"{text}\nresults in {sweep.out}")


def main() -> None:
    """Run the sweep of the command line."""
    run(tyro.cli(Sweep, prog="python -m examples.sweep"))


if __name__ == "__main__":
    sys.exit(plain_errors(main))
