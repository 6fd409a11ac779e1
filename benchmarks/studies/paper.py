"""Do the numbers of the paper, figure by figure, agree with those of our runs?

`docs/paper.md` has the rule of the verdicts. Most runs are of the studies `mod97` and `paper_tasks`. The runs here are
followed in parameter space, for the distances between three states: A is the start, B the first evaluation with 95 %
training accuracy, C the first with 95 % validation accuracy. The paper's baseline, 300,000 steps without weight decay,
takes hours per seed on a CPU; there B is step 500 and C the end, as in the paper.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pandas as pd
from jax.flatten_util import ravel_pytree

from benchmarks import RESULTS, views
from benchmarks.study import Frame, Results, Rows, Run, Study, product
from examples.harness.train import keys
from examples.imdb import EXPERIMENT as IMDB
from examples.mnist import EXPERIMENT as MNIST
from examples.modular import Modular, adam, adamw, ema, ma, two_stage
from examples.qm9 import EXPERIMENT as QM9
from grokfast_jax import ema as lowpass
from grokfast_jax import grokfast_ema, impulse_response

from . import mod97, momentum_and_rate, paper_tasks

Series = Any  # values by seed

BASELINE, BASELINE_STEPS = 39_890, 300_000  # of Adam without weight decay: published steps to 95 %, and for Table 2
WINDOW = 25_000  # steps of the baseline that are told as one
ACCURACIES = {
    "lowest accuracy": "lowest_accuracy",
    "highest accuracy": "highest_accuracy",
    "evaluations at 95 %": "share_at_95",
}
FEWEST = 3  # seeds that a verdict needs
FOLLOWED = {
    "Adam, decay 0.005": (adam, 0.005),
    "AdamW, decay 1": (adamw, 1.0),
    "EMA + Adam, decay 0.005": (ema, 0.005),
    "MA + Adam, decay 0.01": (ma, 0.01),
}
LINEAR = {  # optimizers x(t) = A x(t-1) + B g(t) with x(0) = g(0); B is 1, with dampening 0.1
    "SGD": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "Nesterov": optax.sgd(1.0, momentum=0.9, nesterov=True),
    "dampened momentum": lowpass(0.9, start="gradient"),
}


def runs(_results: Results) -> Iterator[Run]:
    """The runs that are followed up to 95 %, and long ones without weight decay, part of them twice."""
    for method, decay in FOLLOWED.values():
        yield from product(Modular(), method, weight_decay=decay, seed=range(5))
    yield from product(Modular(), adam, max_steps=50_000, seed=range(3))
    yield from product(Modular(), adam, max_steps=BASELINE_STEPS, stop_at=None, seed=range(3))


def by_window(rows: list[Any]) -> dict[str, Any]:
    """What validation does in every WINDOW steps of a run: accuracy, share of evaluations at 95 %, and highest loss."""
    frame = pd.DataFrame(rows)
    frame["at_95"] = frame["val_accuracy"] >= 0.95
    windows = frame.groupby((frame["step"] - 1) // WINDOW)
    found = windows.agg(
        lowest_accuracy=("val_accuracy", "min"),
        highest_accuracy=("val_accuracy", "max"),
        share_at_95=("at_95", "mean"),
        highest_loss=("val_loss", "max"),
    )
    return {str(name): [float(f"{value:.4g}") for value in values] for name, values in found.items()}


def follow(run: Run, states: Iterator[Any], data: Any) -> dict[str, Any]:
    """Distances between the states of a run; of the baseline also what validation does in the course of it."""
    del data
    flat = lambda params: np.array(ravel_pytree(params)[0], np.float64)
    at, rows = {"A": flat(run.task.init(keys(jax.random.key(run.seed)).init))}, []
    for row, state in states:
        rows.append(row)
        reached = {"B": row["train_accuracy"] >= 0.95, "C": row["val_accuracy"] >= 0.95}
        if run.max_steps == BASELINE_STEPS:
            reached = {"B": row["step"] >= 500, "C": row["step"] >= BASELINE_STEPS}
        at |= {name: flat(state.params) for name, is_there in reached.items() if is_there and name not in at}
    pairs = [(one, other) for one, other in ("AB", "BC", "AC") if {one, other} <= at.keys()]
    distances = {f"{one}_{other}": float(f"{np.linalg.norm(at[other] - at[one]):.6g}") for one, other in pairs}
    return distances | (by_window(rows) if run.max_steps == BASELINE_STEPS else {})


STUDY = Study("paper", runs, observe=follow)


@STUDY.table
def distances(frame: Frame) -> Rows:
    """Distances between the states of the runs that reach C."""
    for name, (method, decay) in {**FOLLOWED, "Adam, no decay": (adam, 0.0)}.items():
        if len(reached := views.runs_of(frame, method, weight_decay=decay).dropna(subset="B_C")):
            columns = {pair: reached["_".join(pair)] for pair in ("AB", "BC", "AC")}
            spread = lambda values: f" ± {values.std():.1f}" if len(values) > 1 else ""
            row = {pair: f"{values.mean():.1f}{spread(values)}" for pair, values in columns.items()}
            yield {"run": name, "runs": str(len(reached))} | row


@STUDY.table
def baseline(frame: Frame) -> Rows:
    """Validation of Adam without weight decay in every WINDOW steps: medians over the seeds, and the highest loss."""
    followed = views.runs_of(frame, adam, max_steps=BASELINE_STEPS)
    for window in range(BASELINE_STEPS // WINDOW if len(followed) else 0):
        within = {name: followed[name].str[window] for name in (*ACCURACIES.values(), "highest_loss")}
        row = {"steps": f"{window * WINDOW + 10:,} to {(window + 1) * WINDOW:,}"}
        row |= {title: f"{within[name].median():.1%}" for title, name in ACCURACIES.items()}
        yield row | {"highest loss": f"{within['highest_loss'].max():.3g}"}


class Claim(NamedTuple):
    """A row of a table; figures are numbered as in the ICLR version, in brackets as in arXiv v2."""

    figure: str
    what: str
    published: str
    here: str
    verdict: str


def steps_of(method: Any, column: str = "steps_to_95", **settings: Any) -> Series:
    """Steps to 95 % by seed in the study `mod97`, infinite for runs that fail."""
    return mod97.STUDY.results().of(mod97.grid(method, **settings, seed=mod97.SEEDS)).set_index("seed")[column]


def baseline_steps(frame: Frame) -> Series:
    """Steps to 95 % by seed of the paper's baseline, Adam without weight decay for 300,000 steps."""
    return views.runs_of(frame, adam, max_steps=BASELINE_STEPS).set_index("seed")["steps_to_95"]


def grid_of(columns: str | list[str], settings: list[Run]) -> Frame:
    """Steps to 95 % in `mod97`: a row per seed that all settings have, a column per setting."""
    found: Frame = mod97.STUDY.results().of(mod97.with_seeds(settings, mod97.SEEDS))
    return found.pivot(index="seed", columns=columns, values="steps_to_95").dropna()


def authors(method: str) -> Series:
    """Steps to 95 % by seed of the authors' PyTorch code."""
    runs: Frame = pd.read_csv(RESULTS / "authors.csv", index_col="seed")
    return runs.loc[runs["preset"] == method, "steps_to_95"].astype(float)


def times_fewer(control: Series, steps: Series) -> Series:
    """The steps of a control over those of a method, of the seeds with which both reach 95 %."""
    ratio = control / steps
    return ratio[np.isfinite(ratio) & (ratio > 0)]


def near(published: float, *samples: Series) -> bool:
    """Whether a number is in the range of a sample's finite values, give or take a tenth."""
    finite = [values[np.isfinite(values)] for values in samples]
    return any(values.min() / 1.1 <= published <= values.max() * 1.1 for values in finite if len(values))


def verdict(agrees: Any, in_part: Any = False, seeds: int = FEWEST) -> str:
    """The verdict on a claim, from the number of seeds that can tell."""
    return "open" if seeds < FEWEST else "agrees" if agrees else "in part" if in_part else "no"


def telling(steps: Series, published: float, cap: float) -> int:
    """How many seeds can tell whether a setting reaches 95 %: none if all end too early without it."""
    return len(steps) if cap >= published or np.isfinite(steps).any() else 0


def number(value: float) -> str:
    """A ratio with two decimals, or steps."""
    return f"{value:.2f}" if value < 100 else views.format_steps(value, mod97.CAP)


def in_words(values: Series, cap: int = mod97.CAP) -> str:
    """Median and range of some steps or ratios, how many seeds there are, and how many fail."""
    failed, seeds = int(np.isinf(values).sum()), f"{len(values)} seed{'s' * (len(values) != 1)}"
    if failed == len(values):
        return f"all fail in {cap:,} steps ({seeds})"
    middle, low, high = map(number, (values.median(), values.min(), values.max()))
    span = f"{low} to {high}; " * (len(values) > 1)
    return f"{middle} ({span}{seeds}" + f", {failed} fail" * (failed > 0) + ")"


def claim(
    figure: str, what: str, published: float, *samples: Series, is_gain: bool = False, cap: int = mod97.CAP
) -> Claim:
    """A published number that agrees if it is near our values, or those of the authors' code, which come second.

    A gain agrees in part if the median seed has another gain.
    """
    here = "; the authors' code ".join(in_words(values, cap) for values in samples)
    in_part = is_gain and samples[0].median() > 1
    agrees = verdict(near(published, *samples), in_part, telling(samples[0], published, cap))
    return Claim(figure, what, number(published), here, agrees)


def failing(figure: str, what: str, published: str, steps: Series) -> Claim:
    """A setting with which the paper's run does not generalise."""
    failed = np.isinf(steps)
    return Claim(figure, what, published, in_words(steps), verdict(failed.all(), failed.any(), len(steps)))


def reaching(figure: str, what: str, steps: Series, cap: int = mod97.CAP) -> Claim:
    """A setting that reaches 95 % in the paper after an unknown number of steps, at most those of its baseline."""
    reached = np.isfinite(steps)
    agrees = verdict(reached.all(), reached.any(), telling(steps, BASELINE, cap))
    return Claim(figure, what, "reaches 95 %", in_words(steps, cap), agrees)


def range_claim(what: str, low: float, high: float, grid: Frame) -> Claim:
    """A published range of a hyperparameter: its values reach 95 %; "in part" if only some do or its ends lack runs."""
    failed = {x: int(np.isinf(grid[x]).sum()) for x in grid}
    inside = [x for x in grid if low <= x <= high]
    works, not_run = [x for x in inside if not failed[x]], [x for x in (low, high) if x not in grid]
    here = [", ".join(f"{x:g}" for x in works) + " reach 95 %"] if works else []
    here += [f"{x:g} was not run" for x in not_run]
    here += [f"{x:g}: {n} of {len(grid)} fail" for x, n in failed.items() if n]
    agrees = verdict(works == inside and not not_run, works, len(grid))
    return Claim("text", what, f"{low:g} to {high:g}", "; ".join(here), agrees)


def best_claim(figure: str, what: str, published: Any, grid: Frame, *, as_published: bool = False) -> Claim:
    """A published best setting: the lowest median of steps; `as_published`: whether all else is as in the paper."""
    medians, steps = grid.median(), grid[published]
    best = list(medians.index[(medians == medians.min()) & np.isfinite(medians)])
    text = lambda *settings: " and ".join(f"{x:g}" for x in np.ravel(settings))
    here = f"{text(*best)} (median {medians.min():,.0f}; {len(grid)} seeds)" if best else "all fail"
    if published not in best:
        here += f"; {text(published)}: {in_words(steps)}"
    best_with_a_seed = ((steps == grid.min(axis=1)) & np.isfinite(steps)).any()
    agrees = verdict(published in best and as_published, published in best or best_with_a_seed, len(grid))
    return Claim(figure, what, text(published), here, agrees)


@STUDY.table
def steps(frame: Frame) -> Iterator[Claim]:
    """Steps to 95 % validation accuracy, multiplication mod 97."""
    control = baseline_steps(frame)
    for name, method, figure, published in (("MA", ma, "Fig. 2", 790), ("EMA", ema, "Fig. 2, 4a (8a)", 910)):
        ours = steps_of(method)
        yield claim(f"{figure}, Table 3", name, published, ours, authors(name.lower()))
        gain = times_fewer(control, ours)
        yield claim("Table 3", f"{name}: times fewer", BASELINE / published, gain, is_gain=True)
    plain = steps_of(adam)
    yield failing("Fig. 2, Table 3", "Adam, no decay, in 5,000 steps", "fails", plain)
    yield claim("Fig. 2, Table 3", "Adam, no decay", BASELINE, control, cap=BASELINE_STEPS)
    yield claim("Fig. 2", "Adam, no decay: steps to fit", 410, steps_of(adam, "fit_steps"))


@STUDY.table
def stages(frame: Frame) -> Iterator[Claim]:
    """Steps without weight decay, in one stage and in two."""
    control = baseline_steps(frame)
    one, two = steps_of(ma, weight_decay=0.0), steps_of(two_stage, weight_decay=0.0)
    yield claim("Fig. 8 (4), Table 1", "one stage", 2_940, one)
    yield claim("Table 1", "one stage: times fewer than Adam", 13.57, times_fewer(control, one), is_gain=True)
    yield claim("Fig. 10 (6), Table 1", "two stages", 1_920, two)
    yield claim("Table 1", "two stages: times fewer than Adam", 20.78, times_fewer(control, two), is_gain=True)
    yield claim("Fig. 10 (6), Table 1", "two stages: times fewer than one", 1.53, times_fewer(one, two))
    for start in (99, 500):
        slow = steps_of(two_stage, weight_decay=0.0, fast=0.0, start_step=start)
        yield failing("Fig. 9 (5), Table 1", f"slow part alone from step {start}", "fails", slow)


@STUDY.table
def settings(frame: Frame) -> Iterator[Claim]:
    """The settings with the fewest steps, multiplication mod 97."""
    del frame
    lambdas, alphas, _, with_ema, with_ma = (grid_of(*ablation) for ablation in mod97.ABLATIONS.values())
    windows = grid_of(["lamb", "window_size"], mod97.WINDOW_GRID)
    yield best_claim("Fig. 4c (8c)", "EMA: best λ", 2.0, lambdas)
    yield best_claim("Fig. 4d (8d)", "EMA: best α", 0.98, alphas)
    two_alphas = grid_of("alpha", mod97.grid(ema, alpha=[0.95, 0.98]))
    yield best_claim("Fig. 4d (8d)", "EMA: α 0.95 or 0.98", 0.98, two_alphas)
    yield best_claim("Fig. 4e (8e)", "EMA: best decay", 0.005, with_ema, as_published=True)
    yield best_claim("Fig. 8 (4)", "MA: best λ and w", (5.0, 100), windows)
    yield best_claim("Fig. 11 (7)", "MA: best decay", 0.01, with_ma, as_published=True)
    halved = [*momentum_and_rate.PUBLISHED[1], *momentum_and_rate.BEFORE_ADAM["MA before Adam, decay 0.005"][0]]
    fresh = (
        momentum_and_rate.STUDY.results().of(halved).pivot(index="seed", columns="weight_decay", values="steps_to_95")
    )
    yield best_claim("Fig. 11 (7)", "MA: decay 0.005 or 0.01", 0.01, fresh, as_published=True)
    gain = times_fewer(steps_of(ma, weight_decay=0.0), steps_of(ma))
    yield claim("Fig. 11 (7)", "MA: times fewer with decay 0.01 than with 0", 3.72, gain, is_gain=True)
    yield failing("Fig. 11 (7)", "Adam, decay 0.01", "unstable", steps_of(adam, weight_decay=0.01))
    yield reaching("Fig. 4c-d (8c-d)", "EMA, no decay", steps_of(ema, weight_decay=0.0))
    yield range_claim("EMA: λ that reach 95 %", 0.1, 5.0, lambdas)
    yield range_claim("EMA: α that reach 95 %", 0.8, 0.99, alphas)


def two_by_two(task: str, column: str) -> list[Series]:
    """Outcomes by seed: of the baseline, with the paper's decay alone, and with filter and decay."""
    runs = paper_tasks.STUDY.results().frame().query("task == @task").set_index("seed")
    groups = runs.groupby(["method", "weight_decay"])[column]
    weak, strong = runs["weight_decay"].min(), runs["weight_decay"].max()
    return [groups.get_group(key) for key in (("baseline", weak), ("baseline", strong), ("paper", strong))]


def task_claim(figure: str, what: str, published: tuple[float, float], outcomes: list[Series], form: str) -> Claim:
    """What filter and decay gain; "in part" if the decay alone gains half of it, or the end is another."""
    neither, alone, both = (float(values.median()) for values in outcomes)
    improves = (both - neither) / (published[1] - published[0]) > 0
    by_filter = abs(alone - neither) < abs(both - neither) / 2
    here = f"{neither:{form}} → {both:{form}}; the decay alone {alone:{form}} ({len(outcomes[2])} seeds)"
    agrees = verdict(improves and by_filter and near(published[1], outcomes[2]), improves, len(outcomes[2]))
    return Claim(figure, what, f"{published[0]:{form}} → {published[1]:{form}}", here, agrees)


@STUDY.table
def tasks(frame: Frame) -> Iterator[Claim]:
    """The other tasks: filter and weight decay, two by two."""
    del frame
    mnist, imdb = "Fig. 5 (9), Table 4", "Fig. 7 (11), Table 6"
    steps = two_by_two("Mnist", "steps_to_85")
    yield task_claim(mnist, "MNIST: steps to 85 %", (44_022, 2_001), steps, ",.0f")
    yield task_claim(mnist, "MNIST: times fewer", (1, 22), [steps[0] / values for values in steps], ".1f")
    yield task_claim(mnist, "MNIST: accuracy", (0.898, 0.912), two_by_two("Mnist", "best_val_accuracy"), ".3f")
    baseline, alone, both = two_by_two("Qm9", "min_val_loss")
    ratio, added = both / baseline, both / alone
    here = f"{in_words(ratio)}; lower with {(ratio < 1).sum()}, than with the decay alone with {(added < 1).sum()}"
    is_lower = (ratio < 1).all() and (added < 1).all()
    agrees = verdict(is_lower and near(0.53, ratio), ratio.median() < 1, len(ratio))
    yield Claim("Fig. 6 (10), Table 5", "QM9: lowest loss over the baseline's", "0.53", here, agrees)
    yield task_claim(imdb, "IMDb: best accuracy", (0.84, 0.90), two_by_two("Imdb", "best_val_accuracy"), ".3f")
    yield task_claim(imdb, "IMDb: lowest loss", (0.517, 0.412), two_by_two("Imdb", "min_val_loss"), ".3f")


def order_claim(optimizers: dict[str, Any]) -> Claim:
    """Theorem A.1: the filter before a linear optimizer gives the same updates as the filter after it."""
    amplified = grokfast_ema(0.98, 2.0, start="zero")
    equal, other = [], []
    for name, optimizer in optimizers.items():
        chains = optax.chain(amplified, optimizer), optax.chain(optimizer, amplified)
        before, after = (np.asarray(impulse_response(chain, 300, settle=0)) for chain in chains)
        (equal if np.allclose(before, after, rtol=0, atol=1e-6) else other).append(name)
    here = [f"{how} with {', '.join(names)}" for how, names in (("equal", equal), ("a transient", other)) if names]
    agrees = verdict(not other, equal)
    return Claim("Thm. A.1, Props. A.2, A.3", "filter before and after, x(0) = g(0)", "equal", "; ".join(here), agrees)


def memory_claims(rows: list[Any]) -> Iterator[Claim]:
    """Memory that the filters add: `rows` of one layout of `step_cost.json`, times the parameters of the models."""
    kept = {row["filter"]: row["state_bytes"] for row in rows}
    ma_bytes, ema_bytes = kept["ma-100"] - kept["none"], kept["ema"] - kept["none"]
    tasks = (Modular(), MNIST.task, QM9.task, IMDB.task)
    models = [jax.eval_shape(task.init, jax.random.key(0)) for task in tasks]
    millions = np.array([sum(x.size for x in jax.tree.leaves(params)) for params in models]) / 1e6
    memory, copies = pd.Series([millions[0] * ma_bytes]), pd.Series([ma_bytes / 4])
    yield Claim("Table 3", "MA: memory added", "168 MB", f"{memory[0]:.0f} MB", verdict(near(168, memory)))
    yield Claim("text", "MA: copies of the parameters", "w = 100", f"{copies[0]:.0f}", verdict(near(100, copies)))
    ours, agree = millions * ema_bytes, np.abs(millions * ema_bytes - [4, 2, 0, 8]) <= 1  # published in whole MB
    here = ", ".join(f"{x:.1f}" for x in ours) + " MB"
    yield Claim("Tables 3 to 6", "EMA: memory added", "4, 2, 0, 8 MB", here, verdict(agree.all(), agree.any()))


@STUDY.table
def claims(frame: Frame) -> Iterator[Claim]:
    """Distances, cost, and what the text claims."""
    followed = {
        decay: views.runs_of(frame, method, weight_decay=decay) for method, decay in ((ema, 0.005), (adam, 0.0))
    }
    ratio: Series = followed[0.0]["A_C"].dropna() / followed[0.005]["A_C"].mean()
    here = in_words(ratio) if len(ratio) else "the baseline was not followed"
    agrees = verdict(near(15.94, ratio), near(15.94, ratio**2), len(ratio))
    yield Claim("Fig. 12, Table 2", "AC of the baseline over Grokfast's", "15.94; of roots 3.99", here, agrees)
    yield from memory_claims(json.loads((RESULTS / "step_cost.json").read_text())["rows"][:5])
    epochs = json.loads((RESULTS / "vs_torch.json").read_text())["epochs"]
    seconds = {name: epochs[f"modular {name}"]["seconds_a_step"]["torch"]["median"] for name in ("adam", "ema", "ma")}
    decayed, steps = steps_of(adam, weight_decay=0.00167), {"EMA": steps_of(ema), "MA": steps_of(ma)}
    for name, time, clock in (("MA", 0.37 / 0.15, 20.49), ("EMA", 0.15 / 0.15, 43.79)):
        ratio = pd.Series([seconds[name.lower()] / seconds["adam"]])
        agrees = verdict(near(time, ratio), ratio[0] > 1)
        yield Claim("Table 3", f"{name}: time per step over Adam's", number(time), number(ratio[0]), agrees)
        gain = times_fewer(baseline_steps(frame), steps[name]) / ratio[0]
        yield claim("Table 3", f"{name}: times less wall clock", clock, gain, is_gain=True)
    ours, theirs = steps["MA"] < steps["EMA"], authors("ma") < authors("ema")
    here = f"with {ours.sum()} of {len(ours)} seeds; the authors' code with {theirs.sum()} of {len(theirs)}"
    agrees = verdict(ours.all() and theirs.all(), ours.any() or theirs.any(), len(ours))
    yield Claim("text", "MA takes fewer steps than the EMA", "790 and 910", here, agrees)
    spread = {name: values.std() for name, values in {**steps, "Adam": decayed, "AdamW": steps_of(adamw)}.items()}
    here = ", ".join(f"{name} {deviation:.0f}" for name, deviation in spread.items())
    filtered, alone = max(spread["EMA"], spread["MA"]), (spread["Adam"], spread["AdamW"])
    agrees = verdict(filtered < min(alone), filtered < max(alone), len(decayed))
    yield Claim("text", "standard deviation of steps", "less with filters", here, agrees)
    yield order_claim(LINEAR)
