"""Training steps per second over the number of runs in one vmapped program: `python -m benchmarks.cost.throughput`.

Each program trains so many seeds of the mod-97 model at once, evaluation included. Compilation is not counted.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from examples.harness.config import Config
from examples.harness.files import provenance, write_whole
from examples.harness.loop import evaluations, stack
from examples.harness.tables import markdown
from examples.harness.train import program
from examples.modular import EXPERIMENT

from .timing import in_turn, in_words, spread

OUT = Path(__file__).parents[1] / "results" / "throughput.json"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time vmapped programs of many runs."""

    preset: str = "ema"
    """Preset of the mod-97 experiment."""
    runs: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of runs in one program; on a GPU go on to 256 and beyond."""
    rounds: int = 10
    """Timed epochs of each program."""
    out: Path = OUT
    """File for the results."""


def epochs(config: Config, runs: int) -> Callable[[], object]:
    """A call that trains one epoch of the seeds from 0 to `runs` - 1 to its end."""
    if runs == 1:
        records = evaluations(program(config.task), config.hyper, jax.random.key(0))
    else:
        example = stack([config.hyper] * runs), stack([jax.random.key(seed) for seed in range(runs)])
        records = evaluations(program(config.task, example=example), *example)
    return lambda: next(records)


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    one = result["rows"][0]["steps_a_second"]["median"]
    rows = [
        {
            "runs at once": row["runs"],
            "runs x steps per second": in_words(row["steps_a_second"], ",.0f"),
            "times one run": f"{row['steps_a_second']['median'] / one:.2f}",
        }
        for row in result["rows"]
    ]
    return (
        f"{result['device']}; jax {result['versions']['jax']}; preset {result['preset']}; {result['rounds']} epochs in "
        f"turn; medians (quartiles).\n\n{markdown(rows)}"
    )


def main(arguments: Arguments) -> None:
    """Time all programs in turn."""
    config = EXPERIMENT.preset(arguments.preset)
    seconds = in_turn({str(runs): epochs(config, runs) for runs in arguments.runs}, arguments.rounds)
    rows = [
        {"runs": runs, "steps_a_second": spread([runs * config.task.steps / value for value in seconds[str(runs)]])}
        for runs in arguments.runs
    ]
    result = {**provenance(), "preset": arguments.preset, "rounds": arguments.rounds, "rows": rows}
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.cost.throughput"))
