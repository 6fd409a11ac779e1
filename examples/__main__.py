"""List the experiments: `python -m examples`."""

import importlib
import sys

from examples.harness.errors import UsageError, plain_errors
from examples.harness.experiment import task_names


def main() -> None:
    """Print a line for each experiment."""
    if names := [word for word in sys.argv[1:] if not word.startswith("-")]:
        raise UsageError(
            f"python -m examples takes no argument, got {names[0]!r}; did you mean python -m examples.{names[0]}?"
        )
    print("The experiments; each takes --help, and python -m examples.sweep trains many runs of one:\n")
    for name in task_names():
        summary = importlib.import_module(f"examples.{name}").__doc__ or ""  # none in `python -OO`
        print(f"  python -m examples.{name:<12} {summary.partition(':')[0]}")
    print("\npython -m examples.quickstart shows the filter and its control in one file, in half a minute.")


if __name__ == "__main__":
    sys.exit(plain_errors(main))
