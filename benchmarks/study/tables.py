"""The tables of the study, from its results alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from examples.harness.optimizers import describe
from examples.harness.tables import markdown

from .methods import AFTER, ELSEWHERE, FIRST_STEPS, PARTS, TUNED, TWO_STAGES, Pair, Variant, pairs, tuned_pairs
from .statistics import Results, all_tuned, interval

FEWEST = 6  # seeds of an interval: with fewer, a bootstrap interval of the median covers it too rarely
MISSING = "Not measured yet.\n"
COLUMNS = f"""\
- `steps to fit`: steps to 95 % training accuracy, the median of the seeds.
- `steps to 95 %`: steps to 95 % validation accuracy, the median. In brackets stands its 95 % bootstrap interval, or the
  range where there are fewer than {FEWEST} seeds. A run that fails counts as slower than all others.
- `slowest`: the 95th percentile of these steps, which of fewer than 20 seeds is the slowest.
- `fail`: how many seeds do not reach 95 %, and of how many.
- `hold`: of the runs that reach 95 %, how many are there at each of the next {AFTER} evaluations. In brackets stands
  the share of these evaluations at 95 %.
"""
PAIR_COLUMNS = """\
Both methods start from the same weights, split and batches with the same seed, so they are compared seed by seed.
`neither` counts ties and seeds with which both fail. The ratio is the median over the seeds with which both reach 95 %;
in brackets stands how many these are.
"""
WORDS = {  # how settings are called
    "lr": "learning rate",
    "weight_decay": "decay",
    "beta2": "β2",
    "embedding_std": "embeddings",
    "train_fraction": "fraction",
    "filter_from": "from step",
}


def steps(value: float, cap: int) -> str:
    """A number of steps, or that there were more."""
    return f"{value:,.0f}" if math.isfinite(value) else f"> {cap:,}"


def steps_and_failures(middle: float, fail: int, seeds: int, cap: int) -> str:
    """The median of the steps and how many seeds fail, if any does."""
    return "all fail" if fail == seeds else steps(middle, cap) + f", {fail} fail" * bool(fail)


def two_digits(value: float) -> str:
    """A number with two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def numbers(runs: pd.DataFrame, cap: int) -> dict[str, str]:
    """What runs of one variant came to, as cells of a table; `COLUMNS` says in words what they are."""
    first = runs["first_step"].to_numpy()
    median = steps(float(np.median(first)), cap)
    if len(runs) > 1 and np.isfinite(first).any():
        low, high = interval(first) if len(runs) >= FEWEST else (first.min(), first.max())
        median += f" ({steps(low, cap)} to {steps(high, cap)})"
    # Whether a run stays at the threshold is not known if the cap has cut it off. One that is no longer finite counts
    # as below the threshold from there on.
    reached = runs[np.isfinite(first) & ((runs["evaluations_after"] == AFTER) | ~runs["finite"])]
    share = reached["of_these_at_threshold"] / AFTER
    return {
        "steps to fit": steps(float(np.median(runs["first_step_train"])), cap),
        "steps to 95 %": median,
        "slowest": steps(np.percentile(first, 95, method="higher"), cap),
        "fail": f"{np.isinf(first).sum()} of {len(runs)}",
        "hold": f"{(share == 1).sum()} of {len(share)} ({share.mean():.0%})" if len(share) else "",
    }


def setting(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, str]:
    """Some settings as one cell of a table; no cell if there are none."""
    return {"setting": ", ".join(f"{WORDS.get(name, name)} {values[name]}" for name in settings)} if settings else {}


def variants_table(
    results: Results, variants: Iterable[Variant], titles: Sequence[str] = ("method",), settings: Sequence[str] = ()
) -> str:
    """A table of variants, a row each, with some settings in a column; those without a result are left out."""
    rows = []
    for variant in variants:
        runs = results.reported(variant)
        if len(runs):
            config = variant.run(0, results.cap)
            names = {"method": f"`{variant.name}`", "what": describe(*config.hyper)}
            cells = setting(config.flat(), settings) | {title: names[title] for title in titles}
            rows.append(cells | numbers(runs, results.cap))
    return markdown(rows) if rows else MISSING


def compare(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, str]:
    """Two variants over the seeds that both have, as cells of a table; empty if there are none.

    A run that fails takes more steps than any that does not. The ratio is a median, of seeds without failure.
    """
    taken = pd.concat([one["first_step"], other["first_step"]], axis=1, join="inner").to_numpy(float)
    if not len(taken):
        return {}
    first, second = taken.T
    both = taken[np.isfinite(taken).all(axis=1)]
    return {
        "fewer steps": str(np.sum(first < second)),
        "more steps": str(np.sum(first > second)),
        "neither": str(np.sum(first == second)),
        "ratio of steps (seeds)": f"{np.median(both[:, 0] / both[:, 1]):.2f} ({len(both)})" if len(both) else "",
    }


def pairs_table(
    results: Results, compared: Iterable[Pair], settings: Sequence[str] = (), hidden: Sequence[str] = ()
) -> str:
    """A table of pairs of variants, compared seed by seed; empty if none has a seed in common.

    Changes that are `settings` are in a column, all others but the `hidden` ones beside the names.
    """

    def name(variant: Variant) -> str:
        changes = (f"{WORDS.get(k, k)} {v}" for k, v in variant.changes.items() if k not in (*settings, *hidden))
        return ", ".join([f"`{variant.name}`", *changes])

    rows = []
    for one, other in compared:
        if found := compare(results.reported(one), results.reported(other)):
            rows.append(setting(one.changes, settings) | {"method": name(one), "against": name(other)} | found)
    return markdown(rows) if rows else ""


def part_table(
    results: Results, part: str, settings: Sequence[str], more: Sequence[Variant] = (), *, descending: bool = False
) -> str:
    """The variants of a part, and more, over some settings that all of them change; then its pairs."""
    key = lambda variant: [variant.changes[name] for name in settings]
    variants = sorted([*PARTS[part], *more], key=key, reverse=descending)
    compared = sorted(pairs(part), key=lambda pair: key(pair[0]), reverse=descending)
    return joined(
        variants_table(results, variants, settings=settings),
        pairs_table(results, compared, tuple(settings)),
    )


def tuned_table(results: Results, chosen: Mapping[str, Variant]) -> str:
    """All methods with a learning rate and weight decay from a grid, and those with a filter against those without."""
    rows = []
    for method, variant in chosen.items():
        runs = results.reported(variant)
        if len(runs):
            values = (
                f"{value:g}" + " (edge)" * (value in (grid[0], grid[-1]))
                for value, grid in zip(variant.changes.values(), TUNED[method], strict=True)
            )
            chosen_pair = {"learning rate, decay": ", ".join(values)}
            rows.append({"method": f"`{variant.name}`"} | chosen_pair | numbers(runs, results.cap))
    compared = [(chosen[one], chosen[other]) for one, other in tuned_pairs() if {one, other} <= chosen.keys()]
    return joined(markdown(rows) if rows else MISSING, pairs_table(results, compared, hidden=("lr", "weight_decay")))


def joined(*texts: str) -> str:
    """Tables one below the other; empty ones are left out."""
    return "\n".join(text for text in texts if text)


def tables(results: Results) -> dict[str, str]:
    """All tables, by name."""
    multiplication = [Variant(method, {"operation": "multiplication"}) for method in ELSEWHERE]
    return {
        "study_methods": variants_table(results, PARTS["methods"], ("method", "what")),
        "study_pairs": pairs_table(results, [*pairs("methods"), *FIRST_STEPS]) or MISSING,
        "study_rate": part_table(results, "rate", ("lr", "weight_decay")),
        "study_stable": variants_table(results, PARTS["stable"], ("what",), ("weight_decay",)),
        "study_operations": part_table(results, "operations", ("operation",), multiplication),
        "study_start": part_table(results, "start", ("embedding_std", "train_fraction"), descending=True),
        "study_early": variants_table(results, PARTS["early"], ("method", "what")),
        "study_paper": joined(
            variants_table(results, PARTS["paper"], ("method", "what")),
            pairs_table(results, [*pairs("paper"), TWO_STAGES], hidden=("weight_decay",)),
        ),
        "study_snippet": joined(
            variants_table(results, PARTS["snippet"], ("what",), ("beta2",)),
            pairs_table(results, pairs("snippet"), hidden=("lr_warmup",)),
        ),
        "study_undecayed": variants_table(results, PARTS["undecayed"], ("what",), ("lr",)),
        "study_tuned": tuned_table(results, all_tuned(results)),
    }
