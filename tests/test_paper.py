"""The page on the paper: it is made from the result files, and judged by as many seeds as there are."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import RESULTS, paper, report
from benchmarks.study.cells import differences
from benchmarks.study.methods import PARTS, Variant
from benchmarks.study.statistics import Results


def test_the_page_on_the_paper_is_made_from_the_result_files(tmp_path):
    study = Results.load(RESULTS / "study")
    made, text = paper.tables(RESULTS, study), (report.DOCS / "paper.md").read_text()
    assert report.fill(text, made) == text
    none = paper.tables(tmp_path, Results([]))
    assert set(none.values()) == {"Not measured yet.\n"}
    assert report.fill(report.fill(text, none), made) == text
    # Without the result files only the rows of the study are judged.
    assert paper.tables(tmp_path, study)["paper_others"] == "Not measured yet.\n"
    assert "`ema`, part methods" in paper.tables(tmp_path, study)["paper_modular"]


def fake(steps):
    """Results of the study's part window, by (λ, w) and seed."""
    runs = [
        (Variant("ma", {"lamb": lamb, "window_size": window}).run(seed, 5_000), step)
        for (lamb, window), by_seed in steps.items()
        for seed, step in by_seed.items()
    ]
    rest = {"first_step_train": None, "best_val_accuracy": 0.5}
    return Results({"cell": differences(run), "first_step": step, **rest} for run, step in runs)


@pytest.mark.parametrize(
    ("best", "others", "cell", "verdict"),
    [
        ({0: 900}, {0: None}, "900", "in part"),
        ({0: 900, 1: 950}, {0: None}, "900", "in part"),  # the seed that all have
        ({0: 900, 1: 950, 2: 700}, {0: 1_000, 1: None, 2: None}, "900 (700 to 950)", "yes"),
        ({0: 900, 1: 950, 2: None}, {0: 800, 1: 800, 2: 800}, "950 (900 to > 5,000), 1 of 3 fail", "no"),
        ({0: 900, 1: 700, 2: None}, {0: 800, 1: 800, 2: 800}, "900 (700 to > 5,000), 1 of 3 fail", "in part"),
        ({0: None, 1: None, 2: None}, {0: 800, 1: 800, 2: 800}, "fails", "no"),
        ({0: None}, {0: None}, "fails", "no"),
    ],
)
def test_windows_are_judged_by_the_seeds_that_every_setting_has(tmp_path, best, others, cell, verdict):
    settings = [tuple(variant.changes[name] for name in ("lamb", "window_size")) for variant in PARTS["window"]]
    found = paper.Found(tmp_path, fake(dict.fromkeys(settings, others) | {(5.0, 100): best}))
    shared = len(best.keys() & others.keys())
    (row,) = (line for line in paper.window_table(found).splitlines() if line.startswith("| 5 "))
    assert row.split("|")[5].strip() == cell
    assert paper.window_table(found).startswith("One seed" if shared == 1 else f"Median and range of {shared} seeds")
    text, agrees = paper.grid(found)
    assert agrees == verdict
    won = sum(
        best[seed] is not None and best[seed] <= (others[seed] or math.inf) for seed in best.keys() & others.keys()
    )
    assert f"; with {won} of {'1 seed' if shared == 1 else f'{shared} seeds'} w 100, λ 5 (" in text
    assert text.endswith(f" of {len(settings)} settings reach 95 % with every seed")


def test_published_numbers_are_judged_by_hand():
    steps = np.array([1_000.0, 1_100.0, math.inf])
    assert not paper.near(900, steps[2:])
    assert [paper.near(number, steps) for number in (900, 910, 1_210, 1_220)] == [False, True, True, False]
    control = pd.Series({0: 2_000.0, 2: 3_000.0, 1: math.inf, 3: 4_000.0})
    assert list(paper.times_fewer(control, pd.Series(steps))) == [2.0]
    found = paper.Found(Path(), Results([]))
    assert found.in_words(steps) == "1,100 (1,000 to > 5,000; 3 seeds, 1 failing)"
    assert found.in_words(steps[2:]) == "all fail in 5,000 steps (1 seed)"
    assert paper.best({0.1: np.array([1.0, 9.0]), 0.2: np.array([math.inf, 2.0]), 0.3: np.array([5.0, 5.0])}) == [
        0.1,
        0.3,
    ]
