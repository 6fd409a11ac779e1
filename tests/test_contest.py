"""The board and the memory study: their chains, what is trained again, and what their tables say of made-up results."""

import dataclasses
import functools
import inspect
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tqdm
from jax.flatten_util import ravel_pytree

from benchmarks.cost import entrants
from benchmarks.study import board, contest, edge, memory, noise, raised, windows
from benchmarks.study.cells import append
from benchmarks.study.contest import Chain, Job, missing
from benchmarks.study.statistics import MissingRunError, Results
from examples.harness.errors import UsageError, UserError
from examples.harness.train import TrainState
from examples.modular import Modular
from grokfast_jax import dc_gain, mean_age

pytestmark = pytest.mark.usefixtures("lenient")  # for transformations of optax

TINY = Modular(p=7, dim=8, heads=2, depth=1, batch_size=16)
ADAMW = Chain("AdamW", board.adamw, TINY)
NUMBERS = {"lr": 1e-3, "weight_decay": 1.0}


@pytest.mark.parametrize("age", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("shape", memory.SHAPES)
def test_kernels_have_a_gain_of_one_and_their_age(shape, age):
    kernel = memory.kernel(shape, age)
    assert dc_gain(kernel) == pytest.approx(1, abs=1e-5)
    assert mean_age(kernel) == pytest.approx(age, rel=1e-4)


def test_places_differ_in_what_the_preconditioner_sees():
    params = {"w": jnp.eye(3), "b": jnp.ones(3)}
    grads = [
        jax.tree.map(lambda p, k=k: (k + 1.0) * jnp.cos(k + jnp.arange(float(p.size)).reshape(p.shape)), params)
        for k in range(15)
    ]

    def last(place):
        tx = memory.PLACES[place](memory.kernel("EMA", 2.0), 0.1, 0.0)
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
        return updates

    before, within, muon = (last(place) for place in memory.PLACES)
    assert not np.allclose(before["w"], within["w"], rtol=1e-2)
    assert np.linalg.svd(muon["w"], compute_uv=False)[:2] == pytest.approx(0.1, rel=0.4)  # the gradients have rank 2
    without = memory.in_muon(optax.identity(), 0.1, 0.0)
    state = without.init(params)
    for g in grads:
        plain, state = without.update(g, state, params)
    assert np.array_equal(plain["b"], muon["b"])  # vectors keep their own first moment
    assert not np.allclose(plain["w"], muon["w"], rtol=1e-2)


def test_what_a_file_holds_is_not_trained_again(tmp_path, monkeypatch):
    trained = []
    fake = {
        "first_step": 10,
        "first_step_train": 10,
        "finite": True,
        "best_val_accuracy": 1.0,
    }

    def train(jobs, bar):
        trained.extend(jobs)
        return [fake | ({"evaluations_after": job.after} if job.after else {}) for job in jobs]

    monkeypatch.setattr(contest, "train", train)
    path = tmp_path / "results.jsonl"
    jobs = [Job(ADAMW, NUMBERS, seed, 20) for seed in range(3)]
    contest.train_missing(jobs[:2], path)
    contest.train_missing([*jobs, jobs[0]], path)
    assert [job.seed for job in trained] == [0, 1, 2]
    contest.train_missing([jobs[0]._replace(after=5), jobs[1]], path)
    assert trained[3:] == [jobs[0]._replace(after=5)]
    frame = contest.frame(path)
    assert len(frame) == 3
    assert frame.set_index("seed")["evaluations_after"].fillna(0).to_dict() == {0: 5, 1: 0, 2: 0}


def test_runs_of_one_program_equal_single_ones():
    jobs = [Job(ADAMW, {"lr": lr, "weight_decay": 1.0}, seed, 8) for lr, seed in ((1e-2, 0), (3e-2, 1))]
    bar = contest.tqdm.tqdm(disable=True)
    together = contest.train(jobs, bar)
    assert together == [contest.train([job], bar)[0] for job in jobs]
    assert together[0] != together[1]


def test_a_run_is_followed_beyond_its_cap(monkeypatch):
    monkeypatch.setattr(contest, "THRESHOLD", 0.0)  # which every run is at
    (found,) = contest.train([Job(ADAMW, NUMBERS, 0, 1, after=2)], contest.tqdm.tqdm(disable=True))
    assert (found["evaluations_after"], found["of_these_at_threshold"]) == (2, 2)


def test_a_run_is_followed_after_its_first_at_the_threshold():
    rows = [
        {"step": 10 * k, "val_accuracy": accuracy, "train_accuracy": 1.0}
        for k, accuracy in enumerate((0.5, 0.96, 0.9, 0.97))
    ]
    found = contest.outcome(rows)
    assert (found["first_step"], found["evaluations_after"], found["of_these_at_threshold"]) == (10, 2, 1)
    assert contest.outcome([*rows[:1], {**rows[1], "val_accuracy": math.nan}]) == {
        "first_step": None,
        "first_step_train": 0,
        "finite": False,
        "best_val_accuracy": 0.5,
    }


@functools.cache
def model_params():
    return jax.jit(TINY.init)(jax.random.key(0))


@pytest.mark.parametrize("name", [*board.ENTRANTS, "30 %: MA before Muon"])
def test_entrants_are_short_and_have_nine_settings(name):
    entrant = board.ALL[name]
    assert len(inspect.getsource(entrant.make).strip().splitlines()) <= 15
    numbers = NUMBERS if isinstance(entrant.grid, str) else entrant.settings[4]
    assert isinstance(entrant.grid, str) or len(entrant.settings) == 9
    tx = optax.with_extra_args_support(entrant.make(**numbers))
    params, update = model_params(), jax.jit(tx.update)
    updates, state = None, jax.jit(tx.init)(params)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
    assert all(jnp.isfinite(u).all() and jnp.any(u != 0) for u in jax.tree.leaves(updates))


def test_gradient_off_the_weights():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    tx = board.perpendicular()
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([5.0, 6.0])}
    updates, _ = tx.update(g, tx.init(params), params)
    assert updates["a"] == pytest.approx([1 - 3 * 11 / 25, 2 - 4 * 11 / 25])
    assert np.array_equal(updates["b"], g["b"])


def test_rows_are_clipped_after_the_step():
    params = model_params()
    tx = board.clipped_rows(0.5)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    for leaf in jax.tree.leaves(after["blocks"]):
        assert leaf.ndim < 2 or np.linalg.norm(leaf, axis=0) == pytest.approx(0.5, rel=1e-5)
    assert np.array_equal(updates["token"], jnp.ones_like(params["token"]))


def test_losses():
    logits, answer = jnp.array([[1.0, -3.0, 0.5]]), jnp.array([1])
    stable = board.StableMax().loss(logits, answer)
    assert stable == pytest.approx([-math.log(0.25 / (2 + 0.25 + 1.5))], rel=1e-6)
    scaled = board.Scaled(logit_factor=3.0).loss(logits, answer)
    assert scaled == pytest.approx(np.asarray(Modular().loss(3 * logits, answer)), rel=1e-6)
    numbers = {"lr": 1e-3, "logit_factor": 3.0}
    assert board.job("AdamW, logits scaled", numbers, 0).chain.task == board.Scaled(logit_factor=3.0)


def result(job, first_step, after=0, holding=0):
    made = {"first_step": first_step, "first_step_train": first_step, "evaluations_after": after}
    made |= {"of_these_at_threshold": holding, "finite": True, "best_val_accuracy": 0.5 if first_step is None else 0.96}
    return {"cell": job.cell, **made}


@pytest.fixture
def results_file(tmp_path):
    """Two entrants: one tuned to its second setting that holds, the other to its first that fails with one seed."""
    path = tmp_path / "board.jsonl"
    lines = []
    for name, best, steps in (("Muon", 1, 200), ("Muon, no momentum", 0, 300)):
        for i, numbers in enumerate(board.ENTRANTS[name].settings):
            lines.append(result(board.job(name, numbers, 1000), 150 if i == best else 400 + i))
            lines.append(result(board.job(name, numbers, 1001), 170 if i == best else None))
        chosen = board.ENTRANTS[name].settings[best]
        for seed in board.SEEDS:
            failed = name != "Muon" and seed == 15
            lines.append(result(board.job(name, chosen, seed), None if failed else steps + seed, 50, 50 - (seed > 9)))
        lines += [result(board.job(name, chosen, seed, operation="division"), 250) for seed in range(4)]
    append(path, *lines, base=None)
    return path


def test_board(results_file):
    found = board.Board(results_file, Results([]))
    assert found.chosen("Muon") == board.ENTRANTS["Muon"].settings[1]
    assert found.best(5) == ["Muon", "Muon, no momentum"]
    compared = board.compared(found, "Muon", "Muon, no momentum", board.SEEDS)
    assert compared == {"fewer": 16, "more": 0, "p": pytest.approx(2**-15)}
    with pytest.raises(MissingRunError, match=r"AdamW, StableMax lacks a tuning run with .*; run the stages before"):
        found.chosen("AdamW, StableMax")
    times = results_file.with_name("times.json")
    text = board.table(results_file, Results([]), times)
    assert "ms per step" not in text
    first, second = (
        (line for line in text.splitlines() if line.startswith("| Muon"))
        if text.count("| Muon") == 2
        else text.splitlines()[2:4]
    )
    assert "208 (204 to 211)" in first
    assert "0 of 16" in first
    assert "10 of 16" in first
    assert "1 of 16" in second
    assert "0, 16 (3.1e-05)" in second
    assert text.rstrip().splitlines()[-1].startswith("| Muon, no momentum")
    assert "250" in text.splitlines()[-2]
    times.write_text(json.dumps({"ms_per_step": {"Muon": {"median": 20.04}, "Muon, no momentum": {"median": 10.0}}}))
    timed = board.table(results_file, Results([]), times)
    assert "s to 95 % (ms per step)" in timed
    assert re.search(r"10 of 16 *\| 4.2 \(20.0\) *\|", timed)  # 207.5 steps of 20 ms


def test_entrants_are_timed(results_file, monkeypatch, tmp_path, capsys):
    class Tiny(Modular):
        def __init__(self):
            super().__init__(p=7, dim=8, heads=2, depth=1, batch_size=16)

    monkeypatch.setattr(entrants, "ENTRANTS", ("Muon",))
    monkeypatch.setitem(board.ALL, "Muon", board.ENTRANTS["Muon"]._replace(task=Tiny))
    entrants.main(2, tmp_path / "study", results_file, tmp_path / "times.json")
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["rounds"] == 2
    assert 0 < times["ms_per_step"]["Muon"]["low"] <= times["ms_per_step"]["Muon"]["high"]
    assert capsys.readouterr().out.endswith("ms  Muon\n")


def test_few_pairs_are_tuned_anew(tmp_path):
    """Before AdamW the EMA saves a tenth and fails with one seed, and the MA costs a tenth; Muon lacks tuning."""
    path, lines = tmp_path / "board.jsonl", []
    for name, steps in (
        ("30 %: AdamW", 500),
        ("30 %: EMA before AdamW", 450),
        ("30 %: MA before AdamW", 550),
        ("30 %: Muon", 300),
    ):
        settings = board.FEW_PAIRS[name].settings
        for i, numbers in enumerate(settings):
            lines += [result(board.job(name, numbers, seed), 900 - i) for seed in board.TUNING]
        for seed in range(7 if "MA" in name or "Muon" in name else 8):
            failed = name.startswith("30 %: EMA") and seed == 6
            lines.append(result(board.job(name, settings[-1], seed), None if failed else steps + seed))
    append(path, *lines, base=None)
    found = board.Board(path, Results([]))
    assert missing(board.jobs(found, "seeds", ["30 %: AdamW"]), path) == []
    (last,) = missing(board.jobs(found, "seeds", ["30 %: Muon"]), path)
    assert last.seed == 7
    assert (last.cap, last.after) == (2000, 0)
    assert last.chain.task.train_fraction == 0.3
    assert {job.cap for job in board.jobs(found, "tuning", ["30 %: Muon"])} == {1000}
    header, _, *rows = (re.split(r" *\| *", line) for line in board.few_pairs_table(found).splitlines())
    assert header[1] == "with 30 % of the pairs"
    assert [row[1] for row in rows] == ["AdamW", "EMA before AdamW", "MA before AdamW"]
    assert [row[4] for row in rows] == ["0 of 7", "1 of 7", "0 of 7"]  # the eighth seed is not there behind the MA
    assert [row[5] for row in rows] == ["", "6, 1 (0.12)", "0, 7 (0.016)"]
    assert rows[0][2:4] == ["lr 0.01, weight_decay 3", "503 (501 to 505)"]


def test_stages_follow_from_each_other(results_file, monkeypatch):
    found = board.Board(results_file, Results([]))
    assert len(board.jobs(found, "tuning", ["Muon"])) == 9
    assert [job.seed for job in board.jobs(found, "finals", ["Muon"])] == [1001] * 3
    seeds = board.jobs(found, "seeds", ["Muon"])
    assert [(job.seed, job.after) for job in seeds] == [(seed, 50) for seed in board.SEEDS]
    assert missing(seeds, results_file) == []
    monkeypatch.setattr(found, "of_study", lambda name, seed: {} if seed < 14 else None)
    assert [job.seed for job in board.jobs(found, "seeds", ["Muon"])] == [14, 15]
    more = board.jobs(found, "more", ["Muon"])
    assert [job.seed for job in more] == list(board.MORE_SEEDS)
    assert {job.after for job in more} == {0}
    others = board.jobs(found, "30-percent", ["Muon"])
    assert [job.seed for job in others] == list(board.SEEDS_OF_OTHERS)
    assert {job.cap for job in others} == {board.CAP}
    assert dataclasses.asdict(others[-1].chain.task)["train_fraction"] == 0.3


@pytest.mark.parametrize(
    ("shape", "age", "limit"), [("none", 0.0, 2), ("EMA", 4.0, 18), ("MA", 4.0, 18 * math.sin(math.pi / 18) ** 2)]
)
def test_stability_limits(shape, age, limit):
    assert memory.limit(shape, age) == pytest.approx(limit, rel=1e-4)


def test_largest_rates_follow_the_limit(tmp_path):
    path = tmp_path / "limit.jsonl"
    fails = lambda shape, age, lr: lr > 0.03 * memory.limit(shape, age)
    append(path, *law_results(lambda shape, age, lr, seed: None if fails(shape, age, lr) else 300), base=None)
    cells = memory.medians(memory.frame(path))
    largest = memory.largest_rates(cells).set_index(["task", "shape", "age"])["largest"]
    assert largest["parity", "none", 0.0] == 0.05
    assert largest["parity", "MA", 4.0] == 0.01  # its limit is 0.54
    assert largest["parity", "MA", 64.0] == 0
    row = memory.bounds(cells).set_index("task, place").loc["sparse parity, in AdamW"].to_list()
    assert row[1] == "16 of 16"
    assert float(row[2]) > 0.9
    fast = memory.fastest_limits(cells).set_index(["task, place", "learning rate"]).loc["sparse parity, in AdamW"]
    assert fast.loc["0.01", "their limits"].startswith("0.4 to ")
    assert fast.loc["0.05"].to_list()[:3] == ["300", "300", "17 of 29"]


def test_windows_over_lamb(tmp_path):
    path = tmp_path / "parity_lamb.csv"
    assert windows.table(path, 0.03, 0.3) == windows.MISSING
    lines = ["preset,lr,weight_decay,window_size,lamb,seed,steps_to_95"]
    for preset, rate, window, lamb, taken in (
        ("ma+adamw", 0.03, 100, 3, (400, 500)),
        ("ma+adamw", 0.03, 100, 5, ("", "")),
        ("ema+adamw", 0.03, "", 3, (450, 450)),
        ("ema+adamw", 0.03, "", 5, (700, "")),
        ("ma+adamw", 0.003, 100, 3, ("", "")),
        ("ma+adamw", 0.003, 100, 5, (3_000, 3_500)),
    ):
        lines += [f"{preset},{rate},0.3,{window},{lamb},{seed},{one}" for seed, one in enumerate(taken)]
    path.write_text("\n".join(lines) + "\n")
    for lamb, pairs in ((5, {0.009: 0.101, 0.01: 0.107, 0.03: 153}), (3, {0.009: 131, 0.01: 133, 0.03: 137})):
        for decay, expected in pairs.items():  # what the page on sparse parity says of the hole
            assert windows.limit("ma", 100, lamb, decay) == pytest.approx(expected, rel=0.01)
    limits = windows.load(path, 0.03, 0.3).set_index(["filter", "lamb"])["limit"]
    assert limits["ma", 3] == pytest.approx(131, rel=0.01)
    assert limits["ma", 5] == pytest.approx(0.101, rel=0.01)
    assert limits["ema", 3] == pytest.approx(148, rel=0.01)
    table = re.sub(" +", " ", windows.table(path, 0.03, 0.3))
    assert "| λ | MA, w 100 | EMA |" in table
    assert "| 3 | 450 [131] | 450 [" in table
    assert "| 5 | all fail [0.1] | > 4,000, 1 fail [" in table
    table = re.sub(" +", " ", windows.table(path, 0.003, 0.3))
    assert "| 3 | all fail [0.14] |" in table
    assert "| 5 | 3,250 [0.065] |" in table
    low, empty, high = windows.picture(path).axes
    assert not empty.lines
    assert {tuple(line.get_ydata().round(-1)) for line in low.lines if len(line.get_xdata()) == 2} == {(0, 100)}
    hollow = [line.get_markerfacecolor() == "white" for line in high.lines if len(line.get_xdata()) == 1]
    assert hollow == [False, True]  # of the MA, with λ 3 and 5


def test_sharpness_of_a_small_network():
    """Against the largest eigenvalue of the whole matrix, in the coordinates that Adam's second moment scales."""
    task = edge.FullBatch(n=3, k=2, points=20, fresh_points=5, width=4)
    params, data = task.init(jax.random.key(0)), task.split({}, jax.random.key(1))
    nu = jax.tree.map(lambda p: 0.1 + jnp.cos(p) ** 2, params)
    flat, unravel = ravel_pytree(params)
    batch = jax.tree.map(lambda leaf: leaf[0], task.batches(data, jax.random.key(2)))
    assert sorted(batch["index"].tolist()) == list(range(20))
    hessian = jax.hessian(lambda flat: task.metrics(unravel(flat), data, batch)["loss"].mean())(flat)
    scale = (jnp.sqrt(ravel_pytree(nu)[0]) + edge.EPS) ** -0.5
    expected = np.abs(np.linalg.eigvalsh(np.outer(scale, scale) * hessian)).max()
    vector = jax.tree.map(jnp.ones_like, params)
    for _ in range(20):
        value, vector = edge.sharpness(task, data, params, nu, vector)
    assert abs(value) == pytest.approx(expected, rel=1e-3)


def test_edge_of_stability(tmp_path):
    """AdamW without memory is held at its limit of 2, and one with a longer memory is not."""
    path = tmp_path / "edge.jsonl"
    lines = []
    for name, sharp, first in (("none", 200.0, None), ("MA, age 4", 54.0, 300)):
        for seed in range(2):
            job = edge.job(name, 0.01, seed)
            lines.append(result(job, first) | {"sharpness": [1.0, 900.0, sharp, sharp, sharp]})
    append(path, *lines, base=None)
    cells = edge.frame(path).set_index("chain")
    assert cells["limit"].to_dict() == {"none": pytest.approx(1.997), "MA, age 4": pytest.approx(0.5478, rel=1e-3)}
    assert cells["held"].to_dict() == {"none": pytest.approx(2), "MA, age 4": pytest.approx(0.54)}
    table = re.sub(" +", " ", edge.table(path)).splitlines()
    assert table[2] == "| MA, age 4 | 0.55 | 2 of 2, 300 [0.54] |"
    assert table[3] == "| none | 2 | 0 of 2 [2] |"
    assert edge.table(tmp_path / "none.jsonl") == edge.MISSING
    assert edge.picture(path).axes


def test_edge_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edge, "CAP", 100)
    monkeypatch.setattr(edge, "MEMORIES", {"none": edge.MEMORIES["none"]})
    out = tmp_path / "edge.jsonl"
    edge.main((3,), (0.01,), out)
    (run,) = contest.results(out).values()
    assert len(run["sharpness"]) == 2
    assert min(run["sharpness"]) > 0
    before = out.read_bytes()
    edge.main((3,), (0.01,), out)
    assert out.read_bytes() == before
    assert "| none" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--rates"):
        edge.main((3,), (0.5,), out)


def test_a_filter_raises_the_rate_most_where_gradients_are_white_noise():
    """By its dc gain over the root of the sum of its squared response, and not at all where they are constant."""
    alpha, lamb, w = 0.98, 5.0, 50
    ema = (1 + lamb * (1 - alpha)) ** 2 + (lamb * (1 - alpha) * alpha) ** 2 / (1 - alpha**2)
    assert raised.white("EMA", lamb) == pytest.approx((1 + lamb) / math.sqrt(ema), rel=1e-4)
    ma = (1 + lamb / w) ** 2 + (w - 1) * (lamb / w) ** 2
    assert raised.white("MA, w 50", lamb) == pytest.approx((1 + lamb) / math.sqrt(ma), rel=1e-4)

    tx = raised.behind("parity", "MA, w 50").make(lamb, 0.01, 0.1)
    noise = jax.random.normal(jax.random.key(0), (1_000, 2, 300))
    grads = noise.at[:, 1].set(1.0)  # of the second run constant
    update = jax.vmap(lambda g, state: tx.update(g, state, jnp.zeros(300))[1])
    states = jax.vmap(tx.init)(jnp.zeros((2, 300)))
    states = jax.lax.scan(lambda state, g: (update(g, state), None), states, grads)[0]
    growth = raised.growth(TrainState(jnp.zeros((2, 300)), states, jnp.zeros((), jnp.int32)), many=True)
    assert (1 + lamb) * growth[0] == pytest.approx(raised.white("MA, w 50", lamb), rel=0.05)
    assert (1 + lamb) * growth[1] == pytest.approx(1, rel=0.05)  # but for the first window


def test_the_control_has_the_raised_rate(tmp_path):
    """λ 2 raises by 2.5, and takes longer than its control; with λ 5 the control's runs are not there."""
    path, lines = tmp_path / "raised.jsonl", []
    for lamb, growth, first in ((2.0, 2.5 / 3, 1_000), (5.0, 0.5, None)):
        one = raised.Setting("parity", 0.003, 0.3, "EMA", lamb)
        lines += [result(job, first if job.seed else None) | {"growth": growth} for job in raised.jobs(one)]
    alone = raised.controls(one, 2.5)
    assert alone[0].numbers == {"lr": 0.0075, "weight_decay": 0.12}
    append(path, *lines, *(result(job, 800) for job in alone), base=None)
    (row,) = raised.frame(path, "parity").to_dict("records")
    assert (row["factor"], row["behind"], row["behind_fail"], row["alone"], row["alone_fail"]) == (2.5, 1000, 1, 800, 0)
    assert row["limit"] == pytest.approx(112, rel=0.01)
    table = re.sub(" +", " ", raised.table(path, "parity")).splitlines()
    assert table[2] == "| EMA, λ 2 | 2.8 | 2.5 | 1,000, 1 fail (800) |"
    assert raised.picture(path).axes
    assert raised.table(path, "modular") == raised.MISSING


@pytest.mark.parametrize("together", [False, True])
def test_raised_rates_train_what_is_missing(tmp_path, monkeypatch, capsys, together):
    setup = raised.SETUPS["parity"]._replace(cap=100, seeds=(0, 1), together=together, rates=((0.003, 0.3),))
    monkeypatch.setitem(raised.SETUPS, "parity", setup._replace(filters=(("EMA", 2.0),)))
    out = tmp_path / "raised.jsonl"
    raised.main(("parity",), out)
    runs = list(contest.results(out).values())
    assert [run["cell"]["chain"] for run in runs] == ["parity, EMA"] * 2 + ["parity, AdamW"] * 2
    assert 1 / 3 < runs[0]["growth"] < raised.white("EMA", 2.0) / 3
    before = out.read_bytes()
    raised.main(("parity",), out)
    assert out.read_bytes() == before
    assert "| EMA, λ 2" in capsys.readouterr().out
    with pytest.raises(UsageError, match="TASKS"):
        raised.main(("mnist",), out)


@pytest.fixture
def raised_file(tmp_path, monkeypatch):
    """Results by which the EMA and a window of 25, with λ 2, raise the rate 2.5 times."""
    setup = raised.SETUPS["parity"]._replace(cap=100, seeds=(0, 1), rates=((0.003, 0.3),))
    monkeypatch.setitem(raised.SETUPS, "parity", setup._replace(filters=(("EMA", 2.0), ("MA, w 25", 2.0))))
    monkeypatch.setattr(noise, "SEEDS", 2)
    path = tmp_path / "raised.jsonl"
    for one in raised.settings(["parity"]):
        append(path, *(result(job, 100) | {"growth": 2.5 / 3} for job in raised.jobs(one)), base=None)
        append(path, *(result(job, 50) for job in raised.controls(one, 2.5)), base=None)
    return path


def test_limits_of_the_sharpness(raised_file):
    """The EMA raises the limit by as much as the rate, and so bears AdamW's sharpness. The window does not."""
    limits = {(group.filter, group.place): group.limit for group in noise.groups(raised_file)}
    adamw = 2 * (1 + 0.9) / (1 - 0.9) / 0.003
    assert limits["none", "behind"] == pytest.approx(adamw, rel=1e-3)
    assert limits["EMA, λ 2", "alone"] == limits["MA, w 25, λ 2", "alone"] == pytest.approx(adamw / 2.5, rel=1e-3)
    assert limits["EMA, λ 2", "behind"] == pytest.approx(112 / 2.5 / 0.003, rel=1e-2)
    assert limits["MA, w 25, λ 2", "behind"] == pytest.approx(0.233 / 2.5 / 0.003, rel=1e-2)
    assert [group.filter for group in noise.groups(raised_file) if group.unstable] == ["MA, w 25, λ 2"]


def test_sharpness_with_noise(raised_file, tmp_path):
    path = tmp_path / "noise.jsonl"
    sharp = {"none": 300.0, "EMA, λ 2": 200.0, "MA, w 25, λ 2": 40.0}
    for group in noise.groups(raised_file):
        first = None if group.filter == "none" else 100
        lines = [result(job, first) | {"sharpness": [900.0, sharp[group.filter]]} for job in group.jobs]
        append(path, *lines, base=None)
    table = re.sub(" +", " ", noise.table(path, raised_file)).splitlines()
    assert noise.picture(path, raised_file).axes
    assert table[2:] == [
        "| none | all fail [300] | |",
        "| EMA, λ 2 | 100 [200] | 100 [40] |",  # the controls of both are the same runs, of which the later count
        "| MA, w 25, λ 2 | 100 [40] | 100 [40] |",
    ]
    assert noise.table(tmp_path / "none.jsonl", raised_file) == noise.MISSING


def test_sharpness_with_noise_trains_what_is_missing(raised_file, tmp_path, capsys):
    out = tmp_path / "noise.jsonl"
    noise.main(raised_file, out)
    runs = list(contest.results(out).values())
    assert [run["cell"]["chain"].removeprefix("parity, ") for run in runs[:4]] == ["AdamW", "EMA", "AdamW", "MA, w 25"]
    assert len(runs) == 8
    assert all(len(run["sharpness"]) == 2 and min(run["sharpness"]) > 0 for run in runs)
    before = out.read_bytes()
    noise.main(raised_file, out)
    assert out.read_bytes() == before
    assert "| EMA, λ 2" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--rates must be .* got .*none\.jsonl"):
        noise.main(tmp_path / "none.jsonl", out)
    assert noise.table(out, tmp_path / "none.jsonl") == noise.MISSING


def test_the_sharpness_is_measured_by_the_gradients_before_a_filter():
    """A filter that only scales changes Adam's second moment, but neither the run nor its sharpness."""
    numbers = {"lr": 0.003, "weight_decay": 0.3}
    adamw = raised.SETUPS["parity"].adamw
    scaled = lambda lr, weight_decay: optax.chain(raised.watched(0.999), optax.scale(10.0), adamw(lr, weight_decay))
    chains = [Chain(name, make, edge.Parity()) for name, make in (("AdamW", adamw), ("scaled", scaled))]
    plain, behind = (edge.train(Job(one, numbers, 0, 100), tqdm.tqdm(disable=True))["sharpness"] for one in chains)
    assert behind == pytest.approx(plain, rel=0.02)


def law_results(steps):
    for task in memory.TASKS:
        for job in memory.jobs(task, ["in AdamW"], [0, 1]):
            *_, shape, age = job.chain.name.split(", ")
            yield result(job, steps(shape, float(age.split()[1]), job.numbers["lr"], job.seed))


def test_what_explains_the_steps(tmp_path):
    by_age, by_shape = tmp_path / "age.jsonl", tmp_path / "shape.jsonl"
    append(by_age, *law_results(lambda shape, age, lr, seed: round(10 * age + 1 / lr)), base=None)
    weight = lambda shape, age: round(300 - 200 * memory.newest(shape, age))
    append(by_shape, *law_results(lambda shape, age, lr, seed: weight(shape, age)), base=None)
    row = memory.explained(memory.medians(memory.frame(by_age))).iloc[-1]
    assert (row["task, place"], row["with mean age"]) == ("sparse parity, in AdamW", "100%")
    assert row["rate explains"] != "100%"
    assert row["rank correlation with mean age"] == "1.00"
    row = memory.explained(memory.medians(memory.frame(by_shape))).iloc[-1]
    assert row["rate explains"] == "0%"
    assert row["rank correlation with weight of newest"] == "-1.00"
    best = memory.at_best_rate(memory.medians(memory.frame(by_age)))
    assert set(best["lr"]) == {0.008, 0.05}
    assert set(best["rates without failure"]) == {5}
    text = memory.table(by_age)
    assert "| mod 97, in AdamW" in text
    assert "0 of 2" in text
    assert "| sparse parity, in AdamW | 12 of 12" in re.sub(" +", " ", text)
    for figure in (memory.law_picture(by_age), memory.age_picture(by_age), memory.limit_picture(by_age)):
        assert len(figure.axes) == 6
    assert memory.table(tmp_path / "none.jsonl") == memory.MISSING


@pytest.mark.parametrize(
    ("shape", "age", "weight"),
    [("none", 0.0, 1.0), ("EMA", 4.0, 0.2), ("Nesterov EMA", 3.2, 0.36), ("MA", 4.0, 1 / 9), ("triangular", 4.0, 0.04)],
)
def test_weight_of_the_newest_gradient(shape, age, weight):
    assert memory.newest(shape, age) == pytest.approx(weight, rel=1e-5)


def test_what_fails_with_the_first_seed_is_not_trained_with_others(tmp_path):
    path = tmp_path / "memory.jsonl"
    first, second, third, *_ = memory.jobs("modular", ["in Muon"], [0])
    append(path, result(first, None), result(second, 300), result(third._replace(seed=1), None), base=None)
    others = [job._replace(seed=2) for job in (first, second, third)]
    assert memory.promising(others, path, 0) == others[1:]
    assert memory.promising(others, tmp_path / "none.jsonl", 0) == others


def test_memory_says_what_it_does_not_know(tmp_path):
    with pytest.raises(UsageError, match="TASKS must be among modular, parity, got quantum"):
        memory.main(("quantum",), out=tmp_path / "x.jsonl")
    with pytest.raises(UsageError, match=r"--rates must be among 0.0125, 0.025, 0.05, 0.1, 0.2, got 0.3$"):
        memory.main(("modular",), ("in Muon",), rates=(0.3,), out=tmp_path / "x.jsonl")
    with pytest.raises(
        UsageError, match=r"--entrants must be among AdamW; NAdamW; .*Lion, row norms clipped; .*got Adam$"
    ):
        board.main(entrants=("Adam",), out=tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())
