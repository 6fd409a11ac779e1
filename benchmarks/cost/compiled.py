"""Optimizer updates, compiled for TPUs and an H100 that are not here: `python -m benchmarks.cost.compiled`.

Everything is read from programs that XLA compiled for the device. Nothing is executed or timed. The packages are
those of `tests/accelerators.txt`. Each update is of one matrix that is too large for the memory on a chip, with
parameters and state donated. Counted are

- kernels over whole arrays, and separate copies of whole arrays;
- bytes per parameter that these read from and write to the main memory;
- the least bytes per parameter: gradient read once, parameter and state read and written once, and of a ring buffer one
  slot read and one written;
- bytes per parameter of the state, and of temporary arrays.

Then the update of a model of 8 billion parameters on 256 chips, 64 seeds in one vmapped program, and the whole programs
of two experiments, with their memory and the matrix products that are not in float32.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.signal import butter

from benchmarks import RESULTS, DataDir, OutFile, run_command
from examples.harness.experiment import Run, find_experiment
from examples.harness.methods import Range
from examples.harness.tables import markdown
from examples.harness.train import Precision, program
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

from .accelerators import (
    CHIPS,
    Program,
    collectives,
    compiled,
    devices,
    memory_of,
    one_device,
    placed,
    rounded_products,
    scatters,
    update_step,
)
from .tasks import default_run
from .timing import versions, write

Chips = Annotated[
    tuple[str, ...], Range(f"of {', '.join(CHIPS)}", lambda chips: bool(chips) and CHIPS.keys() >= set(chips))
]
OUT = RESULTS / "compiled.json"
SIDE = 8192  # of the matrix
WINDOW = 100
# The ring buffer of a window of 100 is larger than the memory of most chips, so programs are compiled with a smaller
# one. Kernels and bytes are those of any window. The bytes of state are those of a window of 100.
COMPILED_WINDOW = 10
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
POD = "v5e:16x16"
POD_MESH = {"fsdp": 32, "tp": 8}
V5E_MEMORY = 16 * 2**30
SEEDS = 64
SIZES = {"124 M": 124e6, "1 B": 1e9, "8 B": 8e9}  # parameters, in the table of the filters' memory


def before_adamw(lowpass: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW with a filter before it."""
    return optax.chain(lowpass, optax.adamw(1e-3))


def in_adamw(lowpass: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW with a filter in place of its first moment."""
    scaled = scale_by_filtered_adam(lowpass)
    return optax.chain(scaled, optax.add_decayed_weights(1e-4), optax.scale_by_learning_rate(1e-3))


def sections(order: int) -> optax.GradientTransformation:
    """A Butterworth low-pass filter."""
    design: Any = butter(order, 0.02, output="sos")
    return amplify(sosfilt(design), 2.0)


OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {  # of the window
    "AdamW": lambda window: optax.adamw(1e-3),
    "NAdamW": lambda window: optax.nadamw(1e-3),
    "AdEMAMix": lambda window: optax.contrib.ademamix(1e-3),
    "Muon": lambda window: optax.contrib.muon(1e-3),
    "EMA": lambda window: before_adamw(grokfast_ema()),
    "MA": lambda window: before_adamw(grokfast_ma(window)),
    "MA, bfloat16 buffer": lambda window: before_adamw(grokfast_ma(window, buffer_dtype="bfloat16")),
    "MA, float8 buffer": lambda window: before_adamw(grokfast_ma(window, buffer_dtype="float8_e4m3fn")),
    "MA, stride 10": lambda window: before_adamw(grokfast_ma(100, stride=10)),
    "MA, stride 10, bfloat16 buffer": lambda window: before_adamw(grokfast_ma(100, stride=10, buffer_dtype="bfloat16")),
    "MA, window axis -1": lambda window: before_adamw(grokfast_ma(window, window_axis=-1)),
    "lfilter, order 1": lambda window: before_adamw(amplify(lfilter([0.02], [1.0, -0.98]), 2.0)),
    "lfilter, order 2": lambda window: before_adamw(amplify(lfilter([0.01, 0.01], [1.0, -1.8, 0.82]), 2.0)),
    "sosfilt, order 2": lambda window: before_adamw(sections(2)),
    "sosfilt, order 4": lambda window: before_adamw(sections(4)),
    "sosfilt, order 6": lambda window: before_adamw(sections(6)),
    "EMA in AdamW": lambda window: in_adamw(ema(0.9, start="debiased")),
    "gradient + 2 EMA in AdamW": lambda window: in_adamw(parallel((1.0, optax.identity()), (2.0, ema(0.98)))),
    "MA in AdamW": lambda window: in_adamw(moving_average(window)),
}
SHOWN = (  # in the tables for people
    "AdamW",
    "AdEMAMix",
    "EMA",
    "MA",
    "MA, stride 10, bfloat16 buffer",
    "lfilter, order 2",
    "sosfilt, order 2",
    "sosfilt, order 4",
    "sosfilt, order 6",
    "EMA in AdamW",
    "MA in AdamW",
    "Muon",
)
POD_OPTIMIZERS = ("AdamW", "EMA", "MA", "MA, stride 10, bfloat16 buffer")
PROGRAMS: dict[str, list[tuple[str, Precision]]] = {  # methods, and the precision of matrix products
    "modular": [
        ("ema", "default"),
        *((method, "float32") for method in ("ema", "ma", "adam-third-decay", "adamw", "ma-adamw", "fastest")),
    ],
    "mnist": [("paper", "float32"), ("decay-only", "float32")],
}
FILTERS = ("EMA", "MA", "MA, stride 10", "MA, stride 10, bfloat16 buffer")  # in the table of their memory


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def least_bytes(params: Any, state: Any) -> int:
    """Bytes that an update must move: gradient read, parameters and state read and written, one slot of a ring."""
    size = max(leaf.size for leaf in jax.tree.leaves(params))
    slots = lambda leaf: max(leaf.size // size, 1)
    return 3 * nbytes(params) + sum(2 * nbytes(leaf) // slots(leaf) for leaf in jax.tree.leaves(state))


def state_and_least(label: str, dtype: jax.typing.DTypeLike) -> dict[str, float]:
    """Bytes per parameter of the state with the full window, and the least bytes that an update moves."""
    params = {"w": jax.ShapeDtypeStruct((SIDE, SIDE), dtype)}
    state = jax.eval_shape(OPTIMIZERS[label](WINDOW).init, params)
    return {"state": round(nbytes(state) / SIDE**2, 2), "least": round(least_bytes(params, state) / SIDE**2, 2)}


def update(
    chip: str,
    label: str,
    dtype: jax.typing.DTypeLike,
    *,
    window: int = COMPILED_WINDOW,
    rows: int = SIDE,
    layout: Layout | None = None,
) -> dict[str, float]:
    """Kernels and copies of the update of a matrix for a chip; bytes per parameter that it moves and needs.

    `layout` is of all arrays, by default the chip's own.
    """
    tx, params = OPTIMIZERS[label](window), {"w": jax.ShapeDtypeStruct((rows, SIDE), dtype)}
    arguments = placed((params, jax.eval_shape(tx.init, params), params), one_device(chip))
    place = {} if layout is None else dict.fromkeys(("in_shardings", "out_shardings"), Format(layout, one_device(chip)))
    executable = compiled(update_step(tx), *arguments, donate=(0, 1), **place)
    program = Program(executable, rows * SIDE)
    return {
        "kernels": len(program.kernels()),
        "copies": len(program.moves()),
        "bytes": round(program.bytes() / (rows * SIDE), 2),
        "temporary": round(memory_of(executable).temp_size_in_bytes / (rows * SIDE), 2),
    }


def odd_rows(chip: str, layout: Layout | None) -> dict[str, float]:
    """The moving average over a matrix of 99 rows, which no tile of a TPU divides."""
    return update(chip, "MA", jnp.float32, window=WINDOW, rows=99, layout=layout)


def llama(vocabulary: int = 128_256, hidden: int = 14_336) -> dict[str, tuple[tuple[int, ...], P]]:
    """Shapes and shardings of a model like Llama 3 8B, whose 32 layers are stacked."""
    layers, width, key_value = 32, 4096, 1024
    return {
        "embedding": ((vocabulary, width), P("tp", "fsdp")),
        "query": ((layers, width, width), P(None, "fsdp", "tp")),
        "key": ((layers, width, key_value), P(None, "fsdp", "tp")),
        "value": ((layers, width, key_value), P(None, "fsdp", "tp")),
        "output": ((layers, width, width), P(None, "tp", "fsdp")),
        "gate": ((layers, width, hidden), P(None, "fsdp", "tp")),
        "up": ((layers, width, hidden), P(None, "fsdp", "tp")),
        "down": ((layers, hidden, width), P(None, "tp", "fsdp")),
        "norms": ((layers, 2, width), P()),
        "final_norm": ((width,), P()),
        "head": ((width, vocabulary), P("fsdp", "tp")),
    }


def uneven() -> dict[str, tuple[tuple[int, ...], P]]:
    """Shapes that the mesh does not divide evenly, so that each array is sharded where it can be, or not at all."""
    return {
        "embedding": ((50_257, 1600), P(None, "fsdp")),
        "both": ((1600, 6400), P(None, ("fsdp", "tp"))),
        "one": ((1600, 4808), P("fsdp", "tp")),
        "odd": ((1601, 4801), P()),
        "vector": ((25, 64), P(None, "tp")),
        "scalar": ((), P()),
    }


def pod_mesh(axis_type: AxisType) -> Mesh:
    """A mesh of the 256 chips of a v5e pod."""
    grid = np.array(devices("TPU v5e", POD)).reshape(*POD_MESH.values())
    return Mesh(grid, tuple(POD_MESH), axis_types=(axis_type,) * len(POD_MESH))


def sharded_arguments(
    tx: optax.GradientTransformation, tree: dict[str, tuple[tuple[int, ...], P]], mesh: Mesh
) -> tuple[Any, Any, Any]:
    """Parameters, state and gradients in float32; the state is sharded as the parameters, a ring's slots are whole."""
    struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    params = {name: struct(shape, jnp.float32, spec) for name, (shape, spec) in tree.items()}

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        shape, spec = tree.get(getattr(path[-1], "key", ""), ((), P()))
        return struct(leaf.shape, leaf.dtype, P(*(None,) * (leaf.ndim - len(shape)), *spec))

    state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
    return params, state, params


def pod_update(label: str, tree: Any, axis_type: AxisType) -> dict[str, Any]:
    """What the update of a sharded tree is compiled to: collectives and bytes per chip."""
    tx = OPTIMIZERS[label](WINDOW)
    mesh = pod_mesh(axis_type)
    with jax.set_mesh(mesh):
        arguments = sharded_arguments(tx, tree, mesh)
        executable = compiled(update_step(tx), *arguments, donate=(0, 1))
    memory = memory_of(executable)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(arguments[0])),
        "collectives": len(collectives(executable)),
        "gigabytes": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary_gigabytes": round(memory.temp_size_in_bytes / 1e9, 3),
    }


def seeds(chip: str, side: int = 256, steps: int = 200) -> dict[str, float]:
    """What 64 runs with the moving average, from `init` to the last update, are compiled to as one program."""
    tx = before_adamw(grokfast_ma(WINDOW))

    def run(params: Any) -> Any:
        update = update_step(tx)
        step = lambda carry, _: (update(carry[0], carry[1], jax.tree.map(jnp.sin, carry[0])), None)
        return lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

    params = {"w": jax.ShapeDtypeStruct((SEEDS, side, side), jnp.float32)}
    executable = compiled(jax.vmap(run), *placed([params], one_device(chip)))
    ring = (WINDOW + 1) * nbytes(params)
    return {
        "scatters": scatters(executable),
        "ring_copies": len(Program(executable, ring // 4).moves()),
        "ring_gigabytes": round(ring / 1e9, 3),
        "temporary_gigabytes": round(memory_of(executable).temp_size_in_bytes / 1e9, 3),
    }


def whole_program(chip: str, run: Run, precision: Precision) -> dict[str, float]:
    """What a chunk of training is compiled to, evaluation included: memory, and products that are not in float32."""
    whole, key = program(run, precision=precision), jax.random.key(0)
    (shared, own), state = jax.eval_shape(whole.draw, key), jax.eval_shape(whole.init, run.traced, key)
    arguments = placed((run.traced, key, shared, own, state), one_device(chip))
    executable = compiled(whole.advance, *arguments, donate=(4,))
    memory = memory_of(executable)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "gigabytes": round((memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 1e9, 3),
        "rounded_products": len(rounded_products(executable)),
    }


def measure_programs(chip: str, data_dir: Path | None) -> dict[str, Any]:
    """Chunks of training, with float32 products or the default precision."""
    return {
        f"{task} {method}, {precision}": whole_program(
            chip, default_run(find_experiment(task), data_dir, method), precision
        )
        for task, methods in PROGRAMS.items()
        for method, precision in methods
    }


def measure_chip(chip: str) -> dict[str, Any]:
    """Everything about one chip."""
    layouts = {"default layout": None, "layout chosen by XLA": Layout.AUTO}
    updates = {name: {label: update(chip, label, dtype) for label in OPTIMIZERS} for name, dtype in DTYPES.items()}
    odd = {name: odd_rows(chip, layout) for name, layout in layouts.items()}
    return {**updates, "odd_rows": odd, "seeds": seeds(chip)}


def measure_pod(chip: str) -> dict[str, Any]:
    """The sharded updates."""
    return {
        f"{tree_name}, {axes} axes": {label: pod_update(label, tree, axis_type) for label in POD_OPTIMIZERS}
        for axes, axis_type in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit))
        for tree_name, tree in (("llama", llama()), ("uneven", uneven()))
    }


def alone(function: Callable[[str], dict[str, Any]], chips: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The results of `function`, of each chip in a process of its own."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return dict(zip(chips, pool.map(function, chips), strict=True))


def common(values: dict[str, float]) -> str:
    """A number that most chips share, and the chips that differ."""
    (usual, _), *others = Counter(values.values()).most_common()
    differ = [f"{value:g} on {', '.join(chip for chip, v in values.items() if v == value)}" for value, _ in others]
    return "; ".join([f"{usual:g}", *differ])


def dtype_table(result: dict[str, Any], dtype: str) -> str:
    """One row for each optimizer, for parameters of a dtype."""
    rows = []
    for label in SHOWN:
        by_chip = {chip: found[dtype][label] for chip, found in result["chips"].items()}
        names = ("kernels", "bytes", "temporary")
        kernels, moved, temporary = (common({c: round(row[key], 1) for c, row in by_chip.items()}) for key in names)
        shared = result["state"][dtype][label]
        rows.append(
            {
                "optimizer": label,
                "kernels": kernels,
                "bytes moved": moved,
                "least bytes": f"{shared['least']:g}" if label != "Muon" else "",
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
    rows = []
    for label, row in result["pod"]["llama, auto axes"].items():
        rows.append(
            {
                "optimizer": label,
                "GB per chip": f"{row['gigabytes']:.3g}",
                "part of a chip's memory": f"{row['gigabytes'] * 1e9 / V5E_MEMORY:.0%}",
                "temporary GB": f"{row['temporary_gigabytes']:g}",
                "collectives": f"{sum(rows_[label]['collectives'] for rows_ in result['pod'].values())}",
            }
        )
    count = result["pod"]["llama, auto axes"]["AdamW"]["parameters"]
    return (
        f"Compiled for {POD}, 256 TPU v5e of 16 GiB each, {count / 1e9:.2f} billion parameters in float32, divided "
        f"over {' × '.join(f'{size} ({name})' for name, size in POD_MESH.items())}. Parameters, gradients and "
        f"state:\n\n"
        f"{markdown(rows)}"
    )


def memory_table(result: dict[str, Any]) -> str:
    """Gigabytes of the filters' state by the number of parameters, as Markdown."""
    rows, state = [], result["state"]["float32"]
    for label in FILTERS:
        per_parameter = round(state[label]["state"] - state["AdamW"]["state"], 2)
        total = {name: count * per_parameter / 1e9 for name, count in SIZES.items()}
        cells = {f"{name} parameters": f"{gb:,.0f} GB" if gb >= 100 else f"{gb:.3g} GB" for name, gb in total.items()}
        rows.append({"filter": label, "bytes per parameter": f"{per_parameter:g}"} | cells)
    return markdown(rows)


def programs_table(result: dict[str, Any]) -> str:
    """The whole programs as Markdown."""
    rows = []
    for name in next(iter(result["programs"].values())):
        row = {"program, precision": name}
        for chip, found in result["programs"].items():
            row[f"{chip}: GB"] = f"{found[name]['gigabytes']:g}"
            row[f"{chip}: products not in float32"] = str(found[name]["rounded_products"])
        rows.append(row)
    return markdown(rows)


def main(chips: Chips = tuple(CHIPS), data_dir: DataDir = None, out: OutFile = OUT) -> None:
    """Compile every optimizer's update for every chip, and whole programs for two of them.

    Args:
      chips: Names of the chips.
      data_dir: Folder with the four files of MNIST, or with a folder mnist that has them; None downloads them once.
      out: File for the results.
    """
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "optax")
    result = {
        "versions": versions(packages, "-r tests/accelerators.txt"),
        "state": {
            name: {label: state_and_least(label, dtype) for label in OPTIMIZERS} for name, dtype in DTYPES.items()
        },
        "chips": alone(measure_chip, chips),
        "pod": alone(measure_pod, ["TPU v5e"])["TPU v5e"],
        "programs": alone(functools.partial(measure_programs, data_dir=data_dir), ["TPU v5e", "H100"]),
    }
    write(out, result)
    print(table(result), pod_table(result), memory_table(result), programs_table(result), sep="\n")


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.compiled")
