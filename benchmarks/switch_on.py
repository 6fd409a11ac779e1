"""How the loss jumps where a filter is switched on: `python -m benchmarks.switch_on SWEEP`, a folder of examples.sweep.

The jump is the highest training loss of the records within 100 steps after the switch, less the mean of the 50 before.
A preset whose filter is not switched on late is measured at the switches of all others, which is their control.
SWEEP/switch_on.csv gets a row per run, SWEEP/switch_on.md the table, SWEEP/switch_on.png the picture.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from benchmarks import run_command
from examples.harness import plots
from examples.harness.errors import UserError
from examples.harness.files import write_whole
from examples.harness.records import Row
from examples.harness.tables import markdown, median_and_range
from examples.sweep import to_rows

BEFORE, AFTER = 50, 100  # steps


def jump(rows: Sequence[Row], switch: int) -> float:
    """The highest training loss after the step `switch`, less the mean before it; NaN if either has no record."""
    before = [row["train_loss"] for row in rows if switch - BEFORE < row["step"] <= switch]
    after = [row["train_loss"] for row in rows if switch < row["step"] <= switch + AFTER]
    return max(after) - statistics.fmean(before) if before and after else math.nan


def main(sweep: Annotated[Path, tyro.conf.Positional]) -> None:
    """Measure how the loss jumps in all runs of a sweep.

    Args:
      sweep: Folder of the sweep.
    """
    if not (sweep / "sweep.json").exists():
        raise UserError(f"{sweep} holds no sweep; make one by python -m examples.sweep")
    plan = json.loads((sweep / "sweep.json").read_text())
    results = [json.loads(path.read_text()) for path in sorted(sweep.glob("runs/*.json"))]
    results.sort(key=lambda result: plan["presets"].index(result["axes"]["preset"]))
    switches = sorted({result["config"]["filter_from"] for result in results} - {0})
    if not switches:
        raise UserError(f"{sweep} has no run whose filter is switched on late (--filter-from)")
    runs: dict[str, list[list[Row]]] = {}
    table = []
    for result in results:
        name, rows = ", ".join(result["axes"].values()), to_rows(result)
        runs.setdefault(name, []).append(rows)
        own = result["config"]["filter_from"]
        measured = {f"jump_at_{s}": round(jump(rows, s), 4) if own in (0, s) else math.nan for s in switches}
        table.append({"run": name, "seed": result["config"]["seed"], **measured, "last_val_loss": rows[-1]["val_loss"]})
    frame = pd.DataFrame(table)
    write_whole(sweep / "switch_on.csv", frame.to_csv(index=False))

    titles = {f"jump_at_{s}": f"jump at step {s:,}" for s in switches} | {"last_val_loss": "val. loss at the end"}
    in_words = lambda values: "" if values.isna().all() else median_and_range(values.to_numpy(), ".3f")
    lines = [
        {"run": name} | {title: in_words(group[column]) for column, title in titles.items()}
        for name, group in frame.groupby("run", sort=False)
    ]
    text = markdown(lines)
    write_whole(sweep / "switch_on.md", text)
    print(text, end="")

    last = max(row["step"] for group in runs.values() for rows in group for row in rows)
    title = f"{plan['experiment']}: median and range of {len(plan['seeds'])} seeds"
    plots.save(plots.bands(runs, title, (max(0, switches[0] - 2 * AFTER), last)), sweep / "switch_on.png")


if __name__ == "__main__":
    run_command(main, "benchmarks.switch_on")
