"""The benchmark scripts: they run, and what they find without a clock holds."""

import json

import jax
import numpy as np
import pytest

from benchmarks import best_of_batches, report, step_cost, throughput
from benchmarks.timing import in_turn, ratios, spread
from examples.harness.errors import UserError

from . import toy

pytestmark = pytest.mark.usefixtures("lenient")


def test_contenders_take_turns():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_spread_and_ratios_by_hand():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts how XLA's CPU compiler fuses")
def test_each_array_of_a_filter_is_written_by_one_pass_and_nothing_is_copied(tmp_path):
    """By XLA's count AdamW moves 40 bytes a parameter, 60 with the EMA and 88 with the moving average of any window."""
    out = tmp_path / "step_cost.json"
    step_cost.main(step_cost.Arguments((200_000,), (5, 50), rounds=2, updates=400_000, out=out))
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
    step_cost.main(step_cost.Arguments((1000,), (3, 1000), rounds=2, updates=1000, memory=0.001, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["filter"] for row in rows[:4]] == ["none", "ema", "ma-3", "ma-1000"]
    assert rows[3]["left_out"] == "needs 0.00403 GB"
    assert "left out: needs 0.00403 GB" in capsys.readouterr().out


def test_throughput_runs_many_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PRESETS", toy.PRESETS)
    throughput.main(throughput.Arguments(runs=(1, 3), rounds=2, out=tmp_path / "t.json"))
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == [1, 3]
    assert "| 3 |" in capsys.readouterr().out


def test_the_readme_is_made_from_the_result_files(tmp_path):
    text = (report.HERE / "README.md").read_text()
    made = report.tables(report.HERE / "results", tmp_path)
    assert report.fill(text, made) == text
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (report.HERE / "pictures").iterdir()}
    none = report.tables(tmp_path / "none", tmp_path)
    assert all(table.startswith("Not measured yet") for table in none.values())
    empty = report.fill(text, none)
    assert empty.count("Not measured yet") == len(none)
    assert report.fill(empty, made) == text
    with pytest.raises(ValueError, match="lacks the marks of step_cost"):
        report.fill("", none)
    with pytest.raises(UserError, match=r"--study must be a folder with results .* got .*none"):
        report.main(report.Arguments(tmp_path / "none"))


def test_the_best_of_many_batches_agrees_with_drawing_them(capsys):
    rng = np.random.default_rng(0)
    for correct in (150, 173):
        best = rng.hypergeometric(correct, 250 - correct, 50, size=(400, 1000)).max(axis=1) / 50
        assert best_of_batches.median_best(correct, 250, 50, 1000) == np.median(best)
    assert best_of_batches.median_best(250, 250, 50, 3) == 1.0
    assert best_of_batches.median_best(0, 250, 50, 3) == 0.0
    best_of_batches.main(best_of_batches.Arguments((173,)))
    assert capsys.readouterr().out == "accuracy 69.2%: the best of 10,000 batches of 50 has 90%\n"
