"""Does a filter help, and by how much? `python -m benchmarks.study methods --seeds 0 1 2 3 4 5 6 7`.

Results are appended to OUT/PART.jsonl, each as soon as its run is done. What OUT holds is not trained again. Several
commands may write into one OUT at once; give each its own methods or seeds. `python -m benchmarks.report` makes the
tables and pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import RESULTS, run_command
from examples.harness.config import Config
from examples.harness.errors import UserError
from examples.harness.records import Row, best, is_finite, step_reached
from examples.harness.sweep import train_all

from .cells import append, as_cell, differences
from .methods import (
    AFTER,
    METHODS,
    PARTS,
    THRESHOLD,
    TUNED,
    TUNING,
    TUNING_CAP,
    TUNING_SEEDS,
    Variant,
    check_among,
    check_flags,
)
from .statistics import Results, finalists, tuned

OUT = RESULTS / "study"


def followed(config: Config, rows: Sequence[Row]) -> bool:
    """Whether a run has been followed for `AFTER` evaluations since it first was at the threshold, or need not be."""
    first = step_reached(rows, THRESHOLD)
    after = 0 if config.run.seed in TUNING_SEEDS else AFTER
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
        "every_100_steps": {
            name: [round(row[name], 3) for row in curve] for name in ("train_accuracy", "val_accuracy")
        },
    }


def variants(part: str, methods: Sequence[str], results: Results) -> list[Variant]:
    """The variants of some methods in a part; those of `finals` and `tuned` follow from what was found before."""
    if part == "finals":
        return [variant for name in TUNED if name in methods for variant in finalists(results, name)]
    if part == "tuned":
        return [tuned(results, name) for name in TUNED if name in methods]
    return [variant for variant in PARTS[part] if variant.method in methods]


def main(
    parts: Annotated[tuple[str, ...], tyro.conf.Positional],
    seeds: tuple[int, ...] = (0,),
    methods: tuple[str, ...] = tuple(METHODS),
    cap: int = 5_000,
    group_size: int = 1,
    out: Path = OUT,
) -> None:
    """Train what is missing of some parts of the study.

    Args:
      parts: Which of methods, operations, start, lamb, alpha, decay, window, early, paper, snippet, undecayed, rate,
        stable and, in this order, tuning, finals and tuned.
      seeds: Seeds of every method and variant; `tuning` and `finals` have one each of their own.
      methods: Only these methods.
      cap: Optimizer steps at most; of a tuning run 2,500 at most.
      group_size: Runs to train at once in one vmapped program; on a GPU as many as fit its memory, on a CPU 1.
      out: Folder for the results.
    """
    check_among("PARTS", parts, [*PARTS, "finals", "tuned"])
    check_flags(methods, cap=cap, group_size=group_size)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        results = Results.load(out)
        if other := results.budgets - {cap, min(cap, TUNING_CAP)}:
            raise UserError(f"{out} holds runs with --cap {max(other)}, not {cap}; pass it, or choose another --out")
        part_seeds = (TUNING[part],) if part in TUNING else seeds
        configs = [variant.run(seed, cap) for variant in variants(part, methods, results) for seed in part_seeds]
        todo = list({as_cell(differences(one)): one for one in configs if not results.has(one)}.values())
        for trained in train_all(todo, group_size, followed):
            cell = differences(todo[trained.number])
            append(out / f"{part}.jsonl", {"cell": cell, **summary(trained.rows)})


if __name__ == "__main__":
    run_command(main, "benchmarks.study")
