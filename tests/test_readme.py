"""The README's code runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

pytestmark = pytest.mark.usefixtures("lenient")

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def run(block):
    names = {}
    exec(block, names)
    return names


def test_the_first_example_trains():
    assert jnp.all(run(BLOCKS[0])["params"]["w"] < 1)


@pytest.mark.parametrize(("block", "count"), [(BLOCKS[1], 1), (BLOCKS[2], 8)])
def test_every_transformation_of_the_other_examples_updates(block, count):
    params = {"embedding": jnp.ones(2), "blocks": jnp.ones((2, 2))}
    values = run(block).values()
    transformations = [v for v in values if isinstance(v, optax.GradientTransformation | optax.MultiSteps)]
    assert len(transformations) == count
    for tx in transformations:
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
