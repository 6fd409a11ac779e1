"""The paths that parameters take while a model groks: `python -m benchmarks.study.trajectories --seeds 0 1 2 3 4`.

A is the start, B the first evaluation with 95 % training accuracy, C the first with 95 % validation accuracy. Measured
are the distances between them, and the projection of the paths of several methods, from one and the same start, onto
their two common principal axes. These are found while the models train, without keeping all parameters of all steps.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import tqdm
from matplotlib.figure import Figure

from benchmarks import RESULTS, run_command
from examples.harness.config import Config
from examples.harness.plots import COLOURS, claim
from examples.harness.tables import markdown
from examples.harness.train import program

from .cells import BASE, append, differences, read
from .methods import MAIN, METHODS, THRESHOLD, Variant, check_flags, method_of
from .runs import stored, train

OUT = RESULTS / "trajectories.jsonl"


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
    compiled = program(config.task)
    state = compiled.init(config.hyper, jax.random.key(config.run.seed))
    start = vector(state.params)
    points = {"A": np.zeros_like(start)}
    at: dict[str, int] = {}
    waiting, steps = [points["A"]], [0]
    for evaluation in train(compiled, config, bar, state):
        here = vector(evaluation.state.params) - start
        steps.append(evaluation.step)
        waiting.append(here)
        for point, metric in (("B", "train_accuracy"), ("C", "val_accuracy")):
            if point not in at and evaluation.rows[0][metric] >= THRESHOLD:
                points[point], at[point] = here, evaluation.step
        if len(waiting) == block:
            paths.add(np.stack(waiting))
            waiting = []
        if len(at) == 2:
            break
    if waiting:
        paths.add(np.stack(waiting))
    norm = lambda x: float(np.linalg.norm(x.astype(np.float64)))
    pairs = itertools.combinations(sorted(points), 2)
    distances = {one + other: norm(points[other] - points[one]) for one, other in pairs}
    return {"at": at, "distances": distances, "start_norm": norm(start), "steps": steps}


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    methods: tuple[str, ...] = MAIN,
    cap: int = 5_000,
    every: int = 50,
    out: Path = OUT,
) -> None:
    """Follow several methods from one start, for several seeds.

    Args:
      seeds: Seeds: the start, the split and the batches.
      methods: Methods, as python -m benchmarks.study --help names them.
      cap: Steps at most.
      every: Steps between the points of a path that are kept in the file.
      out: File for the results, a line a seed; a seed that is there is not run again.
    """
    check_flags(methods, cap=cap, every=every)
    runs = lambda seed: [Variant(name, {}).run(seed, cap) for name in methods]
    settings = lambda seed: {"cells": [differences(config) for config in runs(seed)], "every": every}
    found = stored(out, "--methods, --cap or --every", lambda result: settings(seed_of(result)))
    todo = sorted(set(seeds) - set(map(seed_of, found)), key=seeds.index)
    with tqdm.tqdm(total=len(todo) * len(methods) * cap, unit="step") as bar:
        for seed in todo:
            paths = StreamedPaths()
            followed = [follow(config, paths, bar) for config in runs(seed)]
            coordinates, shares = paths.principal()
            for run in followed:
                own, coordinates = np.split(coordinates, [len(run["steps"])])
                keep = [step % every == 0 or step in run["at"].values() for step in run["steps"]]
                run |= {"steps": list(itertools.compress(run["steps"], keep)), "path": own[keep].round(3).tolist()}
            append(out, settings(seed) | {"variance": shares.tolist(), "paths": followed})


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
                {"method": f"`{name}`"}
                | {f"step of {point}": f"{both[point].median():,.0f}" if len(both) else "" for point in "BC"}
                | {pair: mean_and_deviation(both[pair].to_numpy()) if len(both) else "" for pair in ("AB", "BC", "AC")}
                | {"not at C": f"{len(runs) - len(both)} of {len(runs)}"}
            )
    return markdown(rows) if rows else "Not measured yet.\n"


def mean_and_deviation(values: np.ndarray) -> str:
    """Mean, and standard deviation if there are two values or more."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def picture(path: Path, seeds: int = 3) -> Figure:
    """The paths of the first seeds on their principal axes, each in one panel."""
    results = load(path)[:seeds]
    figure = Figure(figsize=(2.9 * len(results), 3.9), layout="constrained")
    claim(figure, "With coupled decay all paths set out alike")
    for axes, result in zip(np.ravel(figure.subplots(1, len(results))), results, strict=True):
        for (name, run), colour in zip(result["paths"].items(), itertools.cycle(COLOURS), strict=False):
            x, y = np.array(run["path"]).T
            axes.plot(x, y, linewidth=1.5, label=Variant(name, {}).in_words, color=colour)
            for point, step in run["at"].items():
                i = run["steps"].index(step)
                axes.plot(x[i], y[i], {"B": "s", "C": "*"}[point], color=colour, markersize=9)
            axes.plot(x[0], y[0], "ko", markersize=5)
        first, second = (f"{share:.0%}" for share in result["variance"])
        axes.set(xlabel=f"first axis ({first} of the variance)", ylabel=f"second axis ({second})", aspect="equal")
        axes.set_title(f"seed {seed_of(result)}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set_adjustable("datalim")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    run_command(main, "benchmarks.study.trajectories")
