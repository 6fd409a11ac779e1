"""Write the tables of benchmarks/README.md anew from the files in results/: `python -m benchmarks.report`."""

import json
from pathlib import Path

from . import step_cost, throughput, vs_torch

HERE = Path(__file__).parent
TABLES = {"step_cost": step_cost.table, "vs_torch": vs_torch.table, "throughput": throughput.table}


def fill(text: str, results: Path) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` made anew for each table."""
    for name, table in TABLES.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if not start or not end:
            raise ValueError(f"the text lacks the marks of {name}")
        path = results / f"{name}.json"
        made = table(json.loads(path.read_text())) if path.exists() else f"Not measured yet: {path.name} is missing.\n"
        text = f"{before}{start}\n{made}\n{end}{after}"
    return text


def main() -> None:
    """Rewrite the README."""
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(), HERE / "results"))


if __name__ == "__main__":
    main()
