"""The folder of a run: its configuration, metrics, checkpoints and pictures. Whatever happens, it stays usable."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

import grokfast_jax

from .errors import UserError
from .records import Row


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


def commit(checkout: Path) -> str | None:
    """The commit that is checked out, with "-dirty" if files differ from it; None where there is none, or no Git."""
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    command = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there in whole or not at all."""
    with contextlib.ExitStack() as stack:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        stack.callback(Path(name).unlink, missing_ok=True)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)


def leads() -> bool:
    """Whether this process is the one, of all that train together, that writes what all of them know."""
    return jax.process_index() == 0


class RunFolder:
    """A run folder: config.json, metrics.csv, checkpoints/ and pictures.

    Processes that train together call its methods together. One of them writes the files; checkpoints are Orbax's.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> Self:
        """A new folder that holds `config`; it appears in whole or not at all."""
        if not leads():
            return cls(path)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} exists already; go on with it by --resume {path}, or choose another --out")
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            except OSError as error:
                raise UserError(f"cannot make {path}: {error.strerror}; choose another --out") from error
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            write_whole(new / "config.json", json.dumps({**config, **provenance()}, indent=2, default=str) + "\n")
            new.chmod(0o755)
            new.replace(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an earlier run."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no run folder (it has no config.json); start a run there by --out {path}")
        return cls(path)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return json.loads((self.path / "config.json").read_text())

    def update_config(self, changes: Mapping[str, Any]) -> None:
        """Change entries of config.json."""
        if leads():
            write_whole(self.path / "config.json", json.dumps({**self.config, **changes}, indent=2, default=str) + "\n")

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.csv"

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a record to metrics.csv."""
        # NumPy prints the shortest decimal that reads back as the same number.
        lines = [",".join(map(str, row.values()))] if self.rows else [",".join(row), ",".join(map(str, row.values()))]
        if leads():
            with self._metrics.open("a") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows.append({name: float(value) for name, value in row.items()})

    def save(self, state: Any) -> None:
        """Keep a checkpoint of the state after the last record, in place of the one before."""
        step = int(self.rows[-1]["step"])
        try:
            with self._checkpoints() as manager:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except (OSError, ValueError) as error:  # Orbax turns a full disk into a ValueError
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"the checkpoint of step {step:,} could not be written ({reason}); the one before is kept. "
                f"Free space and go on with --resume {self.path}"
            ) from error

    def restore(self, like: Any) -> Any:
        """The state of the last checkpoint, None if there is none; records after it are dropped."""
        step, state = 0, None
        if (self.path / "checkpoints").exists():
            with self._checkpoints() as manager:
                if (latest := manager.latest_step()) is not None:
                    step = latest
                    state = manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))
        # A line that was cut short when the run was killed has no end.
        lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        lines = [line for line in lines if line.endswith("\n")]
        kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= step]
        self.rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(kept)]
        if step != (self.rows[-1]["step"] if self.rows else 0):
            raise UserError(
                f"{self._metrics} lacks records before step {step:,}, that of the checkpoint; "
                "put the file back, or start a new run"
            )
        if leads():
            write_whole(self._metrics, "".join(kept) if self.rows else "")
        return state

    def _checkpoints(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager((self.path / "checkpoints").absolute(), options=options)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
