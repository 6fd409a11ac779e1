"""Do the numbers of the paper, figure by figure, agree with those of our runs?

`docs/paper.md` describes each figure, the runs here and the rule of the verdicts. This file has the published numbers
and the verdicts. Most of the runs belong to the studies `mod97` and `paper_tasks`. The runs here
are followed in parameter space, for the distances between states: A is the start, B the first evaluation with 95 %
training accuracy, B500 step 500, C the first evaluation with 95 % validation accuracy, and `end` the last step. Runs
with the same seed and the same length are projected onto common principal axes.

The paper's baseline is Adam without weight decay for 300,000 steps, over an hour per seed on two CPU cores.
`python -m benchmarks run paper` trains the missing runs. After an interruption the same command continues.
"""

import itertools
import json
import math
import pickle
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import tqdm

from benchmarks import RESULTS, views
from benchmarks.study import Study, find_study
from examples.harness.engine import Results, as_text, product
from examples.harness.errors import UserError
from examples.harness.experiment import Run
from examples.harness.files import write_whole
from examples.harness.loop import evaluations
from examples.harness.methods import base
from examples.harness.plots import BLUE, GREEN, ORANGE, PURPLE
from examples.harness.records import is_finished, outcome
from examples.harness.tables import markdown
from examples.harness.train import program
from examples.modular import Modular, adam, adamw, ema, ma, two_stage

BASELINE, BASELINE_STEPS = 39_890, 300_000  # published: steps to 95 %, and steps for Table 2
PARAMETERS = 422_784  # of the model for mod 97
# Table 2, distances in thousands: mean and standard deviation of five runs
TABLE_2 = {
    "Adam, no decay": {"AB": (0.97, 2.2), "BC": (563.7, 199.4), "AC": (570.7, 199.8)},
    "Grokfast": {"AB": (7.7, 0.42), "BC": (15.3, 0.84), "AC": (35.8, 0.98)},
}
PAIRS = {"AB": "A_B", "BC": "B_C", "AC": "A_C"}  # columns of these distances
PAPER_PAIRS = {"AB": "A_B500", "BC": "B500_end", "AC": "A_end"}  # of the baseline, as the paper defines B and C
POINTS = 50  # of a path of `max_steps`
CHECKPOINT_EVERY = 1_000  # evaluations
NAMES = {"adam": "Adam", "adamw": "AdamW", "ema": "EMA + Adam", "ma": "MA + Adam"}
COLOURS = dict(zip(NAMES, (BLUE, ORANGE, GREEN, PURPLE), strict=True))
FEWEST = 3  # seeds; fewer are an anecdote
CAP = 5_000  # steps of the runs of mod97
FAIR = {"weight_decay": 0.00167}  # of Adam: a third of the EMA's decay, a sixth of the MA's
DECAYS = [0.0, 0.001, 0.002, 0.005, 0.01, 0.02]
LAMBDAS, ALPHAS = [0.0, 0.5, 1.0, 2.0, 5.0, 10.0], [0.8, 0.9, 0.95, 0.98, 0.99, 0.995]
WINDOWS = {"lamb": [1.0, 2.0, 5.0, 10.0], "window_size": [2, 10, 50, 100, 200]}

Series = Any  # values by seed


def runs(results: Results) -> Iterator[Run]:
    """The runs that are followed: up to 95 %, then without weight decay."""
    del results
    for method, decay in ((adam, 0.005), (adamw, 1.0), (ema, 0.005), (ma, 0.01)):
        yield from product(Modular(), method, weight_decay=decay, seed=range(5))
    yield from product(Modular(), adam, max_steps=50_000)
    yield from product(Modular(), adam, seed=range(3), max_steps=BASELINE_STEPS, stop_at=None)


class Paths(Study):
    """A study that follows its runs, with common axes for runs of the same seed and length."""

    def train(self, folder: Path = RESULTS) -> Results:
        """Train what a folder lacks; checkpoints in it hold unfinished runs."""
        results = self.results(folder)
        groups: dict[Any, dict[Path, Run]] = {}
        for run in self.runs(results):
            file = folder / f".{self.name}-{base(run.method).__name__}-{run.seed}-{run.max_steps}.checkpoint"
            groups.setdefault((run.seed, run.max_steps), {})[file] = run
        folder.mkdir(parents=True, exist_ok=True)
        for group in groups.values():
            if results.missing(group.values()):
                results.append(on_common_axes([follow(run, file) for file, run in group.items()]))
                for file in group:
                    file.unlink()
        return results


STUDY = Paths("paper", runs)


def vector(params: Any) -> np.ndarray:
    """All parameters in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])


def follow(run: Run, checkpoint: Path) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Train a run from its checkpoint, if there is one, to its end; return its result and its parameters by step.

    Raises:
      UserError: Its loss is no longer finite.
    """
    compiled, key = program(run), jax.random.key(run.seed)
    state, rows = compiled.init(run.traced, key), []
    points, named = {0: vector(state.params)}, {"A": 0}
    if checkpoint.exists():
        state, rows, points, named = pickle.loads(checkpoint.read_bytes())
    spacing = math.ceil(run.max_steps / POINTS / run.task.steps)  # evaluations
    ended = "end" in named
    with tqdm.tqdm(total=run.max_steps, initial=len(rows) * run.task.steps, unit="step") as bar:
        for evaluation in evaluations(compiled, run.traced, key, state=state) if not ended else ():
            (row,), (diverged_at,), step = evaluation.rows, evaluation.diverged_at, evaluation.step
            if diverged_at is not None:
                raise UserError(
                    f"the loss of {as_text(run.key)} is no longer finite at step {diverged_at:,}; leave it out"
                )
            rows.append(row)
            ended = is_finished(run, rows)
            accuracies = (row[f"{part}_accuracy"] >= 0.95 for part in ("train", "val"))
            reached = dict(zip(("B500", "B", "C", "end"), (step >= 500, *accuracies, ended), strict=True))
            new = {name: step for name, is_reached in reached.items() if is_reached and name not in named}
            named |= new
            if new or len(rows) % spacing == 0:
                points[step] = vector(evaluation.state.params)
            if ended or len(rows) % CHECKPOINT_EVERY == 0:
                write_whole(checkpoint, pickle.dumps((jax.device_get(evaluation.state), rows, points, named)))
            bar.update(run.task.steps)
            if ended:
                break
    states = {name: points[step] for name, step in named.items() if name != "end" or step != named.get("C")}
    return {"run": run.key, **outcome(run, rows), "start_norm": norm(points[0]), **pairwise(states)}, points


def norm(x: np.ndarray) -> float:
    """The Euclidean norm, with six digits."""
    return float(f"{np.linalg.norm(x.astype(np.float64)):.6g}")


def pairwise(states: dict[str, np.ndarray]) -> dict[str, float]:
    """Distances between the parameters of all pairs of states."""
    pairs = itertools.combinations([name for name in ("A", "B500", "B", "C", "end") if name in states], 2)
    return {f"{one}_{other}": norm(states[other] - states[one]) for one, other in pairs}


def on_common_axes(followed: list[tuple[dict[str, Any], dict[int, np.ndarray]]]) -> list[dict[str, Any]]:
    """Results of several runs, with their paths on the two principal axes of all points."""
    points = np.stack([point for _, path in followed for point in path.values()])
    left, singular, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    own = np.split(
        (left[:, :2] * singular[:2]).astype(float).round(1), np.cumsum([len(path) for _, path in followed])[:-1]
    )
    shares = (singular[:2] ** 2 / np.sum(singular**2)).astype(float).round(4).tolist()
    return [
        result
        | {"path_step": list(path), "path_x": xy[:, 0].tolist(), "path_y": xy[:, 1].tolist(), "axis_shares": shares}
        for (result, path), xy in zip(followed, own, strict=True)
    ]


def label(runs: Any) -> str:
    """The method and weight decay of some runs in words."""
    method, decay = runs["method"].iloc[0], runs["weight_decay"].iloc[0]
    return f"{NAMES[method]}, " + (f"decay {decay:g}" if decay else "no decay")


def followed_runs(frame: pd.DataFrame) -> dict[str, Any]:
    """The runs that were followed, by method."""
    followed: Any = frame[frame["start_norm"].notna()]
    return {label(group): group for _, group in followed.groupby(["method", "weight_decay"], sort=False)}


def mean_and_deviation(values: Series, form: str = ".1f") -> str:
    """Mean, and standard deviation if there are two values or more."""
    return f"{values.mean():{form}}" * (len(values) > 0) + f" ± {values.std():{form}}" * (len(values) > 1)


@STUDY.table
def distances(frame: pd.DataFrame) -> str:
    """Distances between the states of the runs that reach C."""
    rows = []
    for name, group in followed_runs(frame).items():
        reached = group[group["B_C"].notna()]
        row = {"method": name}
        for state, column in (("B", "fit_steps"), ("C", "steps_to_95")):
            row[f"step of {state}"] = f"{reached[column].median():,.0f}" if len(reached) else ""
        row |= {pair: mean_and_deviation(reached[column]) for pair, column in PAIRS.items()}
        rows.append(row | {"not at C": f"{len(group) - len(reached)} of {len(group)}"})
    return markdown(rows)


@STUDY.table
def squares(frame: pd.DataFrame) -> str:
    """Table 2 with its roots in brackets, and the distances here with their squares."""
    rows = []
    for name, published in TABLE_2.items():
        roots = {pair: f"({(1000 * mean) ** 0.5:.0f})" for pair, (mean, _) in published.items()}
        squared = {f"{pair}², thousands": f"{mean:g} ± {sd:g}" for pair, (mean, sd) in published.items()}
        rows.append({"run": f"paper: {name}", **roots, **squared})
    for name, group in followed_runs(frame).items():
        pairs = PAPER_PAIRS if group["max_steps"].max() == BASELINE_STEPS else PAIRS
        found = {pair: group[column].dropna() for pair, column in pairs.items()}
        # Runs that do not reach C are left out, also where they reach B.
        found = {pair: values.loc[found["BC"].index] for pair, values in found.items()}
        plain = {pair: mean_and_deviation(values) for pair, values in found.items()}
        squared = {f"{pair}², thousands": mean_and_deviation(x**2 / 1000, ".2f") for pair, x in found.items()}
        rows.append({"run": f"here: {name}", **plain, **squared})
    return markdown(rows)


@STUDY.figure("With coupled weight decay, all paths start in the same direction", width=10, height=4.4, columns=3)
def paths(frame: pd.DataFrame, panels: Any) -> None:
    """The paths of three seeds on the common principal axes of their runs."""
    short: Any = frame[frame["start_norm"].notna() & (frame["max_steps"] < BASELINE_STEPS)]
    for axes, (seed, group) in zip(panels, short.groupby("seed"), strict=False):
        for run in group.itertuples():
            x, y, step = map(np.array, (run.path_x, run.path_y, run.path_step))
            axes.plot(x, y, linewidth=1.5, color=COLOURS[run.method])
            for mark, at in (("s", run.fit_steps), ("*", run.steps_to_95)):
                axes.plot(x[step == at], y[step == at], mark, color=COLOURS[run.method], markersize=9)
            axes.plot(x[0], y[0], "ko", markersize=5)
        first, second = (f"{share:.0%}" for share in group["axis_shares"].iloc[0])
        axes.set_title(f"seed {seed}", fontsize="large", loc="left")
        axes.set(aspect="equal", adjustable="datalim")
        views.label(axes, f"first axis ({first} of variance)", f"second axis ({second})")
    names = {label(runs): COLOURS[method] for method, runs in short.groupby("method", sort=False)}
    views.legend(panels[0].figure, names, title="dot: start; square: 95 % in training; star: 95 % in validation")


def mod97(method: Any, **settings: Any) -> Any:
    """The runs of the study `mod97` with a method and, where values are lists, with several settings."""
    return find_study("mod97").results().of(product(Modular(), method, **settings, hold_evals=50, seed=range(8)))


def steps_of(method: Any, **settings: Any) -> Series:
    """Steps to 95 % by seed, infinite for runs that fail."""
    return mod97(method, **settings).set_index("seed")["steps_to_95"]


def grid_of(method: Any, **settings: list[Any]) -> Any:
    """Steps to 95 %: a row per seed that all settings have, a column per setting."""
    columns = [*settings] if len(settings) > 1 else next(iter(settings))
    return mod97(method, **settings).pivot(index="seed", columns=columns, values="steps_to_95").dropna()


def authors(method: str) -> Series:
    """Steps to 95 % by seed of the authors' PyTorch code."""
    runs = pd.read_csv(RESULTS / "authors.csv", index_col="seed")
    return runs.loc[runs["preset"] == method, "steps_to_95"].astype(float)


def undecayed(frame: pd.DataFrame) -> Any:
    """The longest runs of Adam without weight decay."""
    runs: Any = frame[(frame["method"] == "adam") & (frame["weight_decay"] == 0)]
    return runs[runs["max_steps"] == runs["max_steps"].max()]


def times_fewer(control: Series, steps: Series) -> Series:
    """The steps of a control over those of a method, of the seeds with which both reach 95 %."""
    both = pd.concat([control, steps], axis=1, join="inner")
    both = both[np.isfinite(both).all(axis=1)]
    return both.iloc[:, 0] / both.iloc[:, 1]


def best(grid: Any) -> list[Any]:
    """The settings with the fewest steps, by the median of the seeds; an empty list if all fail."""
    medians = grid.median()
    return list(medians.index[(medians == medians.min()) & np.isfinite(medians)])


def near(published: float, *samples: Series) -> bool:
    """Whether a number is in the range of a sample's finite values, give or take a tenth."""
    finite = [values[np.isfinite(values)] for values in samples]
    return any(values.min() / 1.1 <= published <= values.max() * 1.1 for values in finite if len(values))


def verdict(agrees: Any, in_part: Any = False) -> str:
    """The verdict on a claim that the runs can tell."""
    return "agrees" if agrees else "in part" if in_part else "no"


def best_verdict(grid: Any, published: Any, *, as_published: bool = True) -> str:
    """The verdict on the published best setting; `as_published`: whether all else is as in the paper."""
    is_best, steps = published in best(grid), grid[published]
    best_with_a_seed = ((steps == grid.min(axis=1)) & np.isfinite(steps)).any()
    return verdict(is_best and as_published and len(grid) >= FEWEST, is_best or best_with_a_seed)


def seeds(values: Sized) -> str:
    """How many seeds there are."""
    return f"{len(values)} seed{'s' * (len(values) != 1)}"


def in_words(steps: Series, cap: float = CAP) -> str:
    """Median and range of some steps, how many seeds there are, and how many fail."""
    failed = int(np.isinf(steps).sum())
    if failed == len(steps):
        return f"all fail in {cap:,.0f} steps ({seeds(steps)})"
    middle, low, high = (views.format_steps(x, cap) for x in (steps.median(), steps.min(), steps.max()))
    return f"{middle} ({low} to {high}; {seeds(steps)}" + f", {failed} fail" * (failed > 0) + ")"


def extent(values: Series) -> str:
    """Median, range and number of seeds of some ratios."""
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f}; {seeds(values)})"


def best_in_words(grid: Any) -> str:
    """The settings with the fewest steps, and their median."""
    text = " and ".join(f"{x:g}" for setting in best(grid) for x in np.atleast_1d(setting))
    return f"{text} (median {grid.median().min():,.0f}; {seeds(grid)})" if text else "all fail"


Claim = tuple[str, str, str, str, str]  # figure, what, published, here, verdict


def claim(figure: str, what: str, published: float, values: Series, *others: Series) -> Claim:
    """A published number that agrees if it is near our values, or those of the authors' code."""
    words, number = (in_words, f"{published:,.0f}") if published > 100 else (extent, f"{published:.2f}")
    return (
        figure,
        what,
        number,
        "; the authors' code ".join(map(words, (values, *others))),
        verdict(near(published, values, *others)),
    )


def table_of(claims: list[Claim]) -> str:
    """A table; figures and tables are those of the ICLR version, in brackets those of arXiv v2."""
    columns = ("figure", "what", "published", "here", "verdict")
    return markdown([dict(zip(columns, one, strict=True)) for one in claims])


@STUDY.table
def steps(frame: pd.DataFrame) -> str:
    """Steps to 95 % validation accuracy, multiplication mod 97."""
    control, adams, long = steps_of(adam, **FAIR), mod97(adam), undecayed(frame)
    rows = []
    for figure, method, published in (("Fig. 2, Table 3", ma, 790), ("Fig. 2, 4a (8a), Table 3", ema, 910)):
        name, ours = method.__name__, steps_of(method)
        rows.append(claim(figure, name.upper(), published, ours, authors(name)))
        rows.append(claim("Table 3", f"{name.upper()}: times fewer", BASELINE / published, times_fewer(control, ours)))
    figure, what, number, text, agrees = claim("Fig. 2, Table 3", "Adam, no decay", BASELINE, long["steps_to_95"])
    text = f"{in_words(adams['steps_to_95'])}; {in_words(long['steps_to_95'], long['max_steps'].max())}"
    text += f", at best {long['best_val_accuracy'].max():.0%}"
    one, two = steps_of(ma, weight_decay=0.0), steps_of(two_stage, weight_decay=0.0)
    rows += [
        (figure, what, number, text, agrees),
        claim("Fig. 2", "Adam, no decay: steps to fit", 410, adams["fit_steps"]),
        claim("Fig. 8 (4), Table 1", "MA, no decay", 2_940, one),
        claim("Fig. 10 (6), Table 1", "MA in two stages, no decay", 1_920, two),
        claim("Fig. 10 (6), Table 1", "two stages: times fewer", 1.53, times_fewer(one, two)),
    ]
    for start in (99, 500):
        slow = steps_of(two_stage, weight_decay=0.0, fast=0.0, start_step=start)
        what = f"slow part alone from step {start}"
        rows.append(("Fig. 9 (5), Table 1", what, "fails", in_words(slow), verdict(np.isinf(slow).all())))
    return table_of(rows)


@STUDY.table
def settings(frame: pd.DataFrame) -> str:
    """The settings with the fewest steps, multiplication mod 97."""
    del frame
    grids = {
        "Fig. 4c (8c)": ("EMA: best λ", grid_of(ema, lamb=LAMBDAS), 2.0, False),
        "Fig. 4d (8d)": ("EMA: best α", grid_of(ema, alpha=ALPHAS), 0.98, False),
        "Fig. 4e (8e)": ("EMA: best decay", grid_of(ema, weight_decay=DECAYS), 0.005, True),
        "Fig. 8 (4)": ("MA: best λ and w", grid_of(ma, **WINDOWS), (5.0, 100), False),
        "Fig. 11 (7)": ("MA: best decay", grid_of(ma, weight_decay=DECAYS), 0.01, True),
    }
    rows = []
    for figure, (what, grid, published, as_published) in grids.items():
        here, number = best_in_words(grid), " and ".join(f"{x:g}" for x in np.atleast_1d(published))
        if published not in best(grid):
            here += f"; {number}: {in_words(grid[published])}"
        rows.append((figure, what, number, here, best_verdict(grid, published, as_published=as_published)))
    gain = times_fewer(steps_of(ma, weight_decay=0.0), steps_of(ma))
    plain, alone = steps_of(ema, weight_decay=0.0), grid_of(adam, weight_decay=DECAYS)[0.01]
    reaches = "agrees" if np.isfinite(plain).any() else "not run"
    *row, _ = claim("Fig. 11 (7)", "MA: times fewer with decay 0.01 than with 0", 3.72, gain)
    rows += [
        (*row, verdict(near(3.72, gain), gain.min() > 1)),
        ("Fig. 11 (7)", "Adam, decay 0.01", "unstable", in_words(alone), verdict(np.isinf(alone).all())),
        ("Fig. 4c-d (8c-d)", "EMA, no decay", "reaches 95 %", in_words(plain), reaches),
    ]
    return table_of(rows)


@STUDY.table
def window(frame: pd.DataFrame) -> str:
    """Steps to 95 % over λ and window size of the MA."""
    del frame
    grid = grid_of(ma, **WINDOWS)
    cell = lambda steps: "fails" if np.isinf(steps).all() else in_words(steps).replace(f"; {seeds(steps)}", "")
    cells = lambda lamb: {f"w {size}": cell(grid[lamb, size]) for size in WINDOWS["window_size"]}
    return markdown([{"λ": f"{lamb:g}", **cells(lamb)} for lamb in WINDOWS["lamb"]])


def two_by_two(task: str, column: str) -> list[Series]:
    """Outcomes by seed: of the baseline, with the paper's decay alone, and with filter and decay."""
    frame = find_study("paper_tasks").results().frame()
    runs: Any = frame[frame["task"] == task]
    weak, strong = runs["weight_decay"].min(), runs["weight_decay"].max()
    return [
        runs[(runs["method"] == method) & (runs["weight_decay"] == decay)].set_index("seed")[column]
        for method, decay in (("baseline", weak), ("baseline", strong), ("paper", strong))
    ]


def gain(figure: str, what: str, published: tuple[float, float], values: list[Series], form: str) -> Claim:
    """What filter and decay gain; "in part" if the decay alone gains half of it, or the end is another."""
    neither, alone, both = (float(one.median()) for one in values)
    improves = (both - neither) / (published[1] - published[0]) > 0
    by_filter = abs(alone - neither) < abs(both - neither) / 2
    numbers = [f"{one:{form}}" for one in (*published, neither, both, alone)]
    here = f"{numbers[2]} → {numbers[3]}; decay alone {numbers[4]} ({seeds(values[2])})"
    agrees = verdict(improves and by_filter and near(published[1], values[2]), improves)
    return figure, what, " → ".join(numbers[:2]), here, agrees


@STUDY.table
def tasks(frame: pd.DataFrame) -> str:
    """The other tasks: filter and weight decay, two by two."""
    del frame
    mnist, qm9, imdb = "Fig. 5 (9), Table 4", "Fig. 6 (10), Table 5", "Fig. 7 (11), Table 6"
    losses = two_by_two("Qm9", "min_val_loss")
    ratio, added = losses[2] / losses[0], losses[2] / losses[1]
    always = (ratio < 1).all() and (added < 1).all()
    here = f"{extent(ratio)}; lower with {(ratio < 1).sum()}, than with the decay alone with {(added < 1).sum()}"
    agrees = verdict(always and near(0.53, ratio), ratio.median() < 1)
    return table_of(
        [
            gain(mnist, "MNIST: steps to 85 %", (44_022, 2_001), two_by_two("Mnist", "steps_to_85"), ",.0f"),
            gain(mnist, "MNIST: accuracy", (0.898, 0.912), two_by_two("Mnist", "best_val_accuracy"), ".3f"),
            (qm9, "QM9: lowest loss over the baseline's", "0.53", here, agrees),
            gain(imdb, "IMDb: best accuracy", (0.84, 0.90), two_by_two("Imdb", "best_val_accuracy"), ".3f"),
            gain(imdb, "IMDb: lowest loss", (0.517, 0.412), two_by_two("Imdb", "min_val_loss"), ".3f"),
        ]
    )


@STUDY.table
def claims(frame: pd.DataFrame) -> str:
    """Distances, cost, and what the text claims."""
    kept, timed = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("step_cost", "vs_torch"))
    kept = {row["filter"]: row["state_bytes"] for row in kept["rows"] if "state_bytes" in row}
    memory = PARAMETERS * (kept["ma-100"] - kept["none"]) / 1e6
    agrees = verdict(near(168, pd.Series([memory])))
    rows = [distance_claim(frame), ("Table 3", "memory that the MA adds", "168 MB", f"{memory:.0f} MB", agrees)]
    by_method = {"EMA": steps_of(ema), "MA": steps_of(ma), "Adam": steps_of(adam, **FAIR), "AdamW": steps_of(adamw)}
    seconds = lambda name: timed["epochs"][f"modular {name.lower()}"]["seconds_a_step"]["torch"]["median"]
    for name, time, clock in (("MA", 0.37 / 0.15, 20.49), ("EMA", 0.15 / 0.15, 43.79)):
        ratio = seconds(name) / seconds("adam")
        agrees = verdict(near(time, pd.Series([ratio])))
        rows += [
            ("Table 3", f"{name}: time per step over Adam's", f"{time:.2f}", f"{ratio:.2f}", agrees),
            claim(
                "Table 3",
                f"{name}: times less wall clock",
                clock,
                times_fewer(by_method["Adam"], by_method[name]) / ratio,
            ),
        ]
    lambdas, alphas = (
        grid.columns[np.isfinite(grid).all()] for grid in (grid_of(ema, lamb=LAMBDAS), grid_of(ema, alpha=ALPHAS))
    )
    here = "; ".join(", ".join(f"{x:g}" for x in values) for values in (lambdas, alphas))
    in_range = {x for x in LAMBDAS if 0.1 <= x <= 5} <= {*lambdas} and {x for x in ALPHAS if x <= 0.99} <= {*alphas}
    rows.append(("text", "EMA: λ and α that reach 95 %", "0.1 to 5; 0.8 to 0.99", here, verdict(in_range)))
    pairs = (by_method["MA"], by_method["EMA"]), (authors("ma"), authors("ema"))
    fewer = [int((one < other).sum()) for one, other in pairs]
    of = [len(one) for one, _ in pairs]
    here = f"with {fewer[0]} of {of[0]} seeds; the authors' code with {fewer[1]} of {of[1]}"
    rows.append(("text", "MA takes fewer steps than the EMA", "790 and 910", here, verdict(fewer == of, any(fewer))))
    spread = {name: float(steps.std()) for name, steps in by_method.items()}
    filtered, alone = max(spread["EMA"], spread["MA"]), (spread["Adam"], spread["AdamW"])
    here = ", ".join(f"{name} {sd:.0f}" for name, sd in spread.items())
    agrees = verdict(filtered < min(alone), filtered < max(alone))
    return table_of([*rows, ("text", "standard deviation of steps", "less with filters", here, agrees)])


def distance_claim(frame: pd.DataFrame) -> Claim:
    """AC of the baseline over AC of the EMA; "in part" if the square of this ratio is as published."""
    filtered: Any = frame.loc[frame["method"] == "ema", "A_C"].mean()
    ratio = undecayed(frame).get("A_end", pd.Series(dtype=float)).dropna() / filtered
    row = "Fig. 12, Table 2", "AC of the baseline over Grokfast's", "15.94"
    if not len(ratio):
        return *row, f"EMA {filtered:.0f}; the baseline was not followed", "not run"
    here = f"{extent(ratio)}; squared {extent(ratio**2)}"
    return *row, here, verdict(near(15.94, ratio), near(15.94, ratio**2))
