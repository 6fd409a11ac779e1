"""The benchmark scripts: they run, and what they find without a clock holds."""

import dataclasses
import functools
import inspect
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import report, run_command, switch_on
from benchmarks.cost import choices, compiled, step_cost, tasks, throughput, vs_torch
from benchmarks.cost.timing import in_turn, in_words, ratios, spread
from benchmarks.study import __main__ as study
from benchmarks.study import board, circuits, edge, memory, noise, raised, region, spectra, trajectories
from examples import mnist, modular
from examples.harness import train
from examples.harness.errors import UserError
from examples.harness.optimizers import make_tx
from examples.harness.train import advance, init

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.mark.parametrize(
    "module",
    [
        report,
        switch_on,
        step_cost,
        tasks,
        throughput,
        vs_torch,
        choices,
        compiled,
        study,
        board,
        circuits,
        edge,
        memory,
        noise,
        raised,
        region,
        spectra,
        trajectories,
    ],
)
def test_a_command_explains_all_its_flags(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--help"])
    with pytest.raises(SystemExit) as stopped:
        run_command(module.main, module.__name__)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m {module.__name__}" in shown
    for name in inspect.signature(module.main).parameters:
        explained = re.search(rf"^  {name}: (.{{14}})", inspect.getdoc(module.main), re.MULTILINE)
        assert explained, name
        assert explained[1] in shown


def test_a_command_tells_what_is_wrong_and_its_exit_code_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "--windows", "0"])
    with pytest.raises(SystemExit) as stopped:
        run_command(spectra.main, "benchmarks.study.spectra")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --windows must be at least 1, got 0\n"


def test_contenders_take_turns():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_spread_and_ratios_by_hand():
    assert in_words({"median": 0.0034, "low": 0.002, "high": 0.005}, ".1f", 1e3) == "3.4 (2.0 to 5.0)"
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts how XLA's CPU compiler fuses")
def test_each_array_of_a_filter_is_written_by_one_pass_and_nothing_is_copied(tmp_path):
    """By XLA's count AdamW moves 40 bytes per parameter, 60 with the EMA, 88 with the moving average of any window."""
    out = tmp_path / "step_cost.json"
    step_cost.main((200_000,), (5, 50), rounds=2, updates=400_000, out=out)
    rows = json.loads(out.read_text())["rows"]
    cells = [(layout, mode) for layout in ("few", "many") for mode in ("step", "scan")]
    assert [(r["layout"], r["mode"]) for r in rows[::4]] == cells
    for row in rows:
        expected = {"none": 40, "ema": 60, "ma-5": 88, "ma-50": 88}[row["filter"]]
        assert row["compiled_bytes"] == pytest.approx(expected, rel=0.02), row
        arrays = {"none": 2, "ema": 3, "ma-5": 10, "ma-50": 55}[row["filter"]]
        assert row["state_bytes"] == pytest.approx(4 * arrays, rel=0.01)
        assert row["ratio"]["median"] > 0
        if row["mode"] == "step":
            assert row["temporary_bytes"] < 0.1


def test_cells_that_need_too_much_memory_are_left_out_and_told(tmp_path, capsys):
    out = tmp_path / "step_cost.json"
    step_cost.main((1000,), (3, 1000), rounds=2, updates=1000, memory=0.001, out=out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["filter"] for row in rows[:4]] == ["none", "ema", "ma-3", "ma-1000"]
    assert rows[3]["left_out"] == "needs 0.00403 GB"
    assert "left out: needs 0.00403 GB" in capsys.readouterr().out


@pytest.fixture
def small():
    """An experiment that compiles soon: the mod-97 one in small."""
    sizes = {"p": 7, "batch_size": 8, "dim": 8, "depth": 1, "heads": 2}
    presets = {name: preset._replace(config=preset.config.replace(**sizes)) for name, preset in modular.PRESETS.items()}
    return dataclasses.replace(modular.EXPERIMENT, presets=presets)


def test_throughput_runs_many_seeds(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "EXPERIMENT", small)
    throughput.main(runs=(1, 3), rounds=2, out=tmp_path / "t.json")
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == [1, 3]
    assert "| 3 " in capsys.readouterr().out


def test_matrix_products_are_counted_as_they_are_executed():
    x = jnp.ones((4, 5))
    products = lambda x: lax.fori_loop(0, 3, lambda _, x: x @ x.T @ x, x).sum()
    function = jax.jit(lambda x: lax.cond(x[0, 0] > 0, jax.checkpoint(products), jnp.sum, x))
    once = 2 * 4 * 4 * 5
    assert tasks.matmul_flop(function, x) == 3 * 2 * once
    assert tasks.matmul_flop(function, -x) == 0
    # Of y = x w and its two gradients; x.T x on top.
    gradients = jax.jit(jax.grad(lambda pair: jnp.sum((pair[0] @ pair[1]) ** 2)))
    assert tasks.matmul_flop(gradients, (x, x.T)) == 3 * once
    endless = jax.jit(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x.T @ x, x))
    with pytest.raises(NotImplementedError, match="within while are not counted"):
        tasks.matmul_flop(endless, x)


def test_products_are_listed_with_their_shapes_and_timed_alone(monkeypatch):
    x, w = jnp.ones((4, 5)), jnp.ones((5, 3))
    step = lambda w, _: (w + x.T @ (x @ w), None)
    traced = jax.jit(lambda w: lax.scan(step, jax.jit(lambda w: 2 * w)(w), length=7)).trace(w).jaxpr.jaxpr
    counts = tasks.products(traced)
    shapes = {tuple(shape for shape, _ in operands): count for (_, operands), count in counts.items()}
    assert shapes == {((4, 5), (5, 3)): 7, ((5, 4), (4, 3)): 7}
    monkeypatch.setattr(tasks, "CALL", float("inf"))
    assert tasks.products_seconds(counts, rounds=2) is None  # too small
    monkeypatch.setattr(tasks, "CALL", 0.0)
    seconds = tasks.products_seconds(counts, rounds=2)
    assert seconds is not None
    assert seconds > 0
    choice = jax.jit(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x.T @ x, jnp.sin, x)).trace(x).jaxpr.jaxpr
    with pytest.raises(NotImplementedError, match="within cond are executed depends on data"):
        tasks.products(choice)


def test_the_arithmetic_of_mnist_by_hand():
    """Forwards 784-200-200-10, backwards twice that less the gradient of the pixels, and 50 batches per 250 steps."""
    products = [784 * 200, 200 * 200, 200 * 10]
    by_hand = 2 * 200 * (3 * sum(products) - products[0] + 50 / 250 * sum(products))
    data = {"images": jnp.zeros((11_000, 784)), "labels": jnp.zeros(11_000, jnp.int32)}
    config = mnist.EXPERIMENT.base
    tx, key = make_tx(config.hyper), jax.random.key(0)
    data |= config.task.split(data, key)
    run = jax.jit(functools.partial(advance, config.task, tx))
    flop = tasks.matmul_flop(run, key, data, init(config.task, tx, key)) / config.task.steps
    assert flop == pytest.approx(by_hand, rel=1e-5)  # losses and accuracies are summed by products, too
    counts = tasks.products(run.trace(key, data, init(config.task, tx, key)).jaxpr.jaxpr)
    listed = 0.0
    for ((contracted, _), _), ((left, _), (right, _)) in counts.elements():
        listed += 2 * np.prod(left) * np.prod(right) / np.prod([left[axis] for axis in contracted])
    assert listed / config.task.steps == pytest.approx(by_hand, rel=1e-5)


def test_a_task_whose_data_cannot_be_had_is_left_out_and_told(small, tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    found = {"small": small, "mnist": mnist.EXPERIMENT}
    monkeypatch.setattr(tasks, "find_experiment", found.__getitem__)
    monkeypatch.setattr(tasks, "SIDE", 64)
    rows = tasks.measure(tuple(found), threads=2, rounds=2, data_dir=tmp_path)
    assert [(row["task"], row["threads"]) for row in rows] == [("small", 2), ("mnist", 2)]
    assert rows[0]["share"] > 0
    assert "train-images-idx3-ubyte.gz is missing" in rows[1]["left_out"]
    table = tasks.table({"device": "", "versions": {"jax": ""}, "rounds": 2, "rows": rows})
    assert re.search(r"mnist .*\| left out: .* is missing", table)


def test_each_choice_is_timed_with_and_without(small, monkeypatch):
    def shapes(preset):
        state = train.make_tx(small.preset(preset).hyper).init(small.base.task.init(jax.random.key(0)))
        return sorted(leaf.shape for leaf in jax.tree.leaves(state))

    plain, stacked = shapes("adamw-1"), shapes("muon")
    with choices.flattened():
        assert max(map(len, shapes("adamw-1"))) == 1 < max(map(len, plain))
    with choices.separate_matrices():
        assert len(shapes("muon")) > len(stacked)
    assert (shapes("adamw-1"), shapes("muon")) == (plain, stacked)

    some = choices.Choice("arrays of one shape as one", choices.separate_matrices, "small muon")
    monkeypatch.setattr(choices, "CHOICES", (some,))
    monkeypatch.setattr(choices, "find_experiment", {"small": small}.__getitem__)
    rows = choices.measure(rounds=2, data_dir=None)
    assert rows[0].keys() == {f"{a}_{b}" for a in ("first_chunk", "step") for b in ("with", "without")}
    assert min(rows[0].values()) > 0
    table = choices.table({"device": "", "versions": {"jax": ""}, "rounds": 2, "processes": [rows, rows]})
    assert re.search(r"\| arrays of one shape as one *\| small muon *\|", table)


def test_the_committed_results_make_tables():
    for script in (step_cost, tasks, throughput, vs_torch, choices):
        result = json.loads(script.OUT.read_text())
        lines = script.table(result).splitlines()
        assert sum(line.startswith("|") for line in lines) > 4
        assert result["versions"]["jax"] in lines[0]


def test_the_site_is_made_from_the_result_files(tmp_path):
    docs, none = tmp_path / "docs", dict.fromkeys(report.tables(tmp_path, tmp_path), "none\n")
    for path in report.DOCS.rglob("*.md"):
        copy = docs / path.relative_to(report.DOCS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(report.fill(path.read_text(), none))
    shutil.rmtree(docs / "tables")
    report.main(docs=docs)
    for path in report.DOCS.rglob("*.md"):
        assert (docs / path.relative_to(report.DOCS)).read_text() == path.read_text(), path
    assert len(list((docs / "tables").iterdir())) == len(list((report.DOCS / "tables").iterdir())) == len(report.PAGES)
    made = {path.name for path in (docs / "pictures").iterdir()}
    runs = {"modular_ema.png", "mnist_curves.png", "shakespeare_curves.png", "quickstart.png"}  # made while training
    assert {path.name for path in (report.DOCS / "pictures").iterdir()} == made | runs
    with pytest.raises(UserError, match=r"--study must be a folder with results .* got .*none"):
        report.main(tmp_path / "none")


def test_a_table_that_no_page_has_is_told(tmp_path):
    (tmp_path / "page.md").write_text("<!-- tasks -->\n")
    with pytest.raises(ValueError, match=r"no page in .* has the marks of throughput; write <!-- throughput -->"):
        report.pages(tmp_path, {"throughput": ""})
    with pytest.raises(ValueError, match=r"the text lacks the end of tasks; write <!-- end of tasks -->"):
        report.fill("<!-- tasks -->\n", {"tasks": ""})
    made = report.tables(tmp_path / "none", tmp_path / "none")
    assert all(table.startswith("Not measured yet") for table in made.values())
