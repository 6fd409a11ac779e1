"""Many runs in one file: missing runs are trained once, and a crash loses at most the line that is being written."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.harness import engine
from examples.harness.engine import Results, as_text, grouped, product, stacked, to_frame, unstacked
from examples.harness.errors import UserError
from examples.harness.loop import evaluations
from examples.harness.records import outcome

from . import toy

pytestmark = pytest.mark.usefixtures("lenient", "shared_programs")
EMAS = product(toy.Toy(), toy.ema, lr=[0.01, 0.05], seed=range(2))
GROUP = product(toy.Toy(), toy.ema, lr=[0.01, 0.05], seed=range(2), group_size=4)


def results(path, **options):
    return Results(path / "r.jsonl", trains=True, **options)


def lines(path):
    return [json.loads(line) for line in (path / "r.jsonl").read_text().splitlines()]


@pytest.fixture
def groups_trained(monkeypatch):
    """The groups that a test trains, in order."""
    trained, train_group = [], engine.train_group

    def spy(compiled, group, *rest, **options):
        trained.append(group)
        return train_group(compiled, group, *rest, **options)

    monkeypatch.setattr(engine, "train_group", spy)
    return trained


@pytest.fixture
def stub(monkeypatch):
    """Training that takes no time; its outcome is the learning rate and the seed."""
    trained = []

    def train_group(compiled, group, *_, **__):
        trained.append(group)
        return [{"steps_to_80": None, "number": run.traced["lr"] + run.seed} for run in group]

    monkeypatch.setattr(engine, "train_group", train_group)
    monkeypatch.setattr(engine, "program", lambda run: run.program_key)
    return trained


def by_hand(run):
    """The records of a run that is trained alone."""
    rows = []
    for evaluation in evaluations(engine.program(run), run.traced, jax.random.key(run.seed)):
        rows.append(evaluation.rows[0])
        if evaluation.step >= run.max_steps:
            return rows, evaluation.state


def test_a_result_is_the_outcome_of_the_runs_records(tmp_path):
    frame = results(tmp_path, keep_curves=True).of(EMAS)
    assert [(row.lr, row.seed) for row in frame.itertuples()] == [(lr, seed) for lr in (0.01, 0.05) for seed in (0, 1)]
    for run, row in zip(EMAS, frame.to_dict("records"), strict=True):
        rows, _ = by_hand(run)
        assert row["curve"] == {name: [record[name] for record in rows] for name in rows[0]}
        for name, value in outcome(run, rows).items():
            assert row[name] == (np.inf if value is None else value), name
        assert {name: row[name] for name in run.key if run.key[name] is not None} == {
            name: value for name, value in run.key.items() if value is not None
        }


def test_only_what_is_missing_is_trained_and_each_run_once(tmp_path, groups_trained):
    store = results(tmp_path)
    assert store.missing([*EMAS, *EMAS]) == EMAS
    first = store.of(EMAS[1:3])
    assert [len(group) for group in groups_trained] == [1, 1]
    whole = store.of([*EMAS, EMAS[0]])
    assert [group[0] for group in groups_trained] == [EMAS[1], EMAS[2], EMAS[0], EMAS[3]]
    assert len(whole) == 4
    pd.testing.assert_frame_equal(whole[1:3].reset_index(drop=True), first)
    assert store.missing(EMAS) == []
    pd.testing.assert_frame_equal(store.of(EMAS), whole)
    assert len(groups_trained) == 4
    reader = Results(tmp_path / "r.jsonl")
    assert len(reader.of(product(toy.Toy(), toy.ema, lr=[0.01, 0.9]))) == 1  # which trains nothing
    assert len(reader.frame()) == 4
    assert len(groups_trained) == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["r.jsonl", "r.jsonl.lock"]


def test_results_are_appended_at_once_and_a_stopped_study_goes_on(tmp_path, monkeypatch, groups_trained):
    (tmp_path / "whole").mkdir()
    expected = results(tmp_path / "whole").of(EMAS)
    spy = engine.train_group

    def stop_at_the_third(*arguments, **options):
        if len(groups_trained) == 4 + 2:
            raise KeyboardInterrupt
        return spy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_group", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            results(tmp_path).of(EMAS)
    assert len(results(tmp_path).frame()) == 2
    pd.testing.assert_frame_equal(results(tmp_path).of(EMAS), expected)
    assert len(groups_trained) == 4 + 4


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_crash_in_the_middle_of_a_line_loses_that_line_alone(group_size, tmp_path, stub):
    runs = product(toy.Toy(), toy.ema, lr=[0.01, 0.05], seed=range(2), group_size=group_size)
    expected = results(tmp_path).of(runs)
    whole = (tmp_path / "r.jsonl").read_bytes()
    for end in {0, 1, 40, len(whole) - 1, *range(7, len(whole), 97)}:
        (tmp_path / "r.jsonl").write_bytes(whole[:end])
        complete = whole[:end].count(b"\n")
        del stub[:]
        pd.testing.assert_frame_equal(results(tmp_path).of(runs), expected)
        assert sum(map(len, stub)) == 4 - group_size * max(0, complete - 1)
        assert (tmp_path / "r.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"{", b"[1, 2]", b"3", b"\xff", b'{"run": {}}', b'{"provenance": "a", "run": [1]}'),
        b'{"provenance": "a", "run": {"seed": [0, 1]}, "x": [1]}',
    ],
)
def test_a_damaged_line_is_named_with_its_cure(damage, tmp_path, stub):
    results(tmp_path).of(EMAS)
    whole = (tmp_path / "r.jsonl").read_bytes().split(b"\n")
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([*whole[:2], damage, *whole[3:]]))
    for read in (results(tmp_path).frame, lambda: results(tmp_path).of(EMAS)):
        with pytest.raises(UserError, match=r"r\.jsonl, line 3 is damaged; delete the line, and its run is trained ag"):
            read()
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([*whole[:2], *whole[3:]]))
    assert len(results(tmp_path).of(EMAS)) == 4
    assert [group[0] for group in stub[4:]] == [EMAS[1]]


def test_a_result_says_where_it_comes_from(tmp_path, stub, monkeypatch):
    results(tmp_path).of(EMAS[:2])
    results(tmp_path).of(EMAS[2:3])
    monkeypatch.setattr(engine, "provenance", lambda: {"device": "another", "versions": {"jax": "0"}, "commit": "c"})
    results(tmp_path).of(EMAS)
    origin, *first, other, last = lines(tmp_path)
    assert origin["versions"]["jax"] == jax.__version__
    assert "CPU cores" in origin["device"]
    assert {line["provenance"] for line in first} == {origin["provenance"]}
    assert len(first) == 3
    assert (other["device"], other["commit"], last["provenance"]) == ("another", "c", other["provenance"])
    assert other["provenance"] != origin["provenance"]


def test_of_two_results_of_one_run_the_later_counts(tmp_path, stub):
    store = results(tmp_path)
    store.of(EMAS)
    store.append([{"run": EMAS[1].key, "number": 7.0}])
    assert store.frame()["number"].tolist() == [0.01, 7.0, 0.05, 1.05]
    assert store.of(EMAS[:2])["number"].tolist() == [0.01, 7.0]


@dataclasses.dataclass(frozen=True)
class Filed(toy.Toy):
    """A task that reads a file."""

    data_dir: Path | None = None

    def load(self):
        assert self.data_dir is not None
        return {"offset": np.loadtxt(self.data_dir / "offset.txt")}


def test_results_on_other_data_are_not_mixed(tmp_path):
    for name, offset in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "offset.txt").write_text(f"{offset}\n")
    of = lambda name, **more: product(Filed(data_dir=tmp_path / name, **more), toy.adam, max_steps=8, seed=range(2))
    first, path = of("one"), tmp_path
    results(path).of(first[:1])
    with pytest.raises(UserError, match=r"r.jsonl has results of Filed on other data; name their folder with"):
        results(path).of(of("two"))
    assert len(results(path).of(first)) == 2
    assert len(results(path).of(of("two", examples=36))) == 2  # another task


def test_two_processes_share_the_runs_of_a_file(tmp_path, monkeypatch):
    """Two threads replace two processes, because the locks are the file system's."""
    both, trained, frames = threading.Barrier(2), [], []

    def train_group(compiled, group, *_, **__):
        if len(trained) < 2:
            trained.append(group)
            both.wait(60)  # each is in the middle of a group
        else:
            trained.append(group)
        return [{"number": run.seed} for run in group]

    monkeypatch.setattr(engine, "train_group", train_group)
    monkeypatch.setattr(engine, "program", lambda run: run.program_key)
    runs = product(toy.Toy(), toy.ema, seed=range(12), group_size=2)
    workers = [threading.Thread(target=lambda: frames.append(results(tmp_path).of(runs))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    seeds = [run.seed for group in trained for run in group]
    assert sorted(seeds) == list(range(12))  # none twice
    for frame in frames:  # each waits for what the other trains
        assert frame["number"].tolist() == list(range(12))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["r.jsonl", "r.jsonl.lock"]


def test_a_group_that_a_process_failed_to_train_is_free_again(tmp_path, monkeypatch, stub):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_group", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results(tmp_path).of(EMAS)
    assert len(results(tmp_path).of(EMAS)) == 4


@pytest.mark.slow
def test_two_real_processes_train_each_run_once(tmp_path):
    code = "; ".join(
        [
            "import pathlib, sys",
            "from tests import toy",
            "from examples.harness.engine import Results, product",
            "runs = product(toy.Toy(), toy.adam, lr=[0.01 * i for i in range(1, 41)], max_steps=2000)",
            "print(len(Results(pathlib.Path(sys.argv[1]), trains=True).of(runs)))",
        ]
    )
    command = [sys.executable, "-c", code, str(tmp_path / "r.jsonl")]
    root = Path(__file__).parents[1]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in both] == ["40\n", "40\n"]
    keys = [as_text(line["run"]) for line in lines(tmp_path) if "run" in line]
    assert len(keys) == len(set(keys)) == 40


def test_a_group_is_filled_and_its_rounding_is_the_same_however_many_runs_are_missing(tmp_path, groups_trained):
    (tmp_path / "parts").mkdir()
    whole = results(tmp_path, keep_curves=True).of(GROUP)
    parts = results(tmp_path / "parts", keep_curves=True)
    parts.of(GROUP[2:3])
    in_parts = parts.of(GROUP)
    assert [[run.seed for run in group] for group in groups_trained] == [[0, 1, 0, 1], [0], [0, 1, 1]]
    columns = [name for name in whole if name != "provenance"]
    pd.testing.assert_frame_equal(in_parts[columns], whole[columns], check_exact=True)
    for run, curve in zip(
        EMAS, whole["curve"], strict=True
    ):  # only the rounding differs from runs that are trained alone
        rows, _ = by_hand(run)
        for name, values in curve.items():
            np.testing.assert_allclose(values, [row[name] for row in rows], rtol=1e-5, atol=1e-6)


def test_runs_that_differ_in_traced_numbers_alone_compile_once(tmp_path, monkeypatch, groups_trained):
    programs, traces = [], []
    task = toy.Toy(examples=36)  # of no other test: programs are shared
    program = engine.program

    def counted(run):
        programs.append(run.program_key)
        return program(run)

    def measure(task, state, data):
        traces.append(task)
        return {"norm": jnp.linalg.norm(state.params["w"])}

    monkeypatch.setattr(engine, "program", counted)
    runs = product(task, toy.ema, lr=[0.01, 0.05], lamb=[1.0, 2.0], seed=range(2), max_steps=8)
    results(tmp_path, measure=measure).of(runs)
    assert (len(groups_trained), len(programs), len(traces)) == (8, 1, 1)
    compiled = program(runs[0])
    sizes = compiled.advance._cache_size(), compiled.init._cache_size()
    assert sizes == (1, 1)
    grouped_runs = product(task, toy.ema, lr=[0.01, 0.05, 0.1], lamb=[1.0, 2.0], max_steps=8, group_size=4)
    results(tmp_path, measure=measure).of(grouped_runs)
    assert (len(groups_trained), len(programs), len(traces)) == (10, 2, 2)
    assert program(grouped_runs[0]).advance._cache_size() == 1


def test_groups_have_one_program_and_one_rule():
    runs = product(toy.Toy(), toy.ma, window_size=[3, 4], max_steps=[4, 8], seed=range(3), group_size=2)
    found = [[(r.hyperparams["window_size"], r.max_steps, r.seed) for r in group] for group in grouped(runs)]
    assert found == [
        [(window, steps, seed) for seed in seeds] for window in (3, 4) for steps in (4, 8) for seeds in ((0, 1), (2,))
    ]
    assert [len(group) for group in grouped([*EMAS, *GROUP])] == [1, 1, 1, 1, 4]


@pytest.mark.parametrize("runs", [EMAS[:2], GROUP])
def test_measured_numbers_are_reduced_and_stored(runs, tmp_path):
    def measure(task, state, data):
        return {"points": data["y"].sum() + task.examples, "w": state.params["w"][:2], "chunk": state.chunk}

    frame = results(tmp_path, measure=measure).of(runs)
    for run, row in zip(runs, frame.itertuples(), strict=True):
        (alone,) = product(toy.Toy(), toy.ema, lr=run.traced["lr"], seed=run.seed)
        _, state = by_hand(alone)
        assert row.chunk == list(range(1, 21))
        assert np.shape(row.w) == (20, 2)
        np.testing.assert_allclose(row.w[-1], state.params["w"][:2], rtol=1e-3)  # of four digits
        y = engine.program(alone).draw(jax.random.key(run.seed))[1]["y"]
        assert row.points == [float(y.sum()) + 30] * 20
    reduced = Results(tmp_path / "reduced.jsonl", trains=True, measure=measure, reduce=lambda values: values[-1]).of(
        runs
    )
    assert reduced["chunk"].tolist() == [20] * len(runs)
    assert reduced["w"].tolist() == [w[-1] for w in frame["w"]]


def test_all_states_of_a_run_may_be_observed(tmp_path):
    def observe(run, states, data):
        seen = [(row["step"], float(state.params["b"])) for row, state in states]
        return {"bs": [b for _, b in seen], "steps": len(seen), "sum": float(data["x"].sum()) + run.seed}

    frame = results(tmp_path, observe=observe).of(EMAS[:2])
    for run, row in zip(EMAS, frame.itertuples(), strict=False):
        _, state = by_hand(run)
        assert row.steps == len(row.bs) == 20
        assert row.bs[-1] == float(state.params["b"])
        assert row.last_step == 80
        assert row.sum == float(engine.program(run).draw(jax.random.key(run.seed))[1]["x"].sum()) + run.seed
    assert Results(tmp_path / "few.jsonl", trains=True, observe=lambda *_: {}).of(EMAS[:1])["last_step"].item() == 80
    with pytest.raises(ValueError, match="group_size must be 1 where runs are observed, got 4"):
        Results(tmp_path / "group.jsonl", trains=True, observe=observe).of(GROUP)


def test_runs_of_a_group_end_by_their_own_rule_and_failures_are_infinite(tmp_path):
    rule = {"stop_at": 0.8, "hold_evals": 2}
    runs = product(toy.Toy(), toy.ema, lr=[0.0, 3e38, 0.01, 0.05], **rule, group_size=4)
    frame = results(tmp_path, keep_curves=True).of(runs)
    lazy, diverged, slow, fast = frame.to_dict("records")
    for row, lr in ((slow, 0.01), (fast, 0.05)):
        rows, _ = by_hand(product(toy.Toy(), toy.ema, lr=lr)[0])
        reached = next(record["step"] for record in rows if record["val_accuracy"] >= 0.8)
        assert row["steps_to_80"] == reached
        assert row["curve"]["step"] == list(range(4, reached + 12, 4))
        after = [record["val_accuracy"] >= 0.8 for record in rows if reached < record["step"] <= reached + 8]
        assert (row["followed_evals"], row["held_evals"]) == (2, sum(after))
    assert fast["steps_to_80"] < slow["steps_to_80"]
    assert (diverged["finite"], diverged["last_step"], diverged["steps_to_80"]) == (False, 4, np.inf)
    assert (lazy["finite"], lazy["last_step"], lazy["steps_to_80"]) == (True, 80, np.inf)
    assert np.isnan(lazy["held_evals"])
    assert results(tmp_path).missing(runs) == []  # a failed run has a result


def test_the_frame_of_no_results_is_empty(tmp_path):
    assert Results(tmp_path / "none.jsonl").of(EMAS).empty
    assert Results(tmp_path / "none.jsonl").frame().empty
    frame = to_frame([{"run": {"a": 1}, "steps_to_95": None, "fit_steps": 3, "other": None, "provenance": "x"}])
    assert frame["steps_to_95"].tolist() == [np.inf]
    assert frame["fit_steps"].tolist() == [3.0]
    assert frame["other"].isna().all()


VALUES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3)
OUTCOMES = st.dictionaries(st.sampled_from("abcd"), VALUES | st.lists(VALUES, max_size=3))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    keys=st.lists(
        st.fixed_dictionaries({"seed": st.integers(0, 9), "lr": st.sampled_from([0.1, 0.2])}),
        min_size=1,
        max_size=4,
        unique_by=lambda key: (key["seed"], key["lr"]),
    ),
    outcomes=st.lists(OUTCOMES, min_size=4, max_size=4),
    group_size=st.sampled_from([1, 4]),
)
def test_results_of_a_group_are_read_back_from_one_line(keys, outcomes, group_size):
    written = [{"run": {**key, "group_size": group_size}, **one} for key, one in zip(keys, outcomes, strict=False)]
    text = json.loads(json.dumps([{**line, "provenance": "p"} for line in stacked(written)]))
    assert len(text) == (1 if group_size > 1 else len(written))
    names = {name for one in written for name in one} if group_size > 1 and len(written) > 1 else set()
    expected = [{**dict.fromkeys(names), **one, "provenance": "p"} for one in written]
    assert [result for line in text for result in unstacked(line)] == expected
