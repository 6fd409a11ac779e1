"""The numbers that pages state by hand."""

import json
import re
import statistics

import pytest

from benchmarks import DOCS, RESULTS
from benchmarks.study import find_study


def rows_after(words):
    """The rows of the first table after some words of the page, without its titles."""
    lines = (DOCS / "cost.md").read_text().split(words)[1].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_bytes_of_an_update_add_up_to_what_is_compiled():
    *parts, total = rows_after("## Where the bytes go")[:7]
    sums = [sum(int(row[column] or 0) for row in parts) for column in (1, 2, 3)]
    chips = json.loads((RESULTS / "compiled.json").read_text())["chips"]
    for chip in chips.values():
        assert sums == [chip["float32"][name]["bytes"] for name in ("AdamW", "EMA", "MA")]
    assert sums == [int(cell) for cell in total[1:]]


def test_times_to_95_percent_count_the_compile_time():
    result = json.loads((RESULTS / "vs_torch.json").read_text())
    expected = []
    for method in ("ema", "ma"):
        of = {(row["side"], row["seed"]): row for row in result["to_95"] if row["method"] == method}
        ours, torch = ([of[side, seed] for seed in (0, 1, 2)] for side in ("ours", "torch"))
        compiling = result["epochs"][f"modular {method}"]["compile_seconds"]["median"]
        pairs = [(a["seconds"], b["seconds"]) for a, b in zip(ours, torch, strict=True)]
        ratios = [statistics.median(b / (a + more) for a, b in pairs) for more in (0, compiling)]
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        steps = statistics.median(row["steps"] for row in ours)
        times = (mine, compiling, theirs, *ratios)
        expected.append([f"{method.upper()} + Adam", f"{steps:,}", *(f"{value:.1f}" for value in times)])
    assert rows_after("## Against PyTorch")[:2] == expected


def test_the_repeated_runs_that_differ_are_told():
    circuits, others = (find_study(name).results().by_key() for name in ("fourier_circuits", "mod97"))
    pairs = [(circuits[key], others[key]) for key in circuits.keys() & others.keys()]
    names = ("steps_to_95", "fit_steps")
    differ = [[abs(a[name] - b[name]) for name in names] for a, b in pairs if any(a[name] != b[name] for name in names)]
    steps = [max(pair) for pair in differ]
    said = (
        f"{len(pairs)} runs of mod 97 are in two result files, from different commits. {len(differ)} of them differ, "
    )
    text = " ".join((DOCS / "method.md").read_text().split())
    assert f"{said}by {min(steps)} to {max(steps)} steps" in text


@pytest.mark.parametrize(("heading", "is_of"), [("without a commit", "None"), ("with uncommitted changes", "-dirty")])
def test_the_files_whose_runs_name_no_clean_commit_are_told(heading, is_of):
    (told,) = re.findall(rf"\*\*Runs {heading}\*\*: ([^;.]*)[;.]", (DOCS / "method.md").read_text())
    for name in re.findall(r"`(\w+)`", told):
        lines = map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines())
        assert any(str(line.get("commit")).endswith(is_of) for line in lines if "versions" in line), name
