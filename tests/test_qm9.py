"""The QM9 experiment: its facts, its files, and what happens when they are missing or damaged."""

import csv
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import requests

from examples import qm9
from examples.harness import files
from examples.harness.errors import UserError
from examples.harness.optimizers import make_tx
from examples.harness.train import program
from examples.qm9 import PRESETS, Config, Molecule, Qm9, load, read_prepared, read_raw

pytestmark = pytest.mark.usefixtures("lenient")

DATA = Path(__file__).parents[2] / "shared" / "data" / "qm9"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the 100 molecules of QM9 are not part of the repository")

# Water, hydrogen cyanide and a lone fluorine atom, written by hand.
SDF = """\
gdb_1

a comment
  3  2  0  0  0  0  0  0  0  0999 V2000
   -0.0344    0.9775    0.0076 O   0  0  0  0  0  0  0  0  0  0  0  0
    0.0648    0.0206    0.0015 H   0  0  0  0  0  0  0  0  0  0  0  0
    0.8718    1.3008    0.0007 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0  0  0  0
  3  1  1  0  0  0  0
M  END
$$$$
gdb_2


  3  2  0  0  0  0  0  0  0  0999 V2000
   -0.0133    1.1325    0.0083 C   0  0  0  0  0  0  0  0  0  0  0  0
    0.0023   -0.0192    0.0019 N   0  0  0  0  0  0  0  0  0  0  0  0
   -0.0278    2.1989    0.0142 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  3  0  0  0  0
  1  3  1  0  0  0  0
M  CHG  1   2  -1
M  END
$$$$
gdb_3


  1  0  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 F   0  0  0  0  0  0  0  0  0  0  0  0
M  END
$$$$
"""
CSV = "mol_id,A,alpha,homo\ngdb_1,1.5,6.31,-0.3\ngdb_2,,12.99,-0.4\ngdb_3,0,3.5,0\n"


def write(folder, sdf=SDF, table=CSV):
    (folder / "gdb9.sdf").write_text(sdf)
    (folder / "gdb9.sdf.csv").write_text(table)
    return folder


def molecules(count, seed=0, kinds=4):
    """Random graphs of 1 to 6 atoms, some without a bond."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        atoms = 1 + i % 6
        pairs = [(j, k) for j in range(atoms) for k in range(j) if rng.random() < 0.6]
        ends = np.array([(*pair, rng.integers(kinds)) for j, k in pairs for pair in ((j, k), (k, j))], int)
        ends = ends.reshape(-1, 3)
        x = rng.normal(size=(atoms, 11)).astype(np.float32)
        edge_attr = np.eye(4, dtype=np.float32)[ends[:, 2]]
        result.append(Molecule(x, ends[:, :2].T.astype(np.int32), edge_attr, float(np.float32(rng.uniform(1, 5)))))
    return result


def in_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def convolve(params, x, molecule):
    """NNConv with its loops, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    out = np.zeros((len(x), p["root"]["kernel"].shape[1]))
    for i in range(len(x)):
        out[i] = x[i] @ p["root"]["kernel"] + p["root"]["bias"]
        for (source, target), attr in zip(molecule.edge_index.T, molecule.edge_attr.astype(np.float64), strict=True):
            if target == i:
                hidden = np.maximum(attr @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
                h = (hidden @ p["matrix"]["kernel"] + p["matrix"]["bias"]).reshape(x.shape[1], -1)
                out[i] += x[source] @ h
    return out


def evaluate(params, molecule):
    """The model with its loops, in float64."""
    x = molecule.x.astype(np.float64)
    for conv in params["convs"].values() if isinstance(params["convs"], dict) else params["convs"]:
        x = np.maximum(convolve(conv, x, molecule), 0)
    for name in ("hidden", "out"):
        layer = params[name]
        x = (x.sum(axis=0) if x.ndim == 2 else np.maximum(x, 0)) @ np.asarray(layer["kernel"], np.float64)
        x = x + np.asarray(layer["bias"], np.float64)
    return x[0]


def perturbed(params):
    """Parameters all different from zero, so that a lost bias shows."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return treedef.unflatten(noisy)


@pytest.mark.usefixtures("x64")
def test_the_model_is_the_sum_over_neighbours_written_out():
    task = Qm9(molecules(24), batch_size=7)
    params = in_float64(perturbed(task.init(jax.random.key(0))))
    data = in_float64(task.split(jax.random.key(1)))
    index = jnp.arange(24)
    expected = np.array([evaluate(params, molecule) for molecule in task.molecules])
    np.testing.assert_allclose(task.predict(params, data, index), expected, rtol=1e-12, atol=1e-10)
    batch = jax.tree.map(lambda leaf: leaf[-1], task.validation(data))
    chosen = np.asarray(batch["index"])[np.asarray(batch["weight"]) > 0]
    assert len(chosen) == 12 - 7
    alpha = np.array([molecule.alpha for molecule in task.molecules])
    sums = task.measure(params, data, batch)
    assert sums["count"] == len(chosen)
    np.testing.assert_allclose(sums["loss"], np.sum((expected - alpha)[chosen] ** 2), rtol=1e-10)
