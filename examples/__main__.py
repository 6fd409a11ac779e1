"""List the tasks: `python -m examples`."""

import importlib

from .harness.config import TASKS

print("The experiments; each takes --help, and python -m examples.sweep trains many runs of one:\n")
for name in TASKS:
    summary = (importlib.import_module(f"examples.{name}").__doc__ or "").splitlines()[0]
    print(f"  python -m examples.{name:<12} {summary.partition(':')[0]}")
