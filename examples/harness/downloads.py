"""Data files: from a folder that the user names, or downloaded once into a cache; hashes that are known are checked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pooch
import requests

from .errors import UserError


def fetch(files: Mapping[str, str | None], sources: Sequence[str], data_dir: Path | None) -> dict[str, Path]:
    """Paths of the named files; UserError if one is missing, damaged or cannot be downloaded.

    Args:
      files: Hash of each file as pooch spells it, by name; None for no check.
      sources: Addresses of folders that hold the files, tried in turn.
      data_dir: Folder with files already there; None downloads what the cache lacks.
    """
    return {
        name: _download(name, known, sources) if data_dir is None else _check(data_dir / name, known, sources[0] + name)
        for name, known in files.items()
    }


def _check(path: Path, known: str | None, source: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing; put it there (from {source}) or leave out --data-dir")
    if not pooch.hashes.hash_matches(str(path), known):
        raise UserError(f"{path} is damaged (its hash is not {known}); get it again from {source}")
    return path


def _download(name: str, known: str | None, sources: Sequence[str]) -> Path:
    problems = []
    for source in sources:
        try:
            return Path(pooch.retrieve(source + name, known, fname=name, path=pooch.os_cache("grokfast_jax")))
        except requests.RequestException as error:
            problems.append(f"  {source}{name}: no connection ({type(error).__name__})")
        except ValueError as error:  # another hash
            problems.append(f"  {source}{name}: {error}")
    raise UserError(
        f"could not download {name}:\n" + "\n".join(problems) + "\nWithout a network, get the files of "
        f"{sources[0]} on another machine, copy them into a folder here and pass --data-dir FOLDER."
    )
