"""What is done to the gradients: clipping, then the Grokfast filter, then an optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax

from grokfast_jax import ema, grokfast_ema, grokfast_ma, parallel

NAMES = {
    "adam": "Adam",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "lion": "Lion",
    "ademamix": "AdEMAMix",
    "muon": "Muon",
    "muon-hidden": "Muon on hidden matrices",
}

Class = TypeVar("Class", bound=type)


def traced(*names: str) -> Callable[[Class], Class]:
    """Make a dataclass a pytree whose leaves are these fields: runs that differ in nothing else share one program."""

    def register(cls: Class) -> Class:
        static = [field.name for field in dataclasses.fields(cls) if field.name not in names]
        return jax.tree_util.register_dataclass(cls, names, static)

    return register


@traced("alpha", "lamb", "fast")
@dataclasses.dataclass(frozen=True)
class Filtering:
    """Which slow part of the gradients is amplified, and how much."""

    filter: Literal["none", "ema", "ma"] = "ema"
    """Low-pass filter: grokfast_ema or grokfast_ma."""
    alpha: float = 0.98
    """EMA: weight of the past, in [0, 1)."""
    start: Literal["gradient", "zero", "debiased"] = "gradient"
    """EMA: value before the first gradient: that gradient (the authors' code), zero, or zero with bias correction."""
    window_size: int = 100
    """MA: number of gradients in the window."""
    stride: int = 1
    """MA: successive gradients per slot of the ring buffer; divides window_size, and the buffer's memory."""
    buffer_dtype: Literal["bfloat16"] | None = None
    """MA: dtype of the ring buffer; None for that of the parameters."""
    lamb: float = 2.0
    """Amplification of the slow part of the gradients."""
    fast: float = 1.0
    """Weight of the gradient itself; 0 leaves the slow part alone."""
    normalize: bool = False
    """Divide the sum by fast + lamb."""
    filter_from: int = 0
    """Step at which the filter is switched on; the paper's two-stage variant takes 500."""
    collect: bool = True
    """Whether the filter collects before it is switched on; if not, it then starts empty."""


@traced("lr", "weight_decay")
@dataclasses.dataclass(frozen=True)
class Optimization:
    """What takes the filtered gradients."""

    optimizer: Literal["adam", "adamw", "nadamw", "lion", "ademamix", "muon", "muon-hidden"] = "adam"
    """adam has coupled L2 decay, the others decoupled decay; muon trains all that is no matrix by Nesterov's AdamW, and
    muon-hidden all that is no matrix of a Transformer block."""
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
    clip_norm: float | None = None
    """Global norm to which gradients are scaled down before the filter; None for no clipping."""


Hyper = tuple[Filtering, Optimization]  # a pytree: its numbers may be traced, or stacked, one for each run


def make_tx(hyper: Hyper) -> optax.GradientTransformation:
    """The chain of clipping, filter and optimizer."""
    filtering, optimization = hyper
    clip = optax.identity() if optimization.clip_norm is None else optax.clip_by_global_norm(optimization.clip_norm)
    return optax.chain(clip, make_filter(filtering), make_optimizer(optimization))


def make_filter(c: Filtering) -> optax.GradientTransformation:
    """The Grokfast filter."""

    def on(step: jax.typing.ArrayLike, **_: object) -> jax.Array:
        return jnp.asarray(step) >= c.filter_from

    late = c.filter_from > 0 and c.collect  # the filter collects from the first step on, and is amplified later
    lamb = (lambda step: jnp.where(on(step), c.lamb, 0.0)) if late else c.lamb
    fast = (lambda step: jnp.where(on(step), c.fast, 1.0)) if late else c.fast
    if c.filter == "none":
        return optax.identity()
    if c.filter == "ema":
        tx = grokfast_ema(c.alpha, lamb, fast=fast, normalize=c.normalize, start=c.start)
    else:
        ring = {"stride": c.stride, "buffer_dtype": c.buffer_dtype}
        tx = grokfast_ma(c.window_size, lamb, fast=fast, normalize=c.normalize, **ring)
    return optax.conditionally_transform(tx, on) if c.filter_from > 0 and not c.collect else tx


def make_optimizer(c: Optimization) -> optax.GradientTransformation:
    """The optimizer, with its weight decay and learning rate."""
    warmup = optax.linear_schedule(0.0, 1.0, c.lr_warmup) if c.lr_warmup else optax.constant_schedule(1.0)
    rate = lambda step: c.lr * warmup(step)
    b1, b2 = c.beta1, c.beta2
    if c.optimizer == "muon":
        decay = c.weight_decay
        return stacked_muon(rate, adam_b1=b1, adam_b2=b2, weight_decay=decay, adam_weight_decay=decay)
    if c.optimizer == "muon-hidden":
        return _muon_on_hidden_matrices(c, rate)
    scale = {
        "adam": optax.scale_by_adam(b1, b2),
        "adamw": optax.scale_by_adam(b1, b2),
        "nadamw": optax.scale_by_adam(b1, b2, nesterov=True),
        "lion": optax.scale_by_lion(),
        "ademamix": optax.contrib.scale_by_ademamix(b1, b2),
    }[c.optimizer]
    decay = optax.add_decayed_weights(c.weight_decay)
    decayed = (decay, scale) if c.optimizer == "adam" else (scale, decay)
    return optax.chain(*decayed, optax.scale_by_learning_rate(rate))


def stacked_muon(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """optax.contrib.muon, with arrays of one shape as one: fewer and larger products, which take less time on a CPU."""

    def stack(tree: Any) -> dict[str, jax.Array]:
        arrays: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            arrays.setdefault(str(leaf.shape), []).append(leaf)
        return {shape: jnp.stack(leaves) for shape, leaves in arrays.items()}

    def matrices(stacks: dict[str, Any]) -> dict[str, Any]:  # which optax masks, too
        dimensions = optax.contrib.MuonDimensionNumbers(1, 2)
        return {shape: dimensions if getattr(stack, "ndim", 0) == 3 else None for shape, stack in stacks.items()}

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        stacks, state = tx.update(stack(updates), state, stack(params))
        arrays = {shape: iter(stack) for shape, stack in stacks.items()}
        return jax.tree.map(lambda leaf: next(arrays[str(leaf.shape)]), updates), state

    muon: Any = optax.contrib.muon
    tx = muon(learning_rate, muon_weight_dimension_numbers=matrices, **options)
    return optax.GradientTransformation(lambda params: tx.init(stack(params)), update)


def _muon_on_hidden_matrices(c: Optimization, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon with a memory of a few steps on the matrices of blocks; the rest by NAdamW, which steps less far.

    The output matrix, `head`, has the smallest steps and ten times the decay.
    """

    def kind(path: Any, p: jax.Array) -> str:
        name = jax.tree_util.keystr(path)
        return "hidden" if "blocks" in name and p.ndim == 2 else "head" if "head" in name else "rest"

    def nadamw(factor: float, weight_decay: float) -> optax.GradientTransformation:
        lr = lambda step: factor * rate(step)
        return optax.adamw(lr, c.beta1, c.beta2, weight_decay=weight_decay, nesterov=True)

    memory = parallel((0.2, optax.identity()), (0.8, ema(0.8, start="debiased")))
    muon = stacked_muon(rate, beta=0.0, ns_steps=8, weight_decay=c.weight_decay)
    groups: dict[Any, optax.GradientTransformation] = {
        "hidden": optax.chain(memory, muon),
        "head": nadamw(0.06, 10 * c.weight_decay),
        "rest": nadamw(0.2, c.weight_decay),
    }
    return optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(kind, params))


def describe(filtering: Filtering, optimization: Optimization) -> str:
    """Filter and optimizer in words."""
    f = filtering
    numbers = f"α {f.alpha:g}" if f.filter == "ema" else f"w {f.window_size}"
    text = "no filter" if f.filter == "none" else f"Grokfast-{f.filter.upper()} {numbers} λ {f.lamb:g}"
    if f.filter == "ema" and f.start != "gradient":
        text += f" start {f.start}"
    if f.filter != "none":
        text += f" fast {f.fast:g}" * (f.fast != 1) + " normalized" * f.normalize
        text += f" from step {f.filter_from:,}" * (f.filter_from > 0) + " (empty)" * (not f.collect)
    return f"{text}, {NAMES[optimization.optimizer]} weight decay {optimization.weight_decay:g}"
