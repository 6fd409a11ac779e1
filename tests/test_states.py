"""States of other transformations or arguments raise an error; dtypes of states do not change."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import serialization
from jax import lax

import grokfast_jax as gf

from .test_conformance import TABLE

TRANSFORMATIONS = {
    "ema": gf.ema(0.9),
    "moving_average": gf.moving_average(4),
    "lfilter": gf.lfilter([0.5, 0.5]),
    "sosfilt": gf.sosfilt([[0.5, 0.0, 0.0, 1.0, -0.5, 0.0]]),
    "amplify": gf.grokfast_ema(),
    "parallel": gf.parallel((1.0, gf.ema(0.9))),
    "scale_by_filtered_adam": gf.scale_by_filtered_adam(gf.ema(0.9)),
}
PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}


@pytest.fixture(params=TRANSFORMATIONS)
def tx(request):
    return TRANSFORMATIONS[request.param]


def test_the_state_of_another_transformation_raises(tx):
    name = type(tx.init(PARAMS)).__name__
    for foreign in (optax.scale_by_adam().init(PARAMS), {}, (tx.init(PARAMS),)):
        with pytest.raises(
            TypeError, match=rf"state must be the {name} that init returned, got a \w+; pass the latest"
        ):
            tx.update(PARAMS, foreign)


def test_the_state_of_other_parameters_raises(tx):
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"updates\['b'\] must have the shape .* \(3,\), got \(1,\); call init"):
            update({"w": jnp.ones((2, 3)), "b": jnp.ones(1)}, tx.init(PARAMS))
        with pytest.raises(ValueError, match=r"updates\['w'\] must have the shape .* \(2, 3\), got \(3,\); call init"):
            update({"w": jnp.ones(3), "b": jnp.ones(3)}, tx.init(PARAMS))
        with pytest.raises(ValueError, match="updates must have the structure of the parameters passed to init"):
            update({"w": jnp.ones((2, 3))}, tx.init(PARAMS))
        with pytest.raises(ValueError, match="updates must have the structure of the parameters passed to init"):
            update(jnp.ones(3), tx.init(PARAMS))


@pytest.mark.parametrize(
    ("tx", "other", "message"),
    [
        (
            gf.ema(0.9, start="debiased"),
            gf.ema(0.9),
            "state must have a mass for start='debiased', got None; call init",
        ),
        (gf.ema(0.9), gf.ema(0.9, start="debiased"), "state must have no mass for start='gradient', got .*; call init"),
        (gf.moving_average(4), gf.moving_average(5), r"from moving_average\(window_size=4, .* got .*window_size=5, .*"),
        (gf.moving_average(4), gf.moving_average(8, stride=2), "stride=1, .* got .*stride=2, .* call init again"),
        (gf.moving_average(8, stride=2), gf.moving_average(12, stride=3), "stride=2, .* got .*stride=3"),
        (gf.moving_average(2), gf.moving_average(2, window_axis=-1), "window_axis=0.* got .*window_axis=-1"),
        *(
            (
                gf.moving_average(4, buffer_dtype=dtype),
                gf.moving_average(4, buffer_dtype=other),
                f"state must come from .*{dtype or 'axis=0'}.*, got .*{other or 'axis=0'}.*; call init again",
            )
            for dtype, other in [
                (None, "bfloat16"),
                ("bfloat16", None),
                ("bfloat16", "float16"),
                ("bfloat16", "float8_e5m2"),
                ("float8_e4m3fn", "float8_e5m2"),
            ]
        ),
        (
            gf.lfilter([0.5, 0.5]),
            gf.lfilter([0.5, 0.3, 0.2]),
            "state must have 1 delays, got 2; call init again for other",
        ),
        (
            gf.sosfilt(np.ones((2, 6))),
            gf.sosfilt(np.ones((1, 6))),
            "state must have 4 delays, got 2; call init again for",
        ),
        (
            gf.parallel((1, gf.ema(0.9)), (1, gf.ema(0.9))),
            gf.parallel((1, gf.ema(0.9))),
            "state must have 2 branches, got 1",
        ),
    ],
)
def test_the_state_of_other_arguments_raises(tx, other, message):
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=message):
            update(jnp.ones(3), other.init(jnp.ones(3)))


@pytest.mark.parametrize(
    ("tx", "other"),
    [
        (gf.moving_average(4, reduce="sum"), gf.moving_average(4)),
        (gf.moving_average(4, warmup=False), gf.moving_average(4)),
        (gf.moving_average(4, buffer_dtype="float32"), gf.moving_average(4)),
    ],
)
def test_a_state_that_means_the_same_is_accepted(tx, other):
    """Arguments that do not change what the ring holds may change in the middle of a window."""
    g = jnp.arange(3.0)
    chex.assert_trees_all_equal(
        tx.update(g, other.update(g, other.init(g))[1])[1], tx.update(g, tx.update(g, tx.init(g))[1])[1]
    )


def test_checkpoints_of_other_arguments_raise():
    """The names of the arguments are keys of the state, which checkpointers compare."""
    saved = serialization.to_bytes(gf.grokfast_ma(8, stride=2).init(PARAMS))
    restored = serialization.from_bytes(gf.grokfast_ma(8, stride=2).init(PARAMS), saved)
    chex.assert_trees_all_equal(restored, gf.grokfast_ma(8, stride=2).init(PARAMS))
    with pytest.raises(ValueError, match=r"(?s)keys do not match.*window_size=12, stride=3"):
        serialization.from_bytes(gf.grokfast_ma(12, stride=3).init(PARAMS), saved)


@pytest.mark.parametrize("complex_params", [True, False])
@pytest.mark.parametrize("name", ["ema", "moving_average", "lfilter", "sosfilt", "amplify"])
def test_gradients_are_complex_if_and_only_if_the_parameters_are(name, complex_params):
    tx, kinds = TRANSFORMATIONS[name], (jnp.ones(2, jnp.complex64), jnp.ones(2))
    params, grads = kinds if complex_params else kinds[::-1]
    kind = "complex" if complex_params else "real"
    with pytest.raises(
        ValueError, match=f"updates must be {kind} like the parameter .*, got dtype {grads.dtype}; cast"
    ):
        tx.update(grads, tx.init(params))


@pytest.mark.parametrize("name", TABLE)
def test_a_state_without_parameters_is_updated(name):
    tx = TABLE[name].make()
    out, state = tx.update(None, tx.init(None))
    assert out is None
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(None))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("first", [False, True], ids=["x64 on later", "x64 off later"])
@pytest.mark.parametrize("run", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "run"])
def test_dtypes_of_the_state_are_those_of_init_when_x64_is_switched(name, first, run):
    """Eager, jitted and scanned. The fast test only traces jit and scan; the slow one runs them."""
    evaluate = (lambda function, *arguments: function(*arguments)) if run else jax.eval_shape
    tx = TABLE[name].make()
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.bfloat16), "c": jnp.zeros(2, jnp.complex64)}
    with jax.enable_x64(first):
        state = tx.init(params)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    with jax.enable_x64(not first):
        _, new_state = tx.update(params, state)
        assert describe(new_state) == describe(state)
        _, new_state = evaluate(jax.jit(tx.update), params, state)
        assert describe(new_state) == describe(state)
        scan = lambda state: lax.scan(lambda s, _: tx.update(params, s)[::-1], state, length=2)
        final, _ = evaluate(scan, state)
        assert describe(final) == describe(state)


FLOATS = sorted(
    {
        np.dtype(scalar).name
        for scalar in [*vars(ml_dtypes).values(), np.float16, np.float32, np.longdouble]
        if isinstance(scalar, type) and issubclass(scalar, np.generic) and jnp.issubdtype(scalar, jnp.floating)
    }
)
UNSUPPORTED = {name for name in FLOATS if name.startswith(("float4", "float6"))} | {
    "float8_e8m0fnu",
    np.dtype(np.longdouble).name,
}
MAKERS = {
    "buffer_dtype": lambda dtype: gf.moving_average(4, warmup=False, buffer_dtype=dtype),
    "accumulator_dtype of ema": lambda dtype: gf.ema(0.5, accumulator_dtype=dtype),
    "accumulator_dtype of lfilter": lambda dtype: gf.lfilter([0.5, 0.5], accumulator_dtype=dtype),
    "accumulator_dtype of sosfilt": lambda dtype: gf.sosfilt([[0.5, 0.5, 0, 1, 0, 0]], accumulator_dtype=dtype),
}


def test_the_table_contains_the_dtypes_of_ml_dtypes():
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float16", "float32"} <= set(FLOATS)
    assert len(FLOATS) >= 10


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_dtype_works_or_raises_at_construction(dtype, make):
    """Gradients alternate between 1 and -2: the mean of two is -0.5, exact in every dtype that works."""
    name = make.split()[0]
    if dtype in UNSUPPORTED:
        with pytest.raises(TypeError, match=rf"{name} must be None or a real floating-point dtype of 8 to 64 bits"):
            MAKERS[make](dtype)
        return
    tx = MAKERS[make](dtype)
    g = jnp.asarray(np.tile([[1.0], [-2.0]], (6, 3)), jnp.float32)
    state, out = jax.jit(lambda g: lax.scan(lambda s, x: tx.update(x, s)[::-1], tx.init(g[0]), g))(g)
    stored = state.ring if name == "buffer_dtype" else jax.tree.leaves(state)[0]
    assert stored.dtype.itemsize == np.dtype(dtype).itemsize
    if "ema" in make:  # fixed points of mu -> (mu + g) / 2
        np.testing.assert_allclose(out[-2:, 0], [0.0, -1.0], atol=0.15)
    else:
        np.testing.assert_allclose(out[-2:], -0.5, atol=0.1)
    eager, eager_state = [], tx.init(g[0])
    for x in g:
        y, eager_state = tx.update(x, eager_state)
        eager.append(y)
    np.testing.assert_array_equal(np.stack(eager), out)
