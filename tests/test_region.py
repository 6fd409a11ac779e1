"""The region of learning rates and weight decays at which a method works: its grids, its files, its numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from benchmarks.study import region
from benchmarks.study.cells import PARITY, as_cell, differences
from examples.harness.errors import UsageError
from examples.parity import PRESETS

pytestmark = pytest.mark.usefixtures("lenient")


def frame(pairs):
    """Steps by pair and seed."""
    return pd.DataFrame(pairs).T.rename_axis(["lr", "weight_decay"])


def test_every_pair_of_every_method_is_a_run_of_its_own_and_beside_each_filter_stand_its_controls():
    cells = {as_cell(differences(one, PARITY)) for name in region.TITLES for one in region.grid(name).values()}
    assert len(cells) == 5 * 42 + 3 * 16
    for optimizer, names in region.METHODS.items():
        assert next(iter(names)) == optimizer
        filtered = {name for name in names if name.startswith(("ema+", "ma+"))}
        for name in names:
            assert PRESETS[name].config.optimization.optimizer == optimizer
            assert {*PRESETS[name].controls} == ({*names} - filtered if name in filtered else set())


@pytest.fixture
def small(monkeypatch):
    """One bit of four, in a grid of two pairs: one that works, and one that does not move."""
    sizes = {"n": 4, "k": 1, "points": 60, "fresh_points": 40, "width": 8, "eval_every": 10}
    presets = {name: preset._replace(config=preset.config.replace(**sizes)) for name, preset in PRESETS.items()}
    monkeypatch.setattr(region, "PRESETS", presets)
    monkeypatch.setattr(region, "GRIDS", {"adamw": ((0.0, 0.03), (0.1,)), "muon": ((0.1,), (0.1,))})
    monkeypatch.setattr(region, "SEEDS", 4)
    monkeypatch.setattr(region, "CAP", 100)


def test_a_pair_is_trained_once_and_its_line_has_a_step_for_each_seed(tmp_path, small):
    out = tmp_path / "region.jsonl"
    region.main(("adamw",), out)
    text = out.read_text()
    _, still, moving = map(json.loads, text.splitlines())
    assert still["first_step"] == [None] * 4
    assert all(step in range(10, 101, 10) for step in moving["first_step"])
    assert len(moving["first_step_train"]) == 4
    region.main(("adamw",), out)
    assert out.read_text() == text
    out.write_text("".join(text.splitlines(keepends=True)[:2]))
    region.main(("adamw", "ma+adamw"), out)
    assert json.loads(out.read_text().splitlines()[2]) == moving
    found = region.load(out)
    assert list(found) == ["adamw", "ma+adamw"]
    assert list(found["adamw"].index) == [(0.0, 0.1), (0.03, 0.1)]
    assert found["adamw"].loc[(0.03, 0.1)].tolist() == moving["first_step"]
    assert np.isinf(found["adamw"].loc[(0.0, 0.1)]).all()
    table = region.table(out)
    assert "| `ma+adamw` |" in table
    assert "all fail" in table
    assert "1 (1 to 1) of 2" in table
    titles = [axes.get_title() for axes in region.picture(out).axes]
    assert titles == ["AdamW, no filter", "MA before AdamW"]


def test_what_is_no_method_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--methods must be among adamw, .*, got adamw-tuned"):
        region.main(("adamw-tuned",), tmp_path / "region.jsonl")


def test_without_results_there_is_no_number(tmp_path):
    assert region.load(tmp_path / "none.jsonl") == {}
    assert region.table(tmp_path / "none.jsonl").startswith("Not measured yet")


def test_a_pair_works_if_nine_tenths_of_its_seeds_reach_95_percent():
    failing = lambda number: [math.inf] * number + [100.0] * (20 - number)
    one = frame({(0.1, 1.0): failing(0), (0.1, 2.0): failing(2), (0.1, 3.0): failing(3), (0.1, 4.0): failing(20)})
    assert region.works(one.to_numpy()).tolist() == [True, True, False, False]
    count, low, high = region.region(one)
    # The first pair always works, the last never, the others in some of the resampled sets of seeds.
    assert (count, low, high) == (2, 1, 3)
    assert region.region(one, one) == (0, 0, 0)
    other = frame(dict.fromkeys(one.index, failing(20)))
    assert region.region(one, other) == (count, low, high)
    assert region.region(other, one) == (-count, -high, -low)


def test_the_interval_of_a_region_is_that_of_the_binomial_distribution():
    """Of one pair with 16 of 20 seeds, resampled: P(at least 18 reach 95 %) = 0.206, so 0 and 1 are both in it."""
    one = frame({(0.1, 1.0): [math.inf] * 4 + [100.0] * 16})
    assert region.region(one) == (0, 0, 1)
    # With 12 of 20 it is 0.0036, below 2.5 %.
    assert region.region(frame({(0.1, 1.0): [math.inf] * 8 + [100.0] * 12})) == (0, 0, 0)


def test_the_best_pair_is_chosen_by_the_first_half_of_the_seeds_and_reported_with_the_other(monkeypatch):
    monkeypatch.setattr(region, "SEEDS", 8)
    taken = frame(
        {
            (0.1, 1.0): [100.0, 100.0, 100.0, math.inf, 900.0, 900.0, math.inf, math.inf],
            (0.1, 2.0): [100.0, 100.0, 100.0, 200.0, 700.0, 500.0, 600.0, math.inf],
            (0.2, 1.0): [200.0] * 4 + [50.0] * 4,
        }
    )
    assert region.best_pair(taken) == (0.1, 2.0)  # the same median as the first, and a lower mean
    assert region.other_half(taken, (0.1, 2.0)).tolist() == [700, 500, 600, math.inf]
    table = region.methods_table({"adamw": taken, "ma+adamw": taken, "muon": taken.iloc[:2], "ema+adamw": taken})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2][:4] == ["`adamw`", "0.1, 2", "650 (500 to > 4,000)", "1 of 4"]
    assert [row[0] for row in cells[2:]] == ["`adamw`", "`ema+adamw`", "`ma+adamw`", "`muon`"]
    assert [row[-2] for row in cells[2:]] == ["", "+0 (+0 to +0)", "+0 (+0 to +0)", ""]
    assert [row[-3][-4:] for row in cells[2:]] == ["of 3", "of 3", "of 3", "of 2"]
    assert cells[2][-1] == "83%"


def test_at_a_given_rate_the_decay_is_chosen(monkeypatch):
    monkeypatch.setattr(region, "SEEDS", 2)
    monkeypatch.setattr(region, "GRIDS", {"adamw": ((0.1, 0.2), (1.0, 2.0)), "muon": ((0.1,), (1.0,))})
    fails = [math.inf] * 2
    taken = frame({(0.1, 1.0): [300.0, 400.0], (0.1, 2.0): [200.0, 600.0], (0.2, 1.0): fails, (0.2, 2.0): fails})
    table = region.rates_table({"ema+adamw": taken}, "adamw")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[0] == ["learning rate", "`ema+adamw`"]
    assert cells[2:] == [["0.1", "600 (decay 2)"], ["0.2", "all fail"]]
    assert region.rates_table({"ema+adamw": taken}, "muon") == ""
