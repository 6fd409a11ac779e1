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

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks import RESULTS, Count, Counts, OutFile, run_command
from examples.harness.files import provenance
from examples.harness.methods import Range
from examples.harness.tables import markdown
from grokfast_jax import grokfast_ema, grokfast_ma

from .accelerators import memory_of, update_step
from .timing import in_turn, in_words, ratios, spread, write

OUT = RESULTS / "step_cost.json"
MODEL_BYTES = {"none": 28, "ema": 36, "ma": 52}  # per parameter, float32, each array read and written once
LAYOUTS = {"few": lambda parameters: 4, "many": lambda parameters: min(max(parameters // 128**2, 1), 256)}


def contender(name: str, sizes: list[int], mode: str, steps: int) -> tuple[Callable[[], object], dict[str, float]]:
    """A call that runs `steps` updates to their end, and the bytes per parameter that it needs and moves.

    The contender is AdamW with the filter `name` before it: none, ema or ma-WINDOW.
    """
    kind, _, window = name.partition("-")
    make_filter = {"none": optax.identity, "ema": grokfast_ema, "ma": lambda: grokfast_ma(int(window))}[kind]
    tx = optax.chain(make_filter(), optax.adamw(1e-3))
    step = update_step(tx)

    def scan(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        # The gradient is scaled anew in each step, so that none of it can be precomputed.
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
        "temporary_bytes": memory_of(compiled).temp_size_in_bytes / total,
        "compiled_bytes": cost["bytes accessed"] / total,
        "model_bytes": MODEL_BYTES[kind],
    }

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


def measure(
    parameters: int, layout: str, mode: str, *, windows: Sequence[int], rounds: int, updates: int, memory: float
) -> list[dict[str, Any]]:
    """One row for each contender of a cell; `layout` is few arrays, or many of 128 x 128 (256 at most)."""
    arrays = LAYOUTS[layout](parameters)
    sizes = [max(parameters // arrays, 1)] * arrays
    steps = max(1, updates // parameters)
    place = {"parameters": sum(sizes), "layout": layout, "arrays": arrays, "mode": mode}
    gigabytes = {window: (window + 8) * 4 * parameters / 1e9 for window in windows}
    used = 2 * 7 * 4 * parameters / 1e9
    fitting, skipped = [], []
    for window, needed in gigabytes.items():
        if used + needed > memory:
            skipped.append({**place, "filter": f"ma-{window}", "left_out": f"needs {needed:.3g} GB"})
        else:
            used += needed
            fitting.append(window)
    built = {name: contender(name, sizes, mode, steps) for name in ("none", "ema", *(f"ma-{w}" for w in fitting))}
    for call, _ in built.values():
        for _ in range(-(-max(fitting, default=0) // steps)):
            call()
    seconds = in_turn({name: call for name, (call, _) in built.items()}, rounds)
    rows = []
    for name, (_, facts) in built.items():
        times = {"seconds": spread([v / steps for v in seconds[name]]), "ratio": ratios(seconds[name], seconds["none"])}
        rows.append({**place, "filter": name, "steps": steps, **times, **facts})
    return rows + skipped


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    titles = ("ms per step", "ratio to AdamW", "by compiled bytes", "if all was fused")
    rows, base = [], {}
    for row in result["rows"]:
        if "left_out" in row:
            texts = [f"left out: {row['left_out']}", "", "", ""]
        else:
            base = row if row["filter"] == "none" else base
            times = in_words(row["seconds"], ".3g", 1e3), in_words(row["ratio"], ".2f")
            texts = [*times, *(f"{row[kind] / base[kind]:.2f}" for kind in ("compiled_bytes", "model_bytes"))]
        cell = {"parameters": f"{row['parameters']:,} in {row['arrays']} arrays"}
        cell |= {name: row[name] for name in ("mode", "filter")}
        rows.append(cell | dict(zip(titles, texts, strict=True)))
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} rounds in turn; medians (quartiles). "
        f"A copy moves {in_words(result['copy_gb_per_second'], '.1f')} GB/s.\n\n{markdown(rows)}"
    )


def main(
    parameters: Counts = (400_000, 10_000_000, 100_000_000),
    windows: Counts = (10, 100, 1000),
    rounds: Count = 15,
    updates: Count = 60_000_000,
    memory: Annotated[float, Range("above 0", lambda gigabytes: gigabytes > 0)] = 8.0,
    out: OutFile = OUT,
) -> None:
    """Time one update of AdamW alone and behind each filter; the file is written after each cell.

    Args:
      parameters: Numbers of parameters.
      windows: Window sizes of the moving average.
      rounds: Timed rounds; each contender is timed once per round.
      updates: Parameters to update in each timing: the number of steps follows.
      memory: Gigabytes that the contenders of a cell may need together.
      out: File for the results.
    """
    result = {**provenance(), "rounds": rounds, "copy_gb_per_second": copy_bandwidth(rounds), "rows": []}
    for cell in itertools.product(parameters, LAYOUTS, ("step", "scan")):
        result["rows"] += measure(*cell, windows=windows, rounds=rounds, updates=updates, memory=memory)
        write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.step_cost")
