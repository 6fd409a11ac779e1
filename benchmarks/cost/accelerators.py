"""Compile for an accelerator that is not here, and read the compiled program.

XLA's compilers for TPU and GPU run on any Linux machine without the device; the packages are in
`tests/accelerators.txt`. Nothing is executed. A process compiles for one kind of TPU, because libtpu reads its
environment once. Set JAX_PLATFORMS=cpu, or JAX looks for the devices.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPUS = {  # the smallest topology of each, and its type in the environment of libtpu
    "TPU v4": ("v4:2x2x1", "v4-8"),
    "TPU v5e": ("v5e:2x2", "v5litepod-4"),
    "TPU v5p": ("v5p:2x2x1", "v5p-8"),
    "TPU v6e": ("v6e:2x2", "v6e-4"),
    "TPU 7x": ("tpu7x:2x2x1", "tpu7x-8"),
}
CHIPS = (*TPUS, "H100")


@functools.cache
def devices(chip: str, topology: str | None = None) -> list[Any]:
    """The devices of a topology of `chip`, by default its smallest, to compile for."""
    if chip == "H100":
        options = {"topology_name": "h100", "topology": "1x1x1", "target_config": H100}
        return topologies.get_topology_desc(platform="cuda", **options).devices
    smallest, kind = TPUS[chip]
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=kind, TPU_WORKER_HOSTNAMES="localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile, without a TPU
    return topologies.get_topology_desc(platform="tpu", topology_name=topology or smallest).devices


def one_device(chip: str) -> SingleDeviceSharding:
    """The place of arrays of a program for one device."""
    return SingleDeviceSharding(devices(chip)[0])


def compiled(
    chip: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), **options: Any
) -> jax.stages.Compiled:
    """`function`, compiled for one device, or those of the arguments' shardings; options are of `jax.jit`."""
    if all(getattr(leaf, "sharding", None) is None for leaf in jax.tree.leaves(arguments)):
        options = {"in_shardings": one_device(chip)} | options
    traced = jax.jit(function, donate_argnums=donate, **options).trace(*arguments)
    return traced.lower(lowering_platforms=("tpu" if chip in TPUS else "cuda",)).compile()


def memory(program: jax.stages.Compiled) -> Any:
    """Bytes of a program's arguments, results and temporary arrays, per device."""
    return program.memory_analysis()


def update_step(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The optimizer's part of a training step: new parameters and state from parameters, state and gradients."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# An instruction: its name, results, opcode and operands.
INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)", re.MULTILINE)
SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
COLLECTIVE = re.compile(r" (?:all-gather|all-reduce|all-to-all|collective-[a-z]+|reduce-scatter)(?:-start)?\(")
PRODUCT = re.compile(r' (?:dot|convolution)\(|custom_call_target="__cublas')
EXACT = re.compile(r'operand_precision=\{highest,highest\}|"operand_precision":\["HIGHEST","HIGHEST"\]')


def operations(program: jax.stages.Compiled, size: int) -> list[str]:
    """The opcodes that are executed on whole arrays, those of at least `size` elements; loops are not looked into."""
    is_whole = lambda shape: math.prod(int(n) for n in shape.split(",") if n) >= size
    whole, found = set(), []
    text = program.as_text() or ""
    for name, results, opcode, operands in INSTRUCTION.findall(text[text.index("\nENTRY ") :]):
        if any(map(is_whole, SHAPE.findall(results))):
            whole.add(name)
        if opcode not in FREE and whole.intersection([name, *re.findall(r"%([\w.-]+)", operands)]):
            found.append(opcode)
    return found


def bytes_moved(program: jax.stages.Compiled) -> float:
    """Bytes that a program reads and writes by XLA's count; arrays in a memory on the chip, such as VMEM, count too."""
    # `cost_analysis()` of a program has the same number, but is empty for a GPU that is not here.
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    executable: Any = program.runtime_executable()
    (module,) = executable.hlo_modules()
    return _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)["bytes accessed"]


def collectives(program: jax.stages.Compiled) -> int:
    """The number of collective operations in a program."""
    return len(COLLECTIVE.findall(program.as_text() or ""))


def scatters(program: jax.stages.Compiled) -> int:
    """The number of scatters in a program; a TPU's are loops. One that became an update of a slice does not count."""
    return len(re.findall(r' scatter\(| while\(.*/scatter"', program.as_text() or ""))


def rounded_products(program: jax.stages.Compiled) -> int:
    """The number of matrix products that round float32 operands: to bfloat16 on a TPU, to TF32 on a GPU."""
    lines = [line for line in (program.as_text() or "").splitlines() if PRODUCT.search(line)]
    return sum(not EXACT.search(line) or "bf16[" in line for line in lines)
