"""Compile for an accelerator that is not here, and read the compiled program.

XLA's compilers for TPU and GPU run on any Linux machine without the device; the packages are in
`tests/accelerators.txt`. Nothing is executed. A process compiles for one kind of TPU, because libtpu reads its
environment once. Set JAX_PLATFORMS=cpu, or JAX looks for the devices.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


class Chip(NamedTuple):
    """An accelerator as its compiler knows it."""

    platform: str  # "tpu" or "cuda"
    topology: str  # name of the smallest topology
    kind: str  # TPU: accelerator type in libtpu's environment; CUDA: description of the device


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
CHIPS = {
    "TPU v4": Chip("tpu", "v4:2x2x1", "v4-8"),
    "TPU v5e": Chip("tpu", "v5e:2x2", "v5litepod-4"),
    "TPU v5p": Chip("tpu", "v5p:2x2x1", "v5p-8"),
    "TPU v6e": Chip("tpu", "v6e:2x2", "v6e-4"),
    "TPU 7x": Chip("tpu", "tpu7x:2x2x1", "tpu7x-8"),
    "H100": Chip("cuda", "1x1x1", H100),
}


@functools.cache
def devices(chip: str, topology: str | None = None) -> list[Any]:
    """The devices of a topology of `chip`, by default its smallest, to compile for.

    Raises:
      RuntimeError: The compiler is not installed.
    """
    platform, smallest, kind = CHIPS[chip]
    if platform == "cuda":
        options = {"topology_name": "h100", "topology": topology or smallest, "target_config": kind}
    else:
        options = {"topology_name": topology or smallest}
        os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=kind, TPU_WORKER_HOSTNAMES="localhost")
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile; none of them has a TPU
    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:
        raise RuntimeError(f"no compiler for {chip}; pip install -r tests/accelerators.txt") from error


def one_device(chip: str) -> SingleDeviceSharding:
    """The place of arrays of a program for one device."""
    return SingleDeviceSharding(devices(chip)[0])


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes and dtypes of `tree`, all with one sharding."""
    shapes = jax.eval_shape(lambda tree: tree, tree)  # of arrays and numbers, too
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def compiled(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), **options: Any
) -> jax.stages.Compiled:
    """`function`, compiled for the devices of the shardings of its abstract arguments; options are of `jax.jit`."""
    sharding = next(leaf.sharding for leaf in jax.tree.leaves(arguments) if leaf.sharding is not None)
    platform = "tpu" if next(iter(sharding.device_set)).platform == "tpu" else "cuda"
    traced = jax.jit(function, donate_argnums=donate, **options).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).compile()


def memory_of(program: jax.stages.Compiled) -> Any:
    """Bytes of a program's arguments, results and temporary arrays, per device."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("the compiler reports no memory of this program")
    return memory


def update_step(tx: optax.GradientTransformation) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The optimizer's part of a training step: new parameters and state from parameters, state and gradients."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Array(NamedTuple):
    """A result of an instruction."""

    size: int  # elements
    bytes: int
    on_chip: bool  # in a memory on the chip, such as a TPU's VMEM


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    name: str
    opcode: str
    results: list[Array]
    operands: list[str]
    attributes: str
    is_root: bool


LINE = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
ARRAY = re.compile(r"([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\](\{[^}]*\})?")
COLLECTIVE = re.compile(
    r" ((?:all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?)\("
)
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
# Within a fusion, what stands between an operand and the slice of it; a fusion there is a change of layout on the fly.
RENAMES = ("bitcast", "bitcast-convert", "convert", "copy", "fusion", "reshape", "transpose")
PRODUCT = re.compile(r' (?:dot|convolution)\(|custom_call_target="__cublas')
EXACT = re.compile(r'operand_precision=\{highest,highest\}|"operand_precision":\["HIGHEST","HIGHEST"\]')


def collectives(program: jax.stages.Compiled) -> list[str]:
    """The collective operations of a program."""
    return COLLECTIVE.findall(program.as_text() or "")


def scatters(program: jax.stages.Compiled) -> int:
    """The number of scatters in a program; a TPU's are loops. One that became an update of a slice does not count."""
    return len(re.findall(r' scatter\(| while\(.*/scatter"', program.as_text() or ""))


def rounded_products(program: jax.stages.Compiled) -> list[str]:
    """The lines with matrix products that round float32 operands: to bfloat16 on a TPU, to TF32 on a GPU."""
    lines = (line for line in (program.as_text() or "").splitlines() if PRODUCT.search(line))
    return [line.strip() for line in lines if not EXACT.search(line) or "bf16[" in line]


class Program:
    """A compiled program, read from its text.

    Counted are instructions on whole arrays, those of at least `size` elements. Bytes are those that must come from or
    go to the main memory: a slice that is read or updated in place counts as the slice.
    """

    def __init__(self, program: jax.stages.Compiled, size: int):
        self.size = size
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = name = ""
        for line in (program.as_text() or "").splitlines():
            if start := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                name = start[2]
                self.computations[name] = {}
                self.entry = name if start[1] else self.entry
            elif (match := LINE.match(line)) and self.computations:
                root, key, results, opcode, operands, attributes = match.groups()
                self.computations[name][key] = Instruction(
                    key,
                    opcode,
                    [_array(*found) for found in ARRAY.findall(results)],
                    re.findall(r"%([\w.-]+)", operands) if opcode != "parameter" else [operands],
                    attributes,
                    bool(root),
                )

    def kernels(self) -> list[str]:
        """Names of the kernels over whole arrays; those of a loop once per turn, if the program has their number."""
        return [i.name for i, _ in self._executed() if not _is_move(i.opcode)]

    def moves(self) -> list[str]:
        """Names of the copies of whole arrays, also between main memory and the chip."""
        return [i.name for i, _ in self._executed() if _is_move(i.opcode)]

    def bytes(self) -> int:
        """Bytes that the kernels and copies of whole arrays read from and write to the main memory."""
        return sum(self._bytes(instruction, within) for instruction, within in self._executed())

    def _executed(self, computation: str | None = None) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """What is executed on whole arrays, and the computation that it belongs to."""
        within = self.computations[computation or self.entry]
        for instruction in within.values():
            if instruction.opcode == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
                for _ in range(int(turns[1]) if turns else 1):
                    yield from self._executed(_called(instruction, "body"))
            elif instruction.opcode in ("call", "conditional"):
                yield from self._executed(_called(instruction, "to_apply"))
            elif not self._is_free(instruction) and self._is_whole(instruction, within):
                yield instruction, within

    def _is_free(self, instruction: Instruction) -> bool:
        # The end of an asynchronous copy stands for the copy. A TPU's ConcatBitcast only names what lies side by side.
        return (
            instruction.opcode in FREE
            or instruction.opcode.endswith("-start")
            or "ConcatBitcast" in instruction.attributes
        )

    def _is_whole(self, instruction: Instruction, within: dict[str, Instruction]) -> bool:
        arrays = [*instruction.results, *(a for name in instruction.operands for a in within[name].results)]
        if _is_move(instruction.opcode):
            arrays = within[instruction.operands[0]].results if instruction.operands else []
        return any(array.size >= self.size for array in arrays)

    def _bytes(self, instruction: Instruction, within: dict[str, Instruction]) -> int:
        operands = [within[name] for name in instruction.operands]
        if instruction.opcode.endswith("-done"):
            (source,) = within[operands[0].operands[0]].results
            return instruction.results[0].bytes * ((not source.on_chip) + (not instruction.results[0].on_chip))
        body = self.computations[_called(instruction, "calls")] if instruction.opcode == "fusion" else None
        read = sum(
            _sliced(body, index, array.bytes) if body else array.bytes
            for index, operand in enumerate(operands)
            for array in operand.results[:1]
            if not array.on_chip
        )
        return read + sum(
            _updated(body, index, array.bytes) if body else array.bytes
            for index, array in enumerate(instruction.results)
            if not array.on_chip
        )


def _array(dtype: str, bits: str, shape: str, layout: str) -> Array:
    size = math.prod(int(n) for n in shape.split(",") if n)
    width = 8 if dtype == "pred" else int(bits or 0)
    return Array(size, size * width // 8, bool(re.search(r"S\([1-9]\d*\)", layout)))


def _is_move(opcode: str) -> bool:
    return opcode == "copy" or opcode.endswith("-done")


def _called(instruction: Instruction, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=%?([\w.-]+)", instruction.attributes)
    if match is None:
        raise ValueError(f"{instruction.opcode} without {attribute}: {instruction.attributes[:200]}")
    return match[1]


def _sliced(body: dict[str, Instruction], index: int, whole: int) -> int:
    """Bytes that a fusion reads of its operand `index`."""
    (name,) = (i.name for i in body.values() if i.opcode == "parameter" and i.operands == [str(index)])
    names, total = {name}, 0
    for i in body.values():  # operands come before their users
        if i.opcode in RENAMES and names & set(i.operands):
            names.add(i.name)
        elif i.opcode == "dynamic-slice" and i.operands[0] in names:
            total += i.results[0].bytes
        elif i.opcode == "dynamic-update-slice" and i.operands[0] in names and not names & set(i.operands[1:]):
            continue
        elif names & set(i.operands):
            return whole
    return total


def _updated(body: dict[str, Instruction], index: int, whole: int) -> int:
    """Bytes that a fusion writes of its result `index`."""
    (root,) = (i for i in body.values() if i.is_root)
    result = body[root.operands[index]] if root.opcode == "tuple" else root
    while result.opcode in RENAMES:
        result = body[result.operands[0]]
    return body[result.operands[1]].results[0].bytes if result.opcode == "dynamic-update-slice" else whole
