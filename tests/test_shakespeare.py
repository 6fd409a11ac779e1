"""The character GPT: its model against plain NumPy, its windows of text, its file, its presets."""

import dataclasses
import hashlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
import scipy.special
from flax import nnx

from examples import shakespeare
from examples.harness import files
from examples.harness.errors import UserError
from examples.harness.optimizers import make_tx
from examples.harness.train import program
from examples.shakespeare import PRESETS, Config, Shakespeare, load

pytestmark = pytest.mark.usefixtures("lenient")

DATA = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare"
RNG = np.random.default_rng(0)
SHAPE = {"layers": 2, "heads": 2, "width": 12, "context": 8, "dropout": 0.0, "batch_size": 3}
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


def task(**changes):
    """A small task on 600 random characters."""
    text = ALPHABET + "".join(RNG.choice(list(ALPHABET), 600 - len(ALPHABET)))
    return Shakespeare(text, **(SHAPE | changes))


def perturbed(params):
    """Parameters off their initial values, so that a LayerNorm left out or swapped shows."""
    return jax.tree.map(lambda p: np.asarray(p, np.float64) + 0.3 * RNG.normal(size=p.shape), params)


def numpy_logits(params, heads, text_l):
    """The logits of one window, position by position."""

    def layer_norm(x, scale):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale

    def gelu(x):
        return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2

    stream = [params["character"][c] + params["position"][i] for i, c in enumerate(text_l)]
    for k in range(len(params["blocks"])):
        block = params["blocks"][k]
        qkv = [layer_norm(x, block["ln1"]["scale"]) @ block["qkv"]["kernel"] for x in stream]
        q, k, v = (np.array([np.split(row, 3)[i] for row in qkv]) for i in range(3))
        head = q.shape[1] // heads
        for i in range(len(stream)):
            taken = np.zeros(q.shape[1])
            for part in (slice(head * h, head * (h + 1)) for h in range(heads)):
                weights = scipy.special.softmax(k[: i + 1, part] @ q[i, part] / np.sqrt(head))
                taken[part] = weights @ v[: i + 1, part]
            x = stream[i] + taken @ block["out"]["kernel"]
            hidden = gelu(layer_norm(x, block["ln2"]["scale"]) @ block["up"]["kernel"])
            stream[i] = x + hidden @ block["down"]["kernel"]
    return np.array([params["character"] @ layer_norm(x, params["ln"]["scale"]) for x in stream])


def test_the_model_is_that_of_numpy(x64):
    t = task()
    params = perturbed(t.init(jax.random.key(0)))
    text_bl = RNG.integers(0, len(ALPHABET), (3, 7))
    logits = nnx.merge(t.graphdef, jax.tree.map(jnp.asarray, params))(jnp.asarray(text_bl))
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, [numpy_logits(params, 2, text_l) for text_l in text_bl], atol=1e-11)


def test_a_position_depends_on_itself_and_those_before_it():
    # The position embedding is added to that of the character: the gradients by the two are the same.
    t = task()
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), perturbed(t.init(jax.random.key(0))))
    text = jnp.arange(8)[None]

    def logits(position):
        return nnx.merge(t.graphdef, {**params, "position": position})(text)[0]

    gradients = jnp.abs(jax.jacrev(logits)(params["position"])).sum(axis=(1, 3))  # of logits at i by embedding j
    np.testing.assert_array_equal(gradients > 0, np.tril(np.ones((8, 8), bool)))
