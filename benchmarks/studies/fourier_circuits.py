"""Which Fourier circuits do models of modular arithmetic learn, and when?

Each run continues for 50 evaluations after its first at 95 % validation accuracy. Its key frequencies are those of its
final parameters, as in Nanda et al. (arXiv 2301.05217), and the losses at all steps are measured with these. The clock
forms at the first measured step with a restricted loss below half of log p. Methods are compared from the same initial
parameters and split; the control are runs from others.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.stats

from benchmarks import views
from benchmarks.study import Study
from examples import circuits, modular
from examples.fast import answer_logits
from examples.harness import plots
from examples.harness.engine import Results, four_digits, product
from examples.harness.experiment import Run
from examples.harness.methods import Method, base
from examples.harness.records import Row, is_finished
from examples.harness.tables import markdown, median_and_range
from examples.harness.task import Data
from examples.harness.train import TrainState, keys
from examples.modular import Modular

OPERATIONS = ("multiplication", "addition", "subtraction", "division")
METHODS: dict[str, Method] = {  # by the names of their functions
    "adamw": modular.adamw,
    "muon": functools.partial(modular.muon, lr=0.03, weight_decay=0.3),  # at AdamW's learning rate it takes thousands
    "fastest": modular.fastest,
    "ema": modular.ema,
    "ma": modular.ma,
}
LABELS = {"adamw": "AdamW", "muon": "Muon", "fastest": "fastest", "ema": "EMA + Adam", "ma": "MA + Adam"}
Frame = Any  # pandas.DataFrame; type checkers do not know its columns
MEASURE_EVERY = 5  # evaluations
SKETCH_SIZE = 256
measure = jax.jit(circuits.measure, static_argnums=0)


def runs(results: Results) -> Iterator[Run]:
    """All methods on all operations."""
    del results
    for operation, method in itertools.product(OPERATIONS, METHODS.values()):
        yield from product(Modular(operation=operation), method, seed=range(8), hold_evals=50)


@functools.partial(jax.jit, static_argnums=0)
def sketch(task: Modular, params: Any, val: jax.Array) -> jax.Array:
    """A count sketch of the logits of validation pairs: a unit vector; inner products estimate correlations of logits.

    Each logit, less its pair's mean, is added with a random sign to a random one of `SKETCH_SIZE` numbers, the same in
    all runs of a task. The standard deviation of an estimate is at most 1 / sqrt(SKETCH_SIZE) (Charikar, Chen and
    Farach-Colton 2002).
    """
    logits = answer_logits(task.with_params(params), task.tokens(val), prefixes=task.p)
    centred = (logits - logits.mean(axis=1, keepdims=True)).ravel()
    index_key, sign_key = jax.random.split(jax.random.key(0))
    signed = centred * jax.random.rademacher(sign_key, centred.shape, centred.dtype)
    sums = jax.ops.segment_sum(signed, jax.random.randint(index_key, centred.shape, 0, SKETCH_SIZE), SKETCH_SIZE)
    return sums / jnp.linalg.norm(sums)


def quotient_frequencies(p: int, operation: str) -> np.ndarray:
    """The frequencies k that have a divisor in common with the length of the cycle: a mask, (k,).

    Their waves repeat within the cycle: they tell apart only the elements of a quotient of the group. A cycle of prime
    length has no such frequency.
    """
    n = p - (operation in ("multiplication", "division"))
    return np.gcd(np.arange(1, (p - 1) // 2 + 1), n) > 1


def first_step(steps: Iterable[int], is_reached: Iterable[Any]) -> int | None:
    """The first of the steps at which something is reached."""
    return next(itertools.compress(steps, is_reached), None)


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, Any]:
    """When a run's circuit forms, and its final form.

    key: the key frequencies.
    clock_step: first measured step with a restricted loss below half of log p.
    gini_step: first measured step at which the Gini coefficient is half-way from its first to its last value.
    quotient_power: share of the embedding's power at `quotient_frequencies`.
    """
    task: Any = run.task
    params, rows = {0: task.init(keys(jax.random.key(run.seed)).init)}, []
    for row, state in history:
        rows.append(row)
        if len(rows) % MEASURE_EVERY == 0 or is_finished(run, rows):
            params[int(row["step"])] = jax.device_get(state.params)
    last = max(params)
    end = jax.device_get(measure(task, params[last], data))
    measured = [measure(task, one, data, end["is_key"]) for one in params.values()]
    restricted_loss, gini = (np.array([one[name] for one in measured]) for name in ("restricted_loss", "gini"))
    numbers = {name: end[name] for name in ("restricted_loss", "gini", "gini_control", "logit_share")}
    numbers["quotient_power"] = end["share"][quotient_frequencies(task.p, task.operation)].sum()
    result = {
        "key": (1 + np.flatnonzero(end["is_key"])).tolist(),
        "clock_step": first_step(params, restricted_loss < math.log(task.p) / 2),
        "gini_step": first_step(params, gini >= (gini[0] + gini[-1]) / 2),
        **{name: four_digits(value) for name, value in numbers.items()},
        "logit_coefficients": [round(float(value), 3) for value in end["logit_coefficients"]],
        "sketch": np.rint(200 * sketch(task, params[last], data["val"])).astype(int).tolist(),
    }
    is_drawn = run.seed == 0 and base(run.method) is modular.adamw and task.operation == "multiplication"
    return result | ({"circle": circle(task, params, rows, end["share"] * end["is_key"])} if is_drawn else {})


def circle(task: Modular, params: Mapping[int, Any], rows: Sequence[Row], key_share_k: np.ndarray) -> dict[str, Any]:
    """The embedding on the circle of its strongest key frequency k: at the start, memorised, and at the end.

    It is memorised at the measured step with the largest difference of training and validation accuracy.
    """
    accuracy = {0: (0.0, 0.0)} | {row["step"]: (row["train_accuracy"], row["val_accuracy"]) for row in rows}
    memorised = max(params, key=lambda step: accuracy[step][0] - accuracy[step][1])
    steps = [0, memorised, max(params)]
    n = len(circuits.Cycle.of(task.p, task.operation).elements)
    k = 1 + int(np.argmax(key_share_k[: (n - 1) // 2]))  # n/2 has a line, not a circle
    points = circuits.circle_points(task, [params[step] for step in steps], k).round(2).tolist()
    shown = [[round(value, 3) for value in accuracy[step]] for step in steps]
    return {"k": k, "steps": steps, "accuracy": shown, "points": points}


STUDY = Study("fourier_circuits", runs, observe=observe)


def reached(frame: Frame) -> Frame:
    """The runs that reach 95 %."""
    return frame[np.isfinite(frame["steps_to_95"])]


def groups(frame: Frame, column: str, values: Iterable[str]) -> dict[str, Frame]:
    """The runs by the values of a column, in the order of these, sorted by seed; values without runs are left out."""
    parts = {value: frame[frame[column] == value].sort_values("seed") for value in values}
    return {value: part for value, part in parts.items() if len(part)}


def spread(values: Iterable[float], form: str) -> str:
    """Median and range of numbers; NaN marks a failure."""
    return median_and_range(np.array([*values], float), form)


@STUDY.table
def formation(frame: Frame) -> str:
    """When the clocks of each method form, relative to the steps to 95 % validation accuracy."""
    rows = []
    for method, part in groups(frame, "method", METHODS).items():
        done = reached(part)
        failed = f", {len(part) - len(done)} fail" * (len(done) < len(part))
        relative = (
            done[["fit_steps", "clock_step", "gini_step"]].replace(np.inf, np.nan).div(done["steps_to_95"], axis=0)
        )
        rows.append(
            {
                "method": LABELS[method],
                "runs": f"{len(part)}{failed}",
                "training pairs fitted": spread(relative["fit_steps"], ".2f"),
                "clock forms": spread(relative["clock_step"], ".2f"),
                "Gini half-way": spread(relative["gini_step"], ".2f"),
                "key frequencies": spread(done["key"].map(len), ".0f"),
                "Gini": spread(done["gini"], ".2f"),
            }
        )
    return markdown(rows)


@STUDY.table
def operations(frame: Frame) -> str:
    """The clocks of each operation, all methods together."""
    rows = [
        {
            "operation": operation,
            "runs": str(len(part)),
            "key frequencies": spread(part["key"].map(len), ".0f"),
            "Gini, the operation's cycle": spread(part["gini"], ".2f"),
            "Gini, the other cycle": spread(part["gini_control"], ".2f"),
            "the clock's share of the logits": spread(part["logit_share"], ".2f"),
            "restricted loss": spread(part["restricted_loss"], ".2g"),
        }
        for operation, part in groups(reached(frame), "operation", OPERATIONS).items()
    ]
    return markdown(rows)


Draw = tuple[int, int, int]  # frequencies, how many of them are marked, and how many are drawn without replacement


def expected_marked(frequencies: int, marked: int, drawn: int) -> float:
    """The mean number of marked frequencies among those drawn."""
    return marked * drawn / frequencies


def tail_probability(draws: Iterable[Draw], total: int) -> float:
    """The probability that at least `total` are marked in all draws: of a sum of hypergeometric numbers."""
    law = np.ones(1)
    for draw in draws:
        law = np.convolve(law, scipy.stats.hypergeom.pmf(np.arange(draw[2] + 1), *draw))
    return float(law[total:].sum())


@STUDY.table
def quotients(frame: Frame) -> str:
    """How much of each method's clocks of multiplication and division is at frequencies of quotients."""
    is_quotient = quotient_frequencies(Modular().p, "multiplication")
    multiplicative = reached(frame)[reached(frame)["operation"].isin(["multiplication", "division"])]
    rows = []
    for method, part in groups(multiplicative, "method", METHODS).items():
        draws = [(is_quotient.size, int(is_quotient.sum()), len(key)) for key in part["key"]]
        marked = sum(int(is_quotient[np.array(key, int) - 1].sum()) for key in part["key"])
        rows.append(
            {
                "method": LABELS[method],
                "runs": str(len(part)),
                "share of power at frequencies of quotients": spread(part["quotient_power"], ".2f"),
                "these among all": f"{is_quotient.mean():.2f}",
                "these among key frequencies": f"{marked} of {part['key'].map(len).sum()}",
                "by chance": f"{sum(expected_marked(*draw) for draw in draws):.1f}",
                "p": f"{tail_probability(draws, marked):.2g}",
            }
        )
    return markdown(rows) if rows else views.MISSING


def common_keys(pairs: Frame) -> np.ndarray:
    """The number of key frequencies that both runs of each pair have."""
    return np.array([len({*a} & {*b}) for a, b in zip(pairs["key"], pairs["key_2"], strict=True)])


def cosines(pairs: Frame, column: str) -> np.ndarray:
    """The cosine of the angle between the vectors of both runs of each pair; 0 if one vector is 0.

    Of `logit_coefficients` it is the correlation of the logits' parts in a clock's form, because the cosines of a clock
    are orthogonal. Of a `sketch` it estimates the correlation of all logits.
    """
    a, b = (np.array(pairs[name].tolist(), float) for name in (column, f"{column}_2"))
    return (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-9)


@STUDY.table
def comparison(frame: Frame) -> str:
    """What two methods learn in common, from the same initial parameters and split, and from others as the control."""
    rows, frequencies = [], (Modular().p - 1) // 2
    for (name, first), (name_2, second) in itertools.combinations(groups(reached(frame), "method", METHODS).items(), 2):
        pairs = first.merge(second, on="operation", suffixes=("", "_2"))
        same, apart = pairs[pairs["seed"] == pairs["seed_2"]], pairs[pairs["seed"] != pairs["seed_2"]]
        if not len(same):
            continue
        draws = [(frequencies, len(a), len(b)) for a, b in zip(same["key"], same["key_2"], strict=True)]
        chance = np.mean([expected_marked(*draw) for draw in draws])
        control = f" ({cosines(apart, 'logit_coefficients').mean():.2f})" if len(apart) else ""
        rows.append(
            {
                "methods": f"{LABELS[name]}; {LABELS[name_2]}",
                "runs": str(len(same)),
                "keys in common": f"{common_keys(same).mean():.1f}",
                "by chance (p)": f"{chance:.1f} ({tail_probability(draws, common_keys(same).sum()):.1g})",
                "from other starts": f"{common_keys(apart).mean():.1f}" if len(apart) else "",
                "correlation of logits": f"{cosines(same, 'sketch').mean():.2f}",
                "of their clocks (from other starts)": f"{cosines(same, 'logit_coefficients').mean():.2f}{control}",
            }
        )
    return markdown(rows) if rows else views.MISSING


@STUDY.figure("Filters and Muon form the clock before they fit\nthe training pairs; AdamW mostly fits first", height=7)
def figure(frame: Frame, axes: Any) -> None:
    """When runs of multiplication fit the training pairs, form the clock, and reach 95 %; a line per run."""
    by_method = groups(reached(frame[frame["operation"] == "multiplication"]), "method", METHODS)
    drawn = pd.concat(by_method.values(), ignore_index=True)
    marks = {
        "steps_to_95": ("95 % on validation pairs", "s", plots.BLUE),
        "clock_step": ("clock forms", "D", plots.GREEN),
        "fit_steps": ("training pairs fitted", "o", plots.ORANGE),
    }
    for size, (column, (label, marker, colour)) in zip((7, 5, 3.5), marks.items(), strict=True):  # some coincide
        axes.plot(drawn[column], drawn.index, marker, color=colour, markersize=size, label=label)
    steps = drawn[[*marks]].replace(np.inf, np.nan)
    axes.hlines(drawn.index, steps.min(axis=1), steps.max(axis=1), color="lightgrey", zorder=0)
    middle: Any = drawn.index.to_series().groupby(drawn["method"]).mean()
    axes.set_yticks([middle[name] for name in by_method], [LABELS[name] for name in by_method])
    axes.set_xscale("log")
    views.label(axes, "optimizer steps (multiplication; a line per seed)")
    plots.number_steps(axes, axes.get_xlim())
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize="large", frameon=False)


@STUDY.figure("Grokking puts the numbers on a circle", width=9, height=3.9, columns=3)
def circles(frame: Frame, panels: Any) -> None:
    """The embedding of a run of multiplication with AdamW, at three stages."""
    found = frame["circle"].dropna().iloc[0]
    titles = ["at the start\n"] + [
        f"{name}, step {step:,}\ntraining {100 * train:.0f} %, validation {100 * val:.0f} %"
        for name, step, (train, val) in zip(
            ("memorised", "generalised"), found["steps"][1:], found["accuracy"][1:], strict=True
        )
    ]
    circuits.draw_circles(panels, np.array(found["points"]), titles, found["k"])
    for axes in panels:
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
