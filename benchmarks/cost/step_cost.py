"""What a filter adds to the time and memory of an optimizer update: `python -m benchmarks.cost.step_cost`.

AdamW alone and AdamW after each filter take turns, on float32 parameters in few large and in many small arrays, as a
donated jitted step and as a `lax.scan`. The table also has the bytes per parameter that the compiled program moves
by XLA's own count: on a CPU each loop writes one array, so a loop that needs the amplified gradient reads its inputs
again.

Timing starts when all windows are full: a ring that has just been allocated is slower for its first updates. The
largest cells need 14 GB.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import RESULTS, Count, OutFile, run_command
from examples.harness.files import provenance
from examples.harness.tables import markdown

from .accelerators import memory, update_step
from .compiled import optimizers
from .timing import in_turn, in_words, spread, write

OUT = RESULTS / "step_cost.json"
WINDOWS = {400_000: (10, 100, 1000), 10_000_000: (10, 100), 100_000_000: (10,)}  # by number of parameters
UPDATES = 60_000_000  # parameters to update in each timing: the number of steps follows
LAYOUTS = {"few": lambda parameters: 4, "many": lambda parameters: min(max(parameters // 128**2, 1), 256)}
OPTIMIZERS = {"none": "AdamW", "ema": "EMA", "ma": "MA"}


def contender(name: str, sizes: list[int], mode: str, steps: int) -> tuple[Callable[[], object], dict[str, float]]:
    """A call that runs `steps` updates to their end, and the bytes per parameter that it needs and moves.

    The contender is AdamW with the filter `name` before it: none, ema or ma-WINDOW.
    """
    kind, _, window = name.partition("-")
    tx = optimizers(int(window or 1))[OPTIMIZERS[kind]]
    step = update_step(tx)

    def scan(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        # The gradient is scaled in each step, so that it cannot be precomputed.
        body = lambda carry, scale: (step(carry[0], carry[1], jax.tree.map(lambda g: scale * g, grads)), None)
        return lax.scan(body, (params, state), jnp.linspace(1.0, 1.1, steps))[0]

    params, grads = ({f"p{i}": jnp.full(size, value) for i, size in enumerate(sizes)} for value in (0.5, 1e-3))
    state = jax.jit(tx.init)(params)
    compile_ = lambda function: jax.jit(function, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    one = compile_(step)
    compiled = one if mode == "step" else compile_(scan)
    cost: Any = one.cost_analysis()
    total, carry = sum(sizes), (params, state)
    facts = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / total,
        "temporary_bytes": memory(compiled).temp_size_in_bytes / total,
        "compiled_bytes": cost["bytes accessed"] / total,
    }

    def call() -> None:
        nonlocal carry
        for _ in range(steps if mode == "step" else 1):
            carry = compiled(*carry, grads)
        jax.block_until_ready(carry)

    return call, facts


def measure(parameters: int, layout: str, mode: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender of a cell; `layout` is few arrays, or many of 128 x 128 (256 at most)."""
    arrays = LAYOUTS[layout](parameters)
    sizes = [max(parameters // arrays, 1)] * arrays
    steps, windows = max(1, UPDATES // parameters), WINDOWS[parameters]
    built = {name: contender(name, sizes, mode, steps) for name in ("none", "ema", *(f"ma-{w}" for w in windows))}
    for call, _ in built.values():
        for _ in range(-(-max(windows) // steps)):
            call()
    seconds = in_turn({name: call for name, (call, _) in built.items()}, rounds)
    place = {"parameters": sum(sizes), "layout": layout, "arrays": arrays, "mode": mode}
    return [
        {**place, "filter": name, "steps": steps, "seconds": spread(times / steps)}
        | {"ratio": spread(times / seconds["none"]), **built[name][1]}
        for name, times in seconds.items()
    ]


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, base = [], {}
    for row in result["rows"]:
        base = row if row["filter"] == "none" else base
        cell = {"parameters": f"{row['parameters']:,} in {row['arrays']} arrays"}
        cell |= {name: row[name] for name in ("mode", "filter")}
        cell |= {"ms per step": in_words(row["seconds"], ".3g", 1e3), "ratio to AdamW": in_words(row["ratio"], ".2f")}
        rows.append(cell | {"by compiled bytes": f"{row['compiled_bytes'] / base['compiled_bytes']:.2f}"})
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} rounds in turn; medians (quartiles)."
        f"\n\n{markdown(rows)}"
    )


def main(rounds: Count = 15, out: OutFile = OUT) -> None:
    """Time one update of AdamW alone and after each filter; the file is written after each cell.

    Args:
      rounds: Timed rounds; each contender is timed once per round.
      out: File for the results.
    """
    result = {**provenance(), "rounds": rounds, "rows": []}
    for parameters, layout, mode in itertools.product(WINDOWS, LAYOUTS, ("step", "scan")):
        result["rows"] += measure(parameters, layout, mode, rounds)
        write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.step_cost")
