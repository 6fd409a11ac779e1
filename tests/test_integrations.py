"""The code of docs/integrations.md runs as it stands there, and does what the text says."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.usefixtures("lenient")

TEXT = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
BLOCKS = {
    f"{title} {i}".strip(" 0"): code
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
}
CHECKS = {}


def check(block):
    """Register a function as the check of a block, of whose names it is given the dictionary."""
    return lambda function: CHECKS.setdefault(block, function)


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block):
    names = {}
    exec(BLOCKS[block], names)
    CHECKS[block](names)


def test_every_check_has_its_block():
    assert set(CHECKS) == set(BLOCKS)


def shapes(state):
    return {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}


@check("Flax NNX")
@check("Equinox")
def _(names):
    assert names["losses"][-1] < names["losses"][0] / 2


@check("Flax NNX 1")
def _(names):
    ring = names["ring"]
    assert ring.shape[:2] == (4, 16)
    assert ring.sharding.spec == P(None, "model")
    assert ring.sharding.shard_shape(ring.shape) == (4, 2, *ring.shape[2:])


@check("Flax Linen")
def _(names):
    state = names["state"]
    assert state.step == 1
    ring = state.opt_state[0].lowpass.ring["kernel"]
    assert ring.value.sharding.shard_shape(ring.value.shape) == (4, 2, *ring.value.shape[2:])
    assert ring.get_partition_spec() == P(None, "model")
    grads = jnp.abs(ring.value[:, :, 0])
    assert grads.min() > 0
    assert not ring.value[:, :, 1:].any()


@check("Some parameters only")
def _(names):
    params = {"embedding": jnp.ones(3), "block": {"w": jnp.ones((2, 2))}}
    for name, shape, filtered in (("all_but_embeddings", (2, 2), "w"), ("only_embeddings", (3,), "embedding")):
        tx = names[name]
        state = tx.init(params)
        averages = optax.tree_utils.tree_get(state, "slow")
        assert shapes(averages) == {shape}
        grads = jax.tree.map(lambda p: 0.5 * p, params)
        for grad_scale in (1.0, -1.0):  # Adam's first step does not see the amplification
            updates, state = tx.update(jax.tree.map(lambda g, s=grad_scale: s * g, grads), state, params)
        plain = optax.adamw(1e-2)
        plain_state = plain.init(params)
        for grad_scale in (1.0, -1.0):
            expected, plain_state = plain.update(
                jax.tree.map(lambda g, s=grad_scale: s * g, grads), plain_state, params
            )
        same = {
            "w": np.allclose(updates["block"]["w"], expected["block"]["w"]),
            "embedding": np.allclose(updates["embedding"], expected["embedding"]),
        }
        assert same == {"w": filtered != "w", "embedding": filtered != "embedding"}


@check("Some parameters only 1")
def _(names):
    params = {"kernel": jnp.ones((64, 64)), "lora_a": jnp.ones((64, 2)), "lora_b": jnp.ones((2, 64))}
    tx = names["tx"]
    state = tx.init(params)
    assert {shape[-2:] for shape in shapes(state)} == {(64, 2), (2, 64)}
    updates, _ = tx.update(params, state, params)
    assert not updates["kernel"].any()
    assert updates["lora_a"].all()


@check("Accumulated gradients")
def _(names):
    tx, params = names["tx"], jnp.ones(3)
    state = tx.init(params)
    for i in range(8):
        _, state = tx.update(jnp.full(3, float(i)), state, params)
    slow = optax.tree_utils.tree_get(state, "slow")
    np.testing.assert_allclose(slow, 0.98 * 1.5 + 0.02 * 5.5, rtol=1e-6)


@check("Accumulated gradients 1")
def _(names):
    batches = jnp.ones((4, 8, 3)) * jnp.arange(1.0, 5.0)[:, None, None]
    lowpass, step = names["state"][0].lowpass, names["step"]
    assert lowpass.position == 1
    w = jnp.arange(1.0, 4.0)
    # The gradient of the mean of (s (w_0 + w_1 + w_2))^2 is 2 s^2 (w_0 + w_1 + w_2) for each; the mean of s^2 is 7.5.
    _, state = step({"w": w.copy()}, names["tx"].init({"w": w}), batches)
    np.testing.assert_allclose(state[0].lowpass.window["w"], jnp.full(3, 2 * 7.5 * 6))
    large = {"w": jax.ShapeDtypeStruct((10_000,), jnp.float32)}
    batches = jax.ShapeDtypeStruct((4, 8, 10_000), jnp.float32)
    memory = step.lower(large, jax.eval_shape(names["tx"].init, large), batches).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 103 * 40_000
    assert memory.temp_size_in_bytes < 20 * 40_000  # the batches of one product; the ring is not copied


@check("Half precision and loss scaling")
def _(names):
    history, state = names["history"], names["state"]
    assert not all(history[:5])
    assert all(history[5:20])
    assert state.total_notfinite == history.count(False)
    assert state.inner_state[0].lowpass.ema_step == history.count(True)
    assert state.inner_state[0].lowpass.slow["w"].dtype == jnp.float32
    # The average is that of the unscaled gradients of the good steps: 2 w, which falls from 4.
    assert jnp.all((state.inner_state[0].lowpass.slow["w"] < 4) & (state.inner_state[0].lowpass.slow["w"] > 3))


@check("Many devices")
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


@check("Checkpoints")
def _(names):
    host = lambda tree: jax.tree.map(np.asarray, tree)
    assert len(names["resumed"][0]["w"].sharding.device_set) == 2
    assert names["first"][1][0].lowpass.position > 0
    chex.assert_trees_all_equal(host(names["restored"]), host(names["first"]))
    chex.assert_trees_all_close(host(names["resumed"]), host(names["undisturbed"]), rtol=1e-6)
