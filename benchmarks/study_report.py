"""Tables and pictures of the study, from its result files alone."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from examples.harness import plots
from examples.harness.run import described
from examples.harness.run_folder import write_whole
from examples.sweep import to_csv

from .study import AFTER, ELSEWHERE, FINALISTS, METHODS, PARTS, TUNED, TUNING_SEEDS, Variant, cell, tuned

Result = dict[str, Any]
FEWEST = 6  # seeds of an interval: with fewer, a bootstrap interval of the median covers it too seldom


def load_all(folder: Path) -> list[Result]:
    """All results, in the order of methods, then of what was changed, then of seeds."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    methods = list(METHODS)
    return sorted(results, key=lambda r: (methods.index(r["axes"]["method"]), str(r["axes"]), r["config"]["seed"]))


def of(results: Sequence[Result], variant: Variant, *, tuning: bool = False) -> list[Result]:
    """The results of a variant, those of the tuning seeds or all others."""
    axes = cell(variant, 0, 1).axes
    return [r for r in results if r["axes"] == axes and (r["config"]["seed"] in TUNING_SEEDS) == tuning]


def steps(results: Sequence[Result], key: str = "first_step") -> np.ndarray:
    """Steps to the threshold; infinite where a run did not get there."""
    return np.array([math.inf if r[key] is None else r[key] for r in results])


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the median, which may be infinite."""
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5], method="inverted_cdf")
    return float(low), float(high)


def told(value: float, cap: int) -> str:
    """A number of steps, or that there were more."""
    return f"{value:,.0f}" if math.isfinite(value) else f"> {cap:,}"


def cap_of(results: Sequence[Result]) -> int:
    """The steps at which the runs were stopped that had not got there."""
    return max(r["config"]["budget"] for r in results)


def row(results: Sequence[Result]) -> list[str]:
    """Cells of a table: seeds, training's median, validation's and its spread, 95th percentile, failures, and after.

    A run that was no longer finite counts as below the threshold from there on.
    """
    values, cap = steps(results), cap_of(results)
    median = told(float(np.median(values)), cap)
    if len(values) > 1:
        low, high = interval(values) if len(values) >= FEWEST else (float(values.min()), float(values.max()))
        median += f" ({told(low, cap)} to {told(high, cap)})"
    there = [
        r["of_these_at_threshold"] / AFTER
        for r in results
        if r["first_step"] is not None and (r["evaluations_after"] == AFTER or not r["finite"])
    ]
    return [
        str(len(results)),
        told(float(np.median(steps(results, "first_step_train"))), cap),
        median,
        told(float(np.percentile(values, 95, method="higher")), cap),
        str(int(np.isinf(values).sum())),
        f"{sum(share == 1 for share in there)} of {len(there)}" if there else "",
        f"{np.mean(there):.0%}" if there else "",
    ]


TITLES = [
    "seeds",
    "training: steps to 95 %, median",
    f"validation: steps to 95 %, median (95 % interval; of fewer than {FEWEST} seeds: range)",
    "95th percentile (of fewer than 20: the slowest)",
    "not reached",
    f"held for {AFTER} evaluations",
    "evaluations at 95 % after",
]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines) + "\n"


def name_of(variant: Variant) -> str:
    """The name of a variant's method, without its weight decay if the variant may have another."""
    name, changes = variant
    return name.removesuffix(f"-{METHODS[name].weight_decay:g}") if "weight_decay" in changes else name


def listed(results: Sequence[Result], chosen: Sequence[Variant], titles: Sequence[str] = ("method",)) -> str:
    """A table of variants, a row each; those without a result are left out."""
    rows = []
    for variant in chosen:
        if mine := of(results, variant):
            changes, config = variant[1], cell(variant, 0, 1).config
            first = {"method": f"`{name_of(variant)}`", "what": described(config)}
            rows.append([*(first.get(t) or str(changes.get(t, getattr(config, t, ""))) for t in titles), *row(mine)])
    return markdown([*titles, *TITLES], rows) if rows else "Not measured yet.\n"


def compared(results: Sequence[Result], one: Variant, other: Variant) -> list[str]:
    """Cells of a table: two variants compared seed by seed; none if they have no seed in common."""
    by_seed = [{r["config"]["seed"]: r for r in of(results, variant)} for variant in (one, other)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return []
    first, second = (steps([found[seed] for seed in seeds]) for found in by_seed)
    both = np.isfinite(first) & np.isfinite(second)
    ratio = f"{np.median(first[both] / second[both]):.2f} ({both.sum()})" if both.any() else ""
    earlier, later = np.sum(first < second), np.sum(first > second)
    return [str(len(seeds)), str(earlier), str(later), str(len(seeds) - earlier - later), ratio]


COMPARED = ["seeds", "earlier", "later", "neither", "ratio of steps (seeds)"]


CONTROLS = [  # a method with a filter, and what stands against it
    ("ema", "adam-0.00167"),
    ("ma", "adam-0.00167"),
    ("ema", "adam-0.005"),
    ("ma", "adam-0.01"),
    ("ema", "adamw-1"),
    ("ma", "adamw-1"),
    ("ma+adamw-1", "adamw-1"),
]


def filters_compared(
    results: Sequence[Result], settings: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]] = CONTROLS
) -> str:
    """A table of filters against controls, setting by setting; empty if nothing can be compared."""
    rows = [
        [*map(str, changes.values()), *(f"`{name_of((name, changes))}`" for name in (one, other)), *cells]
        for changes in settings
        for one, other in pairs
        if (cells := compared(results, (one, changes), (other, changes)))
    ]
    return "\n" + markdown([*settings[0], "method", "against", *COMPARED], rows) if rows else ""


def operations_table(results: Sequence[Result]) -> str:
    """The main methods on all operations."""
    every = [*PARTS["operations"], *((name, {"operation": "multiplication"}) for name in ELSEWHERE)]
    table = listed(results, sorted(every, key=lambda v: v[1]["operation"]), ("operation", "method"))
    return table + filters_compared(results, [changes for name, changes in PARTS["operations"] if name == "ema"])


def start_table(results: Sequence[Result]) -> str:
    """The main methods over initial scale and training fraction."""
    key = lambda variant: [-variant[1][name] for name in ("embedding_std", "train_fraction")]
    variants = sorted(PARTS["start"], key=key)
    table = listed(results, variants, ("embedding_std", "train_fraction", "method"))
    return table + filters_compared(results, [changes for name, changes in variants if name == "ema"])


def rate_table(results: Sequence[Result]) -> str:
    """AdamW with two learning rates and decays, with a filter and without."""
    settings = [changes for name, changes in PARTS["rate"] if name == "adamw-1"]
    variants = sorted(PARTS["rate"], key=lambda variant: settings.index(variant[1]))
    table = listed(results, variants, ("lr", "weight_decay", "method"))
    return table + filters_compared(results, settings, [(one, "adamw-1") for one in ("ema-late+adamw-1", "ma+adamw-1")])


def tuned_variants(results: Sequence[Result], folder: Path) -> dict[str, Variant]:
    """The methods whose tuning is complete, each with its best pair."""
    runs = dict.fromkeys(TUNED, 0)
    needed = dict.fromkeys(TUNED, FINALISTS)
    for variant in PARTS["tuning"]:
        needed[variant[0]] += 1
        runs[variant[0]] += len(of(results, variant, tuning=True))
    return {name: tuned(folder, name, cap_of(results)) for name in TUNED if runs[name] == needed[name]}


def tuned_table(results: Sequence[Result], chosen: dict[str, Variant]) -> str:
    """All methods with a learning rate and weight decay from a grid, and those with a filter against those without."""
    rows = []
    for name, variant in chosen.items():
        if mine := of(results, variant):
            config = cell(variant, 0, 1).config
            numbers = []
            for value, values in zip((config.lr, config.weight_decay), TUNED[name], strict=True):
                numbers.append(f"{value:g}" + " (edge)" * (value in (values[0], values[-1])))
            rows.append([f"`{name_of(variant)}`", *numbers, *row(mine)])
    if not rows:
        return "Not measured yet.\n"
    pairs = [
        [f"`{name_of(chosen[one])}`", f"`{name_of(chosen[other])}`", *cells]
        for one, other in TUNED_PAIRS
        if one in chosen and other in chosen and (cells := compared(results, chosen[one], chosen[other]))
    ]
    table = markdown(["method", "learning rate", "weight decay", *TITLES], rows)
    return table + ("\n" + markdown(["method", "against", *COMPARED], pairs) if pairs else "")


DEBIASED = {"start": "debiased"}
PAIRS: list[tuple[Variant, Variant]] = [  # what is compared, and with what
    *(
        ((one, {}), (other, {}))
        for one, other in (
            ("ema", "adam-0.00167"),
            ("ma", "adam-0.00167"),
            ("ema", "adam-0.005"),
            ("ma", "adam-0.01"),
            ("ema", "adamw-1"),
            ("ma", "adamw-1"),
            ("ema+adam", "adam"),
            ("ema-late+adam", "adam"),
            ("ma+adam", "adam"),
            ("ema+adamw-0.1", "adamw-0.1"),
            ("ma+adamw-0.1", "adamw-0.1"),
            ("ema+adamw-1", "adamw-1"),
            ("ema-late+adamw-1", "adamw-1"),
            ("ma+adamw-1", "adamw-1"),
            ("ema+muon", "muon"),
            ("ma+muon", "muon"),
            ("ema+muon-1", "muon-1"),
            ("ma+muon-1", "muon-1"),
        )
    ),
    (("ema", DEBIASED), ("adam-0.00167", {})),
    (("ema", DEBIASED), ("ema", {})),
    (("ema+adamw-1", DEBIASED), ("ema+adamw-1", {})),
    (("ema+adamw-1", DEBIASED), ("adamw-1", {})),
    (("ema+adamw-1", {"filter_from": 100}), ("adamw-1", {})),
    (("ema+adamw-1", DEBIASED | {"lamb": 5.0}), ("adamw-1", {})),
    (("ema+adamw-0.1", DEBIASED), ("adamw-0.1", {})),
]

TUNED_PAIRS = [
    *((one, "adam-0.005") for one in ("ema", "ema-0.95", "ema-normalized", "ma", "two-stage", "slow-only")),
    *((one, "adamw-1") for one in ("ema", "ma", "ema+adamw-1", "ema-late+adamw-1", "ma+adamw-1")),
    *((one, "muon-1") for one in ("ema+muon-1", "ma+muon-1")),
]


def pairs_table(results: Sequence[Result]) -> str:
    """Methods with a filter against methods without, or with another."""
    rows = []
    for one, other in PAIRS:
        if cells := compared(results, one, other):
            names = (
                ", ".join([f"`{name}`", *(f"{k} {v}" for k, v in changes.items())]) for name, changes in (one, other)
            )
            rows.append([*names, *cells])
    return markdown(["method", "against", *COMPARED], rows) if rows else "Not measured yet.\n"


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "study_methods": lambda results: listed(results, PARTS["methods"], ("method", "what")),
    "study_pairs": pairs_table,
    "study_rate": rate_table,
    "study_operations": operations_table,
    "study_start": start_table,
    "study_early": lambda results: listed(results, PARTS["early"], ("method", "what")),
    "study_undecayed": lambda results: listed(results, PARTS["undecayed"], ("method", "what", "lr")),
}


def write_csv(folder: Path, path: Path) -> None:
    """Write one row a run."""
    results = load_all(folder)
    changed = sorted({name for r in results for name in r["axes"]} - {"method"})
    kept = ["first_step", "evaluations_after", "of_these_at_threshold", "first_step_train", "last_step", "finite"]
    rows = [
        {"method": r["axes"]["method"], "seed": r["config"]["seed"], "budget": r["config"]["budget"]}
        | {name: r["axes"].get(name, "") for name in changed}
        | {name: r[name] for name in [*kept, "best_val_accuracy", "min_val_loss", "device"]}
        | {"jax": r["versions"]["jax"]}
        for r in results
    ]
    write_whole(path, to_csv(rows))


def methods_picture(results: Sequence[Result], variants: dict[str, Variant]) -> Figure | None:
    """Steps to 95 % of some variants: a point a seed, a line at the median, and beside it how many did not get there.

    None if none of them has been run.
    """
    groups = {label: mine for label, variant in variants.items() if (mine := of(results, variant))}
    if not groups:
        return None
    figure = Figure(figsize=(7, 0.9 + 0.26 * len(groups)), layout="constrained")
    axes = figure.subplots()
    cap = cap_of(results)
    beyond = 1.1 * cap
    for y, mine in enumerate(groups.values()):
        values = steps(mine)
        colour = "tab:blue" if mine[0]["config"]["filter"] == "none" else "tab:green"
        reached = values[np.isfinite(values)]
        axes.plot(reached, np.full(len(reached), y), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
        median = np.median(values)
        axes.plot([min(median, beyond)] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=2)
        if missed := len(values) - len(reached):
            axes.text(beyond, y, f"  {missed} of {len(values)}", va="center", fontsize="small", color=colour)
    axes.axvline(cap, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set(
        xlim=(None, 1.8 * cap), xlabel="steps to 95 % validation accuracy; on the right: how many did not get there"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    for name, colour in (("no filter", "tab:blue"), ("with a filter", "tab:green")):
        axes.plot([], [], "o", color=colour, label=name)
    figure.legend(loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    return figure


ABLATIONS = {  # part: the changed setting, and how it is called
    "lamb": ("lamb", "λ (EMA)"),
    "alpha": ("alpha", "α (EMA)"),
    "decay": ("weight_decay", "weight decay"),
    "window": ("window_size", "window size w (MA)"),
}


def ablation(results: Sequence[Result], part: str) -> dict[str, dict[float, np.ndarray]]:
    """Steps by line of the picture (of two settings or more) and by setting, of the seeds that all of them have."""
    key = ABLATIONS[part][0]
    lines: dict[str, dict[float, list[Result]]] = {}
    for name, changes in PARTS[part]:
        if mine := of(results, (name, changes)):
            line = "no filter" if METHODS[name].filter == "none" else name
            line = f"λ {changes['lamb']:g}" if part == "window" else line
            lines.setdefault(line, {})[changes[key]] = mine
    lines = {label: line for label, line in lines.items() if len(line) > 1}
    seeds = [{r["config"]["seed"] for r in mine} for line in lines.values() for mine in line.values()]
    shared = set.intersection(*seeds) if seeds else set()
    return {
        label: {setting: steps([r for r in mine if r["config"]["seed"] in shared]) for setting, mine in line.items()}
        for label, line in lines.items()
        if shared
    }


def ablation_picture(results: Sequence[Result]) -> Figure | None:
    """Steps to 95 % over one setting, a panel a part: a line through the medians, a point a seed.

    Runs that did not get there are above the dotted line. None if nothing has been measured at two settings.
    """
    measured = {part: lines for part in ABLATIONS if (lines := ablation(results, part))}
    if not measured:
        return None
    cap = cap_of(results)
    beyond = 1.06 * cap
    columns = min(2, len(measured))
    rows = math.ceil(len(measured) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    for i, (part, lines) in enumerate(measured.items(), 1):
        axes = figure.add_subplot(rows, columns, i)
        settings = sorted({setting for line in lines.values() for setting in line})
        for label, line in lines.items():
            path = {settings.index(setting): values for setting, values in line.items()}
            medians = [np.median(values) for values in path.values()]
            (drawn,) = axes.plot(list(path), np.minimum(medians, beyond), label=label)
            for x, values in path.items():
                axes.plot([x] * len(values), np.minimum(values, beyond), ".", color=drawn.get_color(), alpha=0.5)
        axes.axhline(cap, color="grey", linewidth=0.8, linestyle=":")
        seeds = len(next(iter(next(iter(lines.values())).values())))
        seeds_shown = f"{seeds} seed{'s' * (seeds > 1)}"
        axes.set(xlabel=f"{ABLATIONS[part][1]}, {seeds_shown}", ylabel="steps to 95 %", ylim=(0, 1.12 * cap))
        axes.set_xticks(range(len(settings)), [f"{value:g}" for value in settings])
        axes.grid(alpha=0.3)
        # Above the axes, for points may lie anywhere within
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), frameon=False)
    return figure


def tables(folder: Path, pictures: Path) -> dict[str, str]:
    """All tables by name, and what shows the pictures, which are written."""
    results = load_all(folder)
    chosen = tuned_variants(results, folder)
    made = {name: table(results) for name, table in TABLES.items()} | {"study_tuned": tuned_table(results, chosen)}
    of_methods = methods_picture(results, {name: (name, {}) for name in METHODS})
    of_tuned = methods_picture(results, {name_of(variant): variant for variant in chosen.values()})
    for name, figure, text in (
        ("study_methods", of_methods, "Steps to 95 % by method, a point a seed"),
        ("study_tuned", of_tuned, "Steps to 95 % by tuned method, a point a seed"),
        ("study_ablations", ablation_picture(results), "Steps to 95 % over the settings of the filters"),
    ):
        if figure is not None:
            plots.save(figure, pictures / f"{name}.png")
            shown = f"![{text}](pictures/{name}.png)\n"
            made[name] = f"{made[name]}\n{shown}" if name in made else shown
    return {"study_ablations": "Not measured yet.\n"} | made
