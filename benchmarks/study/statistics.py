"""The numbers of the study: what its runs came to, compared seed by seed, and which pair tuning chooses."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from examples.harness.config import Config
from examples.harness.errors import UserError

from .cells import BASE, Cell, as_cell, differences, read
from .methods import FINALISTS, PARTS, TUNED, TUNING, TUNING_SEEDS, Variant


class MissingRunError(UserError):
    """A run that a choice depends on has not been trained."""


class Results:
    """What runs came to: a frame for each configuration, seeds apart, with a row for each seed.

    Where two results are of the same run, the first counts. Of a run that never was at the threshold, `first_step` is
    infinite.
    """

    def __init__(self, results: Iterable[Mapping[str, Any]]):
        found: dict[Cell, dict[int, Mapping[str, Any]]] = {}
        for result in results:
            cell = dict(result["cell"])
            seed = cell.pop("seed", BASE["seed"])
            found.setdefault(as_cell(cell), {}).setdefault(seed, result)
        self.budgets = {dict(cell).get("budget", BASE["budget"]) for cell in found}
        self.cap = max(self.budgets, default=BASE["budget"])  # of all runs but those of the tuning
        self._frames = {cell: self._frame(runs) for cell, runs in found.items()}

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """The results in all files of a folder."""
        return cls(line.result for path in sorted(folder.glob("*.jsonl")) for line in read(path))

    @staticmethod
    def _frame(runs: dict[int, Mapping[str, Any]]) -> pd.DataFrame:
        frame = pd.DataFrame.from_dict(runs, orient="index").sort_index()
        frame["best_val_accuracy"] = frame["best_val_accuracy"].astype(float)
        return frame.assign(**frame[["first_step", "first_step_train"]].astype(float).fillna(math.inf))

    def same_but_for_seed(self, config: Config) -> pd.DataFrame:
        """All runs of a configuration, whatever its seed."""
        cell = as_cell({name: value for name, value in differences(config).items() if name != "seed"})
        return self._frames.get(cell, pd.DataFrame({"first_step": []}))

    def has(self, config: Config) -> bool:
        """Whether a run has been trained."""
        return config.run.seed in self.same_but_for_seed(config).index

    def reported(self, variant: Variant) -> pd.DataFrame:
        """The runs of a variant but for those of the tuning; empty if there are none."""
        return self.same_but_for_seed(variant.run(BASE["seed"], self.cap)).drop(index=[*TUNING_SEEDS], errors="ignore")


def interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the median, which may be infinite.

    scipy.stats.bootstrap interpolates between medians, which makes NaN of infinite ones.
    """
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5], method="inverted_cdf")
    return float(low), float(high)


def ranked(results: Results, variants: Sequence[Variant], parts: Sequence[str]) -> list[Variant]:
    """Variants of a method, sorted by the steps that they needed in parts of the tuning, in the median of the seeds.

    Those with which no seed reached the threshold are sorted by their best validation accuracy.

    Raises:
      MissingRunError: Not all of them have been trained.
    """

    def key(variant: Variant) -> tuple[float, float]:
        frame = results.same_but_for_seed(variant.run(TUNING["tuning"], results.cap))
        for part in parts:
            if TUNING[part] not in frame.index:
                raise MissingRunError(
                    f"the results lack {variant.method} with {variant.changes} and seed {TUNING[part]}; "
                    f"run python -m benchmarks.study {part}"
                )
        runs = frame.loc[[TUNING[part] for part in parts]]
        return runs["first_step"].median(), -runs["best_val_accuracy"].fillna(0.0).median()

    return sorted(variants, key=key)


def finalists(results: Results, method: str) -> list[Variant]:
    """The pairs of a method's grid that are worth a second seed."""
    return ranked(results, [variant for variant in PARTS["tuning"] if variant.method == method], ["tuning"])[:FINALISTS]


def tuned(results: Results, method: str) -> Variant:
    """A method with the best pair of its grid."""
    return ranked(results, finalists(results, method), ["tuning", "finals"])[0]


def all_tuned(results: Results) -> dict[str, Variant]:
    """The methods whose tuning is complete, each with its best pair."""
    chosen = {}
    for method in TUNED:
        with contextlib.suppress(MissingRunError):
            chosen[method] = tuned(results, method)
    return chosen
