"""Write the tables and figures of the site from the results.

A table stands in a page of docs/, between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import DOCS, RESULTS
from examples.harness import plots
from examples.harness.errors import UsageError, UserError

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
    names = {
        "AdamW": "AdamW",
        "EMA": "EMA + AdamW",
        "MA, stride 10, bfloat16 buffer": "MA + AdamW,\nsmall buffer",
        "MA": "MA + AdamW",
    }
    numbers = {
        "bytes moved per parameter and update": (result["chips"]["H100"]["float32"], "bytes", 1),
        "state, in copies of the parameters": (result["state"]["float32"], "state", 4),
    }
    claim = "The MA stores many copies of the parameters,\nbut an update moves only twice the bytes of AdamW"
    figure, panels = chart(claim, width=9, height=4.2, columns=2, sharey=True)
    for axes, (title, (rows, field, size)) in zip(panels, numbers.items(), strict=True):
        values = [rows[label][field] / size for label in names]
        axes.barh([*names.values()], values, color=FILTER)
        axes.barh([*names.values()], values[0], color=NO_FILTER)
        axes.bar_label(axes.containers[0], [f" {value:g}" for value in values], fontsize="large")
        axes.set_xlim(0, 1.15 * max(values))
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
        made[name] = table(json.loads(path.read_bytes())) if path.exists() else MISSING
    for name in study_names():
        made |= find_study(name).made_tables(results)
    return made


def fill(text: str, made: Mapping[str, str]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced by that table."""
    for name, table in made.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if end:
            text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def pages(docs: Path, made: Mapping[str, str]) -> dict[Path, str]:
    """The texts of all pages that have tables, by file.

    Raises:
      UserError: A table with results is in no page.
    """
    written = {path: path.read_text("utf-8") for path in docs.rglob("*.md")}
    measured = [name for name, table in made.items() if table != MISSING]
    marks = lambda name: re.compile(f"<!-- {name} -->\n.*<!-- end of {name} -->\n", re.DOTALL)
    if lost := [name for name in measured if not any(map(marks(name).search, written.values()))]:
        start, end = f"<!-- {lost[0]} -->", f"<!-- end of {lost[0]} -->"
        raise UserError(f"no page in {docs} has the marks of {', '.join(lost)}; write {start} and {end} in one")
    return {path: fill(text, made) for path, text in written.items() if "<!-- end of " in text}


def write(docs: Path = DOCS) -> None:
    """Write all tables and figures into the sources of the site.

    Args:
      docs: Folder of the site's sources.
    """
    if not docs.is_dir():
        raise UsageError(f"docs must be the folder of the site's sources, got {docs}")
    for path, text in pages(docs, tables()).items():
        path.write_text(text, "utf-8")
    (docs / "pictures").mkdir(exist_ok=True)
    figures = {"cost": cost_figure()}
    for name in study_names():
        figures |= find_study(name).made_figures()
    for name, figure in figures.items():
        plots.save(figure, docs / "pictures" / f"{name}.png")
