"""What a study is: the runs that answer one question, and the tables and figures drawn from their results.

A study imports from here what it is made of.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import RESULTS
from examples.harness.engine import Results, product
from examples.harness.errors import UserError
from examples.harness.experiment import Run, find_object, object_names
from examples.harness.tables import markdown

from . import views
from .statistics import Frame, paired

__all__ = ("Frame", "Results", "Rows", "Run", "Study", "find_study", "paired", "product", "study_names")

T = TypeVar("T")
Rows = Iterable[Any]  # of a table: dictionaries or named tuples of cells


class Study:
    """The runs that answer one question; the study of a file is its `STUDY`.

    Args:
      name: Name of the file of results, and the beginning of the names of tables and figures.
      runs: Function from the results to all runs. It may ask `results.of(some_runs)` for the frame of runs that later
        ones depend on; they are then trained first.
      **stored: What is stored of a run beside its outcome: `measure`, `reduce` and `observe` of `Results`.
    """

    def __init__(self, name: str, runs: Callable[[Results], Iterable[Run]], **stored: Any):
        self.name, self.runs, self.stored = name, runs, stored
        self.tables: dict[str, Callable[[pd.DataFrame], str]] = {}
        self.figures: dict[str, Callable[[pd.DataFrame], Figure]] = {}

    def results(self, folder: Path = RESULTS, *, trains: bool = False) -> Results:
        """The results in a folder."""
        return Results(folder / f"{self.name}.jsonl", trains=trains, **self.stored)

    def train(self, folder: Path = RESULTS) -> Results:
        """Train what a folder lacks."""
        results = self.results(folder, trains=True)
        results.of(self.runs(results))
        return results

    def table(self, rows_of: Callable[[pd.DataFrame], Rows]) -> Callable[[pd.DataFrame], str]:
        """Register a table: a function of all results, one row per run, that yields the rows of the table.

        A function `table` is named as the study, one of another name STUDY_NAME.
        """

        @functools.wraps(rows_of)
        def text(frame: pd.DataFrame) -> str:
            rows = list(rows_of(frame)) if len(frame) else []
            return markdown(rows) if rows else views.MISSING

        self.tables[self._name(rows_of, "table")] = text
        return text

    def figure(self, title: str, **layout: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register a figure, named like a table, with a title that says its point and a layout of `views.chart`.

        It is drawn by a function of all results and the axes (an array of them if there are several panels).
        """

        def register(draw: Callable[..., None]) -> Callable[..., None]:
            def drawn(frame: pd.DataFrame) -> Figure:
                figure, axes = views.chart(title, **layout)
                draw(frame, axes)
                return figure

            self.figures[self._name(draw, "figure")] = drawn
            return draw

        return register

    def _name(self, function: Callable[..., Any], default: str) -> str:
        name = function.__name__
        return self.name if name == default else f"{self.name}_{name}"

    def made_tables(self, folder: Path = RESULTS) -> dict[str, str]:
        """All tables by name."""
        return self._made(folder, self.tables)

    def made_figures(self, folder: Path = RESULTS) -> dict[str, Figure]:
        """All figures by name that have something to show."""
        made = self._made(folder, self.figures) if len(self.results(folder).frame()) else {}
        return {name: figure for name, figure in made.items() if any(axes.has_data() for axes in figure.axes)}

    def _made(self, folder: Path, makers: Mapping[str, Callable[[pd.DataFrame], T]]) -> dict[str, T]:
        """What some functions make of all results, by name; UserError if they need results that are missing."""
        results = self.results(folder)
        frame = results.frame()
        try:
            return {name: make(frame) for name, make in makers.items()}
        except (LookupError, ValueError) as error:
            if missing := len(results.missing(self.runs(results))):
                raise UserError(
                    f"{results.path} lacks {missing:,} runs that a table or a picture needs; train them with "
                    f"python -m benchmarks run {self.name}"
                ) from error
            raise


def study_names() -> list[str]:
    """The studies of this package."""
    return object_names(Study, "benchmarks.studies")


def find_study(name: str) -> Study:
    """The `STUDY` of a file of this package, or of any importable module."""
    return find_object(Study, name, "benchmarks.studies")
