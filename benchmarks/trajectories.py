"""The paths that parameters take while a model groks: `python -m benchmarks.trajectories --seeds 0 1 2 3 4`.

A is the start, B the first evaluation with 95 % training accuracy, C the first with 95 % validation accuracy. Measured
are the distances between them, and the projection of the paths of several methods, from one and the same start, onto
their two common principal axes. These are found while the models train, without keeping all parameters of all steps.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
import tyro
from matplotlib.figure import Figure

from examples.harness.errors import UserError, plain_errors
from examples.harness.optimizers import make_tx
from examples.harness.records import to_row
from examples.harness.run_folder import provenance, write_whole
from examples.harness.train import program

from .study import MAIN, METHODS, THRESHOLD, check_methods, check_positive, made_before

OUT = Path(__file__).parent / "results" / "trajectories"


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


def follow(name: str, seed: int, cap: int, paths: StreamedPaths, bar: tqdm.tqdm, block: int = 16) -> dict[str, Any]:
    """Train one method until B and C, its path from the start being added to `paths`; returns steps and distances."""
    config = METHODS[name]
    task = config.task()
    compiled = program(task, functools.partial(make_tx, config))
    hyper, key = config.hyper(), jax.random.key(seed)
    state = compiled.init(hyper, key)
    start = vector(state.params)
    points: dict[str, np.ndarray] = {}
    at: dict[str, int] = {}
    waiting, steps = [np.zeros_like(start)], [0]
    while len(at) < 2 and steps[-1] < cap:
        state, metrics = compiled.advance(hyper, key, state)
        row = to_row(steps[-1] + task.steps, {k: np.asarray(v) for k, v in metrics.items() if k != "losses"})
        here = vector(state.params) - start
        if not np.isfinite(here).all():
            raise UserError(f"{name}, seed {seed}: the parameters are no longer finite at step {row['step']:,}")
        steps.append(int(row["step"]))
        waiting.append(here)
        for point, metric in (("B", "train_accuracy"), ("C", "val_accuracy")):
            if point not in at and row[metric] >= THRESHOLD:
                points[point], at[point] = here, steps[-1]
        if len(waiting) == block:
            paths.add(np.stack(waiting))
            waiting = []
        bar.update(task.steps)
    if waiting:
        paths.add(np.stack(waiting))
    norm = lambda x: float(np.linalg.norm(x.astype(np.float64)))
    distances = {f"A{point}": norm(where) for point, where in points.items()}
    if len(points) == 2:
        distances["BC"] = norm(points["C"] - points["B"])
    return {"steps": steps, "at": at, "distances": distances, "start_norm": norm(start)}


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
    """Folder for the results, a file a seed; a seed whose file is there is not run again."""

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        check_methods(self.methods)
        check_positive(cap=self.cap, every=self.every)


def main(arguments: Arguments) -> None:
    """Run what is missing."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = lambda seed: arguments.out / f"seed-{seed}.json"
    facts = {"cap": arguments.cap, "every": arguments.every, "methods": list(arguments.methods)}
    todo = [seed for seed in arguments.seeds if not made_before(path(seed), facts)]
    with tqdm.tqdm(total=len(todo) * len(arguments.methods) * arguments.cap, unit="step") as bar:
        for seed in todo:
            paths = StreamedPaths()
            found = {name: follow(name, seed, arguments.cap, paths, bar) for name in arguments.methods}
            coordinates, shares = paths.principal()
            first = 0
            for one in found.values():
                steps = one.pop("steps")
                kept = [i for i, step in enumerate(steps) if step % arguments.every == 0 or step in one["at"].values()]
                one["steps"] = [steps[i] for i in kept]
                one["path"] = [[round(float(x), 3) for x in coordinates[first + i]] for i in kept]
                first += len(steps)
            result = {**provenance(), "arguments": facts, "seed": seed, "variance": shares.tolist(), "methods": found}
            write_whole(path(seed), json.dumps(result) + "\n")


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All results, by seed."""
    return sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda result: result["seed"])


def table(folder: Path) -> str:
    """Distances as Markdown: mean and standard deviation over the seeds."""
    results = load_all(folder)
    if not results:
        return "Not measured yet.\n"
    lines = [
        "| method | seeds | step of B | step of C | AB | BC | AC | not at C |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in METHODS if any(name in result["methods"] for result in results)):
        runs = [result["methods"][name] for result in results if name in result["methods"]]
        both = [run for run in runs if "BC" in run["distances"]]
        cells = [f"{np.median([run['at'][point] for run in both]):,.0f}" if both else "" for point in "BC"]
        for pair in ("AB", "BC", "AC"):
            values = [run["distances"][pair] for run in both]
            deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{deviation}" if values else "")
        lines.append(f"| `{name}` | {len(runs)} | {' | '.join(cells)} | {len(runs) - len(both)} |")
    return "\n".join(lines) + "\n"


def picture(folder: Path, seeds: int = 3) -> Figure:
    """The paths of the first seeds on their principal axes, each in one panel."""
    results = load_all(folder)[:seeds]
    figure = Figure(figsize=(3.6 * len(results), 3.6), layout="constrained")
    for axes, result in zip(np.ravel(figure.subplots(1, len(results))), results, strict=True):
        for name, run in result["methods"].items():
            x, y = np.array(run["path"]).T
            (line,) = axes.plot(x, y, linewidth=1, label=name)
            for point, step in run["at"].items():
                i = run["steps"].index(step)
                axes.plot(x[i], y[i], {"B": "s", "C": "*"}[point], color=line.get_color(), markersize=8)
            axes.plot(x[0], y[0], "ko", markersize=5)
        first, second = (f"{share:.0%}" for share in result["variance"])
        axes.set(xlabel=f"first axis ({first} of the variance)", ylabel=f"second axis ({second})", aspect="equal")
        axes.set_title(f"seed {result['seed']}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set_adjustable("datalim")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * len(results), fontsize="small", frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.trajectories"))))
