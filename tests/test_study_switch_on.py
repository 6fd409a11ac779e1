"""The jump of the loss where a filter is switched on, from the curves of runs."""

import math

import pytest

from benchmarks import views
from benchmarks.studies import switch_on as study
from examples import shakespeare
from examples.harness.engine import Results, product, to_frame

pytestmark = pytest.mark.usefixtures("lenient")
STEPS = list(range(10, 2_310, 10))


def curve(train_loss):
    return {"step": STEPS, "train_loss": [train_loss(step) for step in STEPS], "val_loss": [s / 100 for s in STEPS]}


def jumping(at, height):
    """A loss that falls by 1 per step, and is higher in one record, 30 steps after a switch."""
    return lambda step: 10_000.0 - step + (height if step == at + 30 else 0)


def frame_of(task, *runs):
    """Results of runs, each given by its label, seed, the step at which the loss jumps, and by how much."""
    lines = []
    for label, seed, at, height in runs:
        (run,) = product(task, study.METHODS[task][label], seed=seed)
        lines.append({"run": run.key, "curve": curve(jumping(at, height))})
    return to_frame(lines)


def cells(table):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line and ":-" not in line
    ]


def test_a_jump_is_measured_at_the_switch():
    small = frame_of(
        study.SMALL,
        ("no filter", 0, 1_000, 0),
        ("no filter", 1, 1_000, 0),
        ("empty EMA", 0, 1_000, 100),
        ("empty EMA", 1, 1_000, 101),
    )
    # The mean of the 50 steps before the switch is 20 above the last of them.
    assert cells(study.table(small)) == [
        ["method", "seeds", "jump at step 1,000", "val. loss at the end"],
        ["no filter", "2", "-30.000", "23.000"],
        ["empty EMA", "2", "50.500 (50.000 to 51.000)", "23.000"],
    ]


def test_each_switch_has_its_column_and_runs_that_are_never_switched_are_in_all():
    large = frame_of(
        study.LARGE,
        ("EMA from the first step on", 0, 0, 0),
        ("EMA that has collected at step 1,000", 0, 1_000, 55),
        ("empty EMA at step 2,000", 0, 2_000, 100),
    )
    assert cells(study.table(large)) == [
        ["method", "seeds", "jump at step 1,000", "jump at step 2,000", "val. loss at the end"],
        ["EMA from the first step on", "1", "-30.000", "-30.000", "23.000"],
        ["EMA that has collected at step 1,000", "1", "5.000", "", "23.000"],
        ["empty EMA at step 2,000", "1", "", "50.000", "23.000"],
    ]


def test_jumps_that_were_measured_without_a_curve_count_too():
    (run,) = product(study.SMALL, shakespeare.empty_ema)
    frame = to_frame([{"run": run.key, "jump_at_1000": 0.25, "last_val_loss": 2.0}])
    assert cells(study.table(frame))[1] == ["empty EMA", "1", "0.250", "2.000"]


def test_a_switch_with_no_record_on_one_of_its_sides_has_no_jump():
    falling = curve(jumping(0, 0))
    assert study.jump(falling, 150) == 9_840 - 9_870
    assert math.isnan(study.jump(falling, 5))
    assert math.isnan(study.jump(falling, STEPS[-1]))


def test_stored_results_are_those_of_the_small_model():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 3 * (6 + 8)
    assert {run.task for run in results.missing(runs)} <= {study.LARGE}
    assert len(results.of(runs)) == len(results.frame()) >= 3 * 6


@pytest.mark.slow
def test_the_curve_of_a_new_run_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "load", lambda _: "to be or not to be " * 99)
    task = shakespeare.Shakespeare(layers=1, heads=1, width=4, context=4, batch_size=2, val_windows=2)
    results = Results(tmp_path / "switch_on.jsonl", trains=True, keep_curves=study.STUDY.keep_curves)
    frame = results.of(product(task, shakespeare.empty_ema, start_step=20, max_steps=40))
    stored = frame["curve"][0]
    assert stored["step"] == [10, 20, 30, 40]
    loss = stored["train_loss"]
    assert study.jump(stored, 20) == pytest.approx(max(loss[2:]) - sum(loss[:2]) / 2, abs=1e-12)
    jumps = study.with_jumps(frame, [20])
    assert jumps["jump_at_20"].tolist() == [study.jump(stored, 20)]
    assert jumps["last_val_loss"].tolist() == [stored["val_loss"][-1]]


def test_the_figure_leaves_out_what_is_never_switched():
    frame = frame_of(study.SMALL, *((label, 0, 1_000, 40) for label in study.METHODS[study.SMALL]))
    drawing = study.STUDY.figures["switch_on"]
    figure, axes = views.chart(drawing.title, **drawing.layout)
    drawing.draw(frame, axes)
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "no filter",
        "gradients tripled, no filter",
        "EMA that has collected",
        "empty EMA, sum divided by 1 + λ",
        "empty EMA",
    ]
    assert axes.lines[0].get_xdata().tolist() == [-10.0]  # 40 - 30 - 20
    assert figure.axes == [axes]
