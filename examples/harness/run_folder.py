"""The folder of a run: its configuration, metrics, checkpoints and pictures. Whatever happens, it stays usable."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import filelock
import jax
import numpy as np

from .errors import UsageError, UserError, is_full
from .files import provenance, write_whole
from .records import Row
from .train import is_primary_process

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


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
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; choose another --out")
        if path.exists() and any(path.iterdir()):
            raise _occupied(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            place = {"dir": path.parent, "prefix": f".{path.name}.", "ignore_cleanup_errors": True}
            with tempfile.TemporaryDirectory(**place) as new:
                write_whole(Path(new) / "config.json", to_json({**config, **provenance()}))
                Path(new).chmod(0o755)
                Path(new).replace(path)
        except OSError as error:
            if path.is_dir():  # another process was faster
                raise _occupied(path) from error
            raise UserError(f"cannot make {path}: {error.strerror}; choose another --out") from error
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

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Say of an error what could not be written and how to go on."""
        try:
            yield
        except (OSError, ValueError) as error:  # Orbax makes ValueErrors, whose text ends in the reason
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0].split(": ")[-1]
            raise UserError(
                f"{self.path / name} could not be written ({reason}); what was there before is kept. "
                f"{'Free space' if is_full(error) else 'Make it writable'} and continue with "
                f"python -m examples.resume {self.path}"
            ) from error

    def append(self, row: Row) -> None:
        """Add a record to metrics.csv."""
        self.rows.append(row)
        if is_primary_process():
            goes_on = len(self.rows) > 1 and self._metrics.exists()  # else somebody deleted it
            text = to_csv([row], like=self.rows[0]) if goes_on else to_csv(self.rows)
            with self.writing("metrics.csv"), self._metrics.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    def save(self, state: Any, seconds: float) -> None:
        """Keep a checkpoint of state and records, `seconds` into the run, in place of the one before."""
        import orbax.checkpoint as ocp  # takes a second, which the first step need not wait for

        about = with_checksum({"state": fingerprint(state), "seconds": seconds, "rows": self.rows})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with self.writing("checkpoints"), self._checkpoints() as manager:
            manager.save(int(self.rows[-1]["step"]), args=items, force=True)

    def restore(self, state: Any) -> Any:
        """The state of the last checkpoint, `state` itself if there is none; metrics.csv is set back to its records."""
        if (self.path / "checkpoints").exists():
            import orbax.checkpoint as ocp

            like = jax.tree.map(_abstract, state)
            items = {"about": ocp.args.JsonRestore(), "state": ocp.args.StandardRestore(like)}
            try:
                with self._checkpoints() as manager:
                    if (step := manager.latest_step()) is not None:
                        about, state = (
                            manager.restore(step, args=ocp.args.Composite(**{name: item}))[name]
                            for name, item in items.items()
                        )
                        if about != with_checksum(about) or about["state"] != fingerprint(state):
                            raise ValueError("wrong checksum")
                        self.rows, self.seconds = about["rows"], about["seconds"]
            except Exception as error:  # whatever Orbax makes of a damaged file
                raise _damaged(f"the checkpoint in {self.path}") from error
        if is_primary_process():
            write_whole(self._metrics, to_csv(self.rows) if self.rows else "")
        return state

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.csv"

    @contextlib.contextmanager
    def _checkpoints(self) -> "Iterator[ocp.CheckpointManager]":
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        logging.disable()  # Orbax logs the tracebacks of its threads, beside the error that it raises
        try:
            with ocp.CheckpointManager((self.path / "checkpoints").absolute(), options=options) as manager:
                yield manager
        finally:
            logging.disable(logging.NOTSET)


def to_csv(rows: Sequence[Row], like: Row | None = None) -> str:
    """Records as lines of a table, with empty cells for what a record lacks of the first one's numbers.

    Each number is the shortest decimal that reads back as the same. `like` is the first record of a table that has
    its header already.
    """
    header = list(like or rows[0])
    lines = [header] * (like is None) + [[row.get(name, "") for name in header] for row in rows]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)


def read_config(path: Path) -> dict[str, Any]:
    """The content of the config.json in a run folder."""
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} is not a run folder (it has no config.json); name one, or start a run with --out")
    return read_json(path / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file made by `to_json`, whose checksum must be right."""
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
        content = json.loads(file.read_bytes())
        if file.read_text("utf-8") == to_json(content):
            return content
    raise _damaged(str(file))


def _occupied(path: Path) -> UserError:
    has_run = (path / "config.json").exists()
    what = f"; continue its run with python -m examples.resume {path}, or" if has_run else " and holds no run;"
    return UsageError(f"{path} exists already{what} choose another --out")


def _damaged(what: str) -> UserError:
    return UserError(f"{what} is damaged; put it back from a copy, or start a new run")


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a checksum of all else as its last entry."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    return content | {"checksum": hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]}


def to_json(content: Mapping[str, Any]) -> str:
    """JSON for people to read, with a checksum."""
    return json.dumps(with_checksum(content), indent=2, default=str) + "\n"


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
