"""Timing several contenders in turn, so that whatever else the machine does meets them all."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from examples.harness.errors import UserError
from examples.harness.files import write_whole


def in_turn(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call, by contender: `rounds` rounds in which each is called once, after one that is not counted.

    A contender must return only when its work is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": middle, "low": low, "high": high}


def in_words(values: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    """Median and quartiles as text: `median (low to high)`, each times `scale`."""
    middle, low, high = (format(scale * values[name], form) for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def versions(packages: Sequence[str], requirement: str) -> dict[str, str]:
    """Versions of installed packages, which `pip install REQUIREMENT` installs."""
    try:
        return {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is missing; pip install {requirement}") from error


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write results as JSON."""
    write_whole(path, json.dumps(result, indent=1) + "\n")
