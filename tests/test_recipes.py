"""The code blocks of docs/recipes.md run unchanged, and do what the text says."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grokfast_jax import amplify, ema, grokfast_ma, moving_average

pytestmark = pytest.mark.usefixtures("lenient")

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
BLOCKS = {
    f"{title} {i}".strip(" 0"): code
    for title, section in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    if "get_topology_desc" not in code  # test_accelerators.py runs that one
}
CHECKS = {}


def check(block):
    """Register a function as the check of a block; its argument is the dictionary of the names of the block."""
    return lambda function: CHECKS.setdefault(block, function)


SLOW = {"In place of Muon's momentum"}


@pytest.mark.parametrize("block", [pytest.param(b, marks=[pytest.mark.slow] * (b in SLOW)) for b in BLOCKS])
def test_block(block):
    names = {}
    exec(BLOCKS[block], names)
    CHECKS[block](names)


def test_every_check_has_its_block():
    assert set(CHECKS) == set(BLOCKS)


def shapes(state):
    return {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}


def updates_of(tx, grads, **extra):
    """Updates of `tx` for a list of gradients, all at the same parameters."""
    params = jax.tree.map(jnp.ones_like, grads[0])
    state, outs = tx.init(params), []
    for i, g in enumerate(grads):
        out, state = jax.jit(tx.update)(g, state, params, **{name: values[i] for name, values in extra.items()})
        outs.append(out)
    return outs


def random_gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (4, 3), "b": (3,)}
    return [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()} for _ in range(steps)
    ]


@check("Does it fit? 1")
def _(names):
    assert names["state"][0].lowpass.fill == 1
    assert names["state"][0].lowpass.ring["w"].shape == (101, 99, 256)


@check("In place of Adam's first moment")
def _(names):
    grads = random_gradients(30)
    adamw = optax.adamw(1e-3, b2=0.98, weight_decay=1.0)
    chex.assert_trees_all_close(updates_of(names["adamw"], grads), updates_of(adamw, grads), rtol=1e-4, atol=1e-7)
    g = np.array([g["b"] for g in grads], np.float64)
    nu = sum(0.02 * 0.98 ** (29 - t) * g[t] ** 2 for t in range(30)) / (1 - 0.98**30)
    expected = -1e-3 * (g[-10:].mean(axis=0) / np.sqrt(nu) + 1.0)
    np.testing.assert_allclose(updates_of(names["of_window"], grads)[-1]["b"], expected, rtol=1e-4)


@check("In place of Muon's momentum")
def _(names):
    """With its own momentum put in by hand, Muon is Muon; the vectors are left alone by any filter."""
    grads = random_gradients(30)
    options = {"weight_decay": 0.1, "adam_weight_decay": 0.2, "adam_b2": 0.98}
    gradient = lambda step: 0.05 / (1 - 0.95 ** (step + 1.0))  # each part with the bias correction of optax
    average = lambda step: 0.95 * (1 - 0.95 ** (step + 1.0)) / (1 - 0.95 ** (step + 2.0))
    own = names["parallel"]((gradient, optax.identity()), (average, names["ema"](0.95, start="debiased")))
    plain = names["ema"](0.95, start="debiased")
    for momentum, nesterov in ((own, True), (plain, False)):
        expected = updates_of(optax.contrib.muon(1e-2, beta=0.95, nesterov=nesterov, **options), grads)
        ours = updates_of(names["muon_with"](momentum, 1e-2, nesterov=nesterov, **options), grads)
        chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-5)
    expected = updates_of(optax.contrib.muon(1e-2), grads)
    for name in ("muon", "of_window"):
        ours = updates_of(names[name], grads)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a["b"], b["b"])
    assert not np.allclose(ours[-1]["w"], expected[-1]["w"], atol=1e-3)
    late = updates_of(names["muon"], grads * 10)[-1]["w"], updates_of(optax.contrib.muon(1e-2), grads * 10)[-1]["w"]
    np.testing.assert_allclose(*late, atol=1e-5)
    # What the text says of nesterov: the matrices do not see it at beta=0.
    without = updates_of(optax.contrib.muon(1e-2, beta=0.0, nesterov=False), grads)
    with_ = updates_of(optax.contrib.muon(1e-2, beta=0.0), grads)
    np.testing.assert_allclose(with_[-1]["w"], without[-1]["w"], atol=1e-6)
    assert not np.allclose(with_[-1]["b"], without[-1]["b"], atol=1e-5)


@check("Switch on by the training loss")
def _(names):
    assert names["lowest_loss"] == 2
    grads = random_gradients(6)
    losses = jnp.array([3.0, 2.0, 1.0, 0.05, 0.05, 0.05])
    plain = updates_of(names["adamw"], grads)

    def expected(start):
        """The gradients as AdamW should get them, amplified from step 3 on by an average since step `start`."""
        mu, fed = None, []
        for i, g in enumerate(grads):
            if i >= start:
                mu = g if mu is None else jax.tree.map(lambda m, g: 0.98 * m + 0.02 * g, mu, g)
            fed.append(jax.tree.map(lambda g, m: g + 2 * m, g, mu) if i >= 3 else g)
        return updates_of(names["adamw"], fed)

    for name, start in (("collecting", 0), ("starting_empty", 3)):
        ours = updates_of(names[name], grads, lowest_loss=losses)
        chex.assert_trees_all_close(ours[:3], plain[:3], rtol=1e-5)
        chex.assert_trees_all_close(ours, expected(start), rtol=1e-4, atol=1e-8)
    assert not np.allclose(expected(0)[3]["w"], expected(3)[3]["w"])


@check("Flax NNX")
@check("Flax Linen")
@check("Equinox")
def _(names):
    assert names["losses"][-1] < names["losses"][0] / 2


@check("Sharding 1")
def _(names):
    ring = names["ring"]
    assert ring.shape == (4, 16, 101)
    assert ring.sharding.spec == P(None, "model")
    assert ring.sharding.shard_shape(ring.shape) == (4, 2, *ring.shape[2:])


@check("Sharding 2")
def _(names):
    state = names["state"]
    assert state.step == 1
    ring = state.opt_state[0].lowpass.ring["kernel"]
    assert ring.value.sharding.shard_shape(ring.value.shape) == (4, 2, *ring.value.shape[2:])
    assert ring.get_partition_spec() == P(None, "model")
    grads = jnp.abs(ring.value[:, :, 0])
    assert grads.min() > 0
    assert not ring.value[:, :, 1:].any()


@check("Masks and frozen parameters")
def _(names):
    params = {"embedding": jnp.ones(3), "block": {"w": jnp.ones((2, 2))}}
    signs = np.random.default_rng(0).choice([-0.5, 0.5], size=101)  # the window is full in the last steps
    grads = [jax.tree.map(lambda p, sign=sign: sign * p, params) for sign in signs]
    assert shapes(optax.tree_utils.tree_get(names["tx"].init(params), "window")) == {(2, 2)}
    ours, plain = updates_of(names["tx"], grads)[-1], updates_of(names["adamw"], grads)[-1]
    np.testing.assert_allclose(ours["embedding"], plain["embedding"], rtol=1e-6)
    assert not np.allclose(ours["block"]["w"], plain["block"]["w"])
    # What the text says of a mask inside `amplify`.
    inside = amplify(optax.masked(ema(0.98), names["is_filtered"]), 2.0)
    np.testing.assert_allclose(updates_of(inside, grads[:1])[0]["embedding"], 3 * grads[0]["embedding"])


@check("Masks and frozen parameters 1")
def _(names):
    params = {"embedding": jnp.ones((64, 64)), "block": {"w": jnp.ones((64, 2))}}
    tx = names["tx"]
    state = tx.init(params)
    assert {shape[-2:] for shape in shapes(state)} == {(64, 2)}
    updates, _ = tx.update(params, state, params)
    assert not updates["embedding"].any()
    assert updates["block"]["w"].all()


@check("Log the slow part")
def _(names):
    constant, slow_ratio = {"w": jnp.ones(10_000)}, names["slow_ratio"]
    noise = [{"w": g} for g in np.random.default_rng(0).normal(size=(300, 10_000)).astype(np.float32)]
    assert 0.05 < names["logs"]["slow_ratio"] < 1
    for lowpass, field, scale in ((ema(0.98, start="debiased"), "slow", 1), (moving_average(100), "window", 100)):
        for grads, expected in (([constant] * 101, 1.0), (noise, 0.1)):
            state = lowpass.init(constant)
            for g in grads:
                _, state = lowpass.update(g, state)
            slow = jax.tree.map(lambda x, scale=scale: x / scale, optax.tree_utils.tree_get(state, field))
            np.testing.assert_allclose(slow_ratio(grads[-1], {"slow": slow}), expected, rtol=0.03)


@check("State in bfloat16")
def _(names):
    params = jnp.ones(1000, jnp.bfloat16)
    for name, size in (("half_ma", 210), ("small_ma", 34), ("ema", 4), ("half_ema", 2)):
        state = names[name].init(params)[0]
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim) == 1000 * size, name
    lowpass = ema(0.98, accumulator_dtype="bfloat16")
    state = lowpass.init(jnp.ones(()))
    for g in [0.0] + [1.0] * 1000:
        _, state = lowpass.update(jnp.float32(g), state)
    np.testing.assert_allclose(state.slow.astype(float), 0.91, atol=0.005)


@check("Schedule-free")
def _(names):
    assert 0 < float(names["trained"]["w"][0]) < 1
    # The same as schedule-free AdamW of gradients that are filtered before it.
    outside = optax.contrib.schedule_free(names["adamw"], names["learning_rate"], b1=0.9)
    grads = random_gradients(120)
    expected = updates_of(optax.chain(grokfast_ma(100, 5.0), outside), grads)
    chex.assert_trees_all_close(updates_of(names["tx"], grads), expected, rtol=1e-5, atol=1e-8)


@check("Accumulation")
def _(names):
    tx, params = names["tx"], jnp.ones(3)
    state = tx.init(params)
    for i in range(8):
        _, state = tx.update(jnp.full(3, float(i)), state, params)
    slow = optax.tree_utils.tree_get(state, "slow")
    np.testing.assert_allclose(slow, (0.98 * 1.5 + 5.5) / (0.98 + 1), rtol=1e-5)


@check("Accumulation 1")
def _(names):
    batches = jnp.ones((4, 8, 3)) * jnp.arange(1.0, 5.0)[:, None, None]
    lowpass, step = names["state"][0].lowpass, names["step"]
    assert lowpass.fill == 1
    w = jnp.arange(1.0, 4.0)
    # The gradient of the mean of (s (w_0 + w_1 + w_2))^2 is 2 s^2 (w_0 + w_1 + w_2) for each; the mean of s^2 is 7.5.
    _, state = step({"w": w.copy()}, names["tx"].init({"w": w}), batches)
    np.testing.assert_allclose(state[0].lowpass.window["w"], jnp.full(3, 2 * 7.5 * 6))
    large = {"w": jax.ShapeDtypeStruct((10_000,), jnp.float32)}
    batches = jax.ShapeDtypeStruct((4, 8, 10_000), jnp.float32)
    memory = step.lower(large, jax.eval_shape(names["tx"].init, large), batches).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 103 * 40_000
    assert memory.temp_size_in_bytes < 20 * 40_000  # the batches of one product; the ring is not copied


@check("Loss scaling")
def _(names):
    history, state = names["history"], names["state"]
    assert not all(history[:5])
    assert all(history[5:20])
    assert state.total_notfinite == history.count(False)
    assert state.inner_state[0].lowpass.ema_step == history.count(True)
    assert state.inner_state[0].lowpass.slow["w"].dtype == jnp.float32
    # The average is over the unscaled gradients of the finite steps: 2 w, which falls from 4.
    assert jnp.all((state.inner_state[0].lowpass.slow["w"] < 4) & (state.inner_state[0].lowpass.slow["w"] > 3))


@check("Sharding")
def _(names):
    for state in (names["state"], names["compiled"]):
        lowpass = state[0].lowpass
        assert lowpass.fresh["w"].sharding.shard_shape((16, 4)) == (2, 4)
        slots = lowpass.ring["w"].shape[0]
        assert lowpass.ring["w"].sharding.shard_shape((slots, 16, 4)) == (slots, 2, 4)
    # What the text warns of; should it fail one day, the text can be shorter.
    replicated = jax.jit(names["tx"].init)(names["params"])
    assert replicated[0].lowpass.fresh["w"].sharding.shard_shape((16, 4)) == (16, 4)
    assert replicated[1][0].mu["w"].sharding.shard_shape((16, 4)) == (16, 4)
    for window_axis, shard in ((0, (1, 16, 4)), (-1, (2, 4, 8))):  # with 0 the spec divides the 8 slots of the ring
        tx = grokfast_ma(7, window_axis=window_axis)
        state = tx.init(names["params"])
        specs = optax.tree_utils.tree_map_params(tx, lambda _, spec: spec, state, {"w": P("data")})
        ring, spec = (tree.lowpass.ring["w"] for tree in (state, specs))
        assert NamedSharding(names["mesh"], spec).shard_shape(ring.shape) == shard


@check("Checkpoints")
def _(names):
    host = lambda tree: jax.tree.map(np.asarray, tree)
    assert len(names["resumed"][0]["w"].sharding.device_set) == 2
    assert names["first"][1][0].lowpass.fill > 0
    chex.assert_trees_all_equal(host(names["restored"]), host(names["first"]))
    chex.assert_trees_all_close(host(names["resumed"]), host(names["undisturbed"]), rtol=1e-6)


@check("Resume with a new learning rate")
def _(names):
    schedule = optax.piecewise_constant_schedule(1e-3, {25: 0.3})
    params = {"w": jnp.ones(3)}
    tx = names["optimizer"](schedule)
    expected, _ = names["train"](tx, params, tx.init(params), steps=50)
    chex.assert_trees_all_close(names["params"], expected, rtol=1e-6)
    assert names["state"][0].lowpass.fill == 10
