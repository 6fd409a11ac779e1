"""Optimizers that no task has, and the filters that studies share, with their stability limits.

The optimizers are built for mod 97: the learning rate rises in ten steps, and beta2 is 0.98.
"""

import functools
from typing import Any, Literal

import jax
import optax

from examples import modular
from examples.harness.methods import Lamb, LearningRate, StartStep, Tx, WeightDecay
from examples.harness.optimizers import from_step, warmup
from grokfast_jax import ema, grokfast_ema, grokfast_ma, stability_limit

Start = Literal["gradient", "zero", "debiased"]


def nadamw(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0) -> Tx:
    """AdamW with Nesterov's momentum."""
    return optax.adamw(warmup(lr), 0.9, 0.98, weight_decay=weight_decay, nesterov=True)


def lion(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0) -> Tx:
    """Lion with optax's betas."""
    return optax.lion(warmup(lr), weight_decay=weight_decay)


def ademamix(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0) -> Tx:
    """AdEMAMix with constant alpha and beta3."""
    return optax.contrib.ademamix(warmup(lr), 0.9, 0.98, b3=0.9999, alpha=6.0, weight_decay=weight_decay)


def ema_with_start(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.005, start: Start = "debiased") -> Tx:
    """The paper's Grokfast-EMA before Adam; `start` is the value of the average before the first gradient."""
    return optax.chain(grokfast_ema(0.98, 2.0, start=start), modular.adam(lr, weight_decay))


def normalized_ema(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.005, lamb: Lamb = 2.0) -> Tx:
    """Grokfast-EMA divided by 1 + lamb before Adam, which leaves the coupled weight decay its strength."""
    return optax.chain(grokfast_ema(0.98, lamb, normalize=True), modular.adam(lr, weight_decay))


def late_ema(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 0.005, lamb: Lamb = 5.0, start_step: StartStep = 100
) -> Tx:
    """Grokfast-EMA before Adam, which collects from the first step on, and amplifies from a later one on."""
    return optax.chain(grokfast_ema(0.98, from_step(start_step, lamb)), modular.adam(lr, weight_decay))


def ema_adamw_with_start(
    lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0, lamb: Lamb = 2.0, start: Start = "debiased"
) -> Tx:
    """Grokfast-EMA before AdamW; `start` is the value of the average before the first gradient."""
    return optax.chain(grokfast_ema(0.98, lamb, start=start), modular.adamw(lr, weight_decay))


def ema_muon(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0, lamb: Lamb = 2.0) -> Tx:
    """Grokfast-EMA before Muon."""
    return optax.chain(grokfast_ema(0.98, lamb), modular.muon(lr, weight_decay))


def ma_muon(lr: LearningRate = 1e-3, weight_decay: WeightDecay = 1.0, lamb: Lamb = 5.0) -> Tx:
    """Grokfast-MA before Muon."""
    return optax.chain(grokfast_ma(100, lamb), modular.muon(lr, weight_decay))


def grokfast(window: int, lamb: Any, *, normalize: bool = False) -> Tx:
    """Grokfast with an MA of a window, or with the paper's EMA, debiased, if the window is 0."""
    if window:
        return grokfast_ma(int(window), lamb, normalize=normalize)
    return grokfast_ema(0.98, lamb, start="debiased", normalize=normalize)


def filter_name(window: float) -> str:
    """The name of such a filter."""
    return f"MA, window {window:g}" if window else "EMA"


@functools.partial(jax.jit, static_argnums=0)
def adamw_stability_limit(window: int, lamb: float, decay: float) -> jax.Array:
    """The stability limit of such a filter and Adam's first moment, at a learning rate times weight decay of `decay`.

    Adam is invariant to the gain of a filter, so the filter is normalized to a gain of 1.
    """
    return stability_limit(optax.chain(grokfast(window, lamb, normalize=True), ema(0.9)), 4_000, decay=decay)


def is_stable(window: float, lamb: float, decay: float) -> bool:
    """Whether the limit is at least 2, the limit of gradient descent."""
    return bool(adamw_stability_limit(int(window), lamb, decay) >= 2)
