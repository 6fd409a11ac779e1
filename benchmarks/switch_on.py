"""How the loss jumps where a filter is switched on: `python -m benchmarks.switch_on SWEEP`, a folder of examples.sweep.

The jump is the highest training loss of the records within 100 steps after the switch, less the mean of the 50 before.
A preset whose filter is not switched on late is measured at the switches of all others, which is their control.
SWEEP/switch_on.csv gets a row a run and switch, SWEEP/switch_on.md the table, SWEEP/switch_on.png the picture.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from examples.harness import plots
from examples.harness.errors import UserError, plain_errors
from examples.harness.records import Row
from examples.harness.run_folder import write_whole
from examples.sweep import spread, to_csv, to_rows

BEFORE, AFTER = 50, 100  # steps


def jump(rows: Sequence[Row], switch: int) -> float:
    """The highest training loss after the step `switch`, less the mean before it."""
    before = [row["train_loss"] for row in rows if switch - BEFORE < row["step"] <= switch]
    after = [row["train_loss"] for row in rows if switch < row["step"] <= switch + AFTER]
    return max(after) - float(np.mean(before))


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
        for switch in [own] if own else switches:
            seed = result["config"]["seed"]
            table.append({"run": name, "seed": seed, "switch": switch, "jump": round(jump(rows, switch), 4)})
    write_whole(sweep / "switch_on.csv", to_csv(table))

    lines = [
        "| | " + " | ".join(f"jump at step {switch:,}" for switch in switches) + " |",
        "|---" * (len(switches) + 1) + "|",
    ]
    for name in runs:
        jumps = [[row["jump"] for row in table if (row["run"], row["switch"]) == (name, s)] for s in switches]
        lines.append(" | ".join([f"| {name}", *(spread(values, ".3f") if values else "" for values in jumps)]) + " |")
    write_whole(sweep / "switch_on.md", "\n".join(lines) + "\n")
    print("\n".join(lines))

    last = max(row["step"] for group in runs.values() for rows in group for row in rows)
    title = f"{results[0]['experiment']}: median and range of {len(plan['seeds'])} seeds"
    plots.save(plots.bands(runs, title, (max(0, switches[0] - 2 * AFTER), last)), sweep / "switch_on.png")


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: tyro.cli(main, prog="python -m benchmarks.switch_on")))
