"""The optimizer of a run, from its command-line arguments: a filter, then Adam or another."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from grokfast_jax import amplify, ema, moving_average

from .train import Hyper

Optimizer = Literal["adam", "adamw", "nadamw", "lion", "ademamix", "muon"]
NAMES: dict[Optimizer, str] = {
    "adam": "Adam",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "lion": "Lion",
    "ademamix": "AdEMAMix",
    "muon": "Muon",
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What is done to the gradients, in this order: clipping, filter, optimizer."""

    clip_norm: float | None = None
    """Scale gradients down to this global norm before the filter; None for no clipping."""
    filter: Literal["none", "ema", "ma"] = "ema"
    """Low-pass filter whose output is amplified."""
    alpha: float = 0.98
    """EMA: weight of the past, in [0, 1)."""
    start: Literal["gradient", "zero", "debiased"] = "gradient"
    """EMA: what it holds before the first gradient: that gradient, as the authors' code does; nothing; or nothing, and
    the average is over the gradients seen."""
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
    normalize: bool = False
    """Divide the mixture by fast + lamb."""
    filter_from: int = 0
    """Steps before the filter is switched on; the paper's two-stage variant takes 500."""
    collect: bool = True
    """Whether the filter collects before it is switched on; if not, it then starts empty."""
    optimizer: Optimizer = "adam"
    """adam: Adam with coupled L2, the decay being added to the filtered gradient. The others have decoupled weight
    decay: adamw; nadamw; lion; ademamix; muon, which takes Nesterov's AdamW for all that is no matrix."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.005
    """Weight decay."""
    beta1: float = 0.9
    """Adam's decay of the first moment; Lion has its own, 0.9 and 0.99."""
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
    lr, decay = hyper["lr"], hyper["weight_decay"]
    betas = config.beta1, config.beta2
    warmup = optax.linear_schedule(0.0, 1.0, config.lr_warmup) if config.lr_warmup else optax.constant_schedule(1.0)
    rate = lambda step: lr * warmup(step)
    filtered = (
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        make_filter(config, hyper),
    )
    if config.optimizer == "muon":  # which must see what is a matrix
        b1, b2 = betas
        muon = optax.contrib.muon(rate, weight_decay=decay, adam_b1=b1, adam_b2=b2, adam_weight_decay=decay)
        return optax.chain(optax.flatten(optax.chain(*filtered)), muon)
    match config.optimizer:
        case "adam" | "adamw":
            scale = optax.scale_by_adam(*betas)
        case "nadamw":
            scale = optax.scale_by_adam(*betas, nesterov=True)
        case "lion":
            scale = optax.scale_by_lion()
        case "ademamix":
            scale = optax.contrib.scale_by_ademamix(*betas)
    decayed = optax.add_decayed_weights(decay)
    rule = (decayed, scale) if config.optimizer == "adam" else (scale, decayed)
    # One long vector: the same numbers, but fewer operations to compile and to start.
    return optax.flatten(optax.chain(*filtered, *rule, optax.scale_by_learning_rate(rate)))


def make_filter(config: OptimizerConfig, hyper: Hyper) -> optax.GradientTransformation:
    """The amplified filter of `config`."""
    if config.filter == "none":
        return optax.identity()
    if config.filter == "ema":
        lowpass = ema(hyper["alpha"], start=config.start)
    else:
        lowpass = moving_average(config.window_size, stride=config.stride, buffer_dtype=config.buffer_dtype)

    def on(step: jax.typing.ArrayLike, **_: object) -> jax.Array:
        return jnp.asarray(step) >= config.filter_from

    if config.filter_from == 0:
        return amplify(lowpass, hyper["lamb"], fast=hyper["fast"], normalize=config.normalize)
    if config.collect:
        lamb = lambda step: jnp.where(on(step), hyper["lamb"], 0.0)
        fast = lambda step: jnp.where(on(step), hyper["fast"], 1.0)
        return amplify(lowpass, lamb, fast=fast, normalize=config.normalize)
    now = amplify(lowpass, hyper["lamb"], fast=hyper["fast"], normalize=config.normalize)
    return optax.conditionally_transform(now, on)
