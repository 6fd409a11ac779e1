"""Delayed generalisation of a graph network on 100 QM9 molecules: `python -m examples.qm9`."""

import contextlib
import csv
import dataclasses
import itertools
import math
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .harness.batches import Batch
from .harness.cli import main
from .harness.config import Config, Experiment, Preset, Run
from .harness.downloads import fetch
from .harness.errors import UserError, require
from .harness.optimizers import Filtering, Optimization
from .harness.task import Data, Task
from .harness.torch_init import linear

SOURCES = ("https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/molnet_publish/",)
FILES = {"qm9.zip": None}  # holds gdb9.sdf and gdb9.sdf.csv; its hash is not known, so its first molecules are checked
PREPARED = "qm9_first_100_graphs.npz"  # the same graphs as arrays, see read_prepared
MOLECULES = 100
UNCHARACTERIZED = {"gdb_58", "gdb_61", "gdb_80"}  # left out by QM9's authors; the next one is gdb_185
FIRST_ALPHAS = (13.21, 9.46, 6.31, 16.28, 12.99, 14.18, 23.95, 16.97)  # CH4, NH3, H2O, C2H2, HCN, CH2O, C2H6, CH3OH
ATOMIC_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
ATOM_FEATURES, BOND_FEATURES = 11, 4

# Suffixes name the axes: b molecule of the batch, n atom, e bond (one for each direction), k kind of bond, a bond
# feature, d channel. Where there is an n and no b, the batch is one graph, its molecules side by side.
Arrays = Mapping[str, jax.Array]


class EdgeConditionedConv(nnx.Module):
    """PyTorch Geometric's NNConv, whose aggregation is the sum.

    x'_i = W_root x_i + b + Σ_j x_j h(e_ji) over the neighbours j of atom i, where the network h, 4 → 32 (ReLU) →
    in·out, makes a matrix (in, out) of the features of a bond. It starts as there (2.0 and later): b = 0, W_root
    uniform in ±1/√in, h as PyTorch's linear layers do.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.root = linear(in_features, out_features, zero_bias=True, rngs=rngs)
        self.hidden = linear(BOND_FEATURES, 32, rngs=rngs)
        self.matrix = linear(32, in_features * out_features, rngs=rngs)

    def __call__(self, x_nd: jax.Array, bonds: Arrays, kinds_ka: jax.Array) -> jax.Array:
        """The new features of all atoms."""
        n, d = x_nd.shape
        k = kinds_ka.shape[0]
        # There are few kinds of bonds: h is taken once a kind, and neighbours by the same kind are summed before it.
        h_kdd = self.matrix(jax.nn.relu(self.hidden(kinds_ka)))
        sums_nkd = jax.ops.segment_sum(x_nd[bonds["source"]], bonds["target"] * k + bonds["kind"], n * k)
        return self.root(x_nd) + sums_nkd.reshape(n, k * d) @ h_kdd.reshape(k * d, -1)


class GraphNet(nnx.Module):
    """Two convolutions 11 → 32 → 16 with ReLU, the sum over the atoms, then 16 → 32 (ReLU) → 1."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convs = nnx.List([EdgeConditionedConv(m, n, rngs=rngs) for m, n in ((ATOM_FEATURES, 32), (32, 16))])
        self.hidden = linear(16, 32, rngs=rngs)
        self.out = linear(32, 1, rngs=rngs)

    def __call__(self, x_bnd: jax.Array, real_bn: jax.Array, bonds: Arrays, kinds_ka: jax.Array) -> jax.Array:
        """One output a molecule: (b,)."""
        b, n, d = x_bnd.shape
        x_nd = x_bnd.reshape(b * n, d)
        for conv in self.convs:
            x_nd = jax.nn.relu(conv(x_nd, bonds, kinds_ka))
        sums_bd = jnp.where(real_bn[..., None], x_nd.reshape(b, n, -1), 0).sum(axis=1)
        return self.out(jax.nn.relu(self.hidden(sums_bd)))[:, 0]


class Molecule(NamedTuple):
    """A graph as PyTorch Geometric has it, hydrogens included."""

    x: np.ndarray  # (atoms, 11) float32: one-hot H C N O F, atomic number, aromatic, sp, sp2, sp3, H neighbours
    edge_index: np.ndarray  # (2, 2 bonds) int32: source and target of both directions, sorted
    edge_attr: np.ndarray  # (2 bonds, 4) float32: one-hot single, double, triple, aromatic
    alpha: float  # isotropic polarizability in a0^3


def load(data_dir: Path | None) -> list[Molecule]:
    """The first 100 molecules, from the prepared arrays, from gdb9.sdf and gdb9.sdf.csv, or from qm9.zip with these.

    Raises:
      UserError: A file is missing or damaged, does not begin with QM9's molecules or could not be downloaded.
    """
    if data_dir is not None and (data_dir / PREPARED).is_file():
        path = data_dir / PREPARED
        molecules = read_prepared(path)
    elif data_dir is not None and (data_dir / "gdb9.sdf").is_file():
        path = data_dir
        molecules = read_raw(data_dir, MOLECULES)
    else:
        path = fetch(FILES, SOURCES, data_dir)["qm9.zip"]
        try:
            molecules = read_raw(zipfile.Path(path), MOLECULES)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and get it again from {SOURCES[0]}") from error
    alphas = tuple(molecule.alpha for molecule in molecules[: len(FIRST_ALPHAS)])
    known = all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(alphas, FIRST_ALPHAS, strict=False))
    if len(molecules) != MOLECULES or not known:
        raise UserError(
            f"{path} must begin with the {MOLECULES} first molecules of QM9, whose polarizabilities are "
            f"{FIRST_ALPHAS} ..., got {len(molecules)} with {alphas} ...; get it from {SOURCES[0]}"
        )
    return molecules


def read_prepared(path: Path) -> list[Molecule]:
    """Molecules whose arrays are concatenated: x, edge_index, edge_attr, y, and where each begins, *_offset."""
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            atoms, edges = (file[f"{name}_offset"] for name in ("node", "edge"))
            return [
                Molecule(x, edge_index, edge_attr, float(y[1]))
                for x, edge_index, edge_attr, y in zip(
                    np.split(file["x"], atoms[1:-1]),
                    np.split(file["edge_index"], edges[1:-1], axis=1),
                    np.split(file["edge_attr"], edges[1:-1]),
                    file["y"],
                    strict=True,
                )
            ]
    except (ValueError, LookupError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); put it there again, or gdb9.sdf and gdb9.sdf.csv") from error


def read_raw(folder: Path | zipfile.Path, count: int) -> list[Molecule]:
    """The first `count` molecules of gdb9.sdf and gdb9.sdf.csv but for the uncharacterized; nothing after them is read.

    As in PyTorch Geometric, whose reader does not sanitize the molecules, nothing is aromatic or has a hybridization.
    """
    sdf, table = folder / "gdb9.sdf", folder / "gdb9.sdf.csv"
    molecules: list[Molecule] = []
    with contextlib.ExitStack() as stack:
        try:
            lines, rows = (
                stack.enter_context(path.open(encoding="utf-8", errors="replace", newline="")) for path in (sdf, table)
            )
        except FileNotFoundError as error:
            missing = table if sdf.exists() else sdf
            raise UserError(f"{missing} is missing; it is in {SOURCES[0]}qm9.zip, with its companion") from error
        pairs = itertools.zip_longest(records(lines), csv.DictReader(rows))
        for number, (record, row) in enumerate(pairs, 1):
            place = f"record {number}"
            if record is None or row is None:
                ended, other = (sdf, table) if record is None else (table, sdf)
                raise UserError(f"{ended} ends before {place}, which {other} has; get both again from {SOURCES[0]}")
            path = sdf
            try:
                name = record[0].strip()
                graph = read_record(record)
                path = table
                alpha = read_alpha(row, name)
            except ValueError as error:
                raise UserError(f"{path}, {place}: {error}; get the files again from {SOURCES[0]}qm9.zip") from error
            if name not in UNCHARACTERIZED:
                molecules.append(Molecule(*graph, alpha))
            if len(molecules) == count:
                return molecules
    raise UserError(f"{sdf} must have at least {count} molecules, got {len(molecules)}; get it from {SOURCES[0]}")


def records(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each record of an SDF file; its end, `$$$$`, is the last one unless the file is cut short."""
    record: list[str] = []
    for line in lines:
        record.append(line.rstrip())
        if record[-1] == "$$$$":
            yield record
            record = []
    if any(record):
        yield record


def read_record(lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atom features, edge index and edge features of a V2000 record; ValueError says what is wrong with it."""
    if lines[-1] != "$$$$":
        raise ValueError("it is cut short (the file ends before $$$$)")
    counts = lines[3] if len(lines) > 4 else ""
    try:
        atoms, bonds = int(counts[0:3]), int(counts[3:6])
    except ValueError:
        atoms = bonds = 0
    if atoms < 1 or bonds < 0 or not counts.endswith("V2000"):
        raise ValueError(f"line 4 must begin with the numbers of atoms and bonds and end in V2000, got {counts!r}")
    if not "".join(lines[4 + atoms + bonds :]).startswith("M  "):
        raise ValueError(
            f"{atoms} lines of atoms and {bonds} of bonds must follow line 4, and then one that begins with M"
        )

    symbols = [line[31:34].strip() for line in lines[4 : 4 + atoms]]
    for number, symbol in enumerate(symbols, 1):
        if symbol not in ATOMIC_NUMBERS:
            raise ValueError(f"atom {number} must be one of {', '.join(ATOMIC_NUMBERS)}, got {symbol!r}")
    source, target, order = [], [], []
    for line in lines[4 + atoms : 4 + atoms + bonds]:
        try:
            first, second, kind = (int(line[i : i + 3]) for i in (0, 3, 6))
        except ValueError:
            first = second = kind = 0
        if not (1 <= first <= atoms and 1 <= second <= atoms and first != second and 1 <= kind <= BOND_FEATURES):
            raise ValueError(f"a bond must have two of the {atoms} atoms and an order of 1 to 4, got {line!r}")
        source += [first - 1, second - 1]
        target += [second - 1, first - 1]
        order += [kind - 1, kind - 1]
    edge_index = np.array([source, target], np.int32)
    sort = np.lexsort(edge_index[::-1])
    edge_index = edge_index[:, sort]

    x = np.zeros((atoms, ATOM_FEATURES), np.float32)
    x[np.arange(atoms), [list(ATOMIC_NUMBERS).index(symbol) for symbol in symbols]] = 1
    x[:, 5] = [ATOMIC_NUMBERS[symbol] for symbol in symbols]
    np.add.at(x[:, 10], edge_index[1], x[edge_index[0], 0])
    return x, edge_index, np.eye(BOND_FEATURES, dtype=np.float32)[np.array(order, int)[sort]]


def read_alpha(row: Mapping[str, str | None], name: str) -> float:
    """The polarizability in a row, which must be that of the molecule `name`; ValueError says what is wrong with it."""
    if row.get("mol_id") != name:
        raise ValueError(f"mol_id must be {name}, as in gdb9.sdf, got {row.get('mol_id')!r}")
    try:
        alpha = float(row.get("alpha") or "")
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha of {name} must be a positive number, got {row.get('alpha')!r}")
    return alpha


def pad(molecules: Sequence[Molecule]) -> dict[str, np.ndarray]:
    """Arrays whose first axis is the molecule; each has an atom of padding, to which the bonds of padding lead."""
    atoms = 1 + max(len(molecule.x) for molecule in molecules)
    bonds = max(len(molecule.edge_attr) for molecule in molecules)
    kinds, kind = np.unique(np.concatenate([m.edge_attr for m in molecules]), axis=0, return_inverse=True)
    of_molecule = np.split(kind.reshape(-1), np.cumsum([len(m.edge_attr) for m in molecules]))
    shape = len(molecules), bonds
    arrays = {
        "x": np.zeros((len(molecules), atoms, ATOM_FEATURES), np.float32),
        "real": np.zeros((len(molecules), atoms), bool),
        "source": np.full(shape, atoms - 1, np.int32),
        "target": np.full(shape, atoms - 1, np.int32),
        "kind": np.zeros(shape, np.int32),
        "alpha": np.array([molecule.alpha for molecule in molecules], np.float32),
        "kinds": kinds,  # (kinds, 4), the different rows of edge features
    }
    for i, molecule in enumerate(molecules):
        arrays["x"][i, : len(molecule.x)] = molecule.x
        arrays["real"][i, : len(molecule.x)] = True
        for name, values in zip(("source", "target", "kind"), (*molecule.edge_index, of_molecule[i]), strict=True):
            arrays[name][i, : len(values)] = values
    return arrays


@dataclasses.dataclass(frozen=True)
class Qm9(Task):
    """Delayed generalisation on QM9: regression of the polarizability, in a0^3 and not scaled, so losses are in a0^6.

    A random half of 100 molecules is trained on; it depends on the seed, as in the authors' code.
    """

    metric = "loss"

    batch_size: int = 32
    """Molecules per batch."""
    init_scale: float = 3.0
    """Factor of all initial parameters: what delays generalisation here."""
    epochs: int = 50
    """Passes over the training molecules between two evaluations."""
    data_dir: Path | None = None
    """Folder with qm9.zip, gdb9.sdf and gdb9.sdf.csv, or the prepared arrays; None downloads qm9.zip once."""

    def __post_init__(self) -> None:
        """Validate the numbers."""
        for name in ("batch_size", "epochs"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))

    @property
    def train_size(self) -> int:
        """Number of molecules that are trained on."""
        return MOLECULES // 2

    def model(self, key: jax.Array) -> GraphNet:
        """The model, freshly initialised as PyTorch and PyTorch Geometric do."""
        return GraphNet(rngs=nnx.Rngs(params=key))

    def load(self) -> dict[str, np.ndarray]:
        """The padded molecules."""
        return pad(load(self.data_dir))

    def split(self, shared: Mapping[str, np.ndarray], key: jax.Array) -> dict[str, jax.Array]:
        """The numbers of the molecules to train on and to validate on, drawn at random."""
        order = jax.random.permutation(key, len(shared["alpha"]))
        return {"train": order[: self.train_size], "val": order[self.train_size :]}

    def predict(self, params: Any, data: Data, index: jax.Array) -> jax.Array:
        """The polarizabilities that the model gives for molecules by number."""
        first = data["real"].shape[1] * jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        bonds = {
            "source": (first + data["source"][index]).reshape(-1),
            "target": (first + data["target"][index]).reshape(-1),
            "kind": data["kind"][index].reshape(-1),
        }
        return self.with_params(params)(data["x"][index], data["real"][index], bonds, data["kinds"])

    def metrics(self, params: Any, data: Data, batch: Batch) -> dict[str, jax.Array]:
        """Squared error of each molecule of a batch."""
        return {"loss": (self.predict(params, data, batch["index"]) - data["alpha"][batch["index"]]) ** 2}


PAPER = Config(
    Qm9(),
    Filtering(filter="ema", alpha=0.9, lamb=1.0),
    Optimization(optimizer="adamw", weight_decay=0.01, beta2=0.999, lr_warmup=0),
    Run(budget=100_000),
)
PRESETS = {
    "baseline": Preset(PAPER.replace(filter="none", weight_decay=0.0), "The paper's baseline"),
    "filter-only": Preset(
        PAPER.replace(weight_decay=0.0), "The paper's filter with the baseline's decay", ("baseline",)
    ),
    "decay-only": Preset(PAPER.replace(filter="none"), "The paper's decay without its filter"),
    "paper": Preset(PAPER, "The paper's filter and decay", ("decay-only",)),
}
EXPERIMENT = Experiment("qm9", PRESETS, default="paper")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
