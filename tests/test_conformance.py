"""Properties of every public transformation: each row of one table goes through each test."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy.signal import butter

import grokfast_jax as gf

STEPS = 11  # more than two of the windows below, and not a multiple of them


class Row(NamedTuple):
    public: str  # name of the transformation
    make: Callable[[], optax.GradientTransformationExtraArgs]
    requested: str | None = None  # dtype of the state that the arguments request (for a narrow ring, of its bits)


def rising(step):
    return jnp.minimum(step / 5, 1.0)


def rising_to_1(step):
    return step / (step + 1)


TABLE = {
    "ema": Row("ema", lambda: gf.ema(0.9)),
    "ema zero": Row("ema", lambda: gf.ema(0.9, start="zero")),
    "ema debiased": Row("ema", lambda: gf.ema(0.9, start="debiased")),
    "ema schedule": Row("ema", lambda: gf.ema(lambda step: 0.9 * rising(step))),
    "ema debiased schedule": Row("ema", lambda: gf.ema(lambda step: 0.9 * rising(step), start="debiased")),
    "ema bfloat16": Row("ema", lambda: gf.ema(0.9, accumulator_dtype="bfloat16"), "bfloat16"),
    "moving_average": Row("moving_average", lambda: gf.moving_average(4)),
    "moving_average 1": Row("moving_average", lambda: gf.moving_average(1)),
    "moving_average sum": Row("moving_average", lambda: gf.moving_average(4, reduce="sum")),
    "moving_average no warmup": Row("moving_average", lambda: gf.moving_average(4, warmup=False)),
    "moving_average stride": Row("moving_average", lambda: gf.moving_average(6, stride=2, warmup=False)),
    "moving_average stride = window": Row("moving_average", lambda: gf.moving_average(3, stride=3)),
    "moving_average bfloat16": Row("moving_average", lambda: gf.moving_average(4, buffer_dtype="bfloat16"), "uint16"),
    "moving_average last axis": Row("moving_average", lambda: gf.moving_average(4, window_axis=-1)),
    "lfilter FIR": Row("lfilter", lambda: gf.lfilter([0.5, 0.25, 0.25])),
    "lfilter gain": Row("lfilter", lambda: gf.lfilter([0.5])),
    "lfilter IIR": Row("lfilter", lambda: gf.lfilter([0.1, 0.2], [2.0, -1.0, 0.25])),
    "lfilter IIR gradient": Row("lfilter", lambda: gf.lfilter([0.1, 0.2], [2.0, -1.0, 0.25], start="gradient")),
    "sosfilt": Row("sosfilt", lambda: gf.sosfilt([[0.1, 0.2, 0.0, 2.0, -1.0, 0.25], [0.5, 0.5, 0.5, 1.0, 0.2, 0.0]])),
    "sosfilt gradient": Row("sosfilt", lambda: gf.sosfilt(butter(3, 0.2, output="sos"), start="gradient")),
    "sosfilt bfloat16": Row(
        "sosfilt", lambda: gf.sosfilt(butter(3, 0.2, output="sos"), accumulator_dtype="bfloat16"), "bfloat16"
    ),
    "amplify": Row("amplify", lambda: gf.amplify(gf.ema(0.5), 2.0)),
    "amplify normalize": Row("amplify", lambda: gf.amplify(gf.ema(0.5), 2.0, normalize=True)),
    "amplify slow only": Row("amplify", lambda: gf.amplify(gf.moving_average(3), 2.0, fast=0.0)),
    "amplify schedules": Row("amplify", lambda: gf.amplify(gf.ema(0.5), rising, fast=lambda step: 1 - rising(step))),
    "amplify cascade": Row("amplify", lambda: gf.amplify(optax.chain(gf.ema(0.5), gf.ema(0.5)), 2.0)),
    "amplify identity": Row("amplify", lambda: gf.amplify(optax.identity(), 2.0)),
    "parallel": Row(
        "parallel", lambda: gf.parallel((0.5, gf.ema(0.5)), (-1.0, gf.moving_average(3)), (2, gf.ema(0.9)))
    ),
    "parallel schedules": Row(
        "parallel", lambda: gf.parallel((rising, gf.ema(0.5)), (lambda step: 1 - rising(step), optax.identity()))
    ),
    "scale_by_filtered_adam": Row("scale_by_filtered_adam", lambda: gf.scale_by_filtered_adam(gf.ema(0.5))),
    "scale_by_filtered_adam schedule": Row(
        "scale_by_filtered_adam",
        lambda: gf.scale_by_filtered_adam(gf.parallel((1, gf.ema(0.5)), (2, gf.moving_average(3))), b2=rising_to_1),
    ),
    "grokfast_ema": Row("grokfast_ema", gf.grokfast_ema),
    "grokfast_ma": Row("grokfast_ma", lambda: gf.grokfast_ma(4)),
    "grokfast_ma all options": Row(
        "grokfast_ma",
        lambda: gf.grokfast_ma(
            6, filter_type="sum", warmup=False, stride=2, buffer_dtype=jnp.float32, normalize=True, window_axis=-1
        ),
        "float32",
    ),
}


def is_linear(row):
    return row.requested in (None, "float32") and row.public != "scale_by_filtered_adam"


@pytest.fixture(params=TABLE, scope="module")  # runs all tests of a row together: they share its programs
def name(request):
    return request.param


@pytest.fixture
def tx(name):
    return TABLE[name].make()


def test_the_table_has_every_public_transformation():
    measurements = {"impulse_response", "frequency_response", "dc_gain", "mean_age", "stability_limit"}
    public = {name for name in gf.__all__ if name[0].islower()} - measurements
    assert {row.public for row in TABLE.values()} == public


def parameters():
    return {
        "matrix": jnp.full((3, 2), 0.5),
        "half": jnp.full((2,), 0.5, jnp.bfloat16),
        "complex": jnp.full((2,), 0.5j, jnp.complex64),
        "array scalar": jnp.array(0.5),
        "python scalar": 0.5,
        "none": None,
        "masked": optax.MaskedNode(),
    }


def gradients(params=None, steps=STEPS, seed=0):
    """Return gradients like `params`, as NumPy arrays with a leading axis of steps."""
    rng = np.random.default_rng(seed)

    def draw(p):
        dtype = jnp.result_type(p)
        g = rng.normal(size=(steps, *np.shape(p)))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            g = g + 1j * rng.normal(size=g.shape)
        return np.asarray(g, dtype)

    return jax.tree.map(draw, parameters() if params is None else params)


def at(tree, step):
    return jax.tree.map(lambda g: jnp.asarray(g[step]), tree)


def loop(update, state, grads, steps):
    """Return the outputs and the final state of a Python loop over `update`."""
    outs = []
    for step in steps:
        out, state = update(at(grads, step), state)
        outs.append(jax.tree.map(np.asarray, out))
    return stack(outs), state


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


class Compiled(NamedTuple):
    """A row and its programs. The tests share them, because most of their time is compilation."""

    tx: optax.GradientTransformationExtraArgs
    update: Callable[..., Any]  # jitted, for gradients like parameters()
    scanned: Callable[..., Any]  # jitted; outputs and final state of a whole run
    traces: list[None]  # one None per trace of `update`


@functools.cache
def compiled(name):
    tx, traces = TABLE[name].make(), []

    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state)

    return Compiled(tx, jax.jit(update), jax.jit(lambda grads: scanned(tx, grads)), traces)


def scanned(tx, grads):
    """Return the outputs and the final state of a scan of `tx` over the leading axis of `grads`."""

    def step(state, g):
        out, state = tx.update(g, state)
        return state, out

    state, outs = jax.lax.scan(step, tx.init(parameters()), grads)
    return outs, state


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    """Assert the same structure, shapes, dtypes and values; bfloat16 may differ in the last bit."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)

    def check(a, b):
        loose = 8e-3 if a.dtype == jnp.bfloat16 else 0.0
        wide = np.complex128 if jnp.iscomplexobj(a) else np.float64
        np.testing.assert_allclose(np.asarray(a, wide), np.asarray(b, wide), rtol=rtol + loose, atol=atol + loose)

    jax.tree.map(check, actual, expected)


def test_eager_jit_donated_and_scan_agree(name):
    tx, update, scan, _ = compiled(name)
    params, grads = parameters(), gradients()
    expected = loop(tx.update, tx.init(params), grads, range(STEPS))
    assert_close(loop(update, tx.init(params), grads, range(STEPS)), expected)
    assert_close(loop(jax.jit(tx.update, donate_argnums=1), tx.init(params), grads, range(STEPS)), expected)
    assert_close(scan(grads), expected)


@pytest.mark.slow
def test_vmapped_runs_equal_single_runs(name):
    """With `init` inside the vmapped function, so that the counters are not batched."""
    tx, _, scan, _ = compiled(name)
    runs = [gradients(seed=seed) for seed in range(3)]
    assert_close(jax.jit(jax.vmap(lambda grads: scanned(tx, grads)))(stack(runs)), stack([scan(g) for g in runs]))


def test_vmapped_updates_equal_single_runs(name):
    """With a batch of states, so that each run has its own counters."""
    tx, _, scan, _ = compiled(name)
    runs = [gradients(seed=seed) for seed in range(3)]
    expected, batched = stack([scan(grads) for grads in runs]), stack(runs)
    by_step = jax.tree.map(lambda g: np.swapaxes(g, 0, 1), batched)
    outs, states = loop(jax.jit(jax.vmap(tx.update)), stack([tx.init(parameters())] * 3), by_step, range(STEPS))
    assert_close((jax.tree.map(lambda g: np.swapaxes(g, 0, 1), outs), states), expected)


def test_traces_once(name):
    tx, update, _, traces = compiled(name)
    loop(update, tx.init(parameters()), gradients(), range(STEPS))
    assert len(traces) == 1


def test_gradient_dtypes_go_out_and_state_types_are_a_fixed_point(tx):
    params, grads = parameters(), at(gradients(), 0)
    state = jax.eval_shape(tx.init, params)
    out, new_state = jax.eval_shape(tx.update, grads, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, grads)
    describe = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(describe, new_state) == jax.tree.map(describe, state)
    assert not any(x.weak_type for x in jax.tree.leaves((out, state)))


def test_state_does_not_depend_on_the_dtype_of_the_gradients(tx):
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16)}
    grads = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)}
    out, state = tx.update(grads, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def test_integer_gradients_give_the_rounded_updates_of_floats(tx):
    params = jnp.zeros(20, jnp.int32)
    grads = np.random.default_rng(0).integers(-9, 9, size=(STEPS, 20)).astype(np.int32)
    outs, state = loop(tx.update, tx.init(params), grads, range(STEPS))
    floats, expected_state = loop(tx.update, tx.init(params), grads.astype(np.float32), range(STEPS))
    chex.assert_trees_all_equal((outs, state), (np.rint(floats).astype(np.int32), expected_state))


def test_a_state_of_numpy_arrays_becomes_a_state_of_jax_arrays(tx):
    params, grads = parameters(), at(gradients(), 0)
    state = tx.update(grads, jax.tree.map(np.asarray, tx.init(params)))[1]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def test_init_works_without_values(tx):
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, parameters()), tx.init(parameters()))


def place(leaf):
    """Return the shape, dtype and sharding of an array."""
    return leaf.shape, leaf.dtype, leaf.sharding


@pytest.mark.parametrize("spec", [None, PartitionSpec("x")], ids=["one device", "sharded"])
def test_init_of_abstract_parameters_equals_that_of_arrays(tx, spec):
    sharding = spec and NamedSharding(Mesh(np.array(jax.devices()), ("x",)), spec)
    params = {dtype: jnp.ones((8, 4), dtype) for dtype in ("float32", "bfloat16", "complex64", "int32")}
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding), params)
    assert jax.tree.map(place, tx.init(abstract)) == jax.tree.map(place, tx.init(jax.device_put(params, sharding)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizers_of_abstract_nnx_models(tx, dtype):
    nnx = pytest.importorskip("flax.nnx")
    model = lambda: nnx.Linear(2, 3, param_dtype=dtype, rngs=nnx.Rngs(0))
    optimizer = lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param)
    types = lambda optimizer: jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(optimizer))
    expected = types(optimizer(model()))
    assert types(optimizer(nnx.eval_shape(model))) == expected
    assert types(nnx.eval_shape(lambda: optimizer(model()))) == expected


@pytest.mark.skipif(not hasattr(jax.sharding, "reshard"), reason="this jax cannot move arrays among explicit mesh axes")
@pytest.mark.parametrize(("params", "grads"), [("x", None), (None, "x")], ids=["divided state", "divided gradients"])
def test_gradients_divided_otherwise_than_the_state_among_explicit_axes(tx, params, grads):
    """A scan checks that the types of the state, which contain the sharding, are a fixed point."""
    g = np.random.default_rng(0).normal(size=(STEPS, 8, 4)).astype(np.float32)
    run = jax.jit(lambda g, p: jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(p), g))
    expected = run(g, np.zeros((8, 4), np.float32))
    with jax.set_mesh(jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])):
        put = lambda x, *spec: jax.sharding.reshard(x, PartitionSpec(*spec))
        state, outs = run(put(g, None, grads), put(jnp.zeros((8, 4)), params))
    assert_close((state, outs), expected)


def test_fresh_leaves_share_no_buffer(tx):
    leaves = [leaf for leaf in jax.tree.leaves(tx.init(parameters())) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_state_fields_are_not_called_count(tx):
    paths = jax.tree_util.tree_flatten_with_path(tx.init(parameters()))[0]
    assert not any(getattr(key, "name", None) == "count" for path, _ in paths for key in path)


def test_extra_arguments_are_accepted(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, grads = parameters(), at(gradients(), 0)
    chex.assert_trees_all_equal(
        tx.update(grads, tx.init(params), params, value=1.0), tx.update(grads, tx.init(params), params)
    )


def test_floats_of_the_state_are_wide_unless_the_user_says_otherwise(name, x64):
    row = TABLE[name]
    for dtype, least in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        params = jnp.zeros(3, dtype)
        out, state = row.make().update(jnp.ones(3, dtype), row.make().init(params))
        assert out.dtype == dtype
        floats = [leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert set(floats) <= {least, row.requested}
        assert row.requested is None or row.requested in floats


def test_init_keeps_the_sharding_of_the_parameters(tx):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    params = jax.device_put(jnp.zeros((8, 6, 5)), NamedSharding(mesh, PartitionSpec("x", "y")))
    for leaf in jax.tree.leaves(tx.init(params)):
        if leaf.shape == (8, 6, 5) or (leaf.ndim == 4 and leaf.shape[:3] == (8, 6, 5)):
            assert tuple(leaf.sharding.spec)[:2] == ("x", "y")
            assert leaf.sharding.shard_shape(leaf.shape)[:2] == (2, 3)
        elif leaf.ndim == 4 and leaf.shape[0]:
            assert leaf.sharding.shard_shape(leaf.shape) == (leaf.shape[0], 2, 3, 5)
        else:
            assert leaf.size <= 1 or leaf.shape[0] == 0


def test_lowers_for_every_platform(tx):
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
    exported = export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(params, tx.init(params))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


@given(seed=st.integers(0, 99), k=st.integers(1, STEPS - 1))
def test_split_runs_equal_whole_runs(name, seed, k):
    tx, update, _, _ = compiled(name)
    grads = gradients(seed=seed)
    whole, final = loop(update, tx.init(parameters()), grads, range(STEPS))
    _, state = loop(update, tx.init(parameters()), grads, range(k))
    checkpoint = jax.tree.map(np.asarray, state)
    second, resumed = loop(update, checkpoint, grads, range(k, STEPS))
    chex.assert_trees_all_equal(second, jax.tree.map(lambda leaf: leaf[k:], whole))
    chex.assert_trees_all_equal(resumed, final)


@given(seed=st.integers(0, 99), scale=st.floats(-3, 3, width=32))
@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if is_linear(row)], indirect=True, scope="module")
def test_filters_are_linear(name, seed, scale):
    g, h = gradients(seed=seed), gradients(seed=seed + 100)
    outs_g, outs_h, outs = (
        compiled(name).scanned(grads)[0]
        for grads in (g, h, jax.tree.map(lambda g, h: np.asarray(scale * g + h, g.dtype), g, h))
    )
    for leaf in ("matrix", "complex", "array scalar", "python scalar"):  # not bfloat16, which rounds too much
        np.testing.assert_allclose(outs[leaf], scale * outs_g[leaf] + outs_h[leaf], rtol=1e-4, atol=1e-4)
