"""The folder of a run: its configuration, metrics, checkpoints and pictures. Whatever happens, it stays usable."""

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp

from .errors import UsageError, UserError
from .files import provenance, write_whole
from .processes import is_primary_process
from .records import Row


def fingerprint(arrays: Any) -> str:
    """A hash of all arrays of a tree."""
    digest = hashlib.sha256()
    for array in map(np.asarray, jax.tree.leaves(arrays)):
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


class RunFolder:
    """A run folder: config.json, metrics.csv, checkpoints/ and pictures.

    Processes that train together call its methods together. One of them writes the files; checkpoints are Orbax's.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = []
        self.seconds = 0.0  # of the whole run, up to the checkpoint it was resumed from

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> Self:
        """A new folder that holds `config`; it appears in whole or not at all."""
        if not is_primary_process():
            return cls(path)
        occupied = f"{path} exists already; continue its run with --resume {path}, or choose another --out"
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; choose another --out")
        if path.exists() and any(path.iterdir()):
            raise UsageError(occupied)
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            except OSError as error:
                raise UserError(f"cannot make {path}: {error.strerror}; choose another --out") from error
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            write_whole(new / "config.json", to_json({**config, **provenance()}))
            new.chmod(0o755)
            try:
                new.replace(path)
            except OSError as error:  # another process was faster
                raise UsageError(occupied) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of an earlier run."""
        read_config(path)
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system frees the lock of a process that ends."""
        with contextlib.ExitStack() as stack:
            if is_primary_process():
                try:
                    stack.enter_context(filelock.FileLock(self.path / ".lock", timeout=0))
                except filelock.Timeout as error:
                    raise UserError(f"another process trains the run in {self.path}; wait for it to end") from error
            yield

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.path)

    def update_config(self, changes: Mapping[str, Any]) -> None:
        """Change entries of config.json."""
        if is_primary_process():
            write_whole(self.path / "config.json", to_json({**self.config, **changes}))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a record to metrics.csv."""
        # NumPy prints the shortest decimal that reads back as the same number.
        lines = [",".join(map(str, row.values()))] if self.rows else [",".join(row), ",".join(map(str, row.values()))]
        if is_primary_process():
            try:
                with self._metrics.open("a") as file:
                    file.write("\n".join(lines) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UserError(
                    f"step {row['step']:,} could not be recorded in {self._metrics} ({error.strerror}). "
                    f"Free space and continue with --resume {self.path}"
                ) from error
        self.rows.append({name: float(value) for name, value in row.items()})

    def save(self, state: Any, seconds: float) -> None:
        """Keep a checkpoint of the state after the last record, `seconds` into the run, in place of the one before."""
        step, before = int(self.rows[-1]["step"]), self._latest_step()
        about = {str(step): {"seconds": seconds, "state": fingerprint(state), "rows": fingerprint_rows(self.rows)}}
        if before is not None:  # which is the checkpoint still if the process is killed now
            about[str(before)] = read_json(self._about)[str(before)]
        try:
            if is_primary_process():
                write_whole(self._about, to_json(about))
            with self._checkpoints() as manager:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except (
            OSError,
            ValueError,
        ) as error:  # Orbax turns a full disk into a ValueError, whose text ends in the reason
            reason = str(error).splitlines()[0].rpartition(": ")[-1]
            raise UserError(
                f"the checkpoint of step {step:,} could not be written ({reason}); "
                f"{'there was none before' if before is None else 'the one before is kept'}. "
                f"Free space and continue with --resume {self.path}"
            ) from error

    def restore(self, state: Any) -> Any:
        """The state of the last checkpoint, `state` itself if there is none; records after it are dropped."""
        step = self._latest_step()
        if step is not None:
            like = ocp.args.StandardRestore(jax.tree.map(_abstract, state))
            try:
                with self._checkpoints() as manager:
                    state = manager.restore(step, args=like)
            except Exception as error:  # whatever Orbax makes of a damaged file
                raise _damaged(f"the checkpoint of step {step:,} in {self.path}") from error
        lines = self._complete_lines()
        kept = lines[:1] + [line for line in lines[1:] if _step_of(line) <= (step or 0)]
        self.rows = self._parse(kept)
        if (step or 0) != (self.rows[-1]["step"] if self.rows else 0):
            raise UserError(
                f"{self._metrics} lacks records before step {step or 0:,}, that of the checkpoint; "
                "put the file back, or start a new run"
            )
        if step is not None:
            about = read_json(self._about).get(str(step))
            if about is None:
                raise _damaged(str(self._about))
            self.seconds = float(about["seconds"])
            if about["state"] != fingerprint(state):
                raise _damaged(f"the checkpoint of step {step:,} in {self.path}")
            if about["rows"] != fingerprint_rows(self.rows):
                raise _damaged(str(self._metrics))
        if is_primary_process():
            write_whole(self._metrics, "".join(kept) if self.rows else "")
        return state

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def _about(self) -> Path:
        """What must hold of a checkpoint and of the records before it, by step, for the last two."""
        return self.path / "checkpoints.json"

    def _complete_lines(self) -> list[str]:
        """The lines of metrics.csv, but for one that was cut short when the run was killed."""
        try:
            lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        except UnicodeDecodeError as error:
            raise _damaged(str(self._metrics)) from error
        return [line for line in lines if line.endswith("\n")]

    def _parse(self, lines: list[str]) -> list[Row]:
        rows: list[Row] = []
        for number, record in enumerate(csv.DictReader(lines), 2):
            try:
                rows.append({name: float(value) for name, value in record.items()})
            except (TypeError, ValueError) as error:
                raise _damaged(f"line {number} of {self._metrics}") from error
        return rows

    def _latest_step(self) -> int | None:
        if not (self.path / "checkpoints").exists():
            return None
        with self._checkpoints() as manager:
            return manager.latest_step()

    def _checkpoints(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager((self.path / "checkpoints").absolute(), options=options)


def read_config(path: Path) -> dict[str, Any]:
    """The content of the config.json in a run folder."""
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is no run folder (it has no config.json); start a run there by --out {path}")
    return read_json(path / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file made by `to_json`, whose checksum must be right."""
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
        content = json.loads(file.read_bytes())
        if file.read_text() == to_json(content):
            return content
    raise _damaged(str(file))


def _damaged(what: str) -> UserError:
    return UserError(f"{what} is damaged; put it back from a copy, or start a new run")


def to_json(config: Mapping[str, Any]) -> str:
    """JSON for people to read, with a checksum of all else as its last entry."""
    content = {name: value for name, value in config.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
    return json.dumps({**content, "checksum": checksum}, indent=2, default=str) + "\n"


def fingerprint_rows(rows: list[Row]) -> str:
    """A hash of records."""
    return hashlib.sha256(repr([list(row.items()) for row in rows]).encode()).hexdigest()[:16]


def _step_of(line: str) -> float:
    """The step of a record; 0 for a line that is none, which is told of when it is parsed."""
    number = line.split(",")[0]
    return int(number) if number.isdecimal() else -math.inf


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
