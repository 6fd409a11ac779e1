"""The study of mod 97: its methods and runs, and what tables and figures say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.statistics import paired
from benchmarks.studies import fourier_circuits, mod97, momentum_and_rate
from examples import modular
from examples.harness.engine import as_text, to_frame

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


def test_labels_are_of_different_settings_and_only_filters_are_compared():
    assert len({as_text(run.key) for run in mod97.RUNS.values()}) == len(mod97.RUNS)
    filtered = {label for label in mod97.RUNS if mod97.colour(label) == mod97.FILTER}
    is_filtered = lambda run: any(name in run.key["method"].split("_") for name in ("ema", "ma", "two"))
    assert filtered == {label for label, run in mod97.RUNS.items() if is_filtered(run)}
    assert {*mod97.PUBLISHED.values()} <= filtered
    assert filtered.isdisjoint(mod97.CONTROLS)


def test_the_results_are_of_the_runs():
    """Renew the number only with the results: another number says that a method or the key has changed."""
    results = mod97.STUDY.results()
    keys = {as_text(run.key) for run in mod97.runs(results)}
    assert keys == results.by_key().keys()
    assert len(keys) == 863


def test_tuned_pairs_are_the_best_of_nine():
    results = mod97.STUDY.results()
    best = {"Adam": (0.003, 0.001), "AdamW": (0.003, 1.0), "MA before Adam": (0.003, 0.001), "Muon": (0.03, 0.3)}
    best |= {"EMA before Muon": (0.03, 0.3), "MA before Muon": (0.01, 0.3)}
    assert {f"{name}, learning rate {lr}, decay {decay:g}" for name, (lr, decay) in best.items()} <= mod97.RUNS.keys()
    best["EMA before Adam"] = (0.001, 0.003)
    fresh = {"Adam": momentum_and_rate.TUNED}
    fresh |= {name.partition(",")[0]: side for name, side in momentum_and_rate.BEST_OF_NINE.items()}
    for name, (run, *_) in fresh.items():
        assert (run.hyperparams["lr"], run.hyperparams["weight_decay"]) == best[name]
    assert fourier_circuits.METHODS["Muon"].keywords == dict(zip(("lr", "weight_decay"), best["Muon"], strict=True))
    for name, tried in mod97.TUNED.items():
        frame = results.of([*tried, *mod97.second_tries(results, tried)])
        both = frame.pivot_table("steps_to_95", ["lr", "weight_decay"], "seed", dropna=False).dropna()
        assert len(tried) == 9
        assert len(both) == 3
        assert both.median(axis=1).idxmin() == best[name]


def test_three_of_nine_settings_have_a_second_try_by_steps_then_by_accuracy():
    class Fake:
        def __init__(self, outcomes):
            self.outcomes = outcomes

        def of(self, runs):
            return to_frame(
                [result(run, 0, n, best_val_accuracy=a) for run, (n, a) in zip(runs, self.outcomes, strict=False)]
            )

    tried = mod97.TUNED["Adam"]
    steps = [(None, 0.1), (None, 0.4), (900, 0.9), (None, 0.2), (None, None), (800, 0.9), (None, 0.3)]
    outcomes = [*steps, (None, 0.1), (None, 0.1)]
    found = mod97.second_tries(Fake(outcomes), tried)
    assert found == mod97.with_seeds([tried[5], tried[2], tried[1]], [1001])
    assert mod97.second_tries(Fake(outcomes[1:]), tried) == []


def test_stored_results_are_found():
    """Renew these only with the results."""
    frame = mod97.STUDY.results().frame()
    steps = lambda label: list(mod97.seeds_of(frame, mod97.RUNS[label])["steps_to_95"])
    assert steps("MA before Adam, decay 0.01") == [1270, 1540, 1110, 920, 950, 960, 830, 890]
    assert steps("AdamW, learning rate 0.003, decay 1") == [640, 520, 350, 650, 550, 490, 410, 470]
    assert mod97.PAIRS["learning rate 0.003, decay 1"]["AdamW"] == mod97.RUNS["AdamW, learning rate 0.003, decay 1"]


def test_the_numbers_in_the_text_of_the_pages_are_those_of_the_results():
    """Numbers that no table beside the text has: medians and ratios."""
    frame = mod97.STUDY.results().frame()
    runs = {label: mod97.seeds_of(frame, run).sort_values("seed") for label, run in mod97.RUNS.items()}
    ratio = lambda one, other: round(paired(runs[one], runs[other]).ratio, 2)
    for label, median, to_adam in zip(mod97.PUBLISHED.values(), (1280, 955), (0.64, 0.63), strict=True):
        assert runs[label]["steps_to_95"].median() == median
        assert ratio(label, "Adam, decay 0.00167") == to_adam
    assert runs["Adam, decay 0"]["best_val_accuracy"].max() < 0.46
    assert runs["EMA before Adam, decay 0"]["best_val_accuracy"].max() < 0.19
    assert paired(runs["MA before Adam, decay 0"], runs["Adam, learning rate 0.006, decay 0"])[:3] == (5, 3, 0)
    for one, other, counts, times in (
        ("MA before Adam, decay 0, from step 500", "MA before Adam, decay 0", (8, 0, 0), 0.74),
        ("MA before AdamW, decay 1", "AdamW, decay 1", (8, 0, 0), 0.91),
        ("EMA before AdamW, decay 1", "AdamW, decay 1", (0, 8, 0), 2.36),
        ("EMA before AdamW, decay 1, start debiased", "EMA before AdamW, decay 1", (8, 0, 0), 0.57),
        ("EMA before AdamW, decay 1, start debiased", "AdamW, decay 1", (0, 7, 1), 1.17),
        ("EMA before AdamW, decay 1, λ 5 from step 100", "AdamW, decay 1", (4, 4, 0), 0.95),
        ("EMA before Muon, decay 1", "Muon, decay 1", (8, 0, 0), 0.62),
        ("MA before Muon, decay 1", "Muon, decay 1", (6, 2, 0), 0.79),
        ("EMA before Muon, learning rate 0.03, decay 0.3", "Muon, learning rate 0.03, decay 0.3", (0, 8, 0), 1.74),
        ("MA before Muon, learning rate 0.01, decay 0.3", "Muon, learning rate 0.03, decay 0.3", (0, 8, 0), 2.51),
    ):
        assert (paired(runs[one], runs[other])[:3], ratio(one, other)) == (counts, times), one
    for name in ("addition", "subtraction", "division"):
        found = {label: mod97.seeds_of(frame, mod97.on(mod97.OPERATIONS[name], label)) for label in mod97.ELSEWHERE}
        for label in mod97.PUBLISHED.values():
            assert paired(found[label], found["Adam, decay 0.00167"]).fewer >= 4
        assert paired(found["MA before AdamW, decay 1"], found["AdamW, decay 1"]).fewer >= 4


def result(run, seed, steps, **changes):
    """The result of a seed, with None for the steps of a run that fails."""
    followed = {} if steps is None else {"followed_evals": 50, "held_evals": 50}
    outcome = {"steps_to_95": steps, "fit_steps": 100, "best_val_accuracy": 0.9, "finite": True}
    return {"run": dataclasses.replace(run, seed=seed).key, **outcome, **followed, **changes}


def cells(table):
    """The cells of the rows of Markdown tables."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines]


def test_tables_compare_within_a_setting_and_leave_out_missing_runs():
    ema, control = "EMA before Adam, decay 0.005", "AdamW, decay 1"
    division = mod97.on(mod97.OPERATIONS["division"], ema)
    runs = [result(mod97.RUNS[ema], seed, 1000 + seed) for seed in (0, 1)] + [result(division, 0, 900)]
    (row,) = cells(mod97.table(to_frame(runs)))[1:]
    assert row == [ema, "100", "1,000 (1,000 to 1,001)", "0 of 2", "2 of 2 (100%)"]
    rows = {row[0]: row[1:] for row in cells(mod97.operations(to_frame(runs)))[1:]}
    assert (rows[ema], rows[control]) == (["1,000", "", "", "900"], [""] * 4)
    frame = to_frame([*runs, result(mod97.RUNS[control], 0, 500)])
    assert cells(mod97.published(frame))[1] == [control, "500", "0 : 1 (p = 1)", "0 : 0 (p = 1)"]


def test_a_pair_of_rate_and_decay_has_a_row_of_its_own():
    by_label = mod97.PAIRS["learning rate 0.003, decay 3"]
    milder = mod97.PAIRS["learning rate 0.003, decay 1"]["AdamW"]
    runs = [result(by_label["MA before AdamW"], 0, 500), result(by_label["AdamW"], 0, None), result(milder, 0, 100)]
    assert cells(mod97.pairs(to_frame(runs)))[1:] == [
        ["learning rate 0.003, decay 1", "100; holds 1 of 1", "", ""],
        ["learning rate 0.003, decay 3", "all fail", "", "500; holds 1 of 1"],
    ]


def drawn(name, runs):
    """The axes of a figure that is drawn from some results."""
    figure = mod97.STUDY.figures[name](to_frame(runs))
    figure.draw_without_rendering()
    return figure.axes[0]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_figure_says_how_many_seeds_fail_and_draws_no_value_for_them():
    labels = ["MA before Adam, decay 0.01", "EMA before Adam, decay 0.005", "Adam, decay 0"]  # sorted by the medians
    steps = dict(zip(reversed(labels), ([None, None], [1000, None], [900, 1100]), strict=True))
    runs = [result(mod97.RUNS[label], seed, n) for label, two in steps.items() for seed, n in enumerate(two)]
    axes = drawn("mod97_all_methods", runs)
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert texts(axes) == ["× 1 of 2 fail", "× all 2 fail"]
    dots = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "o"])
    assert sorted(dots) == [900, 1000, 1100]


def test_the_ablations_have_a_row_for_each_value():
    frame = mod97.STUDY.results().frame()
    figure = mod97.STUDY.figures["mod97_ablations"](frame)
    figure.draw_without_rendering()
    _, alpha, _, decay, *_ = panels = figure.axes
    assert [label.get_text() for label in alpha.get_yticklabels()] == ["0.8", "0.9", "0.95", "0.98", "0.99", "0.995"]
    assert [label.get_text() for label in decay.get_yticklabels()] == ["0", "0.001", "0.002", "0.005", "0.01", "0.02"]
    assert texts(alpha) == ["× 1 of 3 fail"]
    assert texts(decay) == ["× all 3 fail", "× 1 of 3 fail", "× all 3 fail", "× all 3 fail"]
    for axes in panels:
        right = axes.get_window_extent().x1
        assert all(text.get_window_extent().x1 <= right for text in axes.texts)  # marks are within the axes


def test_the_bars_count_the_runs_that_reach_and_those_that_hold_95_percent():
    alone, filtered = (mod97.PAIRS["learning rate 0.001, decay 1"][label] for label in ("AdamW", "MA before AdamW"))
    runs = [result(alone, 0, 500, held_evals=49), result(alone, 1, None), result(filtered, 0, 500)]
    axes = drawn("mod97_hold", runs)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]  # AdamW reaches, holds; with the MA the same
