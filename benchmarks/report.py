"""Write the tables and pictures of benchmarks/README.md anew from results/: `python -m benchmarks.report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, run_command
from examples.harness import plots
from examples.harness.errors import UserError

from .cost import step_cost, tasks, throughput, vs_torch
from .study import pictures as study_pictures
from .study import region, spectra, trajectories
from .study import tables as study_tables
from .study.statistics import Results

HERE = Path(__file__).parent
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_cost": step_cost.table,
    "tasks": tasks.table,
    "vs_torch": vs_torch.table,
    "throughput": throughput.table,
}


def tables(results: Path, pictures: Path, study: Path | None = None) -> dict[str, str]:
    """All tables by name, those of the study from the folder `study`; pictures are written."""
    made = {}
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        missing = f"Not measured yet: {path.name} is missing.\n"
        made[name] = table(json.loads(path.read_text())) if path.exists() else missing
    runs = Results.load(study or results / "study")
    made |= {"study_ablations": study_tables.MISSING} | study_tables.tables(runs)
    shown = study_pictures.pictures(runs)
    for name, module, text in (
        ("trajectories", trajectories, "Paths on two principal axes"),
        ("spectra", spectra, "Power over frequency, window by window"),
        (
            "region",
            region,
            "Share of the seeds that reach 95 % by learning rate and weight decay, a map for each method",
        ),
    ):
        path = results / f"{name}.jsonl"
        made[name] = module.table(path)
        if path.exists():
            shown[name] = text, module.picture(path)
    for name, (text, figure) in shown.items():
        plots.save(figure, pictures / f"{name}.png")
        image = f"![{text}](pictures/{name}.png)\n"
        made[name] = image if made[name] == study_tables.MISSING else f"{made[name]}\n{image}"
    plots.save(spectra.responses_picture(), pictures / "responses.png")
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


def main(study: Path = RESULTS / "study") -> None:
    """Rewrite benchmarks/README.md and its pictures.

    Args:
      study: Folder of the study's results, the --out of python -m benchmarks.study.
    """
    if not any(study.glob("*.jsonl")):
        raise UserError(f"--study must be a folder with results of python -m benchmarks.study, got {study}")
    readme, pictures = HERE / "README.md", HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    readme.write_text(fill(readme.read_text(), tables(RESULTS, pictures, study)))


if __name__ == "__main__":
    run_command(main, "benchmarks.report")
