"""Write the tables and figures of the site from the results.

A table stands in a page of docs/, between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import RESULTS
from examples.harness import plots
from examples.harness.errors import UserError

from .cost import compiled, step_cost, tasks, vs_torch
from .study import find_study, study_names
from .views import FILTER, MISSING, NO_FILTER, chart, legend

# By name: the file of results, and the function that makes the table
COSTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "compiled": ("compiled.json", compiled.table),
    "pod": ("compiled.json", compiled.pod_table),
    "filter_memory": ("compiled.json", compiled.memory_table),
    "programs": ("compiled.json", compiled.programs_table),
    "step_cost": ("step_cost.json", step_cost.table),
    "tasks": ("tasks.json", tasks.table),
    "vs_torch": ("vs_torch.json", vs_torch.table),
}


def cost_figure(results: Path = RESULTS) -> Figure:
    """Bytes moved by an update, and copies of the parameters in its state: of AdamW, and of the filter before it."""
    result = json.loads((results / "compiled.json").read_text())
    moved = {label: row["bytes"] for label, row in result["chips"]["H100"]["float32"].items()}
    kept = {label: row["state"] / 4 for label, row in result["state"]["float32"].items()}
    optimizers = {
        "AdamW": "AdamW",
        "EMA": "EMA + AdamW",
        "MA, stride 10, bfloat16 buffer": "MA + AdamW,\nsmall buffer",
        "MA": "MA + AdamW",
    }
    claim = "The MA stores many copies of the parameters,\nbut an update moves only twice the bytes of AdamW"
    figure, panels = chart(claim, width=9, height=4.2, columns=2, sharey=True)
    titles = ("bytes moved per parameter and update", "state, in copies of the parameters")
    for axes, values, title in zip(panels, (moved, kept), titles, strict=True):
        for y, label in enumerate(optimizers):
            filtering = values[label] - values["AdamW"]
            axes.barh(y, values["AdamW"], color=NO_FILTER)
            axes.barh(y, filtering, left=values["AdamW"], color=FILTER)
            axes.annotate(f" {values[label]:g}", (values[label], y), va="center", fontsize="large")
        axes.set_yticks(range(len(optimizers)), [*optimizers.values()])
        axes.set_xlim(0, 1.15 * max(values[label] for label in optimizers))
        axes.grid(visible=False, axis="y")
        axes.set_title(title, fontsize="large", loc="left")
    panels[0].invert_yaxis()
    legend(figure, {"AdamW": NO_FILTER, "filter": FILTER})
    return figure


def tables(results: Path = RESULTS) -> dict[str, str]:
    """All tables by name."""
    made = {}
    for name, (file, table) in COSTS.items():
        path = results / file
        try:
            made[name] = table(json.loads(path.read_bytes())) if path.exists() else MISSING
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            script = f"python -m benchmarks.cost.{path.stem}"
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}); write it again by {script}"
            ) from error
    for name in study_names():
        made |= find_study(name).made_tables(results)
    return made


def fill(text: str, made: Mapping[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced by that table."""
    for name, table in made.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if start and not end:
            raise UserError(f"the text lacks the end of {name}; write <!-- end of {name} --> below the table")
        if start:
            text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def pages(docs: Path, made: Mapping[str, str]) -> dict[Path, str]:
    """The texts of all pages that have tables, by file.

    Raises:
      UserError: A table with results is in no page.
    """
    written = {path: path.read_text("utf-8") for path in sorted(docs.rglob("*.md"))}
    measured = [name for name, table in made.items() if table != MISSING]
    if lost := [name for name in measured if not any(f"<!-- {name} -->\n" in text for text in written.values())]:
        raise UserError(f"no page in {docs} has the marks of {', '.join(lost)}; write <!-- {lost[0]} --> in one")
    return {path: fill(text, made) for path, text in written.items() if "<!-- end of " in text}


def write(docs: Path) -> None:
    """Write all tables and figures into the sources of the site."""
    for path, text in pages(docs, tables()).items():
        path.write_text(text, "utf-8")
    (docs / "pictures").mkdir(exist_ok=True)
    plots.save(cost_figure(), docs / "pictures" / "cost.png")
    for name in study_names():
        for figure_name, figure in find_study(name).made_figures().items():
            plots.save(figure, docs / "pictures" / f"{figure_name}.png")
