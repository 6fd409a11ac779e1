"""The studies of mod 97: their methods and runs, how pairs are tuned, and what tables and figures say."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.studies import mod97, mod97_tuned
from benchmarks.study import find_study
from examples import modular
from examples.harness.engine import as_text, product, to_frame

pytestmark = pytest.mark.usefixtures("lenient")
PROGRAMS = {}  # compiled, by their keys
PARAMS = {
    "blocks": {"up": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.linspace(0.5, 1.5, 3)},
    "head": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3),
}


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def end(run, steps=30, scale=1.0):
    """Parameters after some steps on gradients that change from step to step."""
    key = (run.program_key, steps)
    if key not in PROGRAMS:

        def train(traced, scale):
            tx = optax.with_extra_args_support(run.make_tx(traced))

            def step(carry, i):
                params, state = carry
                grads = jax.tree.map(lambda p: scale * jnp.cos(p + i * i), params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(steps, dtype=jnp.float32))[0][0]

        PROGRAMS[key] = jax.jit(train)
    return flat(PROGRAMS[key](run.traced, scale))


@pytest.mark.slow
def test_every_method_moves_all_parameters_and_is_like_no_other():
    ends = {label: end(run, steps=520) for label, run in mod97.RUNS.items()}  # past the second stage of two
    assert [label for label, params in ends.items() if (params == flat(PARAMS)).any()] == []
    for a, b in itertools.combinations(ends, 2):
        assert np.abs(ends[a] - ends[b]).max() > 1e-6, (a, b)


def test_amplifying_gradients_is_weakening_the_coupled_decay():
    """Why the control of the EMA has a third of its decay: what holds for all of a gradient holds for its slow part."""
    amplified, weaker, base = (
        end(mod97.setting(modular.ema, lamb=0.0, fast=fast, weight_decay=decay), scale=0.01)
        for fast, decay in ((3.0, 0.005), (1.0, 0.005 / 3), (1.0, 0.005))
    )
    np.testing.assert_allclose(amplified, weaker, atol=1e-6)
    assert np.abs(amplified - base).max() > 1e-3


def test_labels_are_of_different_settings_and_only_filters_have_controls():
    assert len({as_text(run.key) for run in mod97.RUNS.values()}) == len(mod97.RUNS)
    controls = {
        label: [control for one, control in mod97.pairs_of(mod97.RUNS, mod97.CONTROLS) if one == label]
        for label in mod97.RUNS
    }
    for label, run in mod97.RUNS.items():
        is_filtered = mod97.what(run).startswith("Grokfast-")
        assert bool(controls[label]) == is_filtered == (mod97.colour(run) == mod97.FILTER)
        assert all(mod97.what(mod97.RUNS[control]).startswith("no filter") for control in controls[label])
    optimizer = lambda label: mod97.what(mod97.RUNS[label]).partition(", ")[2].partition(" weight")[0]
    for label, (name, _) in mod97_tuned.TUNED.items():
        of_grid = [control for one, control in mod97.pairs_of(mod97_tuned.TUNED, mod97_tuned.CONTROLS) if one == label]
        assert {optimizer(mod97_tuned.TUNED[control][0]) for control in of_grid} == {
            optimizer(one) for one in controls[name]
        }


@pytest.mark.parametrize(("name", "count"), [("mod97", 677), ("mod97_tuned", 428)])
def test_the_results_are_of_the_runs(name, count):
    """Renew the numbers only with the results: another number says that a method or the key has changed."""
    study = find_study(name)
    results = study.results()
    keys = {as_text(run.key) for run in study.runs(results)}
    assert keys == results.by_key().keys()
    assert len(keys) == count


def test_stored_results_are_found():
    """Renew these only with the results."""
    frame = mod97.STUDY.results().frame()
    steps = lambda run: list(mod97.seeds_of(frame, run)["steps_to_95"])
    assert steps(mod97.RUNS["ma"]) == [1270, 1540, 1110, 920, 950, 960, 830, 890]
    assert steps(mod97.TUNED_ADAMW) == [640, 520, 350, 650, 550, 490, 410, 470]
    chosen = mod97_tuned.chosen(mod97_tuned.STUDY.results().frame())
    assert chosen.keys() == mod97_tuned.TUNED.keys()
    assert chosen["adamw"] == mod97.TUNED_ADAMW


def result(run, seed, steps, **changes):
    """The result of a seed, with None for the steps of a run that fails."""
    followed = {} if steps is None else {"followed_evals": 50, "held_evals": 50}
    outcome = {"steps_to_95": steps, "fit_steps": 100, "best_val_accuracy": 0.9, "finite": True}
    return {"run": dataclasses.replace(run, seed=seed).key, **outcome, **followed, **changes}


def cells(table):
    """The cells of the rows of Markdown tables."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines]


def test_tables_compare_within_a_setting_and_leave_out_what_has_no_runs():
    ema, control = mod97.RUNS["ema"], mod97.RUNS["adamw-1"]
    division = [mod97.BY_OPERATION["operation division"][label] for label in ("ema", "adamw-1")]
    runs = [result(ema, seed, 1000 + seed) for seed in (0, 1)] + [result(division[0], 0, 900)]
    frame = to_frame(runs)
    (row,) = cells(mod97.table(frame))[1:]
    assert row[:3] == ["`ema`", "Grokfast-EMA α 0.98 λ 2, Adam weight decay 0.005", "100"]
    assert row[3:] == ["1,000 (1,000 to 1,001)", "1,001", "0 of 2", "2 of 2 (100%)"]
    assert [row[:2] for row in cells(mod97.operations(frame))[1:]] == [
        ["operation division", "`ema`"],
        ["operation multiplication", "`ema`"],
    ]
    frame = to_frame([*runs, result(control, 0, 500), result(division[1], 0, 1000)])
    assert cells(mod97.operations(frame))[-2:] == [
        ["setting", "method", "against", "fewer steps", "more steps", "neither", "ratio of steps (seeds)"],
        ["operation division", "`ema`", "`adamw-1`", "1", "0", "0", "0.90 (1)"],
    ]
    assert cells(mod97.pairs(frame))[-1] == ["`ema`", "`adamw-1`", "0", "1", "0", "2.00 (1)"]


def test_a_pair_of_rate_and_decay_is_compared_with_its_own_control():
    by_label = mod97_tuned.RATES["learning rate 0.003, decay 3.0"]
    milder = mod97_tuned.RATES["learning rate 0.003, decay 1.0"]["adamw"]
    frame = to_frame([result(by_label["ma+adamw"], 0, 500), result(by_label["adamw"], 0, 1000), result(milder, 0, 100)])
    assert cells(mod97_tuned.rate(frame))[-1] == (
        ["learning rate 0.003, decay 3.0", "`ma+adamw`", "`adamw`", "1", "0", "0", "0.50 (1)"]
    )


def test_tuning_chooses_the_best_median_of_the_three_best_with_one_seed_then_the_best_accuracy():
    grid, (first, second) = mod97_tuned.grid("muon"), mod97_tuned.TUNING_SEEDS
    assert [len(set(map(as_text, (run.key for run in mod97_tuned.grid(name))))) for name in mod97_tuned.TUNED] == (
        [9] * len(mod97_tuned.TUNED)
    )
    assert {(run.max_steps, run.hold_evals) for run in grid} == {(2_500, 0)}

    def tried(steps, accuracies=(0.9,) * 9):
        triples = zip(grid, steps, accuracies, strict=True)
        return [result(run, first, n, best_val_accuracy=accuracy) for run, n, accuracy in triples]

    runs = tried([None, 1900, 1800, None, 1000, None, None, None, 2000])
    finals = [grid[4], grid[2], grid[1]]
    assert mod97_tuned.finalists(to_frame(runs), "muon") == finals
    assert mod97_tuned.chosen(to_frame(runs)) == {}
    runs += [result(run, second, n) for run, n in zip(finals, [3000, 1900, None], strict=True)]
    best = mod97_tuned.chosen(to_frame(runs))["muon"]  # medians 2,000, 1,850 and infinite
    assert best == mod97_tuned.pair("muon", 0.01, 0.3) == mod97.setting(modular.muon, lr=0.01, weight_decay=0.3)
    runs.append(result(best, 0, 1234))
    (row,) = cells(mod97_tuned.table(to_frame(runs)))[1:]
    assert row[:2] == ["`muon`", "0.01 (edge), 0.3 (edge)"]
    assert row[3] == "1,234"  # the seeds of the tuning are not reported
    filtered = mod97_tuned.grid("ema+muon")
    runs += [result(run, first, n) for run, n in zip(filtered, [100, 200, 300, *[None] * 6], strict=True)]
    runs += [result(run, second, n) for run, n in zip(filtered[:3], [200, 300, 100], strict=True)]
    runs.append(result(mod97_tuned.pair("ema+muon", 0.01, 0.03), 0, 617))
    assert cells(mod97_tuned.table(to_frame(runs)))[-1] == ["`ema+muon`", "`muon`", "1", "0", "0", "0.50 (1)"]

    nothing = [None] * 9
    by_accuracy = to_frame(tried(nothing, [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.4, 0.3]))
    assert mod97_tuned.finalists(by_accuracy, "muon") == [grid[7], grid[8], grid[5]]
    never_finite = to_frame(tried(nothing, [0.1, None, 0.1, 0.1, 0.1, 0.2, 0.1, None, 0.3]))
    assert mod97_tuned.finalists(never_finite, "muon") == [grid[8], grid[5], grid[0]]


def test_the_stages_of_the_tuning_follow_from_one_another():
    class Untrained:
        def of(self, runs):
            return to_frame(result(run, run.seed, 100 + 1e5 * run.hyperparams["lr"]) for run in runs)

    runs = list(mod97_tuned.runs(Untrained()))  # pyright: ignore[reportArgumentType]
    by_seed = collections.Counter(run.seed for run in runs)
    methods = len(mod97_tuned.TUNED)
    assert by_seed[1000] == 9 * methods
    assert by_seed[1001] == 3 * methods
    lowest = min(mod97_tuned.LION[0])
    assert {run.hyperparams["lr"] for run in runs if run.key["method"] == "lion" and run.seed < 8} == {lowest}
    assert {(run.max_steps, run.hold_evals) for run in runs if run.seed < 8} == {(5_000, 50)}


def drawn(study, name, runs):
    """The axes of a figure that is drawn from some results."""
    figure, axes = mod97.views.chart("", **{**study.figures[name].layout})
    study.figures[name].draw(to_frame(runs), axes)
    figure.draw_without_rendering()
    return axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_figure_says_how_many_seeds_fail_and_draws_no_value_for_them():
    steps = {"ma": [900, 1100], "ema": [1000, None], "adam-0.01": [None, None]}
    runs = [result(mod97.RUNS[label], seed, n) for label, two in steps.items() for seed, n in enumerate(two)]
    axes = drawn(mod97.STUDY, "mod97_fair_control", runs)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [  # sorted by the medians
        "MA w 100 λ 5, Adam, decay 0.01",
        "EMA α 0.98 λ 2, Adam, decay 0.005",
        "Adam, decay 0.01",
    ]
    assert texts(axes) == ["× 1 of 2 fail", "× 0 of 2 reach it"]
    dots = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "o"])
    assert sorted(dots) == [900, 1000, 1100]


def test_the_share_of_seeds_counts_those_that_fail():
    curves = (mod97.RUNS["ema"], mod97.RUNS["adam-0.00167"], mod97.TUNED_ADAMW, mod97.RUNS["fastest"])
    runs = [result(run, seed, n) for run in curves for seed, n in enumerate([1000, 500, None, None])]
    axes = drawn(mod97.STUDY, "mod97_hero", runs)
    assert axes.get_xlim()[1] < 5_000  # where those that fail would be counted
    for line in axes.lines:
        assert list(line.get_xdata()) == [500, 500, 1000, 5000, 5000]
        assert list(line.get_ydata()) == [0, 0.25, 0.5, 0.75, 1]


def test_the_ablations_have_a_row_for_each_value():
    frame = mod97.STUDY.results().frame()
    figure, panels = mod97.views.chart("", **{**mod97.STUDY.figures["mod97_ablations"].layout})
    mod97.ablations(frame, panels)
    figure.draw_without_rendering()
    alpha, decay = panels[0, 1], panels[1, 0]
    assert [label.get_text() for label in alpha.get_yticklabels()] == ["0.8", "0.9", "0.95", "0.98", "0.99", "0.995"]
    assert [label.get_text() for label in decay.get_yticklabels()] == ["0", "0.001", "0.002", "0.005", "0.01", "0.02"]
    assert texts(alpha) == ["× 1 of 3 fail"]
    assert texts(decay) == ["× 0 of 3 reach it", "× 1 of 3 fail", "× 0 of 3 reach it", "× 0 of 3 reach it"]


def test_the_grid_of_windows_has_medians_of_the_same_three_seeds():
    steps = lambda run, seed: 100 * run.hyperparams["window_size"] * seed
    runs = [result(run, seed, steps(run, seed)) for run in mod97.WINDOW_GRID for seed in (1, 2, 0, 3)]
    published = product(modular.Modular(), modular.ma, window_size=100, lamb=5.0, hold_evals=50)[0]
    assert published in mod97.WINDOW_GRID
    assert texts(drawn(mod97.STUDY, "mod97_window_grid", runs)) == ["200", "1,000", "5,000", "10,000", "20,000"] * 4


def test_the_bars_count_the_runs_that_reach_and_those_that_hold_95_percent():
    alone, filtered = (mod97_tuned.pair(label, 0.001, 1.0) for label in ("adamw", "ma+adamw"))
    runs = [result(alone, 0, 500, held_evals=49), result(alone, 1, None), result(filtered, 0, 500)]
    axes = drawn(mod97_tuned.STUDY, "mod97_tuned_hold", runs)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]  # AdamW reaches, holds; with the MA the same
