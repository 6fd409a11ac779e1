"""Do the numbers of the paper, figure by figure, agree with those of our runs?

`docs/paper.md` has the rule of the verdicts. Most runs are of the studies `mod97` and `paper_tasks`. The runs here are
followed in parameter space, for the distances between states: A is the start, B the first evaluation with 95 % training
accuracy, B500 step 500, C the first evaluation with 95 % validation accuracy, and `end` the last step. The paper's
baseline, 300,000 steps without weight decay, takes over an hour per seed on two CPU cores.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.flatten_util import ravel_pytree

from benchmarks import RESULTS, views
from benchmarks.study import Study, find_study
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.tables import markdown
from examples.harness.train import keys
from examples.modular import Modular, adam, adamw, ema, ma, two_stage

Series = Any  # values by seed
Frame = Any  # pandas.DataFrame; type checkers know nothing of its columns
Claim = tuple[str, str, str, str, str]  # figure, what, published, here, verdict

BASELINE, BASELINE_STEPS = 39_890, 300_000  # published: steps to 95 %, and steps for Table 2
PARAMETERS = 422_784  # of the model for mod 97
# Table 2, distances in thousands: mean and standard deviation of five runs
TABLE_2 = {
    "Adam, no decay": {"AB": (0.97, 2.2), "BC": (563.7, 199.4), "AC": (570.7, 199.8)},
    "Grokfast": {"AB": (7.7, 0.42), "BC": (15.3, 0.84), "AC": (35.8, 0.98)},
}
PAIRS = {"AB": "A_B", "BC": "B_C", "AC": "A_C"}  # columns of these distances
PAPER_PAIRS = {"AB": "A_B500", "BC": "B500_end", "AC": "A_end"}  # of the baseline, as the paper defines B and C
NAMES = {"adam": "Adam", "adamw": "AdamW", "ema": "EMA + Adam", "ma": "MA + Adam"}
FEWEST = 3  # seeds; fewer are an anecdote
CAP = 5_000  # steps of the runs of mod97
CONTROL = {"weight_decay": 0.00167}  # of Adam without a filter
DECAYS = [0.0, 0.001, 0.002, 0.005, 0.01, 0.02]
LAMBDAS, ALPHAS = [0.0, 0.5, 1.0, 2.0, 5.0, 10.0], [0.8, 0.9, 0.95, 0.98, 0.99, 0.995]
WINDOWS = {"lamb": [1.0, 2.0, 5.0, 10.0], "window_size": [2, 10, 50, 100, 200]}


def runs(results: Results) -> Iterator[Run]:
    """The runs that are followed: up to 95 %, then without weight decay."""
    del results
    for method, decay in ((adam, 0.005), (adamw, 1.0), (ema, 0.005), (ma, 0.01)):
        yield from product(Modular(), method, weight_decay=decay, seed=range(5))
    yield from product(Modular(), adam, max_steps=50_000)
    yield from product(Modular(), adam, seed=range(3), max_steps=BASELINE_STEPS, stop_at=None)


def follow(run: Run, states: Iterator[Any], data: Any) -> dict[str, Any]:
    """Distances between the states of a run."""
    del data
    flat = lambda params: np.array(ravel_pytree(params)[0], np.float64)
    params = flat(run.task.init(keys(jax.random.key(run.seed)).init))
    at = {"A": params}
    for row, state in states:
        params = flat(state.params)
        reached = {"B500": row["step"] >= 500, "B": row["train_accuracy"] >= 0.95, "C": row["val_accuracy"] >= 0.95}
        at |= {name: params for name, is_reached in reached.items() if is_reached and name not in at}
    if at.get("C") is not params:
        at["end"] = params
    names = [name for name in ("A", "B500", "B", "C", "end") if name in at]
    pairs = itertools.combinations(names, 2)
    norm = lambda x: float(f"{np.linalg.norm(x):.6g}")
    return {"start_norm": norm(at["A"])} | {f"{one}_{other}": norm(at[other] - at[one]) for one, other in pairs}


STUDY = Study("paper", runs, observe=follow)


def followed_runs(frame: Frame) -> dict[str, Frame]:
    """The runs that were followed, by method and weight decay in words."""
    groups = frame[frame["start_norm"].notna()].groupby(["method", "weight_decay"], sort=False)
    in_words = lambda method, decay: f"{NAMES[method]}, " + (f"decay {decay:g}" if decay else "no decay")
    return {in_words(*key): group for key, group in groups}


def mean_and_deviation(values: Series, form: str = ".1f") -> str:
    """Mean, and standard deviation if there are two values or more."""
    return f"{values.mean():{form}}" * (len(values) > 0) + f" ± {values.std():{form}}" * (len(values) > 1)


@STUDY.table
def distances(frame: Frame) -> str:
    """Table 2 with its roots in brackets, and the distances here with their squares."""
    rows = []
    for name, published in TABLE_2.items():
        roots = {pair: f"({(1000 * mean) ** 0.5:.0f})" for pair, (mean, _) in published.items()}
        squared = {f"{pair}², thousands": f"{mean:g} ± {sd:g}" for pair, (mean, sd) in published.items()}
        rows.append({"run": f"paper: {name}", **roots, **squared})
    for name, group in followed_runs(frame).items():
        pairs = PAPER_PAIRS if group["max_steps"].max() == BASELINE_STEPS else PAIRS
        reached = group[group[pairs["BC"]].notna()]
        found = {pair: reached[column] for pair, column in pairs.items()}
        plain = {pair: mean_and_deviation(x) for pair, x in found.items()}
        squared = {f"{pair}², thousands": mean_and_deviation(x**2 / 1000, ".2f") for pair, x in found.items()}
        rows.append({"run": f"here: {name}", **plain, **squared})
    return markdown(rows)


def mod97(method: Any, **settings: Any) -> Frame:
    """The runs of the study `mod97` with a method and, where values are lists, with several settings."""
    return find_study("mod97").results().of(product(Modular(), method, **settings, hold_evals=50, seed=range(8)))


def steps_of(method: Any, **settings: Any) -> Series:
    """Steps to 95 % by seed, infinite for runs that fail."""
    return mod97(method, **settings).set_index("seed")["steps_to_95"]


def grid_of(method: Any, **settings: list[Any]) -> Frame:
    """Steps to 95 %: a row per seed that all settings have, a column per setting."""
    return mod97(method, **settings).pivot(index="seed", columns=[*settings], values="steps_to_95").dropna()


def authors(method: str) -> Series:
    """Steps to 95 % by seed of the authors' PyTorch code."""
    runs: Frame = pd.read_csv(RESULTS / "authors.csv", index_col="seed")
    return runs.loc[runs["preset"] == method, "steps_to_95"].astype(float)


def undecayed(frame: Frame) -> Frame:
    """The longest runs of Adam without weight decay."""
    return frame.query("method == 'adam' and weight_decay == 0").nlargest(1, "max_steps", keep="all")


def times_fewer(control: Series, steps: Series) -> Series:
    """The steps of a control over those of a method, of the seeds with which both reach 95 %."""
    ratio = control / steps
    return ratio[np.isfinite(ratio) & (ratio > 0)]


def near(published: float, *samples: Series) -> bool:
    """Whether a number is in the range of a sample's finite values, give or take a tenth."""
    finite = [values[np.isfinite(values)] for values in map(np.atleast_1d, samples)]
    return any(values.min() / 1.1 <= published <= values.max() * 1.1 for values in finite if len(values))


def verdict(agrees: Any, in_part: Any = False) -> str:
    """The verdict on a claim that the runs can tell."""
    return "agrees" if agrees else "in part" if in_part else "no"


def seeds(values: Series) -> str:
    """How many seeds there are."""
    return f"{len(values)} seed{'s' * (len(values) != 1)}"


def number(value: float, cap: float = CAP) -> str:
    """A ratio with two decimals, or steps."""
    return f"{value:.2f}" if value < 100 else views.format_steps(value, cap)


def in_words(values: Series, cap: float = CAP) -> str:
    """Median and range of some steps or ratios, how many seeds there are, and how many fail."""
    failed = int(np.isinf(values).sum())
    if failed == len(values):
        return f"all fail in {cap:,.0f} steps ({seeds(values)})"
    middle, low, high = (number(x, cap) for x in (values.median(), values.min(), values.max()))
    return f"{middle} ({low} to {high}; {seeds(values)}" + f", {failed} fail" * (failed > 0) + ")"


def claim(figure: str, what: str, published: float, *samples: Series) -> Claim:
    """A published number that agrees if it is near our values, or those of the authors' code, which come second."""
    here = "; the authors' code ".join(map(in_words, samples))
    return figure, what, number(published), here, verdict(near(published, *samples))


def gain_claim(figure: str, what: str, published: float, ratios: Series) -> Claim:
    """A published gain, which agrees in part if the median seed has another gain."""
    return figure, what, number(published), in_words(ratios), verdict(near(published, ratios), ratios.median() > 1)


def best_claim(figure: str, what: str, published: Any, grid: Frame, *, as_published: bool = False) -> Claim:
    """A published best setting: the lowest median of steps; `as_published`: whether all else is as in the paper."""
    medians, steps = grid.median(), grid[published]
    best = list(medians.index[(medians == medians.min()) & np.isfinite(medians)])
    text = lambda *settings: " and ".join(f"{x:g}" for x in np.ravel(settings))
    here = f"{text(*best)} (median {medians.min():,.0f}; {seeds(grid)})" if best else "all fail"
    if published not in best:
        here += f"; {text(published)}: {in_words(steps)}"
    best_with_a_seed = ((steps == grid.min(axis=1)) & np.isfinite(steps)).any()
    agrees = published in best and as_published and len(grid) >= FEWEST
    return figure, what, text(published), here, verdict(agrees, published in best or best_with_a_seed)


def claims_table(make: Callable[[Frame], Iterator[Claim]]) -> Callable[[Frame], str]:
    """Register claims as a table; figures are numbered as in the ICLR version, in brackets as in arXiv v2."""
    columns = ("figure", "what", "published", "here", "verdict")

    @functools.wraps(make)
    def table(frame: Frame) -> str:
        return markdown([dict(zip(columns, one, strict=True)) for one in make(frame)])

    return STUDY.table(table)


@claims_table
def steps(frame: Frame) -> Iterator[Claim]:
    """Steps to 95 % validation accuracy, multiplication mod 97."""
    control, adams, long = steps_of(adam, **CONTROL), mod97(adam), undecayed(frame)
    for name, method, figure, published in (("MA", ma, "Fig. 2", 790), ("EMA", ema, "Fig. 2, 4a (8a)", 910)):
        ours = steps_of(method)
        yield claim(f"{figure}, Table 3", name, published, ours, authors(name.lower()))
        yield gain_claim("Table 3", f"{name}: times fewer", BASELINE / published, times_fewer(control, ours))
    here = f"{in_words(adams['steps_to_95'])}; {in_words(long['steps_to_95'], long['max_steps'].max())}"
    here += f", at best {long['best_val_accuracy'].max():.0%}"
    yield "Fig. 2, Table 3", "Adam, no decay", number(BASELINE), here, verdict(near(BASELINE, long["steps_to_95"]))
    yield claim("Fig. 2", "Adam, no decay: steps to fit", 410, adams["fit_steps"])
    one, two = steps_of(ma, weight_decay=0.0), steps_of(two_stage, weight_decay=0.0)
    yield claim("Fig. 8 (4), Table 1", "MA, no decay", 2_940, one)
    yield claim("Fig. 10 (6), Table 1", "MA in two stages, no decay", 1_920, two)
    yield claim("Fig. 10 (6), Table 1", "two stages: times fewer", 1.53, times_fewer(one, two))
    for start in (99, 500):
        slow = steps_of(two_stage, weight_decay=0.0, fast=0.0, start_step=start)
        what = f"slow part alone from step {start}"
        yield "Fig. 9 (5), Table 1", what, "fails", in_words(slow), verdict(np.isinf(slow).all())


@claims_table
def settings(frame: Frame) -> Iterator[Claim]:
    """The settings with the fewest steps, multiplication mod 97."""
    del frame
    yield best_claim("Fig. 4c (8c)", "EMA: best λ", 2.0, grid_of(ema, lamb=LAMBDAS))
    yield best_claim("Fig. 4d (8d)", "EMA: best α", 0.98, grid_of(ema, alpha=ALPHAS))
    yield best_claim("Fig. 4e (8e)", "EMA: best decay", 0.005, grid_of(ema, weight_decay=DECAYS), as_published=True)
    yield best_claim("Fig. 8 (4)", "MA: best λ and w", (5.0, 100), grid_of(ma, **WINDOWS))
    yield best_claim("Fig. 11 (7)", "MA: best decay", 0.01, grid_of(ma, weight_decay=DECAYS), as_published=True)
    times = times_fewer(steps_of(ma, weight_decay=0.0), steps_of(ma))
    yield gain_claim("Fig. 11 (7)", "MA: times fewer with decay 0.01 than with 0", 3.72, times)
    alone = grid_of(adam, weight_decay=DECAYS)[0.01]
    yield "Fig. 11 (7)", "Adam, decay 0.01", "unstable", in_words(alone), verdict(np.isinf(alone).all())
    plain = steps_of(ema, weight_decay=0.0)
    reaches = "agrees" if np.isfinite(plain).any() else "not run"
    yield "Fig. 4c-d (8c-d)", "EMA, no decay", "reaches 95 %", in_words(plain), reaches


def two_by_two(task: str, column: str) -> list[Series]:
    """Outcomes by seed: of the baseline, with the paper's decay alone, and with filter and decay."""
    frame: Frame = find_study("paper_tasks").results().frame()
    runs = frame[frame["task"] == task]
    weak, strong = runs["weight_decay"].min(), runs["weight_decay"].max()
    groups = runs.set_index("seed").groupby(["method", "weight_decay"])[column]
    return [groups.get_group(key) for key in (("baseline", weak), ("baseline", strong), ("paper", strong))]


def gain(figure: str, what: str, published: tuple[float, float], values: list[Series], form: str) -> Claim:
    """What filter and decay gain; "in part" if the decay alone gains half of it, or the end is another."""
    neither, alone, both = (float(one.median()) for one in values)
    improves = (both - neither) / (published[1] - published[0]) > 0
    by_filter = abs(alone - neither) < abs(both - neither) / 2
    here = f"{neither:{form}} → {both:{form}}; the decay alone {alone:{form}} ({seeds(values[2])})"
    agrees = verdict(improves and by_filter and near(published[1], values[2]), improves)
    return figure, what, f"{published[0]:{form}} → {published[1]:{form}}", here, agrees


@claims_table
def tasks(frame: Frame) -> Iterator[Claim]:
    """The other tasks: filter and weight decay, two by two."""
    del frame
    mnist, imdb = "Fig. 5 (9), Table 4", "Fig. 7 (11), Table 6"
    yield gain(mnist, "MNIST: steps to 85 %", (44_022, 2_001), two_by_two("Mnist", "steps_to_85"), ",.0f")
    yield gain(mnist, "MNIST: accuracy", (0.898, 0.912), two_by_two("Mnist", "best_val_accuracy"), ".3f")
    baseline, alone, both = two_by_two("Qm9", "min_val_loss")
    ratio, added = both / baseline, both / alone
    here = f"{in_words(ratio)}; lower with {(ratio < 1).sum()}, than with the decay alone with {(added < 1).sum()}"
    agrees = verdict((ratio < 1).all() and (added < 1).all() and near(0.53, ratio), ratio.median() < 1)
    yield "Fig. 6 (10), Table 5", "QM9: lowest loss over the baseline's", "0.53", here, agrees
    yield gain(imdb, "IMDb: best accuracy", (0.84, 0.90), two_by_two("Imdb", "best_val_accuracy"), ".3f")
    yield gain(imdb, "IMDb: lowest loss", (0.517, 0.412), two_by_two("Imdb", "min_val_loss"), ".3f")


def distance_claim(frame: Frame) -> Claim:
    """AC of the baseline over AC of the EMA; "in part" if the square of this ratio is as published."""
    filtered = frame.loc[frame["method"] == "ema", "A_C"].mean()
    ratio = undecayed(frame).reindex(columns=["A_end"])["A_end"].dropna() / filtered
    here, agrees = f"EMA {filtered:.0f}; the baseline was not followed", "not run"
    if len(ratio):
        here = f"{in_words(ratio)}; squared {in_words(ratio**2)}"
        agrees = verdict(near(15.94, ratio), near(15.94, ratio**2))
    return "Fig. 12, Table 2", "AC of the baseline over Grokfast's", "15.94", here, agrees


@claims_table
def claims(frame: Frame) -> Iterator[Claim]:
    """Distances, cost, and what the text claims."""
    yield distance_claim(frame)
    costs = json.loads((RESULTS / "step_cost.json").read_text())["rows"]
    kept = {row["filter"]: row["state_bytes"] for row in costs if "state_bytes" in row}
    memory = PARAMETERS * (kept["ma-100"] - kept["none"]) / 1e6
    yield "Table 3", "memory that the MA adds", "168 MB", f"{memory:.0f} MB", verdict(near(168, memory))
    epochs = json.loads((RESULTS / "vs_torch.json").read_text())["epochs"]
    seconds = lambda name: epochs[f"modular {name.lower()}"]["seconds_a_step"]["torch"]["median"]
    steps = {"EMA": steps_of(ema), "MA": steps_of(ma), "Adam": steps_of(adam, **CONTROL), "AdamW": steps_of(adamw)}
    for name, time, clock in (("MA", 0.37 / 0.15, 20.49), ("EMA", 0.15 / 0.15, 43.79)):
        ratio = seconds(name) / seconds("Adam")
        what = f"{name}: time per step over Adam's"
        yield "Table 3", what, number(time), number(ratio), verdict(near(time, ratio), ratio > 1)
        times_less = times_fewer(steps["Adam"], steps[name]) / ratio
        yield gain_claim("Table 3", f"{name}: times less wall clock", clock, times_less)
    grids = grid_of(ema, lamb=LAMBDAS), grid_of(ema, alpha=ALPHAS)
    lambdas, alphas = (list(grid.columns[np.isfinite(grid).all()]) for grid in grids)
    here = "; ".join(", ".join(f"{x:g}" for x in values) for values in (lambdas, alphas))
    in_range = {x for x in LAMBDAS if 0.1 <= x <= 5} <= {*lambdas} and {x for x in ALPHAS if x <= 0.99} <= {*alphas}
    yield "text", "EMA: λ and α that reach 95 %", "0.1 to 5; 0.8 to 0.99", here, verdict(in_range)
    ours, theirs = steps["MA"] < steps["EMA"], authors("ma") < authors("ema")
    here = f"with {ours.sum()} of {len(ours)} seeds; the authors' code with {theirs.sum()} of {len(theirs)}"
    agrees = verdict(ours.all() and theirs.all(), ours.any() or theirs.any())
    yield "text", "MA takes fewer steps than the EMA", "790 and 910", here, agrees
    spread = {name: float(values.std()) for name, values in steps.items()}
    here = ", ".join(f"{name} {sd:.0f}" for name, sd in spread.items())
    filtered, alone = max(spread["EMA"], spread["MA"]), (spread["Adam"], spread["AdamW"])
    agrees = verdict(filtered < min(alone), filtered < max(alone))
    yield "text", "standard deviation of steps", "less with filters", here, agrees
