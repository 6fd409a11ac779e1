"""What a study is: the runs that answer one question, and the tables and figures drawn from their results."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import RESULTS
from examples.harness.engine import Measure, Observe, Reduce, Results
from examples.harness.experiment import Run, find_object

from . import views

Table = Callable[[pd.DataFrame], str]  # all results, one row per run, to a Markdown table


class Drawing(NamedTuple):
    """A figure of a study."""

    title: str  # the point that it makes
    draw: Callable[..., None]  # all results, and the axes (an array of them if there are several panels)
    layout: Mapping[str, Any]  # of `views.chart`


@dataclasses.dataclass
class Study:
    """The runs that answer one question; the study of a file is its `STUDY`.

    Args:
      name: Name of the file of results, and the beginning of the names of tables and figures.
      runs: Function from the results to all runs. It may ask `results.of(some_runs)` for the frame of runs that later
        ones depend on; they are then trained first.
      measure: Numbers of task, state and data at every evaluation.
      reduce: What is stored of each of these; by default all of them, in order.
      observe: Function of all states of a run, for what takes several of them.
    """

    name: str
    runs: Callable[[Results], Iterable[Run]]
    measure: Measure | None = None
    reduce: Reduce = list
    observe: Observe | None = None
    tables: dict[str, Table] = dataclasses.field(default_factory=dict)
    figures: dict[str, Drawing] = dataclasses.field(default_factory=dict)

    def results(self, folder: Path = RESULTS, *, trains: bool = False) -> Results:
        """The results in a folder."""
        path = folder / f"{self.name}.jsonl"
        return Results(path, trains=trains, measure=self.measure, reduce=self.reduce, observe=self.observe)

    def train(self, folder: Path = RESULTS) -> Results:
        """Train what a folder lacks."""
        results = self.results(folder, trains=True)
        results.of(self.runs(results))
        return results

    def table(self, make: Table) -> Table:
        """Register a table; a function `table` is named as the study, one of another name STUDY_NAME."""
        self.tables[self._name(make, "table")] = make
        return make

    def figure(self, title: str, **layout: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register a figure, named like a table, with a title that says its point and a layout of `views.chart`."""

        def register(draw: Callable[..., None]) -> Callable[..., None]:
            self.figures[self._name(draw, "figure")] = Drawing(title, draw, layout)
            return draw

        return register

    def _name(self, function: Callable[..., Any], default: str) -> str:
        name = function.__name__
        return self.name if name == default else f"{self.name}_{name}"

    def made_tables(self, folder: Path = RESULTS) -> dict[str, str]:
        """All tables by name."""
        frame = self.results(folder).frame()
        return {name: make(frame) if len(frame) else views.MISSING for name, make in self.tables.items()}

    def made_figures(self, folder: Path = RESULTS) -> dict[str, Figure]:
        """All figures by name that have something to show."""
        frame = self.results(folder).frame()
        made = {}
        for name, drawing in self.figures.items() if len(frame) else ():
            figure, axes = views.chart(drawing.title, **drawing.layout)
            drawing.draw(frame, axes)
            if any(panel.has_data() for panel in figure.axes):
                made[name] = figure
        return made


def study_names() -> list[str]:
    """The studies of this package."""
    files = sorted((Path(__file__).parent / "studies").glob("*.py"))
    return [file.stem for file in files if "\nSTUDY = " in file.read_text("utf-8")]


def find_study(name: str) -> Study:
    """The `STUDY` of a file of this package, or of any importable module."""
    names = study_names()
    return find_object(f"benchmarks.studies.{name}" if name in names else name, Study, name, names)
