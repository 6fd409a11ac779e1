"""Files that are there in whole or not at all, and where results come from."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import grokfast_jax


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there in whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / path.name
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def provenance() -> dict[str, Any]:
    """Device, versions and, in a checkout, the commit, for files that hold results."""
    device = jax.devices()[0]
    # Those that the process may use: XLA's rounding on a CPU depends on their number.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform}), {cores} CPU cores",
        "versions": {"grokfast_jax": grokfast_jax.__version__}
        | {name: version(name) for name in ("jax", "jaxlib", "optax", "flax")},
        "commit": commit(Path(__file__).parents[2]),
    }


def fingerprint(arrays: Any) -> str:
    """A hash of all arrays of a tree."""
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(arrays)):
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def commit(checkout: Path) -> str | None:
    """The commit that is checked out, with "-dirty" if files differ from it; None where there is none, or no Git.

    Results in benchmarks/results do not count: they are appended to while they are measured.
    """
    if shutil.which("git") is None or not (checkout / ".git").exists():
        return None
    git = functools.partial(subprocess.run, cwd=checkout, capture_output=True, text=True, check=False)
    name = git(["git", "describe", "--always", "--abbrev=12", "--exclude=*"]).stdout.strip()
    changed = git(["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]).returncode != 0
    return name + "-dirty" * changed if name else None
