"""Arithmetic and time of each experiment, with one thread and with all: `python -m benchmarks.cost.tasks`.

Each task trains its default preset, evaluation included and compilation not. The arithmetic is that of the matrix
products (two operations per multiplication and addition) that the run executes, counted by a walk through the traced
program; all else is not counted. The machine's rate is that of one large product in the same process. A task whose data
cannot be had is left out.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.extend.core import Jaxpr, Literal

from examples.harness.config import find_experiment, task_names
from examples.harness.errors import UserError, plain_errors
from examples.harness.files import provenance, write_whole
from examples.harness.loop import evaluations
from examples.harness.tables import markdown
from examples.harness.train import Program, program

from .timing import in_turn, in_words, spread

OUT = Path(__file__).parents[1] / "results" / "tasks.json"
SIDE = 2048  # of the matrices whose product is the machine's rate


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time the five experiments, and count what they compute."""

    tasks: tuple[str, ...] = dataclasses.field(default_factory=lambda: tuple(task_names()))
    """Experiments: names that python -m examples lists, or importable modules with an EXPERIMENT."""
    threads: tuple[int, ...] = (1, os.cpu_count() or 1)
    """Numbers of threads of XLA's CPU client."""
    rounds: int = 10
    """Timed chunks of each task, and timed products."""
    data_dir: Path | None = None
    """Folder that holds the data files of the tasks, or a subfolder for each task; None downloads them once."""
    out: Path = OUT
    """File for the results."""


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


def with_data(name: str, data_dir: Path | None) -> tuple[Program, Any]:
    """The program and the hyperparameters of the default preset of a task; UserError if its data cannot be had."""
    config = find_experiment(name).base
    if "data_dir" not in config.flat() or data_dir is None:
        return program(config.task), config.hyper
    problems = []
    for folder in (data_dir, *sorted(filter(Path.is_dir, data_dir.iterdir()))):
        try:
            return program(config.replace(data_dir=folder).task), config.hyper
        except UserError as error:
            problems.append(error)
    raise problems[0]


def measure(arguments: Arguments, threads: int) -> list[dict[str, Any]]:
    """One row for each task, in a process that has so many threads."""
    x = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.dot)
    seconds = in_turn({"product": lambda: jax.block_until_ready(product(x, x))}, arguments.rounds)["product"]
    rate = spread([2 * SIDE**3 / 1e9 / value for value in seconds])
    rows: list[dict[str, Any]] = []
    for name in arguments.tasks:
        row = {"task": name, "threads": threads}
        try:
            compiled, hyper = with_data(name, arguments.data_dir)
        except UserError as error:
            rows.append({**row, "left_out": str(error).splitlines()[0]})
            continue
        key, steps = jax.random.key(0), compiled.task.steps
        gflop = matmul_flop(compiled.advance, hyper, key, *compiled.draw(key), compiled.init(hyper, key)) / 1e9 / steps
        records = evaluations(compiled, hyper, key)
        seconds = in_turn({name: lambda records=records: next(records)}, arguments.rounds)[name]
        per_step = spread([value / steps for value in seconds])
        share = gflop / per_step["median"] / rate["median"]
        rows.append({**row, "gflop": gflop, "seconds": per_step, "gflop_per_second": rate, "share": share})
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        {"task": row["task"], "threads": row["threads"]}
        | (
            {"GFLOP per step": "", "ms per step": f"left out: {row['left_out']}", "share of the matmul rate": ""}
            if "left_out" in row
            else {
                "GFLOP per step": f"{row['gflop']:.3g}",
                "ms per step": in_words(row["seconds"], ".3g", 1e3),
                "share of the matmul rate": f"{row['share']:.0%} of {row['gflop_per_second']['median']:.0f} GFLOP/s",
            }
        )
        for row in result["rows"]
    ]
    return (
        f"{result['device']}; jax {result['versions']['jax']}; {result['rounds']} chunks each, evaluation included; "
        f"medians (quartiles).\n\n{markdown(rows)}"
    )


def main(arguments: Arguments) -> None:
    """Measure in a fresh process for each number of threads."""
    rows = []
    for threads in arguments.threads:
        os.environ["PJRT_NPROC"] = str(threads)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows += pool.submit(measure, arguments, threads).result()
    result = {**provenance(), "rounds": arguments.rounds, "rows": rows}
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    sys.exit(plain_errors(lambda: main(tyro.cli(Arguments, prog="python -m benchmarks.cost.tasks"))))
