"""Write the tables and pictures of benchmarks/README.md anew from results/: `python -m benchmarks.report`."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from examples.harness import plots
from examples.harness.errors import UserError, plain_errors

from . import frequency, step_cost, study_report, throughput, trajectories, vs_torch

HERE = Path(__file__).parent
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_cost": step_cost.table,
    "vs_torch": vs_torch.table,
    "throughput": throughput.table,
}


def tables(results: Path, pictures: Path, study: Path | None = None) -> dict[str, str]:
    """All tables by name, those of the study from the folder `study`; pictures are written."""
    made = {}
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        made[name] = (
            table(json.loads(path.read_text())) if path.exists() else f"Not measured yet: {path.name} is missing.\n"
        )
    made |= study_report.tables(study or results / "study", pictures)
    made["trajectories"] = trajectories.table(results / "trajectories")
    made["spectra"] = frequency.table(results / "spectra")
    plots.save(frequency.responses_picture(), pictures / "responses.png")
    if any((results / "trajectories").glob("*.json")):
        plots.save(trajectories.picture(results / "trajectories"), pictures / "trajectories.png")
        made["trajectories"] += "\n![Paths on two principal axes](pictures/trajectories.png)\n"
    if any((results / "spectra").glob("*.json")):
        plots.save(frequency.spectra_picture(results / "spectra"), pictures / "spectra.png")
        made["spectra"] += "\n![Power over frequency, window by window](pictures/spectra.png)\n"
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced by each table."""
    for name, table in made.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if not start or not end:
            raise ValueError(f"the text lacks the marks of {name}")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Rewrite benchmarks/README.md, its pictures and results/study.csv."""

    study: Path = HERE / "results" / "study"
    """Folder of the study's results, the --out of python -m benchmarks.study."""


def main(arguments: Arguments) -> None:
    """Rewrite the README, the pictures and study.csv."""
    if not any(arguments.study.glob("*.json")):
        raise UserError(f"--study must be a folder with results of python -m benchmarks.study, got {arguments.study}")
    readme = HERE / "README.md"
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    readme.write_text(fill(readme.read_text(), tables(HERE / "results", pictures, arguments.study)))
    study_report.write_csv(arguments.study, HERE / "results" / "study.csv")


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.report"))))
