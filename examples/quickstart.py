"""Grokfast at work in one file: a small network learns to multiply three bits out of forty.

It soon fits its 1,000 training points; it predicts fresh points much later, or never. Steps to 95 % accuracy on fresh
points, median (range) of 16 seeds, at most 5,000 steps, weight decay 0.3, on a CPU:

    learning rate    AdamW                    Grokfast-MA (window 100, lamb 5) before AdamW
    0.003            all 16 seeds fail        3,175 (2,250 to 4,300)
    0.01             900 (650 to 1,350)       1,225 (950 to 1,700)
    0.03             300 (250 to 350)         all 16 seeds fail

At 0.003 the filter makes the difference: without it, 2 of 16 seeds reach 95 % in 12,000 steps. With decay 0.1 or 3
both fail. Once the learning rate is tuned, no filter is needed: at 0.03, AdamW takes a tenth of the steps.
`python quickstart.py` trains the first row and that tuned control in about half a minute on two cores, and draws
quickstart.png.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from grokfast_jax import grokfast_ma

NUM_BITS, NUM_TRAIN, NUM_FRESH, WIDTH, BATCH_SIZE = 40, 1_000, 2_000, 256, 64
STEPS_PER_CHUNK = 50  # each chunk ends with an evaluation

ALONE, FILTERED, TUNED = "AdamW", "Grokfast before AdamW", "AdamW, ten times the learning rate"
METHODS = {
    ALONE: optax.adamw(0.003, weight_decay=0.3),
    FILTERED: optax.chain(grokfast_ma(window_size=100, lamb=5.0), optax.adamw(0.003, weight_decay=0.3)),
    TUNED: optax.adamw(0.03, weight_decay=0.3),
}
# The ends of names tell shapes: s seeds, n points of a set, b points of a batch, d bits of a point, e evaluations.


def draw_points(key, num_points):
    """Random points of ±1; the label of each is the product of its first three bits."""
    x_nd = jax.random.rademacher(key, (num_points, NUM_BITS), jnp.float32)
    return x_nd, x_nd[:, 0] * x_nd[:, 1] * x_nd[:, 2]


def linear(num_in, num_out, rngs):
    """A linear layer that starts as PyTorch's: weights and biases uniform in ±1/sqrt(num_in)."""
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(num_in**-0.5), num_in**-0.5)
    return nnx.Linear(num_in, num_out, kernel_init=init, bias_init=init, rngs=rngs)


def make_network(rngs):
    """One layer of ReLUs and a linear output."""
    return nnx.Sequential(linear(NUM_BITS, WIDTH, rngs), nnx.relu, linear(WIDTH, 1, rngs))


NETWORK = nnx.graphdef(make_network(nnx.Rngs(0)))  # the structure alone: each seed has its own parameters


def loss_and_accuracy(params, x_nd, y_n):
    """Logistic loss, and the fraction of points whose sign is right."""
    margin_n = y_n * nnx.merge(NETWORK, params)(x_nd)[:, 0]
    return jnp.mean(nnx.softplus(-margin_n)), jnp.mean(margin_n > 0)


@jax.jit
@jax.vmap  # over seeds: each has its own network and its own data
def start(key):
    """Initial parameters, training points and fresh points."""
    network_key, train_key, fresh_key = jax.random.split(key, 3)
    params = nnx.state(make_network(nnx.Rngs(network_key)))
    return params, draw_points(train_key, NUM_TRAIN), draw_points(fresh_key, NUM_FRESH)


@partial(jax.jit, static_argnames="tx", donate_argnames=("params", "opt_state"))
def train_chunk(tx, params, opt_state, train_set, fresh_set, key):
    """Take STEPS_PER_CHUNK steps with all seeds at once, then measure the accuracies of each."""
    x_snd, y_sn = train_set
    seed_s1 = jnp.arange(len(y_sn))[:, None]

    def step(carry, key):
        params, opt_state = carry
        row_sb = jax.random.randint(key, (len(y_sn), BATCH_SIZE), 0, NUM_TRAIN)
        batch = x_snd[seed_s1, row_sb], y_sn[seed_s1, row_sb]
        grads, _ = jax.vmap(jax.grad(loss_and_accuracy, has_aux=True))(params, *batch)
        # The filter and AdamW treat each number by itself, so one call updates the parameters of all seeds.
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), jax.random.split(key, STEPS_PER_CHUNK))
    return params, opt_state, [jax.vmap(loss_and_accuracy)(params, *points)[1] for points in (train_set, fresh_set)]


def train(label, tx, num_seeds, num_steps):
    """Return the accuracies on training and on fresh points: two arrays of shape (e, s), stacked."""
    params, train_set, fresh_set = start(jax.random.split(jax.random.key(0), num_seeds))
    opt_state, history = tx.init(params), []
    chunk_keys = jax.random.split(jax.random.key(1), num_steps // STEPS_PER_CHUNK)
    for key in tqdm(chunk_keys, desc=label, unit=" steps", unit_scale=STEPS_PER_CHUNK):
        params, opt_state, accuracies_s = train_chunk(tx, params, opt_state, train_set, fresh_set, key)
        history.append(jax.device_get(accuracies_s))
    return np.stack(history, axis=1)


def steps_to_goal(fresh_es):
    """The first step at which each seed reaches 95 % on fresh points; infinite where it never does."""
    reached_es = fresh_es >= 0.95
    return np.where(reached_es.any(axis=0), STEPS_PER_CHUNK * (1 + reached_es.argmax(axis=0)), np.inf)


def draw(accuracies):
    """Accuracy over steps with and without the filter, and where the tuned learning rate alone reaches 95 %."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, colour in [(ALONE, "#D55E00"), (FILTERED, "#0072B2")]:
        train_es, fresh_es = accuracies[label]
        step_e = STEPS_PER_CHUNK * (1 + np.arange(len(fresh_es)))
        axes.plot(step_e, 100 * fresh_es, color=colour, linewidth=0.5, alpha=0.4, antialiased=False)
        axes.plot(step_e, 100 * np.median(fresh_es, axis=1), color=colour, linewidth=2.5, label=label)
        axes.plot(step_e, 100 * np.median(train_es, axis=1), color=colour, linestyle="--")
    tuned_step = np.median(steps_to_goal(accuracies[TUNED][1]))
    axes.axvline(tuned_step, color="black", linestyle=":", label=f"{TUNED}: the median seed reaches 95 %")
    axes.set(xlabel="training step", ylabel="accuracy (%)", xlim=(0, step_e[-1]), ylim=(45, 101))
    axes.set_title("At a small learning rate, AdamW groks far sooner with Grokfast")
    figure.legend(loc="outside lower center", title="solid: fresh points; dashed: training points; thin: single seeds")
    figure.savefig("quickstart.png", dpi=180)


def main(num_seeds=16, num_steps=5_000):
    """Train with each method, print in how many steps the seeds reach 95 %, and draw the accuracies."""
    accuracies = {}
    for label, tx in METHODS.items():
        accuracies[label] = train(label, tx, num_seeds, num_steps)
        steps_s = steps_to_goal(accuracies[label][1])
        reached, median = np.isfinite(steps_s).sum(), np.median(steps_s)
        when = f", after {median:,.0f} steps in the median" if np.isfinite(median) else ""
        print(f"{label}: {reached} of {num_seeds} seeds reach 95 %{when}")
    draw(accuracies)


if __name__ == "__main__":
    main()
