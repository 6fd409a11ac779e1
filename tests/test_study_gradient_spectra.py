"""The study of gradient spectra: what is recorded, the spectrum by hand, and its table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.signal
from jax.flatten_util import ravel_pytree

from benchmarks.studies import gradient_spectra as study
from benchmarks.study import Study
from benchmarks.views import chart
from examples.harness.engine import product
from examples.harness.train import TrainState, keys
from examples.modular import Modular

pytestmark = pytest.mark.usefixtures("lenient")

TINY = Modular(p=11, dim=8, heads=2, depth=1, batch_size=6)  # 10 steps between two evaluations, as mod 97 has


def test_recorded_gradients_are_those_of_the_last_steps():
    tx = optax.chain(study.record_gradients(3), optax.sgd(1.0))
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    state = tx.init(params)
    for i in range(6):
        grads = {"a": jnp.arange(4.0).reshape(2, 2) + 10 * i, "b": jnp.arange(4.0, 6.0) + 10 * i}
        updates, state = tx.update(grads, state, params)
        assert (updates["b"] == -grads["b"]).all()
    recorded = optax.tree_utils.tree_get(state, "recorded")
    assert recorded["b"].tolist() == [[10.0 * i + k for k in (4, 5)] for i in (3, 4, 5)]


def test_spectrum_finds_a_sine_and_white_noise():
    steps = np.arange(500)[:, None]
    power = study.spectrum(np.sin(2 * np.pi * 0.1 * steps + np.arange(3)))
    assert np.argmax(power) == 50
    assert power[48:53].sum() > 0.999
    assert study.slow_share(power) < 1e-6
    power = study.spectrum(np.random.default_rng(0).normal(size=(500, 4000)))
    assert study.slow_share(power) == pytest.approx(0.02, rel=0.12)  # 5 of 251 frequencies, the first being half
    assert study.slow_share(study.spectrum(np.ones((500, 2)))) > 0.999


def test_windows_follow_each_other_and_hold_some_parameters(monkeypatch):
    monkeypatch.setattr(study, "WINDOW", 20)
    monkeypatch.setattr(study, "PARAMETERS", 3)
    (run,) = product(TINY, study.recorded_ema, seed=1, max_steps=50, stop_at=None)
    shapes = jax.eval_shape(TINY.init, jax.random.key(0))
    rng, history = np.random.default_rng(0), []
    for chunk in range(5):
        recorded = jax.tree.map(lambda p: jnp.array(rng.normal(size=(10, *p.shape)), jnp.float32), shapes)
        row = {"train_accuracy": chunk / 10, "val_accuracy": chunk / 100}
        history.append((row, TrainState((), ({"row": 0, "recorded": recorded}, ()), jnp.array(chunk))))
    stored = study.observe(run, iter(history), {})
    flat = [
        np.concatenate([np.reshape(rows, (10, -1)) for rows in jax.tree.leaves(state.opt_state[0]["recorded"])], axis=1)
        for _, state in history
    ]
    index = jax.random.choice(jax.random.key(1), flat[0].shape[1], (3,), replace=False)
    for i in range(2):  # the third window is not full
        signals = np.concatenate(flat[2 * i : 2 * i + 2]).astype(np.float64)[:, index]
        hann = scipy.signal.windows.hann(20, sym=False)
        power = scipy.signal.periodogram(signals, window=hann, detrend=False, scaling="spectrum", axis=0)[1].mean(
            axis=1
        )
        power[1:-1] /= 2  # one-sided
        np.testing.assert_allclose(stored["power"][i], power / power.sum(), rtol=6e-3)
    assert len(stored["power"]) == 2


@pytest.mark.slow
def test_the_spectrum_is_that_of_the_gradients_in_training(tmp_path, shared_programs, monkeypatch):
    """With a learning rate of 0 all gradients are at the initial parameters, where they can be had in another way."""
    monkeypatch.setattr(study, "WINDOW", 20)
    monkeypatch.setattr(study, "PARAMETERS", 50)
    task = TINY
    assert task.steps == study.CHUNK
    (run,) = product(task, study.recorded_ema, lr=0.0, seed=1, max_steps=40, stop_at=None)
    stored = Study("tiny", lambda results: [run], observe=study.observe).train(tmp_path).frame().iloc[0]

    random = keys(jax.random.key(1))
    params, data = task.init(random.init), task.split({}, random.split)
    flat, unravel = ravel_pytree(params)
    index = jax.random.choice(jax.random.key(1), flat.size, (50,), replace=False)

    @jax.jit
    @jax.vmap
    def gradient(batch):
        loss = lambda p: jnp.average(task.metrics(unravel(p), data, batch)["loss"], weights=batch["weight"])
        return jax.grad(loss)(flat)[index]

    gradients = [gradient(task.batches(data, jax.random.fold_in(random.batch, chunk))) for chunk in range(4)]
    assert len(stored["power"]) == 2
    for i in range(2):
        signals = np.concatenate(gradients[2 * i : 2 * i + 2]).astype(np.float64)
        power = study.spectrum(signals)
        np.testing.assert_allclose(stored["power"][i], power, rtol=6e-3, atol=1e-6)
        assert stored["slow_share"][i] == pytest.approx(power[0], abs=1e-4)  # of 20 steps, only frequency 0 is slow


def test_the_table_has_a_row_per_window_and_a_column_per_method():
    keys = [(0.0, 0.0, 1), (0.0, 0.005, 2), (2.0, 0.005, 3), (2.0, 0.005, 5)]
    runs = [{"lamb": lamb, "weight_decay": decay, "slow_share": [0.02, n / 1000]} for lamb, decay, n in keys]
    lines = study.table(pd.DataFrame(runs)).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert rows == [["0 to 499", "2", "2", "2"], ["500 to 999", "0.1", "0.2", "0.4"]]


def test_responses_are_those_of_the_filters():
    _, panels = chart("title", columns=2)
    study.responses(pd.DataFrame(), panels)
    ema, average = (line.get_ydata() for line in panels[0].lines)
    np.testing.assert_allclose(ema, 0.02 * 0.98 ** np.arange(250), rtol=1e-4)
    np.testing.assert_allclose(average, 0.01 * (np.arange(250) < 100), atol=1e-8)
    periods, gain = panels[1].lines[0].get_data()
    exact = 0.02 / np.abs(1 - 0.98 * np.exp(-2j * np.pi / periods))
    np.testing.assert_allclose(gain, exact, rtol=1e-2)


def test_the_results_are_those_of_all_runs():
    results = study.STUDY.results()
    runs = list(study.runs(results))
    assert len(runs) == 9
    assert results.missing(runs) == []
