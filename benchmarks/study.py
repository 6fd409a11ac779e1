"""Does the filter help, and how much? `python -m benchmarks.study methods --seeds 0 1 2 3 4 5 6 7`.

A cell is one method trained once, with one seed, on a variant of the mod-97 task. It has a small file in
results/study/, written when it is done, and is not trained again while that is there. `python -m benchmarks.report`
makes the tables and pictures.
"""

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.harness.config import RunConfig
from examples.harness.errors import UserError, plain_errors
from examples.harness.records import Row, best, is_finite, step_reached
from examples.modular import Config
from examples.sweep import Cell, load, train_missing

OUT = Path(__file__).parent / "results" / "study"
THRESHOLD = 0.95  # validation accuracy
AFTER = 50  # evaluations for which a run is followed after its first at the threshold, to see whether it holds it
TUNING = {"tuning": 1000, "finals": 1001}  # seeds that are not reported, nor followed after the threshold
TUNING_SEEDS = tuple(TUNING.values())
TUNING_CAP = 2_500  # steps of a tuning run at most: a pair that needs more is not the one to choose
FINALISTS = 3  # pairs of each method, its fastest in `tuning`, that are run with the other seed, too


def method(weight_decay: float, **changes: Any) -> Config:
    """A method: learning rate 1e-3, and all else as in the presets."""
    return dataclasses.replace(Config(filter="none", weight_decay=weight_decay), **changes)


EMA: dict[str, Any] = {"filter": "ema"}
LATE: dict[str, Any] = {"filter": "ema", "lamb": 5.0, "filter_from": 100}
MA: dict[str, Any] = {"filter": "ma", "lamb": 5.0}

METHODS: dict[str, Config] = {
    "adam": method(0.0),
    # Adam does not see the scale of its gradients, so what amplifies their slow part by 1 + λ divides the coupled decay
    # that this part has to bear by as much: 0.005 / 3 with the EMA, 0.01 / 6 with the MA.
    "adam-0.00167": method(0.00167),
    "adam-0.005": method(0.005),
    "adam-0.01": method(0.01),
    "adamw-0.01": method(0.01, optimizer="adamw"),
    "adamw-0.1": method(0.1, optimizer="adamw"),
    "adamw-1": method(1.0, optimizer="adamw"),
    "nadamw-1": method(1.0, optimizer="nadamw"),
    "lion-1": method(1.0, optimizer="lion"),
    "ademamix-1": method(1.0, optimizer="ademamix"),
    "muon": method(0.0, optimizer="muon"),
    "muon-1": method(1.0, optimizer="muon"),
    "ema": method(0.005, **EMA),
    "ema-0.95": method(0.005, **EMA, alpha=0.95),
    "ema-normalized": method(0.005, **EMA, normalize=True),
    "ma": method(0.01, **MA),
    "two-stage": method(0.01, **MA, filter_from=500),
    "slow-only": method(0.01, **MA, fast=0.0, filter_from=99),
    # Without decay amplifying weakens none: what these gain on `adam` is the filter's alone.
    "ema+adam": method(0.0, **EMA),
    "ema-late+adam": method(0.0, **LATE),
    "ma+adam": method(0.0, **MA),
    "ema+adamw-0.1": method(0.1, **EMA, optimizer="adamw"),
    "ema+adamw-1": method(1.0, **EMA, optimizer="adamw"),
    "ema-late+adamw-1": method(1.0, **LATE, optimizer="adamw"),
    "ema+muon": method(0.0, **EMA, optimizer="muon"),
    "ema+muon-1": method(1.0, **EMA, optimizer="muon"),
    "ma+adamw-0.1": method(0.1, **MA, optimizer="adamw"),
    "ma+adamw-1": method(1.0, **MA, optimizer="adamw"),
    "ma+muon": method(0.0, **MA, optimizer="muon"),
    "ma+muon-1": method(1.0, **MA, optimizer="muon"),
}
MAIN = ("adam-0.005", "adamw-1", "ema", "ma")
# On other tasks, too: the fair control of both filters, and what is recommended.
ELSEWHERE = ("adam-0.00167", *MAIN, "ma+adamw-1")
# With small embeddings the stronger coupled decay is the better one, so that of `ma`, too, stands beside it.
OTHER_STARTS = ("adam-0.01", *ELSEWHERE)

Variant = tuple[str, dict[str, Any]]  # a method, and what is changed of its configuration


def grid(methods: Iterable[str], **changes: Sequence[Any]) -> list[Variant]:
    """All combinations of methods and changed values."""
    return [
        (name, dict(zip(changes, values, strict=True)))
        for name in methods
        for values in itertools.product(*changes.values())
    ]


# What each method's learning rate and weight decay are chosen from: nine pairs each. At one rate Lion steps further
# than Adam and Muon less far, so their grids lie elsewhere; rate times decoupled decay spans 3e-4 to 3e-2 in all.
Grid = tuple[tuple[float, ...], tuple[float, ...]]
COUPLED: Grid = ((1e-3, 3e-3, 1e-2), (0.0003, 0.001, 0.003))
AMPLIFIED: Grid = (COUPLED[0], (0.001, 0.003, 0.01))  # the filters weaken a coupled decay; see `adam-0.00167`
DECOUPLED: Grid = ((1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0))
LION: Grid = ((3e-4, 1e-3, 3e-3), (1.0, 3.0, 10.0))
MUON: Grid = ((1e-2, 3e-2, 1e-1), (0.03, 0.1, 0.3))
TUNED = {
    "adam-0.005": COUPLED,
    "ema": AMPLIFIED,
    "ema-0.95": AMPLIFIED,
    "ema-normalized": COUPLED,  # divided by 1 + λ, so its decay is not weakened
    "ma": AMPLIFIED,
    "two-stage": AMPLIFIED,
    "slow-only": AMPLIFIED,
    "adamw-1": DECOUPLED,
    "nadamw-1": DECOUPLED,
    "lion-1": LION,
    "ademamix-1": DECOUPLED,
    "muon-1": MUON,
    "ema+adamw-1": DECOUPLED,
    "ema-late+adamw-1": DECOUPLED,
    "ma+adamw-1": DECOUPLED,
    "ema+muon-1": MUON,
    "ma+muon-1": MUON,
}

PARTS: dict[str, list[Variant]] = {
    "methods": grid(METHODS),
    "operations": grid(ELSEWHERE, operation=("addition", "subtraction", "division")),
    "start": grid(OTHER_STARTS, embedding_std=(1.0, 0.02), train_fraction=(0.5, 0.3)),
    # The paper's ablations: its Figures 4c to 4e, 8 and 11
    "lamb": grid(["ema"], lamb=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0)),
    "alpha": grid(["ema"], alpha=(0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
    "decay": grid(["adam-0.005", "ema", "ma"], weight_decay=(0.0, 0.001, 0.002, 0.005, 0.01, 0.02)),
    "window": grid(["ma"], window_size=(2, 10, 50, 100, 200), lamb=(1.0, 2.0, 5.0, 10.0)),
    # What makes the EMA another filter than the MA: what its average holds at first, that it amplifies from the first
    # step on, where the MA waits until its window is full, or its smaller λ?
    "early": [
        *grid(["ema", "ema+adamw-1"], start=("gradient", "zero", "debiased")),
        *grid(["ema+adamw-0.1"], start=("gradient", "debiased")),
        *grid(["ema", "ema+adamw-1"], filter_from=(100,)),
        *grid(["ema+adamw-1"], lamb=(5.0,), start=("gradient", "debiased")),
        *grid(["ema-late+adamw-1"]),
        *grid(["ma+adamw-1"], lamb=(2.0, 5.0)),
    ],
    # Without decay nothing but the filter differs. What it amplifies it also makes go faster, hence the higher rates.
    "undecayed": [*grid(["adam"], lr=(0.001, 0.003, 0.006)), *grid(["ema+adam", "ema-late+adam", "ma+adam"])],
    # At every rate and decay that is best for one of these, the others, too
    "rate": grid(["adamw-1", "ema-late+adamw-1", "ma+adamw-1"], lr=(0.001, 0.003), weight_decay=(1.0, 3.0)),
    "tuning": [
        variant for name, (rates, decays) in TUNED.items() for variant in grid([name], lr=rates, weight_decay=decays)
    ],
}


def cell(variant: Variant, seed: int, cap: int) -> Cell:
    """One run. It is named by the method and what differs from it, or by another method that is the same.

    So two parts can share a cell.
    """
    name, changes = variant
    base = METHODS[name]
    config = dataclasses.replace(base, **changes)
    axes = {key: str(value) for key, value in changes.items() if value != getattr(base, key)}
    name, axes = next(((other, {}) for other, one in METHODS.items() if one == config), (name, axes))
    return Cell({"method": name} | axes, dataclasses.replace(config, seed=seed, budget=cap, stop_at=THRESHOLD))


def followed(config: RunConfig, rows: Sequence[Row]) -> bool:
    """Whether a run has been followed for `AFTER` evaluations since it first was at the threshold, or need not be."""
    first = step_reached(rows, THRESHOLD)
    after = 0 if config.seed in TUNING_SEEDS else AFTER
    return first is not None and sum(row["step"] > first for row in rows) >= after


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What is kept of a run."""
    finite = [row for row in rows if is_finite(row)]
    first = step_reached(rows, THRESHOLD)
    after = [row["val_accuracy"] >= THRESHOLD for row in rows if first is not None and row["step"] > first]
    curve = [row for row in rows if row["step"] % 100 == 0]
    return {
        "last_step": int(rows[-1]["step"]),
        "finite": is_finite(rows[-1]),
        "first_step": first,  # null: not reached
        "evaluations_after": len(after),
        "of_these_at_threshold": sum(after),
        "first_step_train": next((int(row["step"]) for row in rows if row["train_accuracy"] >= THRESHOLD), None),
        "best_val_accuracy": round(best(finite), 4) if finite else None,
        "min_val_loss": min((row["val_loss"] for row in finite), default=None),
        "every_100_steps": {
            name: [round(row[name], 3) for row in curve] for name in ("train_accuracy", "val_accuracy")
        },
    }


def ranked(out: Path, some: Sequence[Variant], parts: Sequence[str], cap: int) -> list[Variant]:
    """Variants of a method, sorted by the steps they needed in some parts of the tuning, in the median of the seeds.

    Those of which no seed got to the threshold are sorted by their best validation accuracy.
    """

    def key(variant: Variant) -> tuple[float, float]:
        results = []
        for part in parts:
            run = cell(variant, TUNING[part], min(cap, TUNING_CAP))
            if (result := load(out, run)) is None:
                raise UserError(f"{out} lacks {run.name}; run python -m benchmarks.study {part}")
            results.append(result)
        steps = [result["first_step"] or math.inf for result in results]
        return statistics.median(steps), -statistics.median(result["best_val_accuracy"] or 0.0 for result in results)

    return sorted(some, key=key)


def finalists(out: Path, name: str, cap: int) -> list[Variant]:
    """The pairs of a method's grid that are worth a second seed."""
    return ranked(out, [variant for variant in PARTS["tuning"] if variant[0] == name], ["tuning"], cap)[:FINALISTS]


def tuned(out: Path, name: str, cap: int) -> Variant:
    """A method with the best pair of its grid."""
    return ranked(out, finalists(out, name, cap), ["tuning", "finals"], cap)[0]


def variants(part: str, methods: Sequence[str], out: Path, cap: int) -> list[Variant]:
    """The variants of some methods in a part."""
    if part == "finals":
        return [variant for name in TUNED if name in methods for variant in finalists(out, name, cap)]
    if part == "tuned":
        return [tuned(out, name, cap) for name in TUNED if name in methods]
    return [variant for variant in PARTS[part] if variant[0] in methods]


def _check_among(flag: str, values: Sequence[str], known: Sequence[str]) -> None:
    if not values or not set(values) <= set(known):
        raise UserError(f"{flag} must be among {', '.join(known)}, got {', '.join(values) or 'none'}")


def check_methods(methods: Sequence[str]) -> None:
    """Raise unless these are some of the methods."""
    _check_among("--methods", methods, [*METHODS])


def check_positive(**flags: int) -> None:
    """Raise unless all values are at least 1."""
    for name, value in flags.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def made_before(path: Path, arguments: dict[str, Any]) -> bool:
    """Whether a result is there; UserError if it was made with other arguments."""
    if not path.exists():
        return False
    stored = json.loads(path.read_text()).get("arguments", {})
    for name, value in arguments.items():
        if (before := stored.get(name)) != value:
            raise UserError(f"{path} was made with {name} {before}, not {value}; delete it, or choose another --out")
    return True


@dataclasses.dataclass(frozen=True)
class Study:
    """Train what is missing of some parts of the study."""

    parts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Which parts: methods, operations, start, lamb, alpha, decay, window, early, undecayed, rate, or, in this
    order, tuning, finals and tuned."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every method and variant; `tuning` and `finals` have one each of their own."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Only these methods."""
    cap: int = 5_000
    """Optimizer steps at most; of a tuning run 2,500 at most."""
    group_size: int = 1
    """Runs to train at once in one vmapped program; on a GPU as many as fit its memory, on a CPU 1."""
    out: Path = OUT
    """Folder for the results."""

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        _check_among("PARTS", self.parts, [*PARTS, "finals", "tuned"])
        check_methods(self.methods)
        check_positive(cap=self.cap, group_size=self.group_size)


def run(study: Study) -> None:
    """Train what is missing, part by part: `finals` and `tuned` follow from what was found before."""
    study.out.mkdir(parents=True, exist_ok=True)
    for part in study.parts:
        seeds, cap = study.seeds, study.cap
        if part in TUNING:
            seeds, cap = (TUNING[part],), min(cap, TUNING_CAP)
        chosen = variants(part, study.methods, study.out, study.cap)
        cells = [cell(variant, seed, cap) for variant in chosen for seed in dict.fromkeys(seeds)]
        train_missing(cells, study.out, study.group_size, summary, followed)


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: run(tyro.cli(Study, prog="python -m benchmarks.study"))))
