"""Arithmetic and time of each experiment, with one thread and with all: `python -m benchmarks.cost.tasks`.

Each task trains its default preset, evaluation included and compilation not. The arithmetic is that of the matrix
products (two operations per multiplication and addition) that the run executes, counted by a walk through the traced
program; all else is not counted. The machine's rate is that of one large product in the same process. The rate for the
task's own shapes is that of its products, each timed alone with one thread, for several would have to wake at each. It
is left out where products are too small to be timed so, or where data decide which are executed. A task whose data
cannot be had is left out.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, Literal

from benchmarks import RESULTS, run_command
from examples.harness.config import find_experiment, task_names
from examples.harness.errors import UserError
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import program

from .timing import in_turn, in_words, spread, write

OUT = RESULTS / "tasks.json"
TASKS = tuple(task_names())
THREADS = (1, os.cpu_count() or 1)
CALL = 5e-5  # seconds; a product that takes less is measured with the call in it
SIDE = 2048  # of the matrices whose product is the machine's rate

Product = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]  # dimension numbers; shape and dtype of each operand


def matmul_flop(function: Any, *args: Any) -> float:
    """Operations of the matrix products that a jitted function executes for these arguments."""
    program = function.trace(*args).jaxpr
    count = jax.jit(lambda *leaves: _run(program.jaxpr, program.consts, *leaves)[0])
    return float(count(*jax.tree.leaves(args)))


def _run(jaxpr: Jaxpr, consts: Sequence[Any], *args: Any) -> tuple[jax.Array, list[Any]]:
    """The operations of the matrix products of a program, which is executed, and its outputs."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda variable: variable.val if isinstance(variable, Literal) else values[variable]
    total = jnp.zeros((), jnp.float32)
    for eqn in jaxpr.eqns:
        inputs, params, flop = [read(variable) for variable in eqn.invars], eqn.params, 0.0
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = params["dimension_numbers"]
                outputs = [eqn.primitive.bind(*inputs, **params)]
                flop = 2.0 * np.prod([inputs[0].shape[axis] for axis in contracted]) * outputs[0].size
            case "scan":
                split = params["num_consts"], params["num_consts"] + params["num_carry"]
                fixed, carry, rows = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]

                def step(carry: Any, row: Any, inner: Any = inner, fixed: Any = fixed) -> Any:
                    flop, outputs = _run(inner.jaxpr, inner.consts, *fixed, *carry[1], *row)
                    return (carry[0] + flop, outputs[: len(carry[1])]), outputs[len(carry[1]) :]

                zero = jnp.zeros((), jnp.float32)
                size, reverse = params["length"], params["reverse"]
                (flop, carry), rows = lax.scan(step, (zero, carry), rows, size, reverse)
                outputs = [*carry, *rows]
            case "cond":
                branches = [functools.partial(_run, branch.jaxpr, branch.consts) for branch in params["branches"]]
                flop, outputs = lax.switch(inputs[0], branches, *inputs[1:])
            case _ if inner is not None:  # a function that is called, with its constants or without
                flop, outputs = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), *inputs)
            case name:
                if "dot_general" in str(params):
                    raise NotImplementedError(f"the matrix products within {name} are not counted")
                bound = eqn.primitive.bind(*inputs, **params)
                outputs = bound if eqn.primitive.multiple_results else [bound]
        total += flop
        values.update(zip(eqn.outvars, outputs, strict=True))
    return total, [read(variable) for variable in jaxpr.outvars]


def products(jaxpr: Any, times: int = 1) -> Counter[Product]:
    """How often a program executes each matrix product of some dimension numbers, shapes and dtypes."""
    found: Counter[Product] = Counter()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if name == "dot_general":
            operands = tuple((variable.aval.shape, str(variable.aval.dtype)) for variable in eqn.invars)
            found[params["dimension_numbers"], operands] += times
        elif inner is not None and name != "while":
            found += products(getattr(inner, "jaxpr", inner), times * (params["length"] if name == "scan" else 1))
        elif "dot_general" in str(params):
            raise NotImplementedError(f"how often the matrix products within {name} are executed depends on data")
    return found


def products_seconds(counts: Counter[Product], rounds: int) -> float | None:
    """Seconds of all these products, each timed alone, by their medians; None if many are too small to be timed."""
    medians = {}
    for numbers, shapes in counts:
        operands = [jax.random.normal(jax.random.key(i), *shape) for i, shape in enumerate(shapes)]
        jitted = jax.jit(functools.partial(lax.dot_general, dimension_numbers=numbers))
        call = lambda jitted=jitted, operands=operands: jax.block_until_ready(jitted(*operands))
        medians[numbers, shapes] = spread(in_turn({"product": call}, rounds)["product"])["median"]
    total = sum(count * medians[product] for product, count in counts.items())
    small = sum(count * medians[product] for product, count in counts.items() if medians[product] < CALL)
    return total if small < 0.1 * total else None


def measure(tasks: Sequence[str], threads: int, rounds: int, data_dir: Path | None) -> list[dict[str, Any]]:
    """One row for each task, in a process that has so many threads."""
    x = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.dot)
    seconds = in_turn({"product": lambda: jax.block_until_ready(product(x, x))}, rounds)["product"]
    rate = spread([2 * SIDE**3 / 1e9 / value for value in seconds])
    rows: list[dict[str, Any]] = []
    for name in tasks:
        config, row = find_experiment(name).base, {"task": name, "threads": threads}
        if data_dir is not None and "data_dir" in config.flat():
            config = config.replace(data_dir=data_dir / name if (data_dir / name).is_dir() else data_dir)
        try:
            compiled = program(config.task)
        except UserError as error:
            rows.append({**row, "left_out": str(error).splitlines()[0]})
            continue
        hyper, key, steps = config.hyper, jax.random.key(0), config.task.steps
        args, advance = (hyper, key, *compiled.draw(key), compiled.init(hyper, key)), cast(Any, compiled.advance)
        gflop = matmul_flop(advance, *args) / 1e9 / steps
        records = evaluations(compiled, hyper, key)
        seconds = in_turn({name: lambda records=records: next(records)}, rounds)[name]
        per_step = spread([value / steps for value in seconds])
        share = gflop / per_step["median"] / rate["median"]
        row |= {"gflop": gflop, "seconds": per_step, "gflop_per_second": rate, "share": share}
        with contextlib.suppress(NotImplementedError):
            counts = products(advance.trace(*args).jaxpr.jaxpr)
            if threads == 1 and (alone := products_seconds(counts, rounds)):
                row["share_of_own_shapes"] = alone / steps / per_step["median"]
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for row in result["rows"]:
        flop, time, share, own = "", f"left out: {row.get('left_out')}", "", ""
        if "left_out" not in row:
            flop, time = f"{row['gflop']:.3g}", in_words(row["seconds"], ".3g", 1e3)
            share = f"{row['share']:.0%} of {row['gflop_per_second']['median']:.0f} GFLOP/s"
            own = f"{row['share_of_own_shapes']:.0%}" if row.get("share_of_own_shapes") else ""
        texts = {"GFLOP per step": flop, "ms per step": time, "share of the matmul rate": share, "for its shapes": own}
        rows.append({"task": row["task"], "threads": row["threads"], **texts})
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} chunks each, evaluation included; "
        f"medians (quartiles).\n\n{markdown(rows)}"
    )


def main(
    tasks: tuple[str, ...] = TASKS,
    threads: tuple[int, ...] = THREADS,
    rounds: int = 10,
    data_dir: Path | None = None,
    out: Path = OUT,
) -> None:
    """Time the experiments, and count what they compute, in a fresh process for each number of threads.

    Args:
      tasks: Experiments: names that python -m examples lists, or importable modules with an EXPERIMENT.
      threads: Numbers of threads of XLA's CPU client.
      rounds: Timed chunks of each task, and timed products.
      data_dir: Folder that holds the data files, those of a task in the subfolder of its name if there is one; None
        downloads them once.
      out: File for the results.
    """
    rows = []
    for count in threads:
        os.environ["PJRT_NPROC"] = str(count)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(measure, tasks, count, rounds, data_dir).result()
    result = {**provenance(), "rounds": rounds, "rows": rows}
    write(out, result)
    print(table(result))


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.tasks")
