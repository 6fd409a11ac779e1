"""On several devices: states are sharded like their parameters, and the filters do not communicate."""

import functools
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.signal import butter

import grokfast_jax as gf

pytestmark = pytest.mark.usefixtures("lenient")  # AdamW promotes dtypes

FILTERS = {
    "ema": gf.grokfast_ema(0.9, 0.5),
    "ma": gf.grokfast_ma(4, 0.5),
    "ma stride": gf.grokfast_ma(4, 0.5, stride=2, warmup=False),
    "ma last axis": gf.grokfast_ma(4, 0.5, window_axis=-1),
    "lfilter": gf.amplify(gf.lfilter([0.1, 0.1], [1.0, -0.8]), 0.5),
    "sosfilt": gf.amplify(gf.sosfilt(butter(3, 0.2, output="sos")), 0.5),
    "parallel": gf.parallel((1.0, gf.ema(0.9)), (0.5, gf.moving_average(4))),
    "filtered adam": gf.scale_by_filtered_adam(gf.ema(0.9)),
}
ALL = optax.chain(*(FILTERS[name] for name in FILTERS if name not in ("ma", "ma stride")), optax.adamw(1e-2))
SPECS = {
    "FSDP": {"up": P("data"), "down": P("data"), "bias": P("data")},
    "tensor parallel": {"up": P(None, "model"), "down": P("model", None), "bias": P("model")},
}


@pytest.fixture(params=["auto", "explicit"])
def mesh(request):
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[request.param]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        yield mesh


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"up": (8, 16), "down": (16, 8), "bias": (16,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def batches():
    return np.random.default_rng(1).normal(size=(10, 32, 8)).astype(np.float32)


def put(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def make_step(tx, gather=lambda params: params):
    """Return a training step; `gather` replicates the parameters, which explicit axes require."""

    def loss(params, x):
        p = gather(params)
        y = jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]
        return jnp.mean((y - x) ** 2)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def trained_on_one_device():
    """Return parameters and state after training with all filters on one device."""
    params = jax.tree.map(jnp.asarray, parameters())
    state, step = ALL.init(params), jax.jit(make_step(ALL))
    for x in batches():
        params, state = step(params, state, jnp.asarray(x))
    return jax.tree.map(np.asarray, (params, state))


def collectives(compiled):
    """Count the calls of each collective for each shape."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return Counter(re.findall(rf"= (.*?) (({kinds})(?:-start)?)\(", compiled.as_text()))


def test_collectives_are_counted(mesh):
    total = jax.jit(lambda x: x.sum()).lower(put(np.ones(8), mesh, P("data"))).compile()
    assert sum(collectives(total).values()) == 1


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        *(("auto", name) for name in FILTERS),
        ("explicit", "parallel"),
        *(pytest.param("explicit", name, marks=pytest.mark.slow) for name in FILTERS if name != "parallel"),
    ],
    indirect=["mesh"],
)
def test_state_is_sharded_as_the_parameters(name, mesh):
    tx, specs = FILTERS[name], {"up": P("data"), "down": P("model", "data"), "bias": P("model")}
    params = put(parameters(), mesh, specs)
    state = tx.init(params)
    checked = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.ndim:
            p = params[path[-1].key]
            spec = tuple(specs[path[-1].key]) + (None,) * (p.ndim - len(specs[path[-1].key]))
            if leaf.ndim > p.ndim:
                spec = (*spec, None) if leaf.shape[:-1] == p.shape else (None, *spec)
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), leaf.ndim), path
            checked += 1
    assert checked >= 3
    # As in the tests of optax: types, which include explicit axes, agree between eager and compiled, before and after.
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    assert types(jax.jit(tx.init)(params)) == types(state)
    assert types(jax.jit(tx.update)(params, state)[1]) == types(state)
    # An update on its own moves nothing between devices, and keeps every sharding.
    update = jax.jit(tx.update).lower(params, state).compile()
    assert not collectives(update)
    updates, new_state = update(params, state)
    for before, after in zip(jax.tree.leaves((params, state)), jax.tree.leaves((updates, new_state)), strict=True):
        if before.ndim:
            assert after.sharding.is_equivalent_to(before.sharding, before.ndim)


@pytest.mark.parametrize(
    ("mesh", "specs"),
    [
        ("auto", "FSDP"),
        ("explicit", "tensor parallel"),
        pytest.param("auto", "tensor parallel", marks=pytest.mark.slow),
        pytest.param("explicit", "FSDP", marks=pytest.mark.slow),
    ],
    indirect=["mesh"],
)
def test_training_communicates_no_more_and_gives_the_same(specs, mesh):
    explicit = mesh.axis_types[0] == AxisType.Explicit
    whole = lambda params: jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
    gather = {"gather": whole} if explicit else {}
    params = put(parameters(), mesh, SPECS[specs])
    compiled = {}
    for name, tx in (("plain", optax.adamw(1e-2)), ("filtered", ALL)):
        x = put(batches()[0], mesh, P("data"))
        compiled[name] = jax.jit(make_step(tx, **gather)).lower(params, tx.init(params), x).compile()
    assert collectives(compiled["plain"])
    assert collectives(compiled["filtered"]) == collectives(compiled["plain"])

    state = ALL.init(params)
    for x in batches():
        params, state = compiled["filtered"](params, state, put(x, mesh, P("data")))
    for actual, want in zip((params, state), trained_on_one_device(), strict=True):
        chex.assert_trees_all_close(jax.tree.map(np.asarray, actual), want, rtol=1e-4, atol=1e-5)
