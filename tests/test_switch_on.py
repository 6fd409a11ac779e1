"""The jump of the loss where a filter is switched on, measured from a sweep."""

import csv
import json
import math

import pytest

from benchmarks import switch_on
from examples.harness import plots
from examples.harness.errors import UserError


def write(folder, preset, seed, filter_from, train_loss):
    steps = list(range(10, 310, 10))
    result = {
        "axes": {"preset": preset},
        "config": {"seed": seed, "filter_from": filter_from},
        "records": {"step": steps, "train_loss": [train_loss(s) for s in steps], "val_loss": [s / 100 for s in steps]},
    }
    (folder / "runs" / f"preset-{preset}_seed-{seed}.json").write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs").mkdir()
    plan = {"experiment": "toy", "presets": ["none", "late", "later"], "seeds": [0, 1]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    return tmp_path


def test_a_jump_is_measured_at_the_switch(folder, capsys, monkeypatch):
    # The loss falls by 1 a step, but for one record 30 steps after the switch.
    def jumping(at, height):
        return lambda step: 1000 - step + (height if step == at + 30 else 0)

    for seed in (0, 1):
        write(folder, "none", seed, 0, jumping(1000, 0))
        write(folder, "late", seed, 150, jumping(150, 100 + seed))
    write(folder, "later", 0, 200, jumping(200, 55))
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, _: figures.append(figure.axes[0]))
    switch_on.main(folder)
    printed = capsys.readouterr().out
    # The mean of the 50 steps before the switch is 20 above the last of them.
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if ":-" not in line] == [
        ["run", "jump at step 150", "jump at step 200", "val. loss at the end"],
        ["none", "-30.000", "-30.000", "3.000"],
        ["late", "50.500 (50.000 to 51.000)", "", "3.000"],
        ["later", "", "5.000", "3.000"],
    ]
    assert (folder / "switch_on.md").read_text() == printed
    with (folder / "switch_on.csv").open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("none", "0", "-30.0", "-30.0", "3.0"),
        ("none", "1", "-30.0", "-30.0", "3.0"),
        ("late", "0", "50.0", "", "3.0"),
        ("late", "1", "51.0", "", "3.0"),
        ("later", "0", "", "5.0", "3.0"),
    ]
    (axes,) = figures
    assert axes.get_xlim() == (0, 300)
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_a_switch_with_no_record_on_one_of_its_sides_has_no_jump():
    rows = [{"step": step, "train_loss": 1000.0 - step} for step in range(10, 310, 10)]
    assert switch_on.jump(rows, 150) == 840 - 870
    assert math.isnan(switch_on.jump(rows, 5))
    assert math.isnan(switch_on.jump(rows, 300))


def test_what_cannot_be_measured_is_named(folder, tmp_path):
    write(folder, "none", 0, 0, float)
    with pytest.raises(UserError, match="has no run whose filter is switched on late"):
        switch_on.main(folder)
    with pytest.raises(UserError, match=r"nothing holds no sweep; make one by python -m examples\.sweep"):
        switch_on.main(tmp_path / "nothing")
