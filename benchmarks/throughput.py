"""Training steps a second over the number of runs in one vmapped program: `python -m benchmarks.throughput`.

Each program trains so many seeds of the mod-97 model at once, evaluation included. Compilation is not counted.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from examples.harness.optimizers import HYPER, make_tx
from examples.harness.run_folder import provenance, write_whole
from examples.harness.train import program
from examples.modular import PRESETS

from .timing import in_turn, spread

OUT = Path(__file__).parent / "results" / "throughput.json"


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


def epochs(preset: str, runs: int) -> Callable[[], object]:
    """A call that trains one epoch of `runs` runs to its end."""
    config = PRESETS[preset]
    make = functools.partial(make_tx, config)
    if runs == 1:
        hyper, key = config.hyper(), jax.random.key(0)
        compiled = program(config.task(), make)
    else:
        hyper = {name: jnp.full(runs, config.hyper()[name]) for name in HYPER}
        key = jax.vmap(jax.random.key)(jnp.arange(runs))
        compiled = program(config.task(), make, example=(hyper, key))
    state = compiled.init(hyper, key)

    def call() -> None:
        nonlocal state
        state, metrics = compiled.advance(hyper, key, state)
        jax.block_until_ready((state.params, metrics))

    return call


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{result['device']}; jax {result['versions']['jax']}; preset {result['preset']}; {result['rounds']} epochs in "
        "turn; medians (quartiles).",
        "",
        "| runs at once | runs x steps a second | times one run |",
        "|---|---|---|",
    ]
    one = result["rows"][0]["steps_a_second"]["median"]
    for row in result["rows"]:
        rate = row["steps_a_second"]
        lines.append(
            f"| {row['runs']} | {rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f}) "
            f"| {rate['median'] / one:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Arguments) -> None:
    """Time all programs in turn."""
    steps = PRESETS[arguments.preset].task().steps
    seconds = in_turn({str(runs): epochs(arguments.preset, runs) for runs in arguments.runs}, arguments.rounds)
    rows = [
        {"runs": runs, "steps_a_second": spread([runs * steps / value for value in seconds[str(runs)]])}
        for runs in arguments.runs
    ]
    result = {**provenance(), "preset": arguments.preset, "rounds": arguments.rounds, "rows": rows}
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
