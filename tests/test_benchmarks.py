"""The benchmark scripts: they run, and what they find without a clock holds."""

import dataclasses
import inspect
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from benchmarks import DOCS, __main__, report, run_command, statistics, views
from benchmarks.cost import compiled, step_cost, tasks, vs_torch
from benchmarks.cost.timing import in_turn, in_words, spread
from benchmarks.study import find_study, study_names
from benchmarks.views import MISSING
from examples import modular
from examples.harness.errors import UsageError, UserError

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.mark.parametrize("module", [compiled, step_cost, tasks, vs_torch])
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


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (step_cost, ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (tasks, ["--tasks"], "--tasks must be one or more names, got ()"),
        (tasks, ["--tasks", "parity", "foo"], "the experiment must be one of imdb, "),
        (vs_torch, ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        *(
            (m, ["--out", "nowhere/x.json"], "--out must be a file in a wr")
            for m in (compiled, step_cost, tasks, vs_torch)
        ),
    ],
)
def test_a_flag_that_cannot_be_used_is_told_before_any_work(module, flags, message, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", ["", *(out if "--out" not in flags else []), *flags])
    with pytest.raises(SystemExit) as stopped:
        run_command(module.main, module.__name__)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_commands_are_listed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [""])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 0
    assert "{list,run,report}" in capsys.readouterr().out


def test_the_studies_are_listed_with_their_questions(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "list"])
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == study_names()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_an_unknown_study_is_answered_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"the study must be one of .*effective_lr.*, got 'leader'"):
        find_study("leader")


def test_contenders_take_turns():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_spread_by_hand():
    assert in_words({"median": 0.0034, "low": 0.002, "high": 0.005}, ".1f", 1e3) == "3.4 (2.0 to 5.0)"
    assert spread(np.array([2.0])) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert spread(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts how XLA's CPU compiler fuses")
def test_each_array_of_a_filter_is_written_by_one_pass_and_nothing_is_copied(tmp_path, monkeypatch):
    """By XLA's count AdamW moves 40 bytes per parameter, 60 with the EMA, 88 with the moving average of any window."""
    out = tmp_path / "step_cost.json"
    monkeypatch.setattr(step_cost, "WINDOWS", {200_000: (5, 50)})
    monkeypatch.setattr(step_cost, "UPDATES", 400_000)
    step_cost.main(rounds=2, out=out)
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


@pytest.fixture
def small():
    """An experiment that compiles soon: the mod-97 one in small."""
    task = modular.Modular(p=7, batch_size=8, dim=8, depth=1, heads=2)
    return dataclasses.replace(modular.EXPERIMENT, task=task)


def test_a_task_is_timed(small, monkeypatch):
    monkeypatch.setattr(tasks, "find_experiment", {"small": small}.__getitem__)
    row = tasks.measure("small", threads=2, rounds=1)
    assert (row["task"], row["threads"]) == ("small", 2)
    assert row["seconds"]["median"] > 0


def test_the_committed_results_make_tables():
    for script in (step_cost, tasks, vs_torch):
        result = json.loads(script.OUT.read_text())
        lines = script.table(result).splitlines()
        assert sum(line.startswith("|") for line in lines) > 4
        assert result["versions"]["jax"] in lines[0]


@pytest.mark.slow
def test_the_site_is_made_from_the_result_files(tmp_path):
    docs, none = tmp_path / "docs", dict.fromkeys(report.tables(tmp_path), "none\n")
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("pictures", "_build"))
    for path in docs.rglob("*.md"):
        path.write_text(report.fill(path.read_text(), none))
    report.write(docs)
    for path in docs.rglob("*.md"):
        assert path.read_text() == (DOCS / path.relative_to(docs)).read_text(), path
    made = {path.name for path in (docs / "pictures").iterdir()}
    assert made <= {path.name for path in (DOCS / "pictures").iterdir()}


def test_every_picture_is_shown_and_every_shown_picture_exists():
    texts = "".join(path.read_text() for path in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"])
    shown = set(re.findall(r"pictures/(\w+\.png)", texts))
    assert shown == {path.name for path in (DOCS / "pictures").iterdir()}


def test_a_table_that_no_page_has_is_told(tmp_path):
    (tmp_path / "page.md").write_text("<!-- tasks -->\n")
    with pytest.raises(UserError, match=r"no page in .* has the marks of leaderboard; write <!-- leaderboard -->"):
        report.pages(tmp_path, {"leaderboard": ""})
    with pytest.raises(UserError, match=r"marks of tasks; write <!-- tasks --> and <!-- end of tasks --> in one"):
        report.pages(tmp_path, {"tasks": ""})
    assert set(report.tables(tmp_path / "none").values()) == {MISSING}


def test_a_study_that_lacks_runs_says_so(tmp_path):
    lines = (report.RESULTS / "lr_wd_map.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "lr_wd_map.jsonl").write_text("".join(lines[:40]), "utf-8")
    message = r"lr_wd_map.jsonl lacks [\d,]+ runs that a table or a picture needs; .* benchmarks run lr_wd_map$"
    with pytest.raises(UserError, match=message):
        find_study("lr_wd_map").made_tables(tmp_path)
    with pytest.raises(UsageError, match="docs must be the folder of the site's sources, got nowhere"):
        report.write(Path("nowhere"))


@pytest.mark.parametrize("size", [6, 8, 25])
def test_the_interval_of_a_median_covers_it_in_19_of_20_cases(size):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        cell = views.median_and_interval(1e6 * rng.exponential(size=size), 1e9)
        _, low, high = (float(one.replace(",", "")) for one in re.findall(r"[\d,]+", cell))
        covered += low <= 1e6 * math.log(2) <= high
    assert covered >= 380


@pytest.mark.parametrize(
    ("values", "cell"),
    [
        (range(1, 17), "8 (4 to 13)"),  # the fourth and the fourth from the last
        (range(1, 9), "4 (1 to 8)"),
        (range(1, 6), "3 (1 to 5)"),  # the range
        ([1.0, 1.0, 1.0, 2.0, math.inf, math.inf], "2 (1 to > 100)"),
        ([math.inf] * 6, "> 100"),
    ],
)
def test_the_interval_of_a_median_has_the_ranks_of_the_sign_test(values, cell):
    assert views.median_and_interval(np.array(values, float), 100) == cell


def test_methods_are_compared_over_the_seeds_that_both_have_and_failures_come_last():
    first = pd.DataFrame({"seed": range(6), "steps_to_95": [1000, 2000, math.inf, math.inf, 600, 100]})
    second = pd.DataFrame({"seed": [4, 3, 2, 1, 0], "steps_to_95": [600, math.inf, 500, 1000, 2000]})
    assert statistics.paired(first, second) == (1, 2, 2, 1.0, 1.0, 3)
    assert statistics.paired(first.head(1), second) == (1, 0, 0, 1.0, 0.5, 1)
    fails = statistics.paired(first.iloc[2:4], second)
    assert fails[:4] == (0, 1, 1, 1.0)
    assert math.isnan(fails.ratio)


def outcomes(steps, held=None, **changes):
    """The cells of some seeds with their steps, of at most 5,000, followed for 50 evaluations."""
    frame = pd.DataFrame({"steps_to_95": steps, "fit_steps": 100.0, "max_steps": 5_000, "hold_evals": 50})
    reached = np.isfinite(frame["steps_to_95"])
    runs = frame.assign(finite=True, **changes)
    runs["held_evals"] = np.where(reached, 50, np.nan) if held is None else held
    return list(views.outcome_cells(runs).values())


def test_failures_count_as_slower_than_any_run():
    assert outcomes([1000, math.inf, 3000, math.inf, 2000])[:3] == [
        "100",
        "3,000 (1,000 to > 5,000)",
        "2 of 5",
    ]
    assert outcomes([1000, math.inf, 3000, math.inf, 2000, 1500])[1] == "2,500 (1,000 to > 5,000)"
    assert outcomes([math.inf], fit_steps=math.inf) == ["> 5,000", "> 5,000", "1 of 1", ""]


@pytest.mark.parametrize(
    ("steps", "held", "changes", "cell"),
    [
        ([1000.0, 1000.0], [50, 49], {}, "1 of 2 (99%)"),
        ([4900.0], [10], {"finite": False}, "0 of 1 (20%)"),  # diverged: below from there on
        ([1000.0], [0], {"hold_evals": 0}, ""),  # not followed
    ],
)
def test_a_run_holds_95_percent_if_all_evaluations_that_follow_are_at_it(steps, held, changes, cell):
    frame = {"steps_to_95": steps, "fit_steps": 100.0, "max_steps": 5_000, "hold_evals": 50}
    runs = pd.DataFrame({**frame, "finite": True, "held_evals": held, **changes})
    assert views.outcome_cells(runs)["hold"] == cell
