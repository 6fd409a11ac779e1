"""Known optimizers are filters in one of three places: exact oracles in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import grokfast_jax as gf

pytestmark = pytest.mark.usefixtures("x64", "lenient")
STEPS = 60


def needs(name):
    """Skip a test where optax.contrib is too old to have `name`."""
    return pytest.mark.skipif(not hasattr(optax.contrib, name), reason=f"this version of optax has no {name}")


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(STEPS, 4, 3))), "b": jnp.asarray(rng.normal(size=(STEPS, 3)))}


def run(tx, grads):
    at = lambda i: jax.tree.map(lambda g: g[i], grads)
    return jax.jit(lambda g: lax.scan(lambda s, x: tx.update(x, s, at(0))[::-1], tx.init(at(0)), g)[1])(grads)


def assert_same(tx, oracle, grads=None):
    grads = gradients() if grads is None else grads
    out, want = run(tx, grads), run(oracle, grads)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def debiased(b1):
    return gf.ema(b1, start="debiased")


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.98), (0.95, 0.0)])
def test_adam(b1, b2):
    tx = gf.scale_by_filtered_adam(debiased(b1), b2=b2, eps=1e-6, eps_root=1e-5)
    assert_same(tx, optax.scale_by_adam(b1, b2, eps=1e-6, eps_root=1e-5))


def test_adam_of_complex_gradients():
    g = gradients()["w"]
    assert_same(gf.scale_by_filtered_adam(debiased(0.9)), optax.scale_by_adam(), g + 1j * g[::-1])


def test_adam_as_a_whole_optimizer():
    tx = optax.chain(
        gf.scale_by_filtered_adam(debiased(0.9)), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-2)
    )
    assert_same(tx, optax.adamw(1e-2, weight_decay=0.1))


@needs("scale_by_ademamix")
def test_ademamix():
    alpha = optax.linear_schedule(0.0, 8.0, 30)
    b3 = optax.linear_schedule(0.9, 0.999, 30)
    for a, b in ((5.0, 0.999), (alpha, b3)):
        tx = gf.scale_by_filtered_adam(gf.parallel((1.0, debiased(0.9)), (a, gf.ema(b, start="zero"))), b2=0.99)
        assert_same(tx, optax.contrib.scale_by_ademamix(0.9, 0.99, b3=b, alpha=a))


def optax_nesterov(b1):
    """Nesterov momentum as optax corrects its bias: m_t over 1 - b1^(t+1), and g_t over 1 - b1^t, from t = 1."""
    gradient = lambda step: (1 - b1) / (1 - b1 ** (step + 1.0))
    average = lambda step: b1 * (1 - b1 ** (step + 1.0)) / (1 - b1 ** (step + 2.0))
    return gf.parallel((gradient, optax.identity()), (average, debiased(b1)))


def test_nadam():
    assert_same(gf.scale_by_filtered_adam(optax_nesterov(0.9), b2=0.99), optax.scale_by_adam(0.9, 0.99, nesterov=True))


@needs("scale_by_muon")
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(optax_nesterov(0.95), True), (debiased(0.95), False), (optax.identity(), None)]
)
def test_muon(momentum, nesterov):
    """With beta=0, Muon has no momentum, and any filter can replace it."""
    without = optax.contrib.scale_by_muon(beta=0.0)
    oracle = without if nesterov is None else optax.contrib.scale_by_muon(beta=0.95, nesterov=nesterov)
    assert_same(optax.chain(momentum, without), oracle, gradients()["w"])


def test_muon_as_its_authors_wrote_it():
    """Their buffer starts at 0 and has no bias correction: buf.lerp_(g, 1 - beta), then g.lerp_(buf, beta).

    optax corrects the bias of each part separately, and early steps therefore mix the parts slightly differently. The
    orthogonalisation removes a common factor of both parts. With a debiased average, the gain is 1 from the first step
    on; this form differs from the other two only in early steps.
    """
    beta = 0.95
    g = gradients()["w"]
    want, buffer = [], jnp.zeros_like(g[0])
    for gradient in g:
        buffer = buffer + (1 - beta) * (gradient - buffer)
        want.append(gradient + beta * (buffer - gradient))
    mix = lambda start: gf.parallel((1 - beta, optax.identity()), (beta, gf.ema(beta, start=start)))
    np.testing.assert_allclose(run(mix("zero"), g), jnp.stack(want), rtol=1e-10, atol=1e-12)

    late = jnp.concatenate([g] * 10)
    ours, theirs = run(mix("debiased"), late), run(optax_nesterov(beta), late)
    np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-10)
    assert abs(ours[1] - theirs[1]).max() > 1e-3
    constant = jnp.ones((STEPS, 2, 2))
    np.testing.assert_allclose(run(mix("debiased"), constant), constant, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(nesterov):
    """Momentum is the zero-start average divided by 1 - b; Nesterov momentum adds the gradient once more."""
    b = 0.9
    gain = 1 / (1 - b)
    average = gf.ema(b, start="zero")
    branches = [(1.0, optax.identity()), (b * gain, average)] if nesterov else [(gain, average)]
    assert_same(
        optax.chain(gf.parallel(*branches), optax.scale_by_learning_rate(0.1)),
        optax.sgd(0.1, momentum=b, nesterov=nesterov),
    )


def test_the_preconditioner_sees_raw_gradients_in_one_place_and_filtered_ones_in_the_other():
    """Inside Adam, a spike of the gradient is divided by its own size. Before Adam, the filter has spread it."""
    g = jnp.ones((STEPS, 1)).at[30].set(100.0)
    inside = run(gf.scale_by_filtered_adam(gf.moving_average(10, warmup=False), b2=0.5), g)
    before = run(optax.chain(gf.moving_average(10, warmup=False), gf.scale_by_filtered_adam(gf.ema(0.0), b2=0.5)), g)
    assert inside[30] < 0.2
    assert before[30] > 1.0


def test_a_scheduled_b2():
    """1 - 1/t is the mean over all gradients so far."""
    g = gradients()["w"]
    tx = gf.scale_by_filtered_adam(optax.identity(), b2=lambda step: step / (step + 1.0), eps=0.0)
    mean = jnp.cumsum(g**2, axis=0) / jnp.arange(1.0, STEPS + 1)[:, None, None]
    np.testing.assert_allclose(run(tx, g), g / jnp.sqrt(mean), rtol=1e-10)
