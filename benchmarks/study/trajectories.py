"""The paths that parameters take while a model groks: `python -m benchmarks.study.trajectories --seeds 0 1 2 3 4`.

A is the start, B the first evaluation with 95 % training accuracy, C the first with 95 % validation accuracy. Measured
are the distances between them, and the projection of the paths of several methods, from one and the same start, onto
their two common principal axes. These are found while the models train, without keeping all parameters of all steps.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import tqdm
import tyro
from matplotlib.figure import Figure

from examples.harness.config import Config
from examples.harness.errors import UserError, plain_errors, require
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import program

from .cells import BASE, append, differences, read
from .methods import MAIN, METHODS, THRESHOLD, Variant, check_among, method_of, require_finite

OUT = Path(__file__).parents[1] / "results" / "trajectories.jsonl"


class StreamedPaths:
    """Points of high dimension, kept as coordinates on the `rank` axes that hold most of their sum of squares."""

    def __init__(self, rank: int = 16):
        self.rank = rank
        self.axes: np.ndarray | None = None  # (up to rank, dimension), orthonormal
        self.coordinates = np.zeros((0, 0))  # (points, up to rank)
        self.sum: np.ndarray | float = 0.0  # (dimension,), of all points
        self.squares = 0.0  # sum of squares of all points

    def add(self, points: np.ndarray) -> None:
        """Add points, (points, dimension)."""
        points = points.astype(np.float64)
        self.sum = self.sum + points.sum(axis=0)
        self.squares += float(np.sum(points**2))
        both = np.concatenate([self.axes, points]) if self.axes is not None else points
        # Householder's QR: an orthonormal basis also where points lie in the span of others, or are zero.
        basis, coordinates = np.linalg.qr(both.T)
        old, new = np.split(coordinates.T, [len(both) - len(points)])
        everything = np.concatenate([self.coordinates @ old, new])
        rotation = np.linalg.svd(everything, full_matrices=False)[2][: self.rank].T
        self.axes = (basis @ rotation).T
        self.coordinates = everything @ rotation

    def principal(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates on the two principal axes, (points, 2), and the shares that these hold of the variance of all."""
        centred = self.coordinates - self.coordinates.mean(axis=0)
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        variance = self.squares - np.sum(np.square(self.sum)) / len(centred)
        return left[:, :2] * singular[:2], singular[:2] ** 2 / variance


def vector(params: Any) -> np.ndarray:
    """All parameters in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])


def follow(config: Config, paths: StreamedPaths, bar: tqdm.tqdm, block: int = 16) -> dict[str, Any]:
    """Train one method until B and C, its path from the start being added to `paths`; returns steps and distances."""
    compiled, key = program(config.task), jax.random.key(config.run.seed)
    state = compiled.init(config.hyper, key)
    start = vector(state.params)
    points: dict[str, np.ndarray] = {}
    at: dict[str, int] = {}
    waiting, steps = [np.zeros_like(start)], [0]
    for evaluation in evaluations(compiled, config.hyper, key, state=state):
        (row,), (diverged_at,) = evaluation.rows, evaluation.diverged_at
        require_finite(config, diverged_at)
        here = vector(evaluation.state.params) - start
        steps.append(evaluation.step)
        waiting.append(here)
        for point, metric in (("B", "train_accuracy"), ("C", "val_accuracy")):
            if point not in at and row[metric] >= THRESHOLD:
                points[point], at[point] = here, evaluation.step
        if len(waiting) == block:
            paths.add(np.stack(waiting))
            waiting = []
        bar.update(config.task.steps)
        if len(at) == 2 or evaluation.step >= config.run.budget:
            break
    if waiting:
        paths.add(np.stack(waiting))
    norm = lambda x: float(np.linalg.norm(x.astype(np.float64)))
    distances = {f"A{point}": norm(where) for point, where in points.items()}
    if len(points) == 2:
        distances["BC"] = norm(points["C"] - points["B"])
    return {"at": at, "distances": distances, "start_norm": norm(start), "steps": steps}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Follow several methods from one start, for several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds: the start, the split and the batches."""
    methods: tuple[str, ...] = MAIN
    """Methods, as python -m benchmarks.study --help names them."""
    cap: int = 5_000
    """Steps at most."""
    every: int = 50
    """Steps between the points of a path that are kept in the file."""
    out: Path = OUT
    """File for the results, a line a seed; a seed that is there is not run again."""

    def __post_init__(self) -> None:
        """Validate the flags."""
        check_among("--methods", self.methods)
        require(self.cap >= 1, "cap", "at least 1", self.cap)
        require(self.every >= 1, "every", "at least 1", self.every)


def main(arguments: Arguments) -> None:
    """Run what is missing."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    runs = lambda seed: [Variant(name, {}).run(seed, arguments.cap) for name in arguments.methods]
    done = set()
    for line in read(arguments.out):
        seed = seed_of(line.result)
        expected = {"cells": [differences(config) for config in runs(seed)], "every": arguments.every}
        if any(line.result[name] != value for name, value in expected.items()):
            raise UserError(
                f"{line.place} was made with another --methods, --cap or --every; delete it, or choose another --out"
            )
        done.add(seed)
    todo = [runs(seed) for seed in dict.fromkeys(arguments.seeds) if seed not in done]
    with tqdm.tqdm(total=len(todo) * len(arguments.methods) * arguments.cap, unit="step") as bar:
        for configs in todo:
            paths = StreamedPaths()
            found = [follow(config, paths, bar) for config in configs]
            coordinates, shares = paths.principal()
            first = 0
            for one in found:
                steps = one["steps"]
                kept = [i for i, step in enumerate(steps) if step % arguments.every == 0 or step in one["at"].values()]
                one["steps"] = [steps[i] for i in kept]
                one["path"] = [[round(float(x), 3) for x in coordinates[first + i]] for i in kept]
                first += len(steps)
            cells = [differences(config) for config in configs]
            result = {"cells": cells, "every": arguments.every, "variance": shares.tolist(), "paths": found}
            append(arguments.out, result)


def seed_of(result: Mapping[str, Any]) -> int:
    """The seed that the runs of a result have in common."""
    return result["cells"][0].get("seed", BASE["seed"])


def load(path: Path) -> list[dict[str, Any]]:
    """All results, sorted by seed, with the paths by method."""
    results = sorted((line.result for line in read(path)), key=seed_of)
    return [
        result | {"paths": dict(zip(map(method_of, result["cells"]), result["paths"], strict=True))}
        for result in results
    ]


def table(path: Path) -> str:
    """Distances as Markdown: mean and standard deviation over the seeds."""
    results, rows = load(path), []
    for name in METHODS:
        runs = [one for result in results if (one := result["paths"].get(name))]
        both = pd.DataFrame([run["at"] | run["distances"] for run in runs if "BC" in run["distances"]])
        if runs:
            rows.append(
                {"method": f"`{name}`", "seeds": str(len(runs))}
                | {f"step of {point}": f"{both[point].median():,.0f}" if len(both) else "" for point in "BC"}
                | {pair: mean_and_deviation(both[pair].to_numpy()) if len(both) else "" for pair in ("AB", "BC", "AC")}
                | {"not at C": str(len(runs) - len(both))}
            )
    return markdown(rows) if rows else "Not measured yet.\n"


def mean_and_deviation(values: np.ndarray) -> str:
    """Mean, and standard deviation if there are two values or more."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def picture(path: Path, seeds: int = 3) -> Figure:
    """The paths of the first seeds on their principal axes, each in one panel."""
    results = load(path)[:seeds]
    figure = Figure(figsize=(3.6 * len(results), 3.6), layout="constrained")
    for axes, result in zip(np.ravel(figure.subplots(1, len(results))), results, strict=True):
        for name, run in result["paths"].items():
            x, y = np.array(run["path"]).T
            (line,) = axes.plot(x, y, linewidth=1, label=name)
            for point, step in run["at"].items():
                i = run["steps"].index(step)
                axes.plot(x[i], y[i], {"B": "s", "C": "*"}[point], color=line.get_color(), markersize=8)
            axes.plot(x[0], y[0], "ko", markersize=5)
        first, second = (f"{share:.0%}" for share in result["variance"])
        axes.set(xlabel=f"first axis ({first} of the variance)", ylabel=f"second axis ({second})", aspect="equal")
        axes.set_title(f"seed {seed_of(result)}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set_adjustable("datalim")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * len(results), fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.study.trajectories"))))
