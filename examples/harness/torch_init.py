"""PyTorch's default initialisation in Flax: it decides when a model groks, so the paper's tasks keep it."""

import jax
from flax import nnx


def linear(
    in_features: int, out_features: int, *, rngs: nnx.Rngs, use_bias: bool = True, zero_bias: bool = False
) -> nnx.Linear:
    """A linear layer with weights and biases uniform in ±1/√in_features, as `torch.nn.Linear` has."""
    bound = in_features**-0.5

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *_: object) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    bias_init = nnx.initializers.zeros if zero_bias else uniform
    return nnx.Linear(in_features, out_features, use_bias=use_bias, kernel_init=uniform, bias_init=bias_init, rngs=rngs)
