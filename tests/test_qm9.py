"""The QM9 experiment: its facts, its files, and what happens when they are missing or damaged."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import qm9, resume
from examples.harness import downloads
from examples.harness.cli import main
from examples.harness.errors import UserError
from examples.harness.train import keys
from examples.qm9 import EXPERIMENT, Molecule, Qm9, load, pad, read_raw

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


def read(folder):
    return list(read_raw(folder, "gdb9.sdf"))


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
    for i in range(2):
        x = np.maximum(convolve(params["convs"][i], x, molecule), 0)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    hidden = np.maximum(x.sum(axis=0) @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
    return (hidden @ p["out"]["kernel"] + p["out"]["bias"])[0]


def parameters(seed=0):
    """Parameters of the model in float64, all different from zero, so that a lost bias shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(Qm9().init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.uniform(-0.3, 0.3, leaf.shape), shapes)


def data_of(task, graphs, seed):
    """All arrays of a task on these molecules."""
    shared = pad(graphs)
    return jax.tree.map(jnp.asarray, {**shared, **task.split(shared, jax.random.key(seed))})


@pytest.mark.usefixtures("x64")
def test_the_model_is_the_sum_over_neighbours_written_out(monkeypatch):
    monkeypatch.setattr(qm9, "MOLECULES", 24)
    graphs, task, params = molecules(24), Qm9(batch_size=7), parameters()
    expected = np.array([evaluate(params, molecule) for molecule in graphs])
    data = in_float64(data_of(task, graphs, 1))
    predicted = jax.jit(task.predict)(params, data, jnp.arange(24))
    np.testing.assert_allclose(predicted, expected, rtol=1e-12, atol=1e-12)

    batch = jax.tree.map(lambda leaf: leaf[-1], task.validation(data))
    chosen = np.asarray(data["val"])[7:]
    metrics = jax.jit(task.metrics)(params, data, batch)
    assert batch["weight"].tolist() == [1] * 5 + [0] * 2
    assert set(metrics) == {"loss"}
    alpha = np.array([molecule.alpha for molecule in graphs])
    np.testing.assert_allclose(metrics["loss"][:5], (expected - alpha)[chosen] ** 2, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_neither_padding_nor_the_order_of_atoms_and_bonds_matters():
    few, params, rng = molecules(6), parameters(), np.random.default_rng(1)
    expected = np.array([evaluate(params, molecule) for molecule in few])
    permuted = []
    for molecule in few:
        new_place, edge_order = (rng.permutation(len(array)) for array in (molecule.x, molecule.edge_attr))
        x = np.zeros_like(molecule.x)
        x[new_place] = molecule.x
        edge_index = new_place.astype(np.int32)[molecule.edge_index][:, edge_order]
        permuted.append(Molecule(x, edge_index, molecule.edge_attr[edge_order], molecule.alpha))
    assert not np.array_equal(permuted[5].x, few[5].x)
    large = Molecule(np.ones((9, 11), np.float32), np.ones((2, 40), np.int32), np.eye(4, dtype=np.float32)[[3] * 40], 1)
    data = in_float64({name: jnp.asarray(array) for name, array in pad([*few, *permuted, large]).items()})
    assert data["x"].shape[1] == 10
    predicted = jax.jit(Qm9().predict)(params, data, jnp.arange(12))
    np.testing.assert_allclose(predicted, [*expected, *expected], rtol=1e-12, atol=1e-12)


def test_facts_of_the_task():
    task, graphs = Qm9(), molecules(100)
    params = jax.jit(task.init)(jax.random.key(0))
    conv1 = (4 * 32 + 32) + (32 + 1) * 11 * 32 + 11 * 32 + 32
    conv2 = (4 * 32 + 32) + (32 + 1) * 32 * 16 + 32 * 16 + 16
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == conv1 + conv2 + (16 + 1) * 32 + (32 + 1) == 30_321
    for i, fan_in in ((0, 11), (1, 32)):
        conv = params["convs"][i]
        assert not conv["root"]["bias"].any()
        assert 0.9 * 3 * fan_in**-0.5 < jnp.abs(conv["root"]["kernel"]).max() <= 3 * fan_in**-0.5
        for name, fan_in in (("hidden", 4), ("matrix", 32)):
            for leaf in conv[name].values():
                assert 0.8 * 3 * fan_in**-0.5 < jnp.abs(leaf).max() <= 3 * fan_in**-0.5

    data, other = (data_of(task, graphs, seed) for seed in (0, 1))
    np.testing.assert_array_equal(np.sort(np.r_[data["train"], data["val"]]), np.arange(100))
    assert len(data["train"]) == 50
    assert set(data["train"].tolist()) != set(other["train"].tolist())
    np.testing.assert_array_equal(data["alpha"], np.array([m.alpha for m in graphs], np.float32))

    batches = jax.tree.map(np.asarray, jax.jit(task.batches)(data, jax.random.key(1)))
    assert task.steps == 100
    assert batches["index"].shape == (100, 32)
    assert batches["weight"].sum(axis=1).tolist() == [32, 18] * 50
    epochs = batches["index"][batches["weight"] > 0].reshape(50, 50)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.sort(data["train"]), (50, 1)))
    assert not np.array_equal(epochs[0], epochs[1])


def test_gradients_are_finite_and_reach_every_parameter(monkeypatch):
    monkeypatch.setattr(qm9, "MOLECULES", 12)
    task = Qm9(batch_size=12)
    data = data_of(task, molecules(12), 0)

    @jax.jit
    def gradients(key):
        batch = jax.tree.map(lambda leaf: leaf[0], task.validation(data))
        loss_fn = lambda params: batch["weight"] @ task.metrics(params, data, batch)["loss"]
        return jax.grad(loss_fn)(task.init(key))

    grads = gradients(jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path


@pytest.mark.slow
def test_a_run_that_is_told_its_folder_is_resumed_from_there(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(qm9, "MOLECULES", 8)
    monkeypatch.setattr(qm9, "load", lambda data_dir: asked.append(data_dir) or molecules(8))
    out = tmp_path / "run"
    assert main(EXPERIMENT, ["baseline", "--max-steps", "1", "--data-dir", str(tmp_path), "--out", str(out)]) == 0
    assert (out / "metrics.csv").read_text().startswith("step,train_loss,val_loss\n50,")
    assert "best validation loss" in capsys.readouterr().out
    for flags, folder in (([], tmp_path), (["--data-dir", "moved"], Path("moved"))):
        _, run, _ = resume.parse([str(out), "--max-steps", "51", *flags])
        run.task.load()
        assert asked[-1] == folder
    assert len(asked) == 3


def test_the_raw_files_by_hand(tmp_path):
    water, cyanide, fluorine = read(write(tmp_path))
    zeros = [0, 0, 0, 0]
    np.testing.assert_array_equal(
        water.x, [[0, 0, 0, 1, 0, 8, *zeros, 2], [1, 0, 0, 0, 0, 1, *zeros, 0], [1, 0, 0, 0, 0, 1, *zeros, 0]]
    )
    np.testing.assert_array_equal(water.edge_index, [[0, 0, 1, 2], [1, 2, 0, 0]])
    np.testing.assert_array_equal(cyanide.x[:, 10], [1, 0, 0])
    np.testing.assert_array_equal(cyanide.edge_index, [[0, 0, 1, 2], [1, 2, 0, 0]])
    np.testing.assert_array_equal(cyanide.edge_attr.argmax(axis=1), [2, 0, 2, 0])
    assert (fluorine.x.shape, fluorine.edge_index.shape, fluorine.edge_attr.shape) == ((1, 11), (2, 0), (0, 4))
    assert [m.alpha for m in (water, cyanide, fluorine)] == [6.31, 12.99, 3.5]
    for molecule in (water, cyanide, fluorine):
        assert [array.dtype for array in molecule[:3]] == [np.float32, np.int32, np.float32]

    write(tmp_path, SDF.replace("\n", "\r\n"), CSV.replace("\n", "\r\n"))
    np.testing.assert_array_equal(read(tmp_path)[1].edge_attr, cyanide.edge_attr)
    write(tmp_path, SDF.replace("gdb_2", "gdb_58"), CSV.replace("gdb_2", "gdb_58"))
    assert [molecule.alpha for molecule in read(tmp_path)] == [6.31, 3.5]


@pytest.fixture
def three(monkeypatch):
    """The three hand-written molecules in place of the first 100."""
    monkeypatch.setattr(qm9, "MOLECULES", 3)
    monkeypatch.setattr(qm9, "FIRST_ALPHAS", (6.31, 12.99, 3.5))


@pytest.mark.usefixtures("three")
def test_nothing_after_the_last_molecule_is_read(tmp_path):
    write(tmp_path, SDF + "rubbish\n", CSV + "rubbish\n")
    assert len(load(tmp_path)) == 3


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("sdf", SDF[SDF.index("gdb_2") :], "gdb_2\n", ".IndexError"),
        ("sdf", "  1  3  1  0  0  0  0", "  1  3", ".ValueError"),
        ("sdf", "  3  2  0  0  0  0  0  0  0  0999", "  x  2", ".ValueError: .* '  x'"),
        ("sdf", "  3  2  0", "  0  2  0", ".ValueError"),
        ("sdf", "  3  2  0", "  2  3  0", ".ValueError"),
        ("sdf", "  3  2  0", "  3  1  0", "gdb_1 must have 3 atoms and 1 bonds between these"),
        ("sdf", "  1  2  3", "  1  4  3", "gdb_2 must have 3 atoms and 2 bonds between these, of order 1 to 4"),
        ("sdf", "  1  2  3", "  0  2  3", "gdb_2 must have 3 atoms and 2 bonds between these, of order 1 to 4"),
        ("sdf", "  1  2  3", "  1  2  0", "gdb_2 must have 3 atoms and 2 bonds between these, of order 1 to 4"),
        ("sdf", "  1  2  3", "  1  2  5", ".IndexError"),
        ("sdf", "  1  2  3", "  1     3", ".ValueError"),
        ("sdf", " N   0", " Xe  0", ".ValueError: 'Xe' is not in list"),
        ("sdf", "$$$$\ngdb_2", "gdb_2", "gdb_3 must be in the table with a positive alpha, got gdb_2 with 12.99"),
        ("sdf", SDF[SDF.index("gdb_3") :], "", ".IndexError"),
        ("csv", "12.99", "", ".ValueError: could not convert string to float"),
        ("csv", "12.99", "inf", "gdb_2 must be in the table with a positive alpha, got gdb_2 with inf"),
        ("csv", "gdb_2,,12.99,-0.4", "gdb_2", ".TypeError"),
        ("csv", "alpha", "beta", ".KeyError: 'alpha'"),
        ("csv", "gdb_2,,12.99,-0.4\n", "", "gdb_2 must be in the table with a positive alpha, got gdb_3 with 3.5"),
        ("csv", "gdb_3,0,3.5,0\n", "", r"must begin with the 3 first .* got 2 with .* \[6.31, 12.99\]"),
    ],
)
def test_damage_to_the_raw_files_is_named(file, old, new, message, tmp_path):
    assert old in (SDF if file == "sdf" else CSV)
    write(tmp_path, **{"sdf": {"sdf": SDF.replace(old, new, 1)}, "csv": {"table": CSV.replace(old, new, 1)}}[file])
    with pytest.raises(UserError, match=rf"(?s)gdb9.sdf .*{message}.*; get it from https://.*qm9.zip"):
        load(tmp_path)


def test_too_few_molecules_or_the_wrong_ones(tmp_path, monkeypatch):
    write(tmp_path)
    with pytest.raises(
        UserError, match=r"gdb9.sdf must begin with the 100 first .* got 3 with .*; get it from https://"
    ):
        load(tmp_path)
    monkeypatch.setattr(qm9, "MOLECULES", 3)
    monkeypatch.setattr(qm9, "FIRST_ALPHAS", (13.21, 9.46))
    with pytest.raises(UserError, match=r"must begin with the 3 first .* got 3 with .* \[6.31, 12.99\]"):
        load(tmp_path)
    monkeypatch.setattr(qm9, "FIRST_ALPHAS", (6.31, 12.99))
    assert len(load(tmp_path)) == 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"qm9.zip is missing; put it there \(from https://.*qm9.zip\) or leave out"):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "gdb9.sdf.csv").unlink()
    with pytest.raises(UserError, match=r"No such file or directory: .*gdb9.sdf.csv.*get it from https://.*qm9.zip"):
        load(tmp_path)


@pytest.fixture
def zipped(tmp_path, three):
    """The hand-written files in place of the published ones, in a ZIP archive."""
    with zipfile.ZipFile(tmp_path / "qm9.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gdb9.sdf", SDF)
        archive.writestr("gdb9.sdf.csv", CSV)
    return tmp_path / "qm9.zip"


def test_the_archive_is_read_without_unpacking(zipped):
    assert [molecule.alpha for molecule in load(zipped.parent)] == [6.31, 12.99, 3.5]
    assert list(zipped.parent.iterdir()) == [zipped]


def field(offset, value):
    """Damage that sets two bytes of each file's entry in the directory of an archive, and of the file's own header."""

    def damage(content):
        for mark, shift in ((b"PK\x01\x02", 2), (b"PK\x03\x04", 0)):
            *parts, last = content.split(mark)
            heads = [
                *parts[:1],
                *(part[: offset + shift] + value + part[offset + shift + 2 :] for part in [*parts[1:], last]),
            ]
            content = mark.join(heads)
        return content

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:200],
        lambda content: content.replace(content[60:80], b""),
        field(2, b"\x01\x00"),  # encrypted
        field(4, b"\x63\x00"),  # compressed in a way that is not known
    ],
    ids=["cut", "changed", "encrypted", "compression"],
)
def test_a_damaged_archive_is_named(damage, zipped):
    zipped.write_bytes(damage(zipped.read_bytes()))
    with pytest.raises(UserError, match=r"qm9.zip or its table cannot be read .*; get it from https://"):
        load(zipped.parent)


def test_an_archive_without_a_file_names_it(zipped):
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("gdb9.sdf", SDF)
    with pytest.raises(UserError, match=r"FileNotFoundError: .*qm9.zip.gdb9.sdf.csv\); get it from"):
        load(zipped.parent)


def test_the_download_is_cached_and_has_no_hash(zipped, monkeypatch):
    def retrieve(url, known_hash, fname, path):
        assert (url, known_hash, fname) == (f"{qm9.SOURCES[0]}qm9.zip", None, "qm9.zip")
        assert Path(path).name == "grokfast_jax"
        return str(zipped)

    monkeypatch.setattr(downloads.pooch, "retrieve", retrieve)
    assert len(load(None)) == 3


@needs_data
def test_the_raw_files_give_the_arrays_of_pytorch_geometric():
    raw = load(DATA)
    assert len(raw) == 100
    with np.load(DATA / "qm9_first_100_graphs.npz") as arrays:
        atoms, bonds = arrays["node_offset"], arrays["edge_offset"]
        for i, molecule in enumerate(raw):
            x, edge_attr = arrays["x"][atoms[i] : atoms[i + 1]], arrays["edge_attr"][bonds[i] : bonds[i + 1]]
            edge_index = arrays["edge_index"][:, bonds[i] : bonds[i + 1]]
            for ours, theirs in zip(molecule[:3], (x, edge_index, edge_attr), strict=True):
                np.testing.assert_array_equal(ours, theirs, strict=True)
        np.testing.assert_array_equal([molecule.alpha for molecule in raw], arrays["y"][:, 1])
    assert sum(len(molecule.edge_attr) for molecule in raw) == 1870
    padded = pad(raw)
    assert padded["x"].shape == (100, 18, 11)
    assert padded["source"].shape == (100, 32)
    np.testing.assert_array_equal(padded["kinds"], np.eye(4)[[2, 1, 0]])
    assert padded["real"].sum() == 1005


@needs_data
def test_least_squares_on_the_numbers_of_atoms_has_the_errors_that_the_readme_tells():
    graphs = load(DATA)
    counts = np.array([[1.0, *molecule.x[:, :5].sum(axis=0)] for molecule in graphs])
    alpha = np.array([molecule.alpha for molecule in graphs])
    errors = []
    for seed in range(5):
        parts = Qm9().split({"alpha": alpha}, keys(jax.random.key(seed)).split)
        train, val = np.asarray(parts["train"]), np.asarray(parts["val"])
        weights = np.linalg.lstsq(counts[train], alpha[train], rcond=None)[0]
        errors.append(np.mean((counts[val] @ weights - alpha[val]) ** 2))
    np.testing.assert_allclose(errors, [0.74, 1.13, 1.33, 1.20, 0.88], atol=0.006)
    assert np.var(alpha) == pytest.approx(102, abs=0.5)
