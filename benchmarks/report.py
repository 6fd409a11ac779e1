"""Write the site's tables and pictures anew from results/: `python -m benchmarks.report`.

A short table stands in a page of docs/, between `<!-- NAME -->` and `<!-- end of NAME -->`. One of more than twelve
rows is a page of its own in docs/tables, named in `PAGES`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import RESULTS, run_command
from examples.harness import plots
from examples.harness.errors import UserError

from . import paper
from .cost import choices, compiled, step_cost, tasks, throughput, vs_torch
from .study import board, circuits, edge, memory, noise, raised, region, spectra, trajectories, windows
from .study import pictures as study_pictures
from .study import tables as study_tables
from .study.statistics import Results

DOCS = Path(__file__).parents[1] / "docs"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_cost": step_cost.table,
    "tasks": tasks.table,
    "vs_torch": vs_torch.table,
    "throughput": throughput.table,
    "choices": choices.table,
}
COMPILED: dict[str, Callable[[dict[str, Any]], str]] = {  # of one file of results
    "compiled": compiled.table,
    "pod": compiled.pod_table,
    "filter_memory": compiled.memory_table,
}


class Page(NamedTuple):
    """What stands above a table that is a page of its own."""

    title: str
    command: str  # that measured it
    text: str  # what the columns are, and where the findings are


SEEDS = "--seeds 0 1 2 3 4 5 6 7"
PAGES = {
    "study_methods": Page(
        "Every method at the paper's learning rate",
        f"python -m benchmarks.study methods {SEEDS}",
        f"[What it says](../results/paper_rate.md).\n\n{study_tables.COLUMNS}",
    ),
    "study_pairs": Page(
        "Every filter against its controls, at the paper's learning rate",
        f"python -m benchmarks.study methods early {SEEDS}",
        f"[What it says](../results/paper_rate.md). {study_tables.PAIR_COLUMNS}",
    ),
    "study_tuned": Page(
        "Every method with a learning rate and a decay of its own",
        f"python -m benchmarks.study tuning finals tuned {SEEDS}",
        "[What it says, and how the pairs are chosen](../results/tuned.md). "
        f'"edge" marks a value at an end of its range.\n\n{study_tables.COLUMNS}\n{study_tables.PAIR_COLUMNS}',
    ),
    "study_rate": Page(
        "AdamW alone and behind two filters, at four pairs of rate and decay",
        f"python -m benchmarks.study rate {SEEDS}",
        f"[What it says](../results/tuned.md).\n\n{study_tables.COLUMNS}\n{study_tables.PAIR_COLUMNS}",
    ),
    "study_operations": Page(
        "Addition, subtraction and division",
        "python -m benchmarks.study operations --seeds 0 1 2 3 4",
        f"[What it says](../results/settings.md).\n\n{study_tables.COLUMNS}\n{study_tables.PAIR_COLUMNS}",
    ),
    "study_start": Page(
        "Initial scale and training fraction",
        "python -m benchmarks.study start --seeds 0 1 2 3 4",
        "[What it says](../results/settings.md). `embeddings` is the standard deviation of the initial embeddings, "
        f"`fraction` the part of all pairs that is trained on.\n\n{study_tables.COLUMNS}\n{study_tables.PAIR_COLUMNS}",
    ),
    "study_early": Page(
        "The first steps of the filters",
        f"python -m benchmarks.study early {SEEDS}",
        f"[What it says](../results/settings.md).\n\n{study_tables.COLUMNS}",
    ),
    "board": Page(
        "The board: which optimizer takes the fewest steps",
        "python -m benchmarks.study.board",
        "The rules are those of `benchmarks/study/board.py`. [What it says](../results/board.md). Sixteen seeds "
        "first, with a two-sided sign test; then some of the best with 64 seeds; then other tasks, with nothing tuned "
        "anew. The last table is tuned with 30 % of the pairs.",
    ),
    "memory": Page(
        "Kernels of the memory of gradients",
        "python -m benchmarks.study.memory",
        "[What it says](../results/memory.md). First, how much of the variance of the logarithm of the steps the "
        "learning rate explains, and the rate with the mean age, over kernels that share their age. Then whether "
        "kernels bear the largest rate at which no memory works, and whether that follows their stability limit. Then "
        "the limits of the kernels that take the fewest steps at each rate, and every kernel at its best rate.",
    ),
    "raised": Page(
        "By how much a filter before Adam raises the learning rate",
        "python -m benchmarks.study.raised",
        "[What it says](../results/stability.md#a-filter-before-adam-raises-the-learning-rate). First sparse parity, "
        "then mod 97. `at most` is what white noise gives. In brackets are the steps of AdamW alone at so many times "
        "the rate, with the decay divided by as much.",
    ),
    "circuits": Page(
        "The clocks that models learn",
        "python -m benchmarks.study.circuits",
        "[What it says](../results/clocks.md), and [what a clock is](../clock.md). The first table gives "
        "steps as parts of those to 95 % validation accuracy. A clock forms when the restricted loss falls "
        "below half of log p. The third has multiplication and division alone. There, a frequency that has a "
        "divisor in common with 96 tells apart the elements of a quotient alone. The fourth has means over "
        "pairs of runs. p is the probability of as many key frequencies in common, or more, by chance. Runs "
        "from other starts are the control.",
    ),
    "step_cost": Page(
        "Time of one update",
        "python -m benchmarks.cost.step_cost --memory 14",
        "AdamW alone and behind each filter, float32. [What it says](../results/cost.md). "
        '"By compiled bytes" is the ratio to AdamW of the bytes that move by XLA\'s own count. "If all was fused" is '
        "that of a step which reads and writes each array once.",
    ),
    "vs_torch": Page(
        "The same training in PyTorch",
        "python -m benchmarks.cost.vs_torch",
        "The same model, initial weights and batches on both sides; the losses are compared before anything is timed. "
        "[What it says](../results/cost.md). `frugal` has our arithmetic. `torch` has the filters of the package "
        "pytorch_optimizer.",
    ),
    "spectra": Page(
        "Where the power of the gradients is",
        "python -m benchmarks.study.spectra",
        "Median and range of seeds 0 to 2, window by window. [What it says](../results/signals.md).",
    ),
}


def tables(results: Path, study: Path) -> dict[str, str]:
    """All tables by name, those of the study from the folder `study`."""
    made = {}
    for name, table in TABLES.items():
        path = results / f"{name}.json"
        missing = f"Not measured yet: {path.name} is missing.\n"
        made[name] = table(json.loads(path.read_text())) if path.exists() else missing
    path = results / compiled.OUT.name
    missing = f"Not measured yet: {path.name} is missing.\n"
    made |= {
        name: table(json.loads(path.read_text())) if path.exists() else missing for name, table in COMPILED.items()
    }
    runs = Results.load(study)
    made |= study_tables.tables(runs) | paper.tables(results, runs)
    made["board"] = board.table(results / "board.jsonl", runs, results / board.TIMES.name)
    by_name = {"memory": memory, "region": region, "circuits": circuits, "edge": edge, "noise": noise}
    for name, module in by_name.items():
        made[name] = module.table(results / f"{name}.jsonl")
    made["raised"] = study_tables.joined(*(raised.table(results / "raised.jsonl", task) for task in raised.SETUPS))
    for rate, decay in windows.SETTINGS:
        made[f"windows_{rate:g}_{decay:g}"] = windows.table(results / "parity_lamb.csv", rate, decay)
    made["trajectories"] = trajectories.table(results / "trajectories.jsonl")
    made["spectra"] = spectra.table(results / "spectra.jsonl")
    return made


def page(name: str, table: str) -> str:
    """A table as a page of the site."""
    title, command, text = PAGES[name]
    return f"# {title}\n\n`{command}`\n\n{text.rstrip()}\n\n{table}"


def fill(text: str, made: Mapping[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced by that table."""
    for name, table in made.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if start and not end:
            raise ValueError(f"the text lacks the end of {name}; write <!-- end of {name} --> below the table")
        if start:
            text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def pages(docs: Path, made: Mapping[str, str]) -> dict[Path, str]:
    """The texts of all pages that have tables, by file: those in `docs` with marks, and those that are made.

    Raises:
      ValueError: A table is neither in a page nor in `PAGES`.
    """
    inside = {name: table for name, table in made.items() if name not in PAGES}
    written = {path: path.read_text() for path in sorted(docs.rglob("*.md")) if path.parent.name != "tables"}
    if lost := [name for name in inside if not any(f"<!-- {name} -->\n" in text for text in written.values())]:
        raise ValueError(f"no page in {docs} has the marks of {', '.join(lost)}; write <!-- {lost[0]} --> in one")
    filled = {path: fill(text, inside) for path, text in written.items() if "<!-- end of " in text}
    return filled | {docs / "tables" / f"{name.removeprefix('study_')}.md": page(name, made[name]) for name in PAGES}


def main(study: Path = RESULTS / "study", docs: Path = DOCS) -> None:
    """Write the tables and pictures of the site anew.

    Args:
      study: Folder of the study's results, the --out of python -m benchmarks.study.
      docs: Folder of the site's sources.
    """
    if not any(study.glob("*.jsonl")):
        raise UserError(f"--study must be a folder with results of python -m benchmarks.study, got {study}")
    for folder in ("tables", "pictures"):
        (docs / folder).mkdir(exist_ok=True)
    for path, text in pages(docs, tables(RESULTS, study)).items():
        path.write_text(text)
    for name, figure in study_pictures.pictures(RESULTS, study).items():
        plots.save(figure, docs / "pictures" / f"{name}.png")


if __name__ == "__main__":
    run_command(main, "benchmarks.report")
