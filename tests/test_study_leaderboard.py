"""The leaderboard's rules, and the study of momentum and learning rate."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from benchmarks import views
from benchmarks.studies import leaderboard, momentum_and_rate
from benchmarks.study import find_study
from examples import modular
from examples.harness.engine import Results, as_text
from examples.harness.experiment import Run

PARAMS = {
    "token": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3),
    "blocks": {"up": jnp.linspace(0.5, -1.5, 9).reshape(3, 3), "bias": jnp.ones(3)},
    "head": jnp.linspace(-0.3, 0.8, 12).reshape(3, 4),
}


def trained(tx: optax.GradientTransformation, steps: int = 4) -> Any:
    """Parameters after some steps on fixed, changing gradients."""

    def step(carry: Any, scale: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.tree.map(lambda p: scale * jnp.sin(3 * p) + 0.1, params)
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.linspace(1.0, -0.5, steps))
    return params


class FakeResults:
    """Results with steps that are a function of the run."""

    def __init__(self, steps: Any):
        self.steps, self.asked = steps, []

    def of(self, runs: Iterable[Run]) -> pd.DataFrame:
        runs = list(runs)
        self.asked += runs
        return pd.DataFrame(
            [run.key | {"steps_to_95": self.steps(run), "best_val_accuracy": 0.5, "max_steps": 1000} for run in runs]
        )


def test_every_entrant_tries_the_same_points_of_the_unit_cube_within_its_ranges():
    places = []
    for board, entrant in [(rules, one) for rules in leaderboard.BOARDS for one in rules.entrants.values()]:
        points = board.points(entrant)
        assert len(points) == leaderboard.SETTINGS == len({tuple(point.values()) for point in points})
        ranges = board.ranges(entrant)
        for name, (low, high) in ranges.items():
            factor = {"weight_decay": "lr"}.get(name)
            for point in points:
                assert low * 0.98 <= point[name] * (point[factor] if factor else 1) <= high * 1.02
        low, high = ranges["lr"]
        places.append([math.log(point["lr"] / low) / math.log(high / low) for point in points])
    np.testing.assert_allclose(places, [places[0]] * len(places), atol=0.01)
    assert abs(np.mean(places[0]) - 0.5) < 0.03  # a Sobol sequence fills its range evenly


def test_tuning_keeps_four_settings_and_enters_the_best_median_of_three_seeds():
    entrant = leaderboard.ENTRANTS["AdamW"]
    board = leaderboard.MOD97
    tried = board.points(entrant)
    place = {point["lr"]: i for i, point in enumerate(tried)}

    def steps(run: Run) -> float:  # by the first seed the first point is best, by the median the third
        i = place[run.hyperparams["lr"]]
        later = {0: 900.0, 1: 800.0, 2: 150.0, 3: math.inf}
        return float(100 + 10 * i) if run.seed == 1000 else later[i]

    results = FakeResults(steps)
    runs = board.finals(results, entrant)  # type: ignore[arg-type]
    assert {run.hyperparams["lr"] for run in runs} == {tried[2]["lr"]}
    assert [run.seed for run in runs] == list(range(400, 416))
    asked = {(run.hyperparams["lr"], run.seed) for run in results.asked}
    assert len(asked) == 32 + 2 * 4


def test_without_complete_tuning_nothing_is_entered(tmp_path: Path):
    results = find_study("leaderboard").results(folder=tmp_path)
    assert list(leaderboard.runs(results)) == leaderboard.FASTEST  # which is not tuned


def test_the_best_of_k_settings_is_the_mean_over_all_choices_of_k():
    steps = np.array([400.0, 150.0, np.inf, 620.0, 150.0])
    for k in range(1, 6):
        expected = np.mean([min(choice) for choice in itertools.combinations(np.minimum(steps, 1000), k)])
        assert leaderboard.best_of(steps, k, 1000) == pytest.approx(expected)


def test_on_other_tasks_the_task_alone_differs():
    setting = {"lr": 0.1, "weight_decay": 0.1, "one_minus_beta": 0.2}
    (run,) = leaderboard.MOD97.trial(leaderboard.ENTRANTS["Muon"], setting, [7])
    runs = leaderboard.on_other_tasks(run, leaderboard.SEEDS)
    assert len(runs) == 4 * 16 == len({str(one.key) for one in runs})
    assert {one.task.operation for one in runs} == {"multiplication", "addition", "subtraction", "division"}  # type: ignore
    assert {tuple(one.hyperparams.items()) for one in runs} == {tuple(run.hyperparams.items())}


def test_other_tasks_have_a_row_per_main_entrant_that_has_all_runs():
    rows = []
    for name, steps in (("AdamW", 500.0), ("Muon", 400.0)):
        entrant = leaderboard.MAIN[name]
        (run,) = leaderboard.MOD97.trial(entrant, leaderboard.MOD97.points(entrant)[0], [7])
        outcome = {"steps_to_95": steps, "best_val_accuracy": 0.9}
        rows += [one.key | outcome for one in leaderboard.on_other_tasks(run, leaderboard.SEEDS)]
    adamw, muon = leaderboard.elsewhere.__wrapped__(pd.DataFrame(rows))
    assert [*adamw.values()] == ["AdamW", *["500"] * 4]
    assert [*muon.values()] == ["Muon", *["400; 16 : 0 (p < 0.001)"] * 4]
    assert [row["method"] for row in leaderboard.elsewhere.__wrapped__(pd.DataFrame(rows[:-1]))] == ["AdamW"]
    assert [*leaderboard.elsewhere.__wrapped__(pd.DataFrame(rows[1:]))] == []  # AdamW lacks a run


def test_the_example_is_trained_with_none_of_the_fresh_seeds_and_has_its_results():
    frame = leaderboard.STUDY.results().of(leaderboard.FASTEST[:56])
    assert (len(frame), frame["steps_to_95"].median(), frame["steps_to_95"].max()) == (56, 140, 200)
    assert len(leaderboard.STUDY.results().of(leaderboard.FASTEST)) == len(leaderboard.FASTEST) == 56 + 4 * 8


def test_all_results_are_of_runs_that_the_study_names():
    """A result without a run says that a method, a rule or the key has changed."""
    study, asked = leaderboard.STUDY, []

    class Recorder(Results):
        def of(self, runs):
            asked.extend(runs := list(runs))
            return super().of(runs)

    list(leaderboard.runs(Recorder(study.results().path)))
    stored = study.results().by_key().keys()
    assert stored
    assert stored - {as_text(run.key) for run in asked} == set()


ALL = leaderboard.ENTRANTS | leaderboard.BEFORE_MUON | leaderboard.CONTROLS


def test_standings_compare_with_adamw_seed_by_seed_and_mark_numbers_at_an_edge():
    board, rows = leaderboard.PARITY, []
    for name, steps, lr in (("AdamW", 500.0, 0.1), ("Muon", 400.0, 0.98), ("NAdamW", math.inf, 0.1)):
        entrant = board.entrants[name]
        setting = {"lr": lr, "weight_decay": 0.002 / lr, entrant.own: 0.1}
        rows += [
            run.key | {"steps_to_95": steps, "best_val_accuracy": 0.9}
            for run in board.trial(entrant, setting, leaderboard.SEEDS)
        ]
    muon, adamw, nadamw = ([*row.values()] for row in board.standings(pd.DataFrame(rows)))
    assert muon == ["Muon", "0.98 (edge), 0.00204, 0.1", "400 (400 to 400)", "0 of 16", "16 : 0 (p < 0.001)"]
    assert adamw == ["AdamW", "0.1, 0.02, 0.1", "500 (500 to 500)", "0 of 16", ""]
    assert nadamw[2:] == ["> 2,000", "16 of 16", "0 : 16 (p < 0.001)"]
    assert [*board.standings(pd.DataFrame(rows[1:]))] == []  # AdamW lacks a seed


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", ALL)
def test_every_entrant_moves_every_parameter(name: str):
    entrant = ALL[name]
    setting = leaderboard.MOD97.points(entrant)[1]
    moved = trained(entrant.method(**setting))
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(moved), strict=True):
        assert bool(jnp.isfinite(after).all())
        assert not np.array_equal(before, after)


@pytest.mark.usefixtures("lenient")
def test_entrants_equal_the_optimizers_that_they_are_named_after():
    pairs = [
        (leaderboard.adamw_tuned(0.01, 0.3, 0.1), modular.adamw(0.01, 0.3)),
        (leaderboard.ema_adamw_tuned(0.01, 0.3, 2.0), modular.ema_adamw(0.01, 0.3)),
        (leaderboard.ma_adamw_tuned(0.01, 0.3, 5.0), modular.ma_adamw(0.01, 0.3)),
        (momentum_and_rate.filtered_adam(0.01, 0.3, 0.9, "none", False), modular.adamw(0.01, 0.3)),
        (momentum_and_rate.filtered_adam(0.01, 0.3, 0.9, "ma", False), modular.ma_adamw(0.01, 0.3)),
        (momentum_and_rate.filtered_adam(0.001, 0.005, 0.9, "ema", True), modular.ema(0.001, 0.005)),
        (momentum_and_rate.filtered_adam(0.001, 0.01, 0.9, "ma", True), modular.ma(0.001, 0.01)),
    ]
    for one, other in pairs:
        for x, y in zip(jax.tree.leaves(trained(one)), jax.tree.leaves(trained(other)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_perpendicular_gradients_do_not_change_norms_to_first_order():
    tx = leaderboard.remove_along(optax.constant_schedule(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.cos, PARAMS), tx.init(PARAMS), PARAMS)
    for p, u in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(updates), strict=True):
        assert abs(float(jnp.vdot(p, u))) < 1e-5


def test_the_primary_comparisons_come_first_and_have_sixteen_fresh_seeds(tmp_path: Path):
    results = find_study("momentum_and_rate").results(folder=tmp_path)
    runs = list(momentum_and_rate.runs(results))
    first = [run for pair in momentum_and_rate.PRIMARY.values() for side in pair for run in side]
    assert runs[: len(first)] == first
    assert {run.seed for run in runs} == set(range(300, 316))
    settings = {tuple(run.hyperparams.items()) for run in runs}
    # The grid; the published filters, raised rates, the tuned pair, rate and decay traded, a weak MA, the strong decay;
    # both filters at the tuned pair, two decays between, two momenta at one of these, one of the six settings, the
    # EMA's best pair, four more momenta of Adam, three of the published EMA, and the MA with half of the paper's decay.
    assert len(settings) == 5 * 2 * 2 + 2 + 2 + 1 + 2 + 1 + 3 + 2 + 2 * 2 + 2 + 1 + 1 + 4 + 3 + 1


def primary_results(**more):
    """Results of the primary comparisons; all first sides need fewer steps."""
    rows = []
    for sides in momentum_and_rate.PRIMARY.values():
        for side, steps in zip(sides, (500.0, 700.0), strict=True):
            rows += [run.key | {"steps_to_95": steps} | more for run in side]
    return pd.DataFrame(rows)


def test_a_primary_comparison_is_a_sign_test_with_adjusted_p():
    table = momentum_and_rate.primary(primary_results())
    assert table.count("16 : 0 (p < 0.001)") == 3
    assert f"{2 * 0.5**16:.2g}" in table
    assert momentum_and_rate.primary(primary_results().iloc[1:17]) == views.MISSING


def test_the_shrinkage_of_a_coupled_decay_is_divided_by_the_root_of_the_second_moment():
    table = momentum_and_rate.shrinkage(primary_results(root_nu=[0.01] * 5, param_norm=[4, 3, 2, 2, 1]))
    first, *_, last = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:])
    assert first == ["EMA before Adam", "0.01", f"{0.001 * 0.005 / 0.01:.2g}", "2, 1"]
    assert last == ["AdamW with β1 0.5", "0.01", "0.001", "2, 1"]


def test_the_grid_has_the_rows_with_all_momenta_and_seeds():
    runs = momentum_and_rate.on_mod97(lr=0.001, b1=momentum_and_rate.B1S, lowpass="ma", **momentum_and_rate.DECOUPLED)
    frame = pd.DataFrame([run.key | {"steps_to_95": 100.0 * run.hyperparams["b1"]} for run in runs])
    assert [cell.strip() for cell in momentum_and_rate.table(frame).splitlines()[2].split("|")[3:-1]] == [
        "0", "50", "80", "90", "98",
    ]  # fmt: skip
    assert momentum_and_rate.table(frame.iloc[1:]) == views.MISSING
