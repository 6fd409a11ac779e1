"""The optimizer of a run, from its command-line arguments: a filter, then Adam or AdamW."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from grokfast_jax import amplify, ema, moving_average

from .train import Hyper


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What is done to the gradients, in this order: clipping, filter, weight decay, Adam, learning rate."""

    clip_norm: float | None = None
    """Scale gradients down to this global norm before the filter; None for no clipping."""
    filter: Literal["none", "ema", "ma"] = "ema"
    """Low-pass filter whose output is amplified."""
    alpha: float = 0.98
    """EMA: weight of the past, in [0, 1)."""
    window_size: int = 100
    """MA: number of gradients in the window."""
    stride: int = 1
    """MA: successive gradients that share a slot of the ring buffer; divides window_size, and the buffer's memory."""
    buffer_dtype: Literal["bfloat16"] | None = None
    """MA: dtype of the ring buffer; None for that of the parameters."""
    lamb: float = 2.0
    """Amplification of the slow part of the gradients."""
    fast: float = 1.0
    """Weight of the gradient itself; 0 leaves the slow part alone."""
    filter_from: int = 0
    """Steps before the filter is switched on; the paper's two-stage variant takes 500."""
    collect: bool = True
    """Whether the filter collects before it is switched on; if not, it then starts empty."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adam: Adam with coupled L2, the decay being added to the filtered gradient. adamw: decoupled weight decay."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.005
    """Weight decay."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.98
    """Adam's decay of the second moment."""
    lr_warmup: int = 10
    """Steps over which the learning rate rises from 0; 0 for none."""

    def hyper(self) -> dict[str, float]:
        """The numbers that may differ between the runs of one compiled program."""
        return {name: getattr(self, name) for name in HYPER}


HYPER = ("alpha", "lamb", "fast", "lr", "weight_decay")


def make_tx(config: OptimizerConfig, hyper: Hyper) -> optax.GradientTransformation:
    """The chain of `config`, with the numbers in `hyper` (which may be traced) in place of its own."""
    lr, decay = hyper["lr"], optax.add_decayed_weights(hyper["weight_decay"])
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    warmup = optax.linear_schedule(0.0, 1.0, config.lr_warmup) if config.lr_warmup else optax.constant_schedule(1.0)
    chain = optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        make_filter(config, hyper),
        *((decay, adam) if config.optimizer == "adam" else (adam, decay)),
        optax.scale_by_learning_rate(lambda step: lr * warmup(step)),
    )
    return optax.flatten(chain)  # one long vector: the same numbers, but fewer operations to compile and to start


def make_filter(config: OptimizerConfig, hyper: Hyper) -> optax.GradientTransformation:
    """The amplified filter of `config`."""
    if config.filter == "none":
        return optax.identity()
    if config.filter == "ema":
        lowpass = ema(hyper["alpha"])
    else:
        lowpass = moving_average(config.window_size, stride=config.stride, buffer_dtype=config.buffer_dtype)

    def on(step: jax.typing.ArrayLike, **_: object) -> jax.Array:
        return jnp.asarray(step) >= config.filter_from

    if config.filter_from == 0:
        return amplify(lowpass, hyper["lamb"], fast=hyper["fast"])
    if config.collect:
        lamb = lambda step: jnp.where(on(step), hyper["lamb"], 0.0)
        fast = lambda step: jnp.where(on(step), hyper["fast"], 1.0)
        return amplify(lowpass, lamb, fast=fast)
    return optax.conditionally_transform(amplify(lowpass, hyper["lamb"], fast=hyper["fast"]), on)
