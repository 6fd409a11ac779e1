"""PyTorch's default initialisation in Flax: it decides when a model groks, so the paper's tasks keep it."""

import jax
from flax import nnx


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in ±bound."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = float, *_: object) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    in_features: int, out_features: int, *, rngs: nnx.Rngs, use_bias: bool = True, zero_bias: bool = False
) -> nnx.Linear:
    """A linear layer with weights and biases uniform in ±1/√in_features, as `torch.nn.Linear` has."""
    init = uniform(in_features**-0.5)
    bias_init = nnx.initializers.zeros if zero_bias else init
    return nnx.Linear(in_features, out_features, use_bias=use_bias, kernel_init=init, bias_init=bias_init, rngs=rngs)
