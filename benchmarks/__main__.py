"""Studies: `python -m benchmarks list`, `python -m benchmarks run STUDY`, `python -m benchmarks report`."""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import RESULTS, report
from benchmarks.study import find_study, study_names
from examples.harness import plots
from examples.harness.errors import plain_errors, program_name


def list_studies() -> None:
    """List the studies of this package."""
    for name in study_names():
        summary = (importlib.import_module(f"benchmarks.studies.{name}").__doc__ or "").splitlines()[0]
        print(f"  {name:<18} {summary}")


def run(study: Annotated[str, tyro.conf.Positional], out: Path = RESULTS) -> None:
    """Train what the results of a study lack, and print its tables.

    Each result is appended as soon as its run is done. The same command continues where it was stopped, and several
    processes share the work.

    Args:
      study: A name that `list` prints, or an importable module that has a STUDY.
      out: Folder for the results; for any but the package's own, figures are drawn there, too.
    """
    chosen = find_study(study)
    chosen.train(out)
    for name, table in chosen.made_tables(out).items():
        print(f"\n{name}\n\n{table}")
    for name, figure in chosen.made_figures(out).items() if out.resolve() != RESULTS.resolve() else ():
        plots.save(figure, out / f"{name}.png")
        print(out / f"{name}.png")


def main() -> None:
    """Run the subcommand of the command line; without one, list them."""
    commands = {"list": list_studies, "run": run, "report": report.write}
    with program_name("python -m benchmarks") as prog:
        tyro.extras.subcommand_cli_from_dict(commands, prog=prog, args=sys.argv[1:] or ["--help"])


if __name__ == "__main__":
    sys.exit(plain_errors(main))
