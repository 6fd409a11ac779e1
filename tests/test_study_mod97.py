"""The studies of mod 97: their methods and runs, how pairs are tuned, and what tables and figures say."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.statistics import paired
from benchmarks.studies import mod97, mod97_tuned
from benchmarks.study import find_study
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
    for label, (setting, _) in mod97_tuned.TUNED.items():
        assert mod97_tuned.control_of(label) == mod97_tuned.control_of(setting.partition(",")[0])


@pytest.mark.parametrize(("name", "count"), [("mod97", 683), ("mod97_tuned", 348)])
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
    steps = lambda label: list(mod97.seeds_of(frame, mod97.RUNS[label])["steps_to_95"])
    assert steps("MA before Adam, decay 0.01") == [1270, 1540, 1110, 920, 950, 960, 830, 890]
    assert steps("AdamW, learning rate 0.003, decay 1") == [640, 520, 350, 650, 550, 490, 410, 470]
    chosen = mod97_tuned.chosen(mod97_tuned.STUDY.results().frame())
    assert chosen.keys() == mod97_tuned.TUNED.keys()
    assert chosen["AdamW"] == mod97.RUNS["AdamW, learning rate 0.003, decay 1"]


def test_the_numbers_in_the_text_of_the_pages_are_those_of_the_results():
    """Numbers that no table beside the text has: medians, ratios and tuning budgets."""
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
    ):
        assert (paired(runs[one], runs[other])[:3], ratio(one, other)) == (counts, times), one
    for name in ("addition", "subtraction", "division"):
        found = {label: mod97.seeds_of(frame, mod97.on(mod97.OPERATIONS[name], label)) for label in mod97.ELSEWHERE}
        for label in mod97.PUBLISHED.values():
            assert paired(found[label], found["Adam, decay 0.00167"]).fewer >= 4
        assert paired(found["MA before AdamW, decay 1"], found["AdamW, decay 1"]).fewer >= 4

    stored = find_study("leaderboard").results().frame()
    tuning = stored[(stored["seed"] == 1000) & (stored["train_fraction"] == 0.5)]
    tuned = {label: one for label, one in mod97_tuned.ENTRANTS.items() if label not in mod97_tuned.TUNED}
    for label, entrant in tuned.items():
        tried = tuning[(tuning["method"] == entrant.method) & (tuning["task"] == entrant.task)]
        if entrant.one_minus_beta:
            tried = tried[(tried["one_minus_beta"] == 1) == (entrant.one_minus_beta == 1)]
        assert (len(tried), set(tried["max_steps"])) == (9, {500}), label
    fastest = mod97_tuned.entered("`fastest`")["steps_to_95"]
    assert (len(fastest), fastest.median(), fastest.max()) == (64, 140, 200)


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
    by_label = mod97_tuned.RATES["learning rate 0.003, decay 3"]
    milder = mod97_tuned.RATES["learning rate 0.003, decay 1"]["AdamW"]
    runs = [result(by_label["MA before AdamW"], 0, 500), result(by_label["AdamW"], 0, None), result(milder, 0, 100)]
    assert cells(mod97_tuned.rate(to_frame(runs)))[1:] == [
        ["learning rate 0.003, decay 1", "100; holds 1 of 1", "", "", ""],
        ["learning rate 0.003, decay 3", "all fail", "", "500; holds 1 of 1", ""],
    ]


def test_tuning_chooses_the_best_median_of_the_three_best_with_one_seed_then_the_best_accuracy():
    grid, (first, second) = mod97_tuned.grid("Muon"), mod97_tuned.TUNING_SEEDS
    assert [len(set(map(as_text, (run.key for run in mod97_tuned.grid(name))))) for name in mod97_tuned.TUNED] == (
        [9] * len(mod97_tuned.TUNED)
    )
    assert {(run.max_steps, run.hold_evals) for run in grid} == {(2_500, 0)}

    def tried(steps, accuracies=(0.9,) * 9):
        triples = zip(grid, steps, accuracies, strict=True)
        return [result(run, first, n, best_val_accuracy=accuracy) for run, n, accuracy in triples]

    runs = tried([None, 1900, 1800, None, 1000, None, None, None, 2000])
    finals = [grid[4], grid[2], grid[1]]
    assert mod97_tuned.finalists(to_frame(runs), "Muon") == finals
    assert mod97_tuned.chosen(to_frame(runs)) == {}
    runs += [result(run, second, n) for run, n in zip(finals, [3000, 1900, None], strict=True)]
    best = mod97_tuned.chosen(to_frame(runs))["Muon"]  # medians 2,000, 1,850 and infinite
    assert best == mod97_tuned.pair("Muon", 0.01, 0.3) == mod97.setting(modular.muon, lr=0.01, weight_decay=0.3)
    runs.append(result(best, 0, 1234))
    (row,) = cells(mod97_tuned.table(to_frame(runs)))[1:]
    assert row[:3] == ["Muon", "0.01 (edge), 0.3 (edge)", "1,234"]  # the seeds of the tuning are not reported
    filtered = mod97_tuned.grid("EMA before Muon")
    runs += [result(run, first, n) for run, n in zip(filtered, [100, 200, 300, *[None] * 6], strict=True)]
    runs += [result(run, second, n) for run, n in zip(filtered[:3], [200, 300, 100], strict=True)]
    runs.append(result(mod97_tuned.pair("EMA before Muon", 0.01, 0.03), 0, 617))
    assert cells(mod97_tuned.table(to_frame(runs)))[-1][-1] == "1 : 0 (p = 1)"

    nothing = [None] * 9
    by_accuracy = to_frame(tried(nothing, [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.4, 0.3]))
    assert mod97_tuned.finalists(by_accuracy, "Muon") == [grid[7], grid[8], grid[5]]
    never_finite = to_frame(tried(nothing, [0.1, None, 0.1, 0.1, 0.1, 0.2, 0.1, None, 0.3]))
    assert mod97_tuned.finalists(never_finite, "Muon") == [grid[8], grid[5], grid[0]]


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
    figure = study.figures[name](to_frame(runs))
    figure.draw_without_rendering()
    return figure.axes[0]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_figure_says_how_many_seeds_fail_and_draws_no_value_for_them():
    labels = ["MA before Adam, decay 0.01", "EMA before Adam, decay 0.005", "Adam, decay 0"]  # sorted by the medians
    steps = dict(zip(reversed(labels), ([None, None], [1000, None], [900, 1100]), strict=True))
    runs = [result(mod97.RUNS[label], seed, n) for label, two in steps.items() for seed, n in enumerate(two)]
    axes = drawn(mod97.STUDY, "mod97_all_methods", runs)
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
    alone, filtered = (mod97_tuned.pair(label, 0.001, 1.0) for label in ("AdamW", "MA before AdamW"))
    runs = [result(alone, 0, 500, held_evals=49), result(alone, 1, None), result(filtered, 0, 500)]
    axes = drawn(mod97_tuned.STUDY, "mod97_tuned_hold", runs)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]  # AdamW reaches, holds; with the MA the same
