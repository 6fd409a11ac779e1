"""Which clocks do models learn, and when? `python -m benchmarks.study.circuits --seeds 0 1 2 3 4 5 6 7`.

Each run is followed for 50 evaluations after its first at 95 % validation accuracy, and `examples.circuits` measures
what it has learned all along. The key frequencies are those of its end, as in Nanda et al. (arXiv 2301.05217). The
clock forms at the first measured step at which the restricted loss is below half of log p.
`python -m benchmarks.report` compares the methods from the same start and split, and from others.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tqdm
from matplotlib.figure import Figure

from benchmarks import RESULTS, run_command
from examples import circuits
from examples.fast import answer_logits
from examples.harness import plots
from examples.harness.config import Config
from examples.harness.records import Row, step_reached
from examples.harness.sweep import compiled_program
from examples.harness.tables import markdown, median_and_range
from examples.modular import Modular

from .cells import BASE, append, as_cell, differences, read
from .methods import AFTER, METHODS, THRESHOLD, Variant, check_among, check_flags, method_of
from .runs import stored, train

OUT = RESULTS / "circuits.jsonl"
MULTIPLICATIVE = ("multiplication", "division")
OPERATIONS = ("multiplication", "addition", "subtraction", "division")
Run = dict[str, Any]  # a result with its method, operation, seed and p
# At the paper's rate Muon takes thousands of steps, so it has those that it was tuned to.
TUNED_TO = {"muon-1": {"lr": 0.03, "weight_decay": 0.3}}
EVERY = 5  # evaluations between two measurements
SKETCH = 256  # numbers that stand for the logits of a run
DRAWN = 0  # the seed whose embedding is kept for a picture


def sketch(task: Modular, params: Any, val: jax.Array) -> jax.Array:
    """The logits of validation pairs in `SKETCH` numbers whose correlation estimates that of the logits.

    Each logit, less its pair's mean, is added to a random one of the numbers with a random sign, the same in all runs
    of a task. So the error of an estimate has a standard deviation of 1 / sqrt(SKETCH) at most (Charikar, Chen and
    Farach-Colton 2002: the count sketch).
    """
    logits = answer_logits(task.with_params(params), task.tokens(val), prefixes=task.p)
    centred = (logits - logits.mean(axis=1, keepdims=True)).ravel()
    where, sign = jax.random.split(jax.random.key(0))
    signed = centred * jax.random.rademacher(sign, centred.shape, centred.dtype)
    sums = jax.ops.segment_sum(signed, jax.random.randint(where, centred.shape, 0, SKETCH), SKETCH)
    return sums / jnp.linalg.norm(sums)


def follow(config: Config, after: int, bar: tqdm.tqdm) -> dict[str, Any]:
    """Train one run until `after` evaluations after its first at 95 %; what it has learned, and when."""
    task: Any = config.task
    compiled = compiled_program(task, jax.tree.structure(config.hyper), 1, 1)
    key = jax.random.key(config.run.seed)
    _, own = compiled.draw(key)
    state = compiled.init(config.hyper, key)
    snapshots, rows, first = {0: jax.device_get(state.params)}, [], None
    for evaluation in train(compiled, config, bar, state):
        rows += evaluation.rows
        first = step_reached(rows, THRESHOLD)
        end = evaluation.step >= config.run.budget or (
            first is not None and evaluation.step >= first + after * task.steps
        )
        if len(rows) % EVERY == 0 or end:
            snapshots[evaluation.step] = jax.device_get(evaluation.state.params)
        if end:
            break
    last, measure = int(rows[-1]["step"]), jax.jit(circuits.measure, static_argnums=0)
    none = jnp.zeros((task.p - 1) // 2, bool)
    key_k = measure(task, snapshots[last], own, none)["logit_coefficients"] >= circuits.KEY
    found = {step: jax.device_get(measure(task, params, own, key_k)) for step, params in snapshots.items()}
    numbers = jax.jit(sketch, static_argnums=0)(task, snapshots[last], own["val"])
    result = {
        "last_step": last,
        "first_step": first,  # null: not reached
        "first_step_train": next((int(row["step"]) for row in rows if row["train_accuracy"] >= THRESHOLD), None),
        "val_accuracy": round(rows[-1]["val_accuracy"], 4),
        "key": (1 + np.flatnonzero(key_k)).tolist(),
        "neurons": (1 + np.flatnonzero(found[last]["neurons"] >= circuits.TUNED_PART)).tolist(),  # what they prefer
        "share": found[last]["share"].round(4).tolist(),
        "gini_control": round(float(found[last]["gini_control"]), 3),
        "logit_coefficients": found[last]["logit_coefficients"].round(3).tolist(),
        "sketch": (200 * numbers).round().astype(int).tolist(),
        "steps": [*found],
    }
    for name in ("restricted_loss", "excluded_loss", "gini", "logit_share"):
        result[name] = [round(float(one[name]), 3) for one in found.values()]
    if config.run.seed == DRAWN:
        result["circle"] = circle(task, snapshots, rows, np.where(key_k, found[last]["share"], 0))
    return result


def circle(task: Modular, snapshots: dict[int, Any], rows: Sequence[Row], key_share_k: np.ndarray) -> dict[str, Any]:
    """The embedding on the circle of its strongest key frequency: at the start, memorised, and at the end.

    It is memorised where, until the validation accuracy reaches 95 %, the training accuracy is most ahead of it.
    """
    accuracy = {0: (0.0, 0.0)} | {row["step"]: (row["train_accuracy"], row["val_accuracy"]) for row in rows}
    first = step_reached(rows, THRESHOLD)
    early = [step for step in snapshots if first is None or step <= first]
    memorised = max(early, key=lambda step: accuracy[step][0] - accuracy[step][1])
    stages = [0, memorised, max(snapshots)]
    with_circle = (len(circuits.Cycle.of(task.p, task.operation).numbers) - 1) // 2  # n/2 has but two places
    k = 1 + int(np.argmax(key_share_k[:with_circle]))
    return {
        "k": k,
        "steps": stages,
        "accuracy": [[round(value, 3) for value in accuracy[step]] for step in stages],
        "points": circuits.circle_points(task, [snapshots[step] for step in stages], k).round(2).tolist(),
    }


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7),
    methods: tuple[str, ...] = ("adamw-1", "muon-1", "fastest", "ema", "ma"),
    operations: tuple[str, ...] = OPERATIONS,
    cap: int = 5_000,
    after: int = AFTER,
    out: Path = OUT,
) -> None:
    """Train what is missing, and measure what was learned.

    Several commands may write into one OUT at once; give each its own methods, seeds or operations.

    Args:
      seeds: Seeds: start, split and batches, the same for all methods.
      methods: Methods, as python -m benchmarks.study --help names them; muon-1 has a rate and a decay of its own.
      operations: Which of multiplication, addition, subtraction and division.
      cap: Steps at most.
      after: Evaluations for which a run is followed after its first at 95 % validation accuracy.
      out: File for the results, a line a run; a run that is there is not made again.
    """
    check_among("--operations", operations, OPERATIONS)
    check_flags(methods, cap=cap, after=after)
    runs = itertools.product(operations, seeds, methods)
    configs = [
        Variant(name, {"operation": operation, **TUNED_TO.get(name, {})}).run(seed, cap)
        for operation, seed, name in runs
    ]
    found = stored(out, "--cap or --after", lambda result: {"after": after, "cell": result["cell"] | budget(cap)})
    done = {as_cell(result["cell"]) for result in found}
    todo = {cell: config for config in configs if (cell := as_cell(differences(config))) not in done}
    with tqdm.tqdm(total=len(todo) * cap, unit="step") as bar:
        for number, config in enumerate(todo.values(), 1):
            result = follow(config, after, bar)
            append(out, {"cell": differences(config), "after": after, **result})
            bar.update(number * cap - bar.n)


def budget(cap: int) -> dict[str, int]:
    """The cell's entry of a budget, none if it is that of the base."""
    return {} if cap == BASE["budget"] else {"budget": cap}


def named(cell: Mapping[str, Any]) -> str:
    """The method that a cell is a run of."""
    settings = lambda cell: {k: v for k, v in cell.items() if k not in ("operation", "seed", "budget", "stop_at")}
    for variant in itertools.starmap(Variant, TUNED_TO.items()):
        if settings(differences(variant.run(BASE["seed"], BASE["budget"]))) == settings(cell):
            return variant.name
    return method_of(settings(cell))


def load(path: Path) -> list[Run]:
    """All results with their method, operation, seed and p, sorted by these."""
    runs: dict[tuple[str, str, int], Run] = {}
    for line in read(path):
        cell = line.result["cell"]
        method = named(cell)
        places = {name: cell.get(name, BASE[name]) for name in ("operation", "seed", "p")}
        runs.setdefault((method, *list(places.values())[:2]), {"method": method, **places, **line.result})
    order = lambda run: ([*METHODS].index(run["method"]), OPERATIONS.index(run["operation"]), run["seed"])
    return sorted(runs.values(), key=order)


def reached(runs: Iterable[Run]) -> list[Run]:
    """Those that reached 95 %."""
    return [run for run in runs if run["first_step"] is not None]


def grouped(runs: Iterable[Run], field: str) -> dict[str, list[Run]]:
    """The runs by a field, in their order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run[field], []).append(run)
    return groups


def fit_step(run: Run) -> float:
    """The first step with 95 % training accuracy, NaN if there is none."""
    return math.nan if run["first_step_train"] is None else run["first_step_train"]


def clock_step(run: Run) -> float:
    """The first measured step at which the restricted loss is below half of log p, NaN if there is none."""
    below = np.array(run["restricted_loss"]) < math.log(run["p"]) / 2
    return run["steps"][int(np.argmax(below))] if below.any() else math.nan


def gini_step(run: Run) -> float:
    """The first measured step at which the Gini coefficient is half-way from its first to its last."""
    gini = np.array(run["gini"])
    return run["steps"][int(np.argmax(gini >= (gini[0] + gini[-1]) / 2))]


def in_quotient(run: Run) -> np.ndarray:
    """The frequencies k that have a divisor in common with the length of the cycle: a mask, (k,).

    Their waves repeat within the cycle, and tell apart the elements of a quotient of the group alone. A cycle of prime
    length has none.
    """
    n = run["p"] - (run["operation"] in MULTIPLICATIVE)
    return np.gcd(np.arange(1, (run["p"] - 1) // 2 + 1), n) > 1


def table(path: Path) -> str:
    """When clocks form, what they are like, and whether methods learn the same, as Markdown."""
    runs = load(path)
    if not runs:
        return "Not measured yet.\n"
    texts = [when(runs), kinds(reached(runs)), quotients(reached(runs)), common(reached(runs))]
    return "\n".join(text for text in texts if text)


def spread(values: Iterable[float], form: str) -> str:
    """Median and range; empty if there are no values."""
    found = np.array([*values], float)
    return median_and_range(found, form) if len(found) else ""


def when(runs: Sequence[Run]) -> str:
    """When the clocks of each method form, in parts of the steps to 95 % validation accuracy."""
    steps = {
        "training pairs fitted": fit_step,
        "clock forms": clock_step,
        "Gini half-way": gini_step,
    }
    rows = []
    for method, group in grouped(runs, "method").items():
        done = reached(group)
        failed = f", {len(group) - len(done)} fail" if len(done) < len(group) else ""
        rows.append(
            {"method": f"`{method}`", "runs": f"{len(group)}{failed}"}
            | {title: spread([step(run) / run["first_step"] for run in done], ".2f") for title, step in steps.items()}
            | {"key frequencies": spread([len(run["key"]) for run in done], ".0f")}
            | {"Gini": spread([run["gini"][-1] for run in done], ".2f")}
        )
    return markdown(rows)


def kinds(runs: Sequence[Run]) -> str:
    """What the clocks of each operation are like, all methods together."""
    rows = [
        {
            "operation": operation,
            "runs": str(len(group)),
            "key frequencies": spread([len(run["key"]) for run in group], ".0f"),
            "Gini, the operation's cycle": spread([run["gini"][-1] for run in group], ".2f"),
            "Gini, the other cycle": spread([run["gini_control"] for run in group], ".2f"),
            "the clock's share of the logits": spread([run["logit_share"][-1] for run in group], ".2f"),
            "restricted loss": spread([run["restricted_loss"][-1] for run in group], ".2g"),
        }
        for operation, group in grouped(runs, "operation").items()
    ]
    return markdown(rows) if rows else ""


def quotients(runs: Sequence[Run]) -> str:
    """How much of each method's clocks of multiplication and division is at frequencies of quotients."""
    rows = []
    for method, group in grouped([run for run in runs if run["operation"] in MULTIPLICATIVE], "method").items():
        masks = [in_quotient(run) for run in group]
        keys = [mask[np.array(run["key"], int) - 1] for run, mask in zip(group, masks, strict=True)]
        draws = [(mask.size, int(mask.sum()), len(key)) for key, mask in zip(keys, masks, strict=True)]
        marked = int(sum(key.sum() for key in keys))
        power = [np.array(run["share"])[mask].sum() for run, mask in zip(group, masks, strict=True)]
        rows.append(
            {
                "method": f"`{method}`",
                "runs": str(len(group)),
                "share of power at frequencies of quotients": spread(power, ".2f"),
                "these among all": f"{masks[0].mean():.2f}",
                "these among key frequencies": f"{marked} of {sum(map(len, keys))}",
                "by chance": f"{sum(expected(*draw) for draw in draws):.1f}",
                "p": f"{chance(draws, marked):.2g}",
            }
        )
    return markdown(rows) if rows else ""


Draw = tuple[int, int, int]  # frequencies, how many of them are marked, and how many are drawn without replacement


def expected(frequencies: int, marked: int, drawn: int) -> float:
    """How many of those drawn are marked, in the mean."""
    return marked * drawn / frequencies


def chance(draws: Iterable[Draw], total: int) -> float:
    """The probability that `total` or more are marked in all draws: of a sum of hypergeometric numbers."""
    law = np.ones(1)
    for draw in draws:
        law = np.convolve(law, scipy.stats.hypergeom.pmf(np.arange(draw[2] + 1), *draw))
    return float(law[total:].sum())


def common(runs: Sequence[Run]) -> str:
    """What two methods learn in common, from the same start and split and, as the control, from others."""
    rows = []
    for (one, ones), (other, others) in itertools.combinations(grouped(runs, "method").items(), 2):
        pairs = [pair for pair in itertools.product(ones, others) if pair[0]["operation"] == pair[1]["operation"]]
        same = [pair for pair in pairs if pair[0]["seed"] == pair[1]["seed"]]
        apart = [pair for pair in pairs if pair[0]["seed"] != pair[1]["seed"]]
        if not same:
            continue
        draws = [(len(a["share"]), len(a["key"]), len(b["key"])) for a, b in same]
        rows.append(
            {
                "methods": f"`{one}`, `{other}`",
                "runs": str(len(same)),
                "keys in common": f"{np.mean([keys_in_common(*pair) for pair in same]):.1f}",
                "by chance (p)": f"{np.mean([expected(*draw) for draw in draws]):.1f} "
                f"({chance(draws, sum(keys_in_common(*pair) for pair in same)):.1g})",
                "from other starts": f"{np.mean([keys_in_common(*pair) for pair in apart]):.1f}" if apart else "",
                "correlation of logits": f"{np.mean([logits_alike(*pair) for pair in same]):.2f}",
                "of their clocks (from other starts)": f"{np.mean([clocks_alike(*pair) for pair in same]):.2f}"
                + (f" ({np.mean([clocks_alike(*pair) for pair in apart]):.2f})" if apart else ""),
            }
        )
    return markdown(rows) if rows else ""


def keys_in_common(one: Run, other: Run) -> int:
    """How many key frequencies two runs have in common."""
    return len({*one["key"]} & {*other["key"]})


def logits_alike(one: Run, other: Run) -> float:
    """The correlation of the logits of two runs on the validation pairs of the split that they share, as estimated."""
    return float(
        np.array(one["sketch"]) @ other["sketch"] / np.linalg.norm(one["sketch"]) / np.linalg.norm(other["sketch"])
    )


def clocks_alike(one: Run, other: Run) -> float:
    """The correlation of the parts of two runs' logits that are in a clock's form.

    Σ c c' / sqrt(Σ c² Σ c'²) with the logit coefficients c and c', for the cosines are orthogonal; 0 if one has none.
    """
    c, c_other = np.array(one["logit_coefficients"]), np.array(other["logit_coefficients"])
    return float(c @ c_other / max(np.sqrt(c @ c * (c_other @ c_other)), 1e-9))


def picture(path: Path) -> Figure:
    """When runs of multiplication fit the training pairs, form the clock, and reach 95 %; a line a run."""
    runs = [run for run in reached(load(path)) if run["operation"] == "multiplication"]
    marks = {
        "training pairs fitted": ("o", "#E69F00", fit_step),
        "clock forms": ("D", "#009E73", clock_step),
        "95 % on validation pairs": ("s", "#0072B2", lambda run: run["first_step"]),
    }
    figure = Figure(figsize=(7, 1.4 + 0.14 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for label, (marker, colour, step) in marks.items():
        axes.plot([step(run) for run in runs], range(len(runs)), marker, color=colour, markersize=4.5, label=label)
    at = [[step(run) for _, _, step in marks.values()] for run in runs]
    axes.hlines(range(len(runs)), [min(x) for x in at], [max(x) for x in at], color="lightgrey", zorder=0)
    places = grouped([run | {"place": place} for place, run in enumerate(runs)], "method")
    axes.set_yticks([np.mean([run["place"] for run in group]) for group in places.values()], [*places])
    axes.set(xscale="log", xlabel="optimizer steps (multiplication; a line a seed)")
    plots.number_steps(axes, axes.get_xlim())
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure


def circles(path: Path) -> Figure:
    """The embedding of the first method's run of multiplication on its key circle: at three stages."""
    run = next(run for run in reached(load(path)) if run["operation"] == "multiplication" and "circle" in run)
    stages = zip(("start", "memorised", "generalised"), run["circle"]["steps"], run["circle"]["accuracy"], strict=True)
    titles = [
        f"{name}, step {step:,}\ntraining {100 * train:.0f} %, validation {100 * val:.0f} %"
        if step
        else f"{name}, step 0\n"
        for name, step, (train, val) in stages
    ]
    return circuits.circles(np.array(run["circle"]["points"]), titles, run["circle"]["k"])


if __name__ == "__main__":
    run_command(main, "benchmarks.study.circuits")
