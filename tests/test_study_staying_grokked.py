"""What changes after grokking: every change is neutral before its step, and acts from there as its name says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import views
from benchmarks.studies import staying_grokked as study
from examples.harness.engine import to_frame

pytestmark = pytest.mark.usefixtures("lenient")
PARAMS = {"token": jnp.linspace(-1, 1, 12).reshape(3, 4), "blocks": jnp.linspace(2, -1, 8).reshape(2, 4)}
STEPS, CHANGE = 260, 150
MODULAR = study.Modular()


@functools.cache
def paths(**numbers):
    """Parameters after each of some noisy steps, with all hyperparameters traced, as runs have them."""

    @jax.jit
    def train(numbers):
        tx = study.changed_adamw(**numbers)

        def step(carry, key):
            params, state = carry
            grads = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jax.random.split(jax.random.key(0), STEPS))[1]

    neutral = {"rate": 1.0, "cosine": 0.0, "b1": 0.9, "weight_decay": 1.0}
    neutral |= dict.fromkeys(("ema_lamb", "ma_lamb", "perpendicular", "frozen"), 0.0)
    return jax.tree.map(np.asarray, train(neutral | {"change_step": float(CHANGE)} | numbers))


@pytest.mark.parametrize("change", [name for name, numbers in study.CHANGES.items() if numbers])
def test_a_change_leaves_every_digit_before_its_step_and_acts_from_there(change):
    plain, changed = paths(), paths(**study.CHANGES[change])
    # Updates count from 0, so the record CHANGE is the first with the change; a cosine is still close to 1 there.
    for name in PARAMS:
        np.testing.assert_array_equal(plain[name][:CHANGE], changed[name][:CHANGE])
    assert any(np.any(plain[name][CHANGE + 2] != changed[name][CHANGE + 2]) for name in PARAMS)


def test_without_a_change_it_is_adamw():
    tx = optax.adamw(study.warmup(1e-3), 0.9, 0.98, weight_decay=1.0)
    params, state = PARAMS, tx.init(PARAMS)
    for key in jax.random.split(jax.random.key(0), STEPS)[:20]:
        grads = jax.tree.map(lambda p, key=key: p + jax.random.normal(key, p.shape), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name in PARAMS:
        np.testing.assert_allclose(paths()[name][19], params[name], rtol=2e-5)


def test_frozen_parameters_stay_and_the_others_move():
    changed = paths(frozen=1.0)
    np.testing.assert_array_equal(changed["token"][CHANGE - 1], changed["token"][-1])
    assert np.all(changed["blocks"][CHANGE - 1] != changed["blocks"][-1])


def test_a_cosine_decay_ends_at_zero():
    tx = study.changed_adamw(change_step=0.0, cosine=1.0)
    params, state = {"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)})
    state = jax.tree.map(lambda x: jnp.full_like(x, study.STEPS) if x.dtype == jnp.int32 and not x.ndim else x, state)
    updates, _ = tx.update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_allclose(updates["w"], 0, atol=1e-9)


def test_the_exact_loss_and_its_gradient_keep_their_digits_beside_a_sure_answer():
    logits = np.array([[2.0, 32.0, -1.0, 9.0], [0.5, -0.5, 1.0, 2.0]])
    answer = np.array([1, 3])
    rest = np.exp(logits - logits[np.arange(2), answer][:, None])
    rest[np.arange(2), answer] = 0
    gradient = rest / (1 + rest.sum(axis=1, keepdims=True))
    gradient[np.arange(2), answer] = -gradient.sum(axis=1)
    found = lambda task: jax.jit(jax.value_and_grad(lambda z: task.loss(z, jnp.asarray(answer)).sum()))(
        jnp.float32(logits)
    )
    value, slope = found(study.ExactLoss())
    np.testing.assert_allclose(value, np.log1p(rest.sum(axis=1)).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-5)
    usual = found(study.Modular())[1]
    np.testing.assert_allclose(usual, gradient, atol=1e-7)
    assert abs(usual[0, 1] / gradient[0, 1] - 1) > 0.5  # where it cancels


def line(seed, steps, share, task=MODULAR, **numbers):
    (run,) = study.product(task, study.changed_adamw, seed=seed, **study.RULE, **numbers)
    held = {"held_evals": round(2 * share), "followed_evals": 200, "lowest": share / 100, "norm": 2.0, "last_norm": 1.0}
    return {"run": run.key, "steps_to_95": steps, **held}


def lines(seeds, **numbers):
    """Runs that reach 95 % at step 1,000 + seed, from the change at that step on unless they have none."""
    plain = not numbers
    return [
        line(i, 1_000 + i, 80 + i if plain else 100, change_step=study.NEVER if plain else 1_000.0 + i, **numbers)
        for i in range(seeds)
    ]


def test_changes_are_compared_with_the_run_of_their_seed():
    of_another_step = line(1, 1_200, 10, change_step=1_000.0, ma_lamb=5.0)
    exact = [line(i, 900, 97, task=study.ExactLoss(), change_step=study.NEVER) for i in range(16)]
    frame = to_frame([*lines(16), *lines(16, ma_lamb=5.0), of_another_step, *lines(15, rate=1 / 3), *exact])
    nothing, ma, loss = ([c.strip() for c in row.split("|")[1:-1]] for row in study.table(frame).splitlines()[2:])
    assert nothing[:3] + nothing[-2:] == ["no change", "0 of 16", "88 (80 to 95) %", "", "0 : 16 (p < 0.001)"]
    assert ma[:3] + ma[-2:] == ["MA, λ 5", "16 of 16", "100 %", "16 : 0 (p < 0.001)", ""]
    assert loss[:3] + loss[-2:] == [study.EXACT_LOSS, "0 of 16", "97 %", "16 : 0 (p < 0.001)", "0 : 16 (p < 0.001)"]


def test_without_results_the_runs_without_a_change_are_named(tmp_path):
    named = list(study.runs(study.STUDY.results(tmp_path)))
    assert [run.seed for run in named] == [*study.SEEDS] * 2
    assert {run.hyperparams["change_step"] for run in named} == {study.NEVER}


def test_without_a_change_that_has_enough_seeds_nothing_is_shown():
    assert study.table(to_frame([*lines(16), *lines(15, ma_lamb=5.0)])) == views.MISSING


def test_the_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 11 * len(study.SEEDS)
    assert results.missing(runs) == []
