"""Training steps per second over the number of runs in one vmapped program: `python -m benchmarks.cost.throughput`.

Each program trains so many seeds of the mod-97 model at once, evaluation included. Compilation is not counted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import RESULTS, run_command
from examples.harness.config import Config
from examples.harness.files import provenance
from examples.harness.loop import evaluations, stack
from examples.harness.tables import markdown
from examples.harness.train import program
from examples.modular import EXPERIMENT

from .timing import in_turn, in_words, spread, write

OUT = RESULTS / "throughput.json"


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


def main(preset: str = "ema", runs: tuple[int, ...] = (1, 2, 4, 8), rounds: int = 10, out: Path = OUT) -> None:
    """Time vmapped programs of many runs.

    Args:
      preset: Preset of the mod-97 experiment.
      runs: Numbers of runs in one program; on a GPU go on to 256 and beyond.
      rounds: Timed epochs of each program.
      out: File for the results.
    """
    config = EXPERIMENT.preset(preset)
    seconds = in_turn({str(n): epochs(config, n) for n in runs}, rounds)
    steps = {n: [n * config.task.steps / value for value in seconds[str(n)]] for n in runs}
    rows = [{"runs": n, "steps_a_second": spread(values)} for n, values in steps.items()]
    result = {**provenance(), "preset": preset, "rounds": rounds, "rows": rows}
    write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.throughput")
