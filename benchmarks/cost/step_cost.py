"""What a filter adds to the time and memory of an optimizer update: `python -m benchmarks.cost.step_cost`.

AdamW alone and AdamW behind each filter take turns, on float32 parameters in few large and in many small arrays, as a
donated jitted step and as a `lax.scan`. Beside the times stand

- the bytes per parameter that must move if every array is read and written once: 28 for AdamW (gradient, two moments
  and parameter read; moments and parameter written), 36 with the EMA, 52 with the moving average (two sums read and
  written, one slot of the ring buffer written and one read);
- the bytes per parameter that the compiled program moves by XLA's own count: on a CPU it writes one array a loop, so a
  loop that needs the amplified gradient reads again what it is made of;
- the bandwidth of a plain copy on this machine.

Timing starts when all windows are full: a ring that has just been allocated is slower for its first updates. Cells
that need more memory than --memory are left out, and said to be.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import lax

from examples.harness.files import provenance, write_whole
from examples.harness.tables import markdown
from grokfast_jax import grokfast_ema, grokfast_ma

from .timing import in_turn, in_words, ratios, spread

OUT = Path(__file__).parents[1] / "results" / "step_cost.json"
MODEL_BYTES = {"none": 28, "ema": 36, "ma": 52}  # per parameter, float32, each array read and written once
SMALL_LEAF = 128 * 128


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time one update of AdamW alone and behind each filter."""

    parameters: tuple[int, ...] = (400_000, 10_000_000, 100_000_000)
    """Numbers of parameters."""
    windows: tuple[int, ...] = (10, 100, 1000)
    """Window sizes of the moving average."""
    rounds: int = 15
    """Timed rounds; each contender is timed once per round."""
    updates: int = 60_000_000
    """Parameters to update in each timing: the number of steps follows."""
    memory: float = 8.0
    """Gigabytes that the contenders of a cell may need together."""
    out: Path = OUT
    """File for the results."""


def leaf_shapes(parameters: int, layout: str) -> list[int]:
    """Sizes of the arrays: four large ones, or as many of 128 x 128 as there are parameters (256 at most)."""
    count = 4 if layout == "few" else min(max(parameters // SMALL_LEAF, 1), 256)
    return [parameters // count] * count


def transformation(name: str) -> optax.GradientTransformation:
    """AdamW behind the filter `name`: none, ema or ma-WINDOW."""
    kind, _, window = name.partition("-")
    adamw = optax.adamw(1e-3)
    if kind == "none":
        return adamw
    return optax.chain(grokfast_ema() if kind == "ema" else grokfast_ma(int(window)), adamw)


def make_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """One update of the parameters."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def make_scan(tx: optax.GradientTransformation, steps: int) -> Callable[..., Any]:
    """So many updates in one scan; the gradient is scaled anew in each, so that none of it can be precomputed."""
    step = make_step(tx)

    def scan(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        def body(carry: tuple[Any, Any], scale: jax.Array) -> tuple[tuple[Any, Any], None]:
            return step(*carry, jax.tree.map(lambda g: scale * g, grads)), None

        return lax.scan(body, (params, state), jnp.linspace(1.0, 1.1, steps))[0]

    return scan


def contender(name: str, sizes: list[int], mode: str, steps: int) -> tuple[Callable[[], object], dict[str, float]]:
    """A call that runs `steps` updates to their end, and the bytes per parameter that it needs and moves."""
    tx = transformation(name)
    params = {f"p{i}": jnp.full(size, 0.5) for i, size in enumerate(sizes)}
    grads = {f"p{i}": jnp.full(size, 1e-3) for i, size in enumerate(sizes)}
    state = jax.jit(tx.init)(params)
    compile_ = lambda function: jax.jit(function, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    one = compile_(make_step(tx))
    compiled = one if mode == "step" else compile_(make_scan(tx, steps))
    total, memory, cost = sum(sizes), compiled.memory_analysis(), one.cost_analysis()
    if memory is None or cost is None:
        raise RuntimeError(f"the backend {jax.default_backend()} tells no memory and cost of a compiled program")
    facts = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / total,
        "temporary_bytes": memory.temp_size_in_bytes / total,
        "compiled_bytes": cost["bytes accessed"] / total,
        "model_bytes": MODEL_BYTES[name.partition("-")[0]],
    }
    carry = params, state

    def call() -> None:
        nonlocal carry
        for _ in range(steps if mode == "step" else 1):
            carry = compiled(*carry, grads)
        jax.block_until_ready(carry)

    return call, facts


def copy_bandwidth(rounds: int) -> dict[str, float]:
    """Gigabytes per second, read and written, of adding 1 to an array of 400 MB in place."""
    x = jnp.zeros(100_000_000)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call() -> None:
        nonlocal x
        x = jax.block_until_ready(add(x))

    return spread([2 * x.nbytes / 1e9 / seconds for seconds in in_turn({"copy": call}, rounds)["copy"]])


def measure(arguments: Arguments, parameters: int, layout: str, mode: str) -> list[dict[str, Any]]:
    """One row for each contender of a cell."""
    names = ["none", "ema"]
    skipped = []
    used = 2 * 7 * 4 * parameters
    for window in arguments.windows:
        needed = (window + 8) * 4 * parameters
        if used + needed > arguments.memory * 1e9:
            skipped.append({"filter": f"ma-{window}", "left_out": f"needs {needed / 1e9:.3g} GB"})
        else:
            used += needed
            names.append(f"ma-{window}")
    sizes = leaf_shapes(parameters, layout)
    steps = max(1, arguments.updates // parameters)
    built = {name: contender(name, sizes, mode, steps) for name in names}
    longest = max((window for window in arguments.windows if f"ma-{window}" in names), default=0)
    for call, _ in built.values():
        for _ in range(-(-longest // steps)):
            call()
    seconds = in_turn({name: call for name, (call, _) in built.items()}, arguments.rounds)
    place = {"parameters": sum(sizes), "layout": layout, "arrays": len(sizes), "mode": mode}
    rows = [
        {
            **place,
            "filter": name,
            "steps": steps,
            "seconds": spread([value / steps for value in seconds[name]]),
            "ratio": ratios(seconds[name], seconds["none"]),
            **facts,
        }
        for name, (_, facts) in built.items()
    ]
    return rows + [{**place, **row} for row in skipped]


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, base = [], {}
    for row in result["rows"]:
        text = {
            "parameters": f"{row['parameters']:,} in {row['arrays']} arrays",
            "mode": row["mode"],
            "filter": row["filter"],
            "ms per step": f"left out: {row['left_out']}" if "left_out" in row else "",
            "ratio to AdamW": "",
            "by compiled bytes": "",
            "if all was fused": "",
        }
        if "left_out" not in row:
            base = row if row["filter"] == "none" else base
            text |= {
                "ms per step": in_words(row["seconds"], ".3g", 1e3),
                "ratio to AdamW": in_words(row["ratio"], ".2f"),
                "by compiled bytes": f"{row['compiled_bytes'] / base['compiled_bytes']:.2f}",
                "if all was fused": f"{row['model_bytes'] / base['model_bytes']:.2f}",
            }
        rows.append(text)
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} rounds in turn; medians (quartiles). "
        f"A copy moves {in_words(result['copy_gb_per_second'], '.1f')} GB/s.\n\n{markdown(rows)}"
    )


def main(arguments: Arguments) -> None:
    """Measure all cells and write the file after each."""
    result = {**provenance(), "rounds": arguments.rounds, "copy_gb_per_second": copy_bandwidth(arguments.rounds)}
    rows: list[dict[str, Any]] = []
    for parameters in arguments.parameters:
        for layout in ("few", "many"):
            for mode in ("step", "scan"):
                rows += measure(arguments, parameters, layout, mode)
                write_whole(arguments.out, json.dumps({**result, "rows": rows}, indent=1) + "\n")
    print(table({**result, "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.cost.step_cost"))
