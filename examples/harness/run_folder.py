"""The folder of a run: its configuration, metrics, checkpoint and pictures. Whatever happens, it stays usable."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import serialization

from .errors import UsageError, UserError, is_full
from .files import provenance, write_whole
from .records import Row
from .train import is_primary_process


class RunFolder:
    """A run folder: config.json, metrics.csv, the last checkpoint and pictures.

    Processes that train together call its methods together. One of them writes the files.
    """

    def __init__(self, path: Path):
        self.path, self.metrics, self.checkpoint = path, path / "metrics.csv", path / "checkpoint"
        self.rows: list[Row] = []
        self.seconds: float = 0.0  # of the whole run, up to the checkpoint it was resumed from

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> Self:
        """A new folder that holds `config`; it appears in whole or not at all."""
        if is_primary_process():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                place = {"dir": path.parent, "prefix": f".{path.name}.", "ignore_cleanup_errors": True}
                with tempfile.TemporaryDirectory(**place) as new:
                    write_whole(Path(new) / "config.json", to_json({**config, **provenance()}))
                    Path(new).chmod(0o755)
                    Path(new).replace(path)  # fails where a file is, or a folder that is not empty
            except OSError as error:
                problem = f"cannot make {path}: {error.strerror};"
                if path.is_dir():
                    problem = f"{path} exists already and holds no run;"
                if (path / "config.json").exists():
                    problem = f"{path} exists already; continue its run with python -m examples.resume {path}, or"
                raise UsageError(f"{problem} choose another --out") from error
        return cls(path)

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Keep other processes out of the folder; the system frees the lock of a process that ends."""
        if not is_primary_process():
            return contextlib.nullcontext()
        try:
            return filelock.FileLock(self.path / ".lock", timeout=0).acquire()
        except filelock.Timeout as error:
            raise UserError(f"another process trains the run in {self.path}; wait for it to end") from error

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, whose checksum must be right."""
        file = self.path / "config.json"
        if not file.is_file():
            raise UsageError(f"{self.path} is not a run folder (it has no config.json); name one, or start a run")
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            content = json.loads(file.read_bytes())
            if file.read_text("utf-8") == to_json(content):
                return content
        raise _damaged(file)

    def update_config(self, changes: Mapping[str, Any]) -> None:
        """Change entries of config.json."""
        if is_primary_process():
            write_whole(self.path / "config.json", to_json({**self.config, **changes}))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Say of an error what could not be written and how to go on."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / name} could not be written ({error.strerror}); what was there before is kept. "
                f"{'Free space' if is_full(error) else 'Make it writable'} and continue with "
                f"python -m examples.resume {self.path}"
            ) from error

    def append(self, row: Row) -> None:
        """Add a record to metrics.csv."""
        self.rows.append(row)
        if is_primary_process():
            goes_on = len(self.rows) > 1 and self.metrics.exists()  # else somebody deleted it
            text = self._to_csv([row], header=False) if goes_on else self._to_csv(self.rows)
            with self.writing("metrics.csv"), self.metrics.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def save(self, state: Any, seconds: float) -> None:
        """Keep a checkpoint of state and records, `seconds` into the run, in place of the one before."""
        if is_primary_process():
            leaves = [np.asarray(_numbers(leaf)) for leaf in jax.tree.leaves(state)]
            parts = {"state": leaves, "seconds": seconds, "rows": json.dumps(self.rows)}
            content = serialization.msgpack_serialize(parts)
            with self.writing("checkpoint"):
                write_whole(self.checkpoint, hashlib.sha256(content).digest() + content)

    def restore(self, state: Any) -> Any:
        """The state of the last checkpoint, `state` itself if there is none; metrics.csv is set back to its records."""
        if self.checkpoint.exists():
            content = self.checkpoint.read_bytes()
            digest, content = content[:32], content[32:]
            if hashlib.sha256(content).digest() != digest:
                raise _damaged(self.checkpoint)
            parts: Any = serialization.msgpack_restore(content)
            self.rows, self.seconds = json.loads(parts["rows"]), parts["seconds"]
            leaves, structure = jax.tree.flatten(state)
            if [_numbers(leaf).shape for leaf in leaves] != [leaf.shape for leaf in parts["state"]]:
                raise UserError(f"{self.checkpoint} is of another version of its method; start a new run")
            state = structure.unflatten(map(_as_before, parts["state"], leaves))
        if is_primary_process():
            for unfinished in self.path.glob(".*.*/"):  # left by `write_whole` in a process that was killed
                shutil.rmtree(unfinished)
            write_whole(self.metrics, self._to_csv(self.rows) if self.rows else "")
        return state

    def _to_csv(self, rows: Sequence[Row], *, header: bool = True) -> str:
        """Records as a table, with empty cells for what a record lacks of the first one's numbers."""
        table = pd.DataFrame(rows, columns=list(self.rows[0]))
        return table.to_csv(index=False, header=header, lineterminator="\n")


def _numbers(leaf: jax.Array) -> jax.Array:
    """A leaf of a state, or the data of one that is a random key."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _as_before(numbers: np.ndarray, like: jax.Array) -> jax.Array:
    """The leaf that has these numbers, of the kind and placed as another one."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        leaf = jax.random.wrap_key_data(jnp.asarray(numbers), impl=jax.random.key_impl(like))
        return jax.device_put(leaf, like.sharding)
    return jax.device_put(numbers, like.sharding)


def to_json(content: Mapping[str, Any]) -> str:
    """JSON for people to read; its last entry is a checksum of all else."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
    return json.dumps({**content, "checksum": checksum}, indent=2, default=str) + "\n"


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged; put it back from a copy, or start a new run")
