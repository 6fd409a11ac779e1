"""Programs compiled for a TPU and an H100 without the device: no larger than benchmarks/results/compiled.json says.

They need the compilers of tests/accelerators.txt, and JAX_PLATFORMS=cpu, because there is no device.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cost import compiled as cost
from benchmarks.cost.accelerators import (
    CHIPS,
    bytes_moved,
    collectives,
    compiled,
    operations,
    rounded_products,
    scatters,
)
from examples.parity import EXPERIMENT

INSTALL = "is not installed; pip install -r tests/accelerators.txt"
PACKAGES = {"TPU v5e": "libtpu", "H100": "jax_cuda12_plugin"}
MISSING = {chip: importlib.util.find_spec(package) is None for chip, package in PACKAGES.items()}
needs = {chip: pytest.mark.skipif(MISSING[chip], reason=f"{package} {INSTALL}") for chip, package in PACKAGES.items()}
every_chip = pytest.mark.parametrize("chip", [pytest.param(chip, marks=needs[chip]) for chip in PACKAGES])
pytestmark = pytest.mark.usefixtures("lenient")  # AdamW promotes dtypes

TABLE = json.loads(cost.OUT.read_text())["chips"]
HALF = ("AdamW", "EMA", "MA", "sosfilt, order 4", "EMA in AdamW")  # also with parameters in bfloat16
UPDATES = [(label, "float32") for label in cost.optimizers()]
UPDATES += [(label, "bfloat16") for label in HALF]


@every_chip
@pytest.mark.parametrize(("label", "dtype"), UPDATES)
def test_an_update_has_no_more_kernels_copies_and_bytes_than_the_table(label, dtype, chip):
    measured, listed = cost.update(chip, label, dtype), TABLE[chip][dtype][label]
    assert {name: min(measured[name], listed[name]) for name in listed} == measured


@every_chip
def test_the_ema_is_one_kernel_and_the_moving_average_two_without_a_copy(chip):
    table = TABLE[chip]["float32"]
    assert table["AdamW"] == {"kernels": 1, "copies": 0, "bytes": 28, "temporary": 0}
    assert table["EMA"] == {"kernels": 1, "copies": 0, "bytes": 36, "temporary": 0}
    assert table["EMA in AdamW"] == table["AdamW"]
    assert table["MA"] == {"kernels": 2, "copies": 0, "bytes": 56, "temporary": 0}


def test_every_chip_has_every_optimizer_in_the_table():
    assert set(TABLE) == set(CHIPS)
    for chip in TABLE.values():
        assert all(set(chip[dtype]) == set(cost.optimizers()) for dtype in cost.DTYPES)


@every_chip
def test_64_seeds_in_one_program_update_their_ring_buffers_in_place(chip):
    program = cost.seeds(chip)
    assert program["scatters"] == 0
    assert program["temporary_gigabytes"] < 1.1 * program["ring_gigabytes"]  # no room for a copy


@every_chip
def test_a_scatter_and_a_copy_of_the_ring_are_noticed(chip):
    """The control: a counter for each run makes a scatter, and a ring that is not donated is copied."""
    array = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    ring, value, slots = array((64, 11, 256, 256)), array((64, 256, 256)), array((64,), jnp.int32)
    write = lambda ring, value, slot: lax.dynamic_update_index_in_dim(ring, value, slot, 0)
    assert scatters(compiled(chip, jax.vmap(write), ring, value, slots, donate=(0,)))
    arguments = array((11, 8192, 8192)), array((8192, 8192)), array((), jnp.int32)
    in_place, copied = compiled(chip, write, *arguments, donate=(0,)), compiled(chip, write, *arguments)
    assert "copy" in operations(copied, 8192**2)
    assert "copy" not in operations(in_place, 8192**2)
    assert bytes_moved(in_place) == pytest.approx(8 * 8192**2)
    assert bytes_moved(copied) == pytest.approx(bytes_moved(in_place) + 2 * 11 * 4 * 8192**2)


@needs["TPU v5e"]
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("label", ["EMA", "MA, stride 10, bfloat16 buffer"])
def test_the_update_of_a_sharded_model_communicates_nothing(label, axis_type):
    uneven = {  # shapes that the mesh does not divide evenly, so that each array is sharded where it can be
        "embedding": ((50_257, 1600), P(None, "fsdp")),
        "both": ((1600, 6400), P(None, ("fsdp", "tp"))),
        "odd": ((1601, 4801), P()),
        "scalar": ((), P()),
    }
    measured = cost.pod_update(label, uneven, axis_type)
    assert measured["collectives"] == 0
    assert measured["temporary_gigabytes"] < 0.01


@needs["TPU v5e"]
def test_8_billion_parameters_on_256_chips_communicate_nothing_and_need_no_temporary():
    measured = cost.pod_update("EMA")
    assert measured["parameters"] == pytest.approx(8.03e9, rel=1e-3)
    assert measured["collectives"] == measured["temporary_gigabytes"] == 0
    state = 20 * measured["parameters"] / 256 / 1e9  # gradient, parameter, two moments and the average
    assert state <= measured["gigabytes"] < 1.02 * state


@needs["TPU v5e"]
def test_a_collective_is_noticed():
    mesh = cost.pod_mesh(AxisType.Auto)
    array = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    assert collectives(compiled("TPU v5e", lambda x: x.sum(), array))


@needs["TPU v5e"]
def test_rows_that_no_tile_divides_are_copied_unless_xla_chooses_the_layout():
    """What docs/cost.md warns of; should the first number be 0 one day, the text can be shorter."""
    default, chosen = cost.odd_rows("TPU v5e").values()
    assert default > 400
    assert chosen == 0


@every_chip
def test_matrix_products_are_float32_where_the_precision_is_set(chip):
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    model = lambda x: jnp.tanh(x @ x) @ x
    assert rounded_products(compiled(chip, model, x)) == 2
    with jax.default_matmul_precision("highest"):
        assert rounded_products(compiled(chip, model, x)) == 0


@every_chip
def test_an_experiment_multiplies_in_float32_unless_told_otherwise(chip):
    for precision, rounds in (("float32", False), ("default", True)):
        found = cost.whole_program(chip, EXPERIMENT.run("ma"), precision)
        assert (found["rounded_products"] > 0) == rounds


def test_the_experiments_in_the_table_multiply_in_float32():
    for chip in PACKAGES:
        assert len(TABLE[chip]["programs"]) == len(cost.PROGRAMS)
        for name, row in TABLE[chip]["programs"].items():
            assert (row["rounded_products"] > 0) == name.endswith("default"), name


@every_chip
def test_a_program_is_read_as_it_is(chip):
    """By hand: a sum of two arrays reads 8 and writes 4 bytes an element; a slice that is updated counts as a slice."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    size = 8192**2
    total = compiled(chip, lambda x, y: x + 2 * y, array(8192, 8192), array(8192, 8192))
    assert operations(total, size) == ["fusion"]
    assert operations(total, size + 1) == []
    assert bytes_moved(total) == pytest.approx(12 * size)
    write = lambda ring, x: ring.at[2].set(2 * x)
    ring = compiled(chip, write, array(5, 8192, 8192), array(8192, 8192), donate=(0,))
    assert bytes_moved(ring) == pytest.approx(8 * size)


@needs["TPU v5e"]
def test_the_recipe_tells_what_fits():
    """In a process of its own, as users run it."""
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    code = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "get_topology_desc" in code)
    run = lambda code: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    done = run(code)
    arguments, temporary, moved = (float(line.split()[0]) for line in done.stdout.splitlines())
    # 124 million times gradient, parameter, two moments, two sums, the slot that is being filled, and 11 narrow slots
    assert arguments == pytest.approx((7 * 4 + 11 * 2) * 0.1235, rel=0.02)
    assert temporary < 0.1
    assert moved == pytest.approx(64 * 0.1235, rel=0.1)
    too_large = code.replace("(12, 768, 9216)", "(12, 7680, 9216)")
    failed = run(too_large)
    assert "RESOURCE_EXHAUSTED" in failed.stderr


def test_the_least_that_must_move_by_hand():
    state = optax.EmptyState(), {"mu": jnp.zeros(10), "ring": jnp.zeros((5, 10)), "count": jnp.zeros((), jnp.int32)}
    assert cost.least_bytes(jnp.zeros(10), state) == 3 * 40 + 2 * 40 + 2 * 40 + 2 * 4


def test_a_number_that_differs_names_its_chips():
    assert cost.common({"a": 1, "b": 1}) == "1"
    assert cost.common({"a": 1, "b": 2.5, "c": 1}) == "1; 2.5 on b"
