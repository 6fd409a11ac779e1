"""Data files: from a folder that the user names, or downloaded once into a cache; hashes that are known are checked."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pooch
import requests

from .errors import UserError


def fetch(files: Mapping[str, str | None], sources: Sequence[str], data_dir: Path | None) -> dict[str, Path]:
    """Paths of the named files.

    Args:
      files: Hash of each file, by name: its SHA-256, or another after the name of the algorithm and a colon, or None
        for no check.
      sources: Addresses of folders that hold the files, tried in turn.
      data_dir: Folder with files already there; None downloads what the cache lacks.

    Raises:
      UserError: A file is missing, does not have its hash, or could not be downloaded.
    """
    return {name: _fetch_one(name, known, sources, data_dir) for name, known in files.items()}


def _fetch_one(name: str, known: str | None, sources: Sequence[str], data_dir: Path | None) -> Path:
    if data_dir is not None:
        path = data_dir / name
        if not path.is_file():
            raise UserError(f"{path} is missing; put it there (from {sources[0]}{name}) or leave out --data-dir")
        if not pooch.hashes.hash_matches(str(path), known):
            raise UserError(f"{path} is damaged (its hash is not {known}); get it again from {sources[0]}{name}")
        return path
    cache = pooch.os_cache("grokfast_jax")
    if known is None and not (cache / name).exists():
        print(f"note: no checksum of {name} is known, so what arrives is not checked by one", file=sys.stderr)
    problems = []
    for source in sources:
        try:
            return Path(pooch.retrieve(source + name, known_hash=known, fname=name, path=cache))
        except requests.RequestException as error:
            problems.append(f"  {source}{name}: no connection ({type(error).__name__})")
        except ValueError as error:  # another hash
            problems.append(f"  {source}{name}: {error}")
    raise UserError(
        f"could not download {name}:\n" + "\n".join(problems) + "\nWithout a network, get the files of "
        f"{sources[0]} on another machine, copy them into a folder here and pass --data-dir FOLDER."
    )
