"""The paper, figure by figure: what is published, what was run here, what came out, and whether it agrees.

Figures and tables are those of arXiv 2405.20233v2. `python -m benchmarks.report` writes what follows from the result
files into docs/paper.md. A published number agrees if it is in the range of the seeds, ours or those of the authors'
code, give or take a tenth. "In part" is what a control shows, too, or some of the seeds, or fewer than three of them,
or what was run otherwise than published.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from examples.harness.tables import markdown

from .study import trajectories
from .study.methods import METHODS, PARTS, THRESHOLD, Variant
from .study.statistics import MissingRunError, Results

MISSING = "Not measured yet.\n"
FEWEST = 3  # seeds; fewer are an anecdote
BASELINE = 39_890  # published steps to 95 % without filter and decay
PARAMETERS = 422_784  # of the mod-97 model


class Found:
    """The results that the rows are judged by; what is missing raises MissingRunError."""

    def __init__(self, results: Path, study: Results):
        self.results, self.study, self.cap = results, study, study.cap

    def steps(self, method: str, **changes: Any) -> pd.Series:
        """Steps to 95 % by seed, infinite for those that fail."""
        runs = self.study.reported(Variant(method, changes))
        if not len(runs):
            raise MissingRunError(f"the results lack {method} with {changes}")
        return pd.Series(runs["first_step"])

    def over(self, part: str, method: str, *settings: str) -> dict[Any, np.ndarray]:
        """Steps to 95 % of a method's variants in a part, by settings changed there, of the seeds that all have."""
        variants = [variant for variant in PARTS[part] if variant.method == method]
        steps = pd.concat([self.study.reported(one)["first_step"] for one in variants], axis=1, join="inner")
        if not len(steps):
            raise MissingRunError(f"the results lack a seed that all variants of {method} in part {part} have")
        key = operator.itemgetter(*settings)
        return {key(one.changes): of_seeds for one, of_seeds in zip(variants, steps.to_numpy().T, strict=True)}

    def csv(self, name: str, column: str) -> dict[str, np.ndarray]:
        """A column of a file of results by preset, sorted by seed."""
        runs = pd.read_csv(self._file(f"{name}.csv")).sort_values("seed")
        return {str(preset): group[column].to_numpy(float) for preset, group in runs.groupby("preset")}

    def json(self, name: str) -> dict[str, Any]:
        """A file of results."""
        return json.loads(self._file(f"{name}.json").read_text())

    def distances(self) -> dict[str, list[float]]:
        """Distances from start to 95 % by method, of the runs that got there."""
        found: dict[str, list[float]] = {}
        for result in trajectories.load(self._file("trajectories.jsonl")):
            for name, run in result["paths"].items():
                if "AC" in run["distances"]:
                    found.setdefault(name, []).append(run["distances"]["AC"])
        return found

    def _file(self, name: str) -> Path:
        path = self.results / name
        if not path.exists():
            raise MissingRunError(f"{path} is missing")
        return path

    def in_words(self, steps: np.ndarray | pd.Series) -> str:
        """Steps of all seeds in words."""
        failed = np.isinf(steps).sum()
        if failed == len(steps):
            return f"all fail in {self.cap:,} steps ({seeds(steps)})"
        failing = f", {failed} failing" if failed else ""
        return f"{self.number(np.median(steps))} ({self.extent(steps)}; {seeds(steps)}{failing})"

    def extent(self, steps: np.ndarray | pd.Series) -> str:
        """The range of steps."""
        return f"{self.number(steps.min())} to {self.number(steps.max())}"

    def number(self, steps: float | np.floating) -> str:
        """A number of steps, or that there were more."""
        return f"{steps:,.0f}" if math.isfinite(steps) else f"> {self.cap:,}"


def seeds(values: Sized) -> str:
    """How many seeds there are."""
    return "1 seed" if len(values) == 1 else f"{len(values)} seeds"


def near(published: float, *samples: np.ndarray | pd.Series) -> bool:
    """Whether a number is in the range of a sample's finite values, give or take a tenth."""
    finite = [values[np.isfinite(values)] for values in samples]
    return any(values.min() / 1.1 <= published <= values.max() * 1.1 for values in finite if len(values))


def yes(agrees: bool) -> str:
    """A verdict without a doubt."""
    return "yes" if agrees else "no"


def times_fewer(control: pd.Series, steps: pd.Series) -> np.ndarray:
    """How many times the steps of its control a method needs, of the seeds with which both reach 95 %."""
    both = pd.concat([control, steps], axis=1, join="inner").to_numpy(float)
    return np.divide(*both[np.isfinite(both).all(axis=1)].T)


def best(steps: Mapping[Any, np.ndarray]) -> list[Any]:
    """The settings with the fewest steps in the median; none if all fail."""
    medians = {setting: np.median(of_seeds) for setting, of_seeds in steps.items()}
    return [setting for setting, median in medians.items() if median == min(medians.values()) < math.inf]


Judge = Callable[[Found], tuple[str, str]]  # what came out, and whether it agrees


class Row(NamedTuple):
    """One claim of a figure or table."""

    paper: str  # where it stands
    shows: str
    published: str
    run: str  # what was run here
    judge: Judge | None  # None where there is nothing to judge
    why: str


def as_published(number: int, method: str, authors: str | None = None, **changes: Any) -> Judge:
    """Judge a number of steps to 95 %, with the authors' code beside ours where it was run."""

    def judge(found: Found) -> tuple[str, str]:
        ours = found.steps(method, **changes)
        if not authors:
            return found.in_words(ours), yes(near(number, ours))
        theirs = found.csv("authors", "steps_to_95")[authors]
        return f"{found.in_words(ours)}; the authors' code {found.in_words(theirs)}", yes(near(number, ours, theirs))

    return judge


def baseline(found: Found) -> tuple[str, str]:
    """Adam alone, without decay."""
    many, long = found.steps("adam"), found.csv("modular_baseline", "best_val_accuracy")["baseline"]
    steps = found.csv("modular_baseline", "last_step")["baseline"].max()
    text = f"{found.in_words(many)}; {100 * long.max():.0f} % at best in {steps:,.0f} ({seeds(long)})"
    return text, yes(bool(long.max() >= THRESHOLD))


def factor(found: Found) -> tuple[str, str]:
    """The filters against Adam with the decay that they leave."""
    control = found.steps("adam-0.00167")
    factors = {name.upper(): times_fewer(control, found.steps(name)) for name in ("ma", "ema")}
    text = ", ".join(f"{np.median(values):.1f} ({name})" for name, values in factors.items())
    return f"{text}; no filter {found.in_words(control)}", yes(
        near(50.49, factors["MA"]) and near(43.84, factors["EMA"])
    )


def grid(found: Found) -> tuple[str, str]:
    """λ and window size of the MA."""
    steps = found.over("window", "ma", "lamb", "window_size")
    chosen = best(steps)
    where = " and ".join(f"w {window}, λ {lamb:g}" for lamb, window in chosen)
    reliable = sum(bool(np.isfinite(of_seeds).all()) for of_seeds in steps.values())
    published, fewest = steps[5.0, 100], np.min(list(steps.values()), axis=0)
    seeds_won = int(np.sum((published == fewest) & np.isfinite(published)))
    text = f"fewest steps: {where or 'none'} ({found.number(min(map(np.median, steps.values())))}); "
    text += f"with {seeds_won} of {seeds(published)} w 100, λ 5 ({found.number(np.median(published))}); "
    text += f"{reliable} of {len(steps)} settings reach 95 % with every seed"
    if (5.0, 100) in chosen and len(published) >= FEWEST:
        return text, "yes"
    return text, "in part" if seeds_won else "no"


def two_stages(found: Found) -> tuple[str, str]:
    """The MA amplified from step 500 on."""
    two, one = found.steps("two-stage", weight_decay=0.0), found.steps("ma", weight_decay=0.0)
    fewer = float(np.median(times_fewer(one, two)))
    return f"{found.in_words(two)}; {fewer:.2f} times fewer than in one stage", yes(near(1_920, two) and fewer > 1)


def slow_only(found: Found) -> tuple[str, str]:
    """The slow part alone: as published, or else from when the window is full."""
    try:
        steps = found.steps("slow-only", weight_decay=0.0, filter_from=500)
    except MissingRunError:
        steps = found.steps("slow-only", weight_decay=0.0)
        return f"from step 99 on: {found.in_words(steps)}", "in part" if np.isinf(steps).all() else "no"
    return found.in_words(steps), yes(bool(np.isinf(steps).all()))


def decays(found: Found) -> tuple[str, str]:
    """The MA and no filter over the weight decay."""
    words, good, how_many = [], [], ""
    for name, method in (("MA", "ma"), ("no filter", "adam-0.005")):
        steps = found.over("decay", method, "weight_decay")
        medians = {decay: float(np.median(of_seeds)) for decay, of_seeds in steps.items()}
        least, fails = best(steps), [decay for decay, median in medians.items() if median == math.inf]
        decays = [" and ".join(f"{decay:g}" for decay in some) or "none" for some in (least, fails)]
        words.append(
            f"{name}: fewest steps with {decays[0]} ({found.number(min(medians.values()))}), fails with {decays[1]}"
        )
        good.append(min(medians.values()) < medians[0.0] and max(fails, default=0.0) > 0.0)
        how_many = seeds(steps[0.0])
    return f"{'; '.join(words)} (medians of {how_many})", yes(all(good))


def ema_settings(found: Found) -> tuple[str, str]:
    """The EMA over λ, α and weight decay."""
    published = {"lamb": ("λ", "lamb", 2.0), "alpha": ("α", "alpha", 0.98), "decay": ("decay", "weight_decay", 0.005)}
    words, good, how_many = [], [], ""
    for part, (name, setting, value) in published.items():
        steps = found.over(part, "ema", setting)
        words.append(f"{name} {' and '.join(f'{one:g}' for one in best(steps))}")
        good.append(value in best(steps))
        how_many = seeds(steps[value])
    return f"fewest steps: {', '.join(words)} (medians of {how_many})", yes(all(good))


def ema_undecayed(found: Found) -> tuple[str, str]:
    """The EMA without decay, which may need more steps than it was given."""
    steps = found.steps("ema", weight_decay=0.0)
    reaches = bool(np.isfinite(steps).any())
    return found.in_words(steps), "yes" if reaches else "no" if found.cap >= BASELINE else "not run"


PRESETS = {"neither": "baseline", "both": "paper", "the decay alone": "decay-only"}


def mnist(found: Found) -> tuple[str, str]:
    """Steps to 85 % of neither, both, and the decay alone."""
    steps, accuracy = found.csv("mnist", "steps_to_85"), found.csv("mnist", "best_val_accuracy")
    medians = {name: np.median(np.nan_to_num(steps[preset], nan=math.inf)) for name, preset in PRESETS.items()}
    both, alone = (medians["neither"] / medians[name] for name in ("both", "the decay alone"))
    text = "; ".join(
        f"{name} {medians[name]:,.0f} steps, {100 * np.median(accuracy[preset]):.1f} %"
        for name, preset in PRESETS.items()
    )
    text += f": {both:.0f} times fewer with both, {alone:.0f} with the decay alone ({seeds(steps['paper'])})"
    return text, "no" if both < 22.0 / 1.1 else "in part" if alone > both / 2 else "yes"


def qm9(found: Found) -> tuple[str, str]:
    """The lowest validation losses, split by split."""
    loss = found.csv("qm9", "min_val_loss")
    ratio, added = loss["paper"] / loss["baseline"], loss["paper"] / loss["decay-only"]
    text = f"ratio {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}), lower in {(ratio < 1).sum()} of "
    text += f"{len(ratio)} splits; against the decay alone in {(added < 1).sum()} of {len(ratio)}"
    always = (ratio < 1).all() and (added < 1).all()
    return text, "yes" if always else "in part" if np.median(ratio) < 1 else "no"


def imdb(found: Found) -> tuple[str, str]:
    """The best accuracies and losses."""
    accuracy, loss = found.csv("imdb", "best_val_accuracy"), found.csv("imdb", "min_val_loss")
    steps = found.csv("imdb", "last_step")["paper"].max()
    text = "; ".join(
        f"{name} {np.median(accuracy[preset]):.3f}, {np.median(loss[preset]):.3f}" for name, preset in PRESETS.items()
    )
    gained, lost = (np.median(values["paper"]) - np.median(values["baseline"]) for values in (accuracy, loss))
    return f"{text} ({seeds(loss['paper'])}, {steps:,.0f} steps)", "in part" if gained > 0 > lost else "no"


def paths(found: Found) -> tuple[str, str]:
    """Distances from the start to generalising; the paper's baseline does not get there."""
    lengths = found.distances().items()
    text = ", ".join(f"{np.mean(values):.0f} (`{name}`, {seeds(values)})" for name, values in lengths)
    return f"distance from start to 95 %: {text}", "not run"


def memory(found: Found) -> tuple[str, str]:
    """What the window of the MA keeps, for the mod-97 model."""
    rows = {row["filter"]: row["state_bytes"] for row in found.json("step_cost")["rows"] if "state_bytes" in row}
    kept = PARAMETERS * (rows["ma-100"] - rows["none"]) / 1e6
    return f"{kept:.0f} MB", yes(168 / 1.1 <= kept <= 168 * 1.1)


def time(found: Found) -> tuple[str, str]:
    """A training step with each filter."""
    runs = found.json("vs_torch")["epochs"]
    seconds = {name: runs[f"modular {name}"]["seconds_a_step"]["ours"]["median"] for name in ("adam", "ema", "ma")}
    ma, ema = (seconds[name] / seconds["adam"] for name in ("ma", "ema"))
    return f"{ma:.2f} times (MA), {ema:.2f} times (EMA)", yes(2.4 / 1.1 <= ma <= 2.4 * 1.1)


MODULAR = [
    Row(
        "Figure 2, Table 3",
        "steps to 95 % with the MA (w 100, λ 5, decay 0.01)",
        "790",
        "`ma`, part methods",
        as_published(790, "ma", authors="ma"),
        "The published run is among the fastest.",
    ),
    Row(
        "Figures 2 and 8, Table 3",
        "steps to 95 % with the EMA (α 0.98, λ 2, decay 0.005)",
        "910",
        "`ema`, part methods",
        as_published(910, "ema", authors="ema"),
        "The published run is among the fastest.",
    ),
    Row(
        "Figure 2, Table 3",
        "steps to 95 % without filter and decay",
        f"{BASELINE:,}",
        "`adam`, part methods; one run of 50,000 steps",
        baseline,
        "One run is published, and few here are that long, so this may be chance.",
    ),
    Row(
        "Abstract, Table 3",
        "how many times fewer steps the filters need",
        "50.49 (MA), 43.84 (EMA)",
        "`ma` and `ema` against `adam-0.00167`, part methods",
        factor,
        "The published baseline has no decay. This one has the decay that the filters leave of theirs.",
    ),
    Row(
        "Figure 4, Table 1",
        "steps to 95 % with the MA, without decay",
        "2,940 (13.57 times fewer)",
        "`ma` with decay 0, part paper",
        as_published(2_940, "ma", weight_decay=0.0),
        "The control is the row without filter and decay.",
    ),
    Row(
        "Figure 4",
        "the best window and λ of the MA",
        "w 100, λ 5; else as curves",
        "`ma`, part window",
        grid,
        "Here the decay is 0.01, in that figure 0. Its grid has the windows 5 and 20, too.",
    ),
    Row(
        "Figure 6, Table 1",
        "steps to 95 % in two stages, without decay",
        "1,920; 1.53 times fewer than in one",
        "`two-stage` with decay 0, part paper",
        two_stages,
        "The second stage begins at step 500.",
    ),
    Row(
        "Figure 6, Table 1",
        "the slow part alone in the second stage, without decay",
        "does not converge",
        "`slow-only` with decay 0, part paper",
        slow_only,
        "The second stage begins at step 500, when the training pairs are fitted. From step 99 on it fails, too.",
    ),
    Row(
        "Figure 7",
        "a fitting decay helps the MA much; alone it does not always help",
        "as curves",
        "`ma` and no filter, part decay",
        decays,
        "A weaker decay without a filter also does much.",
    ),
    Row(
        "Figure 8",
        "the EMA's λ, α and decay",
        "λ 2, α 0.98, decay 0.005; else as curves",
        "`ema`, parts lamb, alpha and decay",
        ema_settings,
        "One setting is changed at a time.",
    ),
    Row(
        "Figure 8",
        "the EMA without decay",
        "as curves",
        "`ema` with decay 0, part decay",
        ema_undecayed,
        "Runs that end before the published baseline generalises cannot tell.",
    ),
]
OTHERS = [
    Row(
        "Figure 9, Table 4",
        "MNIST: steps, best accuracy",
        "44,022 to 2,001 (22.0 times fewer); 89.8 to 91.2 %",
        "`mnist`, two by two; steps to 85 %",
        mnist,
        "The decay alone does it. The printed command has no `--filter`.",
    ),
    Row(
        "Figure 10, Table 5",
        "QM9: lowest validation loss",
        "0.00659 to 0.00348 (ratio 0.53)",
        "`qm9`, two by two",
        qm9,
        "The published losses are on another scale, so only ratios compare.",
    ),
    Row(
        "Figure 11, Table 6",
        "IMDb: best accuracy, lowest loss",
        "0.84 to 0.90; 0.517 to 0.412",
        "`imdb`, two by two",
        imdb,
        "The decay alone does most of it. Published: best batches of 50, in 10,000 steps.",
    ),
    Row(
        "Figure 12, Table 2",
        "paths of the parameters",
        "start to end 16 times shorter than the baseline's",
        "four methods, `trajectories`",
        paths,
        "The baseline without decay was not followed to the end. Controls with a decay have paths about as long.",
    ),
    Row(
        "Table 3",
        "memory that the MA adds",
        "168 MB",
        "`step_cost`, for 422,784 parameters",
        memory,
        "The window of 100 gradients, and three arrays more here.",
    ),
    Row(
        "Table 3",
        "time per step with a filter",
        "2.4 times (MA), as much (EMA), a GPU",
        "`vs_torch`, a CPU",
        time,
        "The MA here adds one gradient and drops one, where the authors' code sums a hundred.",
    ),
    Row("Figure 1", "how the filter works", "a drawing", "", None, "There is nothing to run."),
    Row("Figures 3, 5 and 13", "", "", "", None, "What they show was not at hand."),
]


def table(rows: Sequence[Row], found: Found) -> str:
    """Claims as a Markdown table; rows whose results are missing are not run."""
    lines = []
    for row in rows:
        try:
            came_out, agrees = row.judge(found) if row.judge else ("", "not run")
        except MissingRunError:
            came_out, agrees = "", "not run"
        lines.append(
            {
                "paper": row.paper,
                "shows": row.shows,
                "published": row.published,
                "run here": row.run,
                "came out": came_out,
                "agrees": agrees,
                "why": row.why,
            }
        )
    return markdown(lines) if any(line["came out"] for line in lines) else MISSING


def window_table(found: Found) -> str:
    """Steps to 95 % over window size and λ of the MA, of the seeds that every setting has."""
    try:
        steps = found.over("window", "ma", "lamb", "window_size")
    except MissingRunError:
        return MISSING
    lambdas, windows = (sorted({setting[i] for setting in steps}) for i in (0, 1))
    rows = []
    for lamb in lambdas:
        rows.append({"λ": f"{lamb:g}"} | {f"w {window}": cell(found, steps[lamb, window]) for window in windows})
    first = next(iter(steps.values()))
    how = "One seed, so an anecdote" if len(first) == 1 else f"Median and range of {seeds(first)}"
    return f"{how}; decay {METHODS['ma'].config.optimization.weight_decay:g}.\n\n{markdown(rows)}"


def cell(found: Found, steps: np.ndarray) -> str:
    """Steps of a setting, or that it fails."""
    failed = np.isinf(steps).sum()
    if failed == len(steps):
        return "fails"
    extent = f" ({found.extent(steps)})" if len(steps) > 1 else ""
    return f"{found.number(np.median(steps))}{extent}" + (f", {failed} of {len(steps)} fail" if failed else "")


def tables(results: Path, study: Results) -> dict[str, str]:
    """The tables of docs/paper.md, by name."""
    found = Found(results, study)
    return {
        "paper_modular": table(MODULAR, found),
        "paper_window": window_table(found),
        "paper_others": table(OTHERS, found),
    }
