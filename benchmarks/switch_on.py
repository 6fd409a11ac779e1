"""How the loss jumps where a filter is switched on: `python -m benchmarks.switch_on SWEEP`, a folder of examples.sweep.

The jump is the highest training loss of the records within 100 steps after the switch, less the mean of the 50 before.
A preset whose filter is not switched on late is measured at the switches of all others, which is their control.
SWEEP/switch_on.csv gets a row a run, SWEEP/switch_on.md the table, SWEEP/switch_on.png the picture.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.harness import plots
from examples.harness.errors import UserError, plain_errors
from examples.harness.records import Row
from examples.harness.run_folder import write_whole
from examples.sweep import spread, to_csv, to_rows

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
    table: list[dict[str, Any]] = []
    for result in results:
        name, rows = ", ".join(result["axes"].values()), to_rows(result)
        runs.setdefault(name, []).append(rows)
        own = result["config"]["filter_from"]
        measured = {f"jump_at_{s}": round(jump(rows, s), 4) if own in (0, s) else None for s in switches}
        table.append({"run": name, "seed": result["config"]["seed"], **measured, "last_val_loss": rows[-1]["val_loss"]})
    write_whole(sweep / "switch_on.csv", to_csv(table))

    titles = {f"jump_at_{s}": f"jump at step {s:,}" for s in switches} | {"last_val_loss": "val. loss at the end"}
    lines = [" | ".join(["| run", *titles.values()]) + " |", "|---" * (len(titles) + 1) + "|"]
    for name in runs:
        columns = [[row[column] for row in table if row["run"] == name] for column in titles]
        cells = ["" if None in column else spread(column, ".3f") for column in columns]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    write_whole(sweep / "switch_on.md", "\n".join(lines) + "\n")
    print("\n".join(lines))

    last = max(row["step"] for group in runs.values() for rows in group for row in rows)
    title = f"{plan['experiment']}: median and range of {len(plan['seeds'])} seeds"
    plots.save(plots.bands(runs, title, (max(0, switches[0] - 2 * AFTER), last)), sweep / "switch_on.png")


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: tyro.cli(main, prog="python -m benchmarks.switch_on")))
