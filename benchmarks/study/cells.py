"""What identifies a run, and the files that keep results.

A run is identified by its cell: the differences of its configuration from its task's base, `BASE` for mod 97, which
never changes.

A file of results has a JSON object per line. A line with a `schema` says where the results come from that follow it, up
to the next such line. Every other line is a result: of the run in its `cell`, or of all the runs in its `cells`. Lines
are only ever appended, so a crash costs at most the last one.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from examples.harness.config import Config
from examples.harness.errors import UserError
from examples.harness.files import provenance

SCHEMA = 1  # to be raised when runs of a configuration no longer give what they gave before, rounding apart
# fmt: off
SHARED: dict[str, Any] = {  # fields of all tasks
    "filter": "none", "alpha": 0.98, "start": "gradient", "window_size": 100, "stride": 1, "buffer_dtype": None,
    "lamb": 2.0, "fast": 1.0, "normalize": False, "filter_from": 0, "collect": True,
    "optimizer": "adam", "lr": 0.001, "weight_decay": 0.005, "beta1": 0.9, "beta2": 0.98, "lr_warmup": 10,
    "clip_norm": None,
    "seed": 0, "budget": 5_000, "stop_at": 0.95, "hold": 0,
}
BASE: dict[str, Any] = SHARED | {
    "p": 97, "operation": "multiplication", "train_fraction": 0.5, "batch_size": 512,
    "dim": 128, "depth": 2, "heads": 4, "embedding_std": 1.0,
}
PARITY: dict[str, Any] = SHARED | {
    "n": 40, "k": 3, "points": 1000, "fresh_points": 2000, "batch_size": 64, "width": 256, "eval_every": 50,
}
# fmt: on

Cell = tuple[tuple[str, Any], ...]


def differences(config: Config, base: Mapping[str, Any] = BASE) -> dict[str, Any]:
    """How a configuration differs from the base of its task, sorted by name.

    Raises:
      UserError: The configuration and the base do not have the same fields.
    """
    facts = config.facts()
    if new := sorted(facts.keys() - base.keys()):
        raise UserError(
            f"the base in {__name__} lacks the field {', '.join(new)}; add it with the value that earlier results had"
        )
    if gone := sorted(base.keys() - facts.keys()):
        raise UserError(
            f"the base in {__name__} has the field {', '.join(gone)}, which configurations lack; remove it, and "
            "results that differ in it"
        )
    return {name: facts[name] for name in sorted(facts) if facts[name] != base[name]}


def as_cell(changes: Mapping[str, Any]) -> Cell:
    """Differences as a key."""
    return tuple(sorted(changes.items()))


class Line(NamedTuple):
    """A result in a file."""

    place: str  # file and line, for messages
    origin: dict[str, Any]  # schema, device, versions and commit
    result: dict[str, Any]


def read(path: Path, base: Mapping[str, Any] | None = BASE) -> Iterator[Line]:
    """The results in a file, none if there is no file. A last line that is not whole is passed over.

    Raises:
      UserError: A line is damaged, of another schema, or has fields in a cell that the base, if there is one, lacks.
    """
    origin = None
    text = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        place = f"{path}, line {number}"
        try:
            content = json.loads(line)
            schema = content.get("schema")
            cells = content["cells"] if "cells" in content else [content["cell"]] if schema is None else []
            unknown = sorted({name for cell in cells for name in cell if base is not None and name not in base})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place} is damaged; delete the line, and its run is trained again") from error
        if schema != SCHEMA and (schema is not None or origin is None):
            raise UserError(f"{place} has schema {schema}, not {SCHEMA}; move the file elsewhere")
        if unknown:
            raise UserError(f"{place} has the unknown field {', '.join(unknown)}; delete the line")
        if schema is not None:
            origin = content
        else:
            yield Line(place, origin or {}, content)


def append(path: Path, *results: Mapping[str, Any], base: Mapping[str, Any] | None = BASE) -> None:
    """Append results to a file, with where they come from unless its last results come from there too."""
    origin = _origin()
    with filelock.FileLock(f"{path}.lock"), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a crash has left of a line
        same = [line.origin for line in read(path, base)][-1:] == [origin]
        lines = results if same else [origin, *results]
        file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


@functools.cache
def _origin() -> dict[str, Any]:
    """Where the results of this process come from."""
    return {"schema": SCHEMA, **provenance()}
