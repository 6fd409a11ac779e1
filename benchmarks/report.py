"""Write the tables and pictures of benchmarks/README.md anew from results/: `python -m benchmarks.report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.harness import plots

from . import frequency, step_cost, study_report, throughput, trajectories, vs_torch

HERE = Path(__file__).parent
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_cost": step_cost.table,
    "vs_torch": vs_torch.table,
    "throughput": throughput.table,
}


def tables(results: Path, pictures: Path) -> dict[str, str]:
    """All tables by name; pictures are written."""
    made = {}
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        made[name] = (
            table(json.loads(path.read_text())) if path.exists() else f"Not measured yet: {path.name} is missing.\n"
        )
    made |= study_report.tables(results / "study", pictures)
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


def main() -> None:
    """Rewrite the README, the pictures and study.csv."""
    readme = HERE / "README.md"
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    readme.write_text(fill(readme.read_text(), tables(HERE / "results", pictures)))
    study_report.write_csv(HERE / "results" / "study", HERE / "results" / "study.csv")


if __name__ == "__main__":
    main()
