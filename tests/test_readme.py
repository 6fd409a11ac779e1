"""The README's code runs as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

pytestmark = pytest.mark.usefixtures("lenient")

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_first_example_trains():
    names = {}
    exec(BLOCKS[0], names)
    assert jnp.all(names["params"]["w"] < 1)


def test_every_transformation_of_the_second_example_updates():
    names = {}
    exec(BLOCKS[1], names)
    params = {"embedding": jnp.ones(2), "blocks": jnp.ones((2, 2))}
    transformations = {k: v for k, v in names.items() if isinstance(v, optax.GradientTransformation | optax.MultiSteps)}
    assert len(transformations) == 8
    for tx in transformations.values():
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
