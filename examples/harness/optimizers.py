"""The optimizer of a run, from its command-line arguments: a filter, then Adam or AdamW."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from grokfast_jax import amplify, ema, moving_average

from .train import Hyper

TWO_STAGE_START = 500  # the step at which the paper's two-stage variant switches the filter on


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What is done to the gradients, in this order: filter, weight decay, Adam, learning rate."""

    filter: Literal["none", "ema", "ma"] = "ema"
    """Low-pass filter whose output is amplified."""
    alpha: float = 0.98
    """EMA: weight of the past, in [0, 1)."""
    window_size: int = 100
    """MA: number of gradients in the window."""
    lamb: float = 2.0
    """Amplification of the slow part of the gradients."""
    fast: float = 1.0
    """Weight of the gradient itself; 0 leaves the slow part alone."""
    two_stage: bool = False
    """Amplify from step 500 on only (the filter collects from the first step)."""
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
    lamb, lr, decay = hyper["lamb"], hyper["lr"], optax.add_decayed_weights(hyper["weight_decay"])
    adam = optax.scale_by_adam(config.beta1, config.beta2)
    start = TWO_STAGE_START if config.two_stage else 0

    def lamb_now(step: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(step) < start, 0.0, lamb)

    warmup = optax.linear_schedule(0.0, 1.0, config.lr_warmup) if config.lr_warmup else optax.constant_schedule(1.0)
    match config.filter:
        case "none":
            gradient_filter = optax.identity()
        case "ema":
            gradient_filter = amplify(ema(hyper["alpha"]), lamb_now, fast=hyper["fast"])
        case "ma":
            gradient_filter = amplify(moving_average(config.window_size), lamb_now, fast=hyper["fast"])
    return optax.chain(
        gradient_filter,
        *((decay, adam) if config.optimizer == "adam" else (adam, decay)),
        optax.scale_by_learning_rate(lambda step: lr * warmup(step)),
    )
