"""The Grokfast filters that several studies share, and their stability limits."""

import functools
from collections.abc import Callable

import jax
import optax

from grokfast_jax import ema, grokfast_ema, grokfast_ma, stability_limit


def grokfast(window: int, lamb: float, *, normalize: bool = False) -> optax.GradientTransformation:
    """Grokfast with an MA of a window, or with the paper's EMA, debiased, if the window is 0."""
    if window:
        return grokfast_ma(int(window), lamb, normalize=normalize)
    return grokfast_ema(0.98, lamb, start="debiased", normalize=normalize)


def filter_name(window: float) -> str:
    """The name of such a filter."""
    return f"MA, window {window:g}" if window else "EMA"


@functools.cache
def _limit(window: int) -> Callable[[float, float], jax.Array]:
    def of(lamb: float, decay: float) -> jax.Array:
        # Adam is invariant to the gain of a filter, so the filter is normalized to a gain of 1.
        return stability_limit(optax.chain(grokfast(window, lamb, normalize=True), ema(0.9)), 4_000, decay=decay)

    return jax.jit(of)


def adamw_stability_limit(window: float, lamb: float, decay: float) -> float:
    """The stability limit of a filter of gain 1 and Adam's first moment.

    Args:
      window: Window of the MA; 0 for the EMA.
      lamb: Amplification of the slow part.
      decay: Learning rate times weight decay.
    """
    return float(_limit(int(window))(lamb, decay))


def is_stable(window: float, lamb: float, decay: float) -> bool:
    """Whether the limit is at least 2, the limit of gradient descent."""
    return adamw_stability_limit(window, lamb, decay) >= 2
