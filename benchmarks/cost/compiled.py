"""Optimizer updates, compiled for TPUs and an H100 that are not here: `python -m benchmarks.cost.compiled`.

Everything is read from programs that XLA compiled for the device. Nothing is executed or timed. The packages are
those of `tests/accelerators.txt`. Each update is of one matrix that is too large for the memory on a chip, with
parameters and state donated. Counted are kernels over whole arrays, separate copies of whole arrays, bytes per
parameter that the program reads from and writes to the main memory, and bytes per parameter of temporary arrays.

Then the update of a model of 8 billion parameters on 256 chips, 64 seeds in one vmapped program, and whole programs
of the mod-97 experiment, with their memory and the matrix products that are not in float32.
"""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.signal import butter

from benchmarks import RESULTS, OutFile, run_command
from examples.harness.experiment import Run
from examples.harness.tables import markdown
from examples.harness.train import Precision, program
from examples.modular import EXPERIMENT
from grokfast_jax import (
    amplify,
    ema,
    grokfast_ema,
    grokfast_ma,
    lfilter,
    moving_average,
    parallel,
    scale_by_filtered_adam,
    sosfilt,
)

from . import accelerators
from .accelerators import compiled, update_step
from .timing import versions, write

OUT = RESULTS / "compiled.json"
SIDE = 8192  # of the matrix
WINDOW = 100
# The ring buffer of a window of 100 is larger than the memory of most chips, so programs are compiled with a smaller
# one. Kernels and bytes are those of any window. The bytes of state are those of a window of 100.
COMPILED_WINDOW = 10
DTYPES = ("float32", "bfloat16")  # of the parameters
POD = "v5e:16x16"
POD_MESH = {"fsdp": 32, "tp": 8}
V5E_MEMORY = 16 * 2**30
SEEDS = 64
SIZES = {"124 M": 124e6, "1 B": 1e9, "8 B": 8e9}  # parameters, in the table of the filters' memory
# Compiled and tested, but not in the table for people.
HIDDEN = ("MA, bfloat16 buffer", "MA, stride 10", "MA, window axis -1", "lfilter, order 1", "gradient + 2 EMA in AdamW")
POD_OPTIMIZERS = ("AdamW", "EMA", "MA", "MA, stride 10, bfloat16 buffer")
FILTERS = ("EMA", "MA", "MA, stride 10", "MA, stride 10, bfloat16 buffer")  # in the table of their memory
PROGRAMS: list[tuple[str, Precision]] = [  # methods of the mod-97 experiment, and the precision of matrix products
    ("ema", "default"),
    *((method, "float32") for method in ("ema", "ma", "adam-third-decay", "adamw", "ma-adamw", "fastest")),
]

Tree = dict[str, tuple[tuple[int, ...], P]]  # shapes and shardings

# A model like Llama 3 8B, with its 32 layers stacked.
LLAMA: Tree = {
    "embedding": ((128_256, 4096), P("tp", "fsdp")),
    "query": ((32, 4096, 4096), P(None, "fsdp", "tp")),
    "key": ((32, 4096, 1024), P(None, "fsdp", "tp")),
    "value": ((32, 4096, 1024), P(None, "fsdp", "tp")),
    "output": ((32, 4096, 4096), P(None, "tp", "fsdp")),
    "gate": ((32, 4096, 14_336), P(None, "fsdp", "tp")),
    "up": ((32, 4096, 14_336), P(None, "fsdp", "tp")),
    "down": ((32, 14_336, 4096), P(None, "tp", "fsdp")),
    "norms": ((32, 2, 4096), P()),
    "final_norm": ((4096,), P()),
    "head": ((4096, 128_256), P("fsdp", "tp")),
}


def sections(order: int) -> optax.GradientTransformation:
    """A Butterworth low-pass filter."""
    design: Any = butter(order, 0.02, output="sos")
    return amplify(sosfilt(design), 2.0)


def optimizers(window: int = WINDOW) -> Mapping[str, optax.GradientTransformation]:
    """The compiled optimizers: AdamW alone, with a filter before or in it, and AdEMAMix, with its own slow EMA."""
    adamw, decay_and_scale = optax.adamw(1e-3), (optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))
    before = {
        "EMA": grokfast_ema(),
        "MA": grokfast_ma(window),
        "MA, bfloat16 buffer": grokfast_ma(window, buffer_dtype="bfloat16"),
        "MA, stride 10": grokfast_ma(100, stride=10),
        "MA, stride 10, bfloat16 buffer": grokfast_ma(100, stride=10, buffer_dtype="bfloat16"),
        "MA, window axis -1": grokfast_ma(window, window_axis=-1),
        "lfilter, order 1": amplify(lfilter([0.02], [1.0, -0.98]), 2.0),
        "lfilter, order 2": amplify(lfilter([0.01, 0.01], [1.0, -1.8, 0.82]), 2.0),
        "sosfilt, order 2": sections(2),
        "sosfilt, order 4": sections(4),
        "sosfilt, order 6": sections(6),
    }
    inside = {
        "EMA": ema(0.9, start="debiased"),
        "gradient + 2 EMA": parallel((1.0, optax.identity()), (2.0, ema(0.98))),
        "MA": moving_average(window),
    }
    return (
        {"AdamW": adamw, "AdEMAMix": optax.contrib.ademamix(1e-3)}
        | {label: optax.chain(lowpass, adamw) for label, lowpass in before.items()}
        | {f"{label} in AdamW": optax.chain(scale_by_filtered_adam(f), *decay_and_scale) for label, f in inside.items()}
    )


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def least_bytes(params: Any, state: Any) -> int:
    """Bytes that an update must move: gradient read, parameters and state read and written, one slot of a ring."""
    size = max(leaf.size for leaf in jax.tree.leaves(params))
    slots = lambda leaf: max(leaf.size // size, 1)
    return 3 * nbytes(params) + sum(2 * nbytes(leaf) // slots(leaf) for leaf in jax.tree.leaves(state))


def state_and_least(tx: optax.GradientTransformation, dtype: str) -> dict[str, float]:
    """Bytes per parameter of the state, and the least bytes that an update moves."""
    params = {"w": jax.ShapeDtypeStruct((SIDE, SIDE), dtype)}
    state = jax.eval_shape(tx.init, params)
    return {"state": round(nbytes(state) / SIDE**2, 2), "least": round(least_bytes(params, state) / SIDE**2, 2)}


def update(
    chip: str, label: str, dtype: str, *, window: int = COMPILED_WINDOW, rows: int = SIDE, **options: Any
) -> dict[str, float]:
    """Kernels and copies of the update of a matrix for a chip; bytes per parameter that it moves and needs."""
    tx, size = optimizers(window)[label], rows * SIDE
    params = {"w": jax.ShapeDtypeStruct((rows, SIDE), dtype)}
    arguments = params, jax.eval_shape(tx.init, params), params
    executable = compiled(chip, update_step(tx), *arguments, donate=(0, 1), **options)
    opcodes, memory = accelerators.operations(executable, size), accelerators.memory(executable)
    copies = sum(opcode.startswith("copy") for opcode in opcodes)
    return {
        "kernels": len(opcodes) - copies,
        "copies": copies,
        "bytes": round(accelerators.bytes_moved(executable) / size, 2),
        "temporary": round(memory.temp_size_in_bytes / size, 2),
    }


def odd_rows(chip: str) -> dict[str, float]:
    """Temporary bytes of the moving average over a matrix of 99 rows, which no tile of a TPU divides, by layout."""
    temporary = lambda **options: update(chip, "MA", "float32", window=WINDOW, rows=99, **options)["temporary"]
    chosen = Format(Layout.AUTO, accelerators.one_device(chip))
    return {
        "default layout": temporary(),
        "layout chosen by XLA": temporary(in_shardings=chosen, out_shardings=chosen),
    }


def pod_mesh(axis_type: AxisType) -> Mesh:
    """A mesh of the 256 chips of a v5e pod."""
    grid = np.array(accelerators.devices("TPU v5e", POD)).reshape(*POD_MESH.values())
    return Mesh(grid, tuple(POD_MESH), axis_types=(axis_type,) * len(POD_MESH))


def pod_update(label: str, tree: Tree = LLAMA, axis_type: AxisType = AxisType.Auto) -> dict[str, Any]:
    """What the update of a sharded tree in float32 is compiled to: collectives and bytes per chip."""
    tx = optimizers()[label]
    explicit, mesh = pod_mesh(AxisType.Explicit), pod_mesh(axis_type)
    with jax.set_mesh(explicit):  # with explicit axes, shapes have the sharding that `init` gives the state
        place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(explicit, spec))
        params = {name: place(*leaf) for name, leaf in tree.items()}
        arguments = params, jax.eval_shape(tx.init, params), params
    with jax.set_mesh(mesh):
        spec = lambda x: x.sharding.spec if x.sharding else P()
        move = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))
        executable = compiled("TPU v5e", update_step(tx), *jax.tree.map(move, arguments), donate=(0, 1))
    memory = accelerators.memory(executable)
    return {
        "parameters": nbytes(params) // 4,
        "collectives": accelerators.collectives(executable),
        "gigabytes": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary_gigabytes": round(memory.temp_size_in_bytes / 1e9, 3),
    }


def seeds(chip: str, side: int = 256, steps: int = 200) -> dict[str, float]:
    """What 64 runs with the moving average, from `init` to the last update, are compiled to as one program."""
    tx = optimizers()["MA"]

    def run(params: Any) -> Any:
        update = update_step(tx)
        step = lambda carry, _: (update(carry[0], carry[1], jax.tree.map(jnp.sin, carry[0])), None)
        return lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

    params = {"w": jax.ShapeDtypeStruct((SEEDS, side, side), jnp.float32)}
    executable = compiled(chip, jax.vmap(run), params)
    return {
        "scatters": accelerators.scatters(executable),
        "ring_gigabytes": round((WINDOW + 1) * nbytes(params) / 1e9, 3),
        "temporary_gigabytes": round(accelerators.memory(executable).temp_size_in_bytes / 1e9, 3),
    }


def whole_program(chip: str, run: Run, precision: Precision) -> dict[str, float]:
    """What a chunk of training is compiled to, evaluation included: memory, and products that are not in float32."""
    whole, key = program(run, precision=precision), jax.eval_shape(lambda: jax.random.key(0))
    (shared, own), state = jax.eval_shape(whole.draw, key), jax.eval_shape(whole.init, run.traced, key)
    executable = compiled(chip, whole.advance, run.traced, key, shared, own, state, donate=(4,))
    memory = accelerators.memory(executable)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "gigabytes": round((memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 1e9, 3),
        "rounded_products": accelerators.rounded_products(executable),
    }


def measure(chip: str) -> dict[str, Any]:
    """Everything about one chip; the sharded updates are for the v5e, the whole programs for it and the H100."""
    found: dict[str, Any] = {dtype: {label: update(chip, label, dtype) for label in optimizers()} for dtype in DTYPES}
    found |= {"odd_rows": odd_rows(chip), "seeds": seeds(chip)}
    if chip == "TPU v5e":
        found["pod"] = {label: pod_update(label) for label in POD_OPTIMIZERS}
    if chip in ("TPU v5e", "H100"):
        found["programs"] = {
            f"modular {method}, {precision}": whole_program(chip, EXPERIMENT.run(method), precision)
            for method, precision in PROGRAMS
        }
    return found


def common(values: dict[str, float]) -> str:
    """A number that most chips share, and the chips that differ."""
    (usual, _), *others = Counter(values.values()).most_common()
    differ = [f"{value:g} on {', '.join(chip for chip, v in values.items() if v == value)}" for value, _ in others]
    return "; ".join([f"{usual:g}", *differ])


def dtype_table(result: dict[str, Any], dtype: str) -> str:
    """One row for each optimizer, for parameters of a dtype."""
    rows = []
    for label in [label for label in result["state"][dtype] if label not in HIDDEN]:
        shared, by_chip = (
            result["state"][dtype][label],
            {c: found[dtype][label] for c, found in result["chips"].items()},
        )
        names = ("kernels", "bytes", "temporary")
        kernels, moved, temporary = (common({c: round(row[name], 1) for c, row in by_chip.items()}) for name in names)
        rows.append(
            {
                "optimizer": label,
                "kernels": kernels,
                "bytes moved": moved,
                "least bytes": f"{shared['least']:g}",
                "temporary bytes": temporary,
                "state bytes": f"{shared['state']:g}",
            }
        )
    return markdown(rows)


def table(result: dict[str, Any]) -> str:
    """The updates as Markdown."""
    versions = result["versions"]
    return (
        f"Compiled for {', '.join(result['chips'])}, not run; jax {versions['jax']}, libtpu {versions['libtpu']}. "
        f"Bytes are per parameter of a matrix of {SIDE:,} × {SIDE:,}; `MA` has a window of {WINDOW}. "
        f"Parameters in float32:\n\n{dtype_table(result, 'float32')}\nParameters in bfloat16:\n\n"
        f"{dtype_table(result, 'bfloat16')}"
    )


def pod_table(result: dict[str, Any]) -> str:
    """The sharded updates as Markdown."""
    pod = result["chips"]["TPU v5e"]["pod"]
    rows = [
        {
            "optimizer": label,
            "GB per chip": f"{row['gigabytes']:.3g}",
            "part of a chip's memory": f"{row['gigabytes'] * 1e9 / V5E_MEMORY:.0%}",
            "temporary GB": f"{row['temporary_gigabytes']:g}",
            "collectives": row["collectives"],
        }
        for label, row in pod.items()
    ]
    return (
        f"Compiled for {POD}, 256 TPU v5e of 16 GiB each, {pod['AdamW']['parameters'] / 1e9:.2f} billion parameters in "
        f"float32, divided over {' × '.join(f'{size} ({name})' for name, size in POD_MESH.items())}. "
        f"Parameters, gradients and state:\n\n{markdown(rows)}"
    )


def memory_table(result: dict[str, Any]) -> str:
    """The size of the filters' state by the number of parameters, as Markdown."""
    rows, state = [], result["state"]["float32"]
    for label in FILTERS:
        per_parameter = round(state[label]["state"] - state["AdamW"]["state"], 2)
        total = {name: count * per_parameter / 1e9 for name, count in SIZES.items()}
        cells = {f"{name} parameters": f"{gb:,.0f} GB" if gb >= 100 else f"{gb:.3g} GB" for name, gb in total.items()}
        rows.append({"filter": label, "bytes per parameter": f"{per_parameter:g}"} | cells)
    return markdown(rows)


def programs_table(result: dict[str, Any]) -> str:
    """The whole programs as Markdown."""
    rows: dict[str, dict[str, Any]] = {}
    for chip in ("TPU v5e", "H100"):
        for name, found in result["chips"][chip]["programs"].items():
            row = rows.setdefault(name, {"program, precision": name})
            row[f"{chip}: GB"] = f"{found['gigabytes']:g}"
            row[f"{chip}: products not in float32"] = found["rounded_products"]
    return markdown([*rows.values()])


def main(out: OutFile = OUT) -> None:
    """Compile every optimizer's update for every chip, and whole programs for two of them.

    Args:
      out: File for the results.
    """
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "optax")
    result: dict[str, Any] = {"versions": versions(packages, "-r tests/accelerators.txt")}
    result["state"] = {
        dtype: {label: state_and_least(tx, dtype) for label, tx in optimizers().items()} for dtype in DTYPES
    }
    os.environ["JAX_PLATFORMS"] = "cpu"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:  # one for each chip
        result["chips"] = dict(zip(accelerators.CHIPS, pool.map(measure, accelerators.CHIPS), strict=True))
    write(out, result)
    print(table(result), pod_table(result), memory_table(result), programs_table(result), sep="\n")


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.compiled")
