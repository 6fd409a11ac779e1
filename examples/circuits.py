"""Fourier circuits: measures of what a model of modular arithmetic has learned, pure and jit-able.

A model that has grokked adds angles, as a clock does. It embeds x and y as points on circles, cos and sin of 2πk/n
times their indices in a cycle of n elements, for a few key frequencies k. Its neurons compute cos and sin of the sum of
these angles, and the logit of an answer is highest where the answer's own angle is that sum (Nanda et al. 2023, arXiv
2301.05217).

Addition and subtraction mod p use the cycle 0, 1, ..., p - 1 of n = p elements. Multiplication and division use the
powers g^0, g^1, ..., g^(p-2) of a primitive root g, n = p - 1 elements, because g^i g^j = g^(i+j) (arXiv 2606.17399).
0 is not a power of g and is left out. Another primitive root permutes the frequencies and changes nothing else.

Suffixes name the axes: n index in the cycle, i and j the indices of x and y, s the index of the answer, l the index of
a logit's answer, v token, d channel, k frequency from 1 to n // 2 (at array index k - 1).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .harness.errors import require
from .harness.experiment import Measure
from .harness.records import Row
from .harness.task import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .modular import Modular

KEY_CORRELATION = 0.05  # least correlation of a key frequency with the logits


def primitive_root(p: int) -> int:
    """The smallest g with powers g^0, ..., g^(p-2) mod p that are all numbers from 1 to p - 1; p is prime."""
    return next(g for g in range(1, p) if len({pow(g, j, p) for j in range(p - 1)}) == p - 1)


class Cycle(NamedTuple):
    """A cyclic group in the order of its generator's powers."""

    elements: np.ndarray  # (n,)
    sign: int  # the answer of the elements i and j is the element i + sign j mod n

    @classmethod
    def of(cls, p: int, operation: str, *, control: bool = False) -> "Cycle":
        """The cycle of an operation mod a prime p; as control, additive for a multiplicative one and the reverse."""
        is_additive = operation in ("addition", "subtraction")
        elements = range(p) if is_additive != control else [pow(primitive_root(p), j, p) for j in range(p - 1)]
        return cls(np.array(elements), 1 if operation in ("addition", "multiplication") else -1)


def mean_over_pairs(table_ijx: jax.Array, sign: int) -> jax.Array:
    """The mean over the n pairs with s = i + sign j mod n: (s, x)."""
    index = np.arange(table_ijx.shape[0])
    return table_ijx[index[:, None], sign * (index - index[:, None]) % len(index)].mean(axis=0)


def one_sided(n: int, dtype: Any) -> jax.Array:
    """The number of frequencies among k and n - k: 2, or 1 for k = n/2; (k,)."""
    return jnp.where(2 * jnp.arange(1, n // 2 + 1) == n, 1, 2).astype(dtype)


def power_shares(embedding_nd: jax.Array) -> jax.Array:
    """The share of each frequency in the variance of the embeddings of a cycle; they sum to 1: (k,).

    P_k / Σ_k P_k with P_k = Σ_d |Σ_j E_jd exp(-2πi jk/n)|² over k and n - k. The mean embedding has frequency 0.
    """
    n = embedding_nd.shape[0]
    power_kd = jnp.abs(jnp.fft.rfft(embedding_nd, axis=0)[1:]) ** 2
    power_k = one_sided(n, power_kd.dtype) * power_kd.sum(axis=1)
    return power_k / power_k.sum()


def gini(share_k: jax.Array) -> jax.Array:
    """The Gini coefficient of m shares: 0 if all are equal, 1 - 1/m if one share is everything.

    Σ_r (2r - m - 1) x_r / (m Σ_r x_r) with x sorted, r = 1, ..., m (Hurley and Rickard 2009, arXiv 0811.4706). For the
    shares of noise in d channels it is about sqrt(1 / (π d)): each share is a sum of 2d squares.
    """
    m = share_k.shape[0]
    return jnp.arange(1 - m, m, 2).astype(share_k.dtype) @ jnp.sort(share_k) / (m * share_k.sum())


def restricted_loss(logits_ijv: jax.Array, cycle: Cycle, key_k: jax.Array) -> jax.Array:
    """The cross-entropy on all pairs of the logits' part that is a function of the answer at the key frequencies.

    That part is the projection of the logits onto cos and sin of 2πk(i ± j)/n for key frequencies k. The rest is
    replaced by its mean over all pairs. The loss is near 0 where the clock alone computes the answer, and log p without
    a clock.
    """
    mean_sv = mean_over_pairs(logits_ijv, cycle.sign)
    keep = jnp.concatenate([jnp.zeros(1, bool), key_k])[:, None]
    clock_sv = jnp.fft.irfft(jnp.where(keep, jnp.fft.rfft(mean_sv, axis=0), 0), mean_sv.shape[0], axis=0)
    restricted_sv = clock_sv + mean_sv.mean(axis=0, keepdims=True)
    return optax.softmax_cross_entropy_with_integer_labels(restricted_sv, jnp.array(cycle.elements)).mean()


def logit_coefficients(logits_ijv: jax.Array, cycle: Cycle) -> jax.Array:
    """The correlation of the logits with a clock's, cos(2πk(i ± j - l)/n), over i, j and l: (k,).

    Each is in [-1, 1]. These cosines are orthogonal: the squares sum to the share of the logits' variance that has a
    clock's form, at most 1. Logits of tokens outside the cycle and each pair's mean are left out.
    """
    logits_ijl = logits_ijv[:, :, cycle.elements]
    logits_ijl = logits_ijl - logits_ijl.mean(axis=2, keepdims=True)
    n = logits_ijl.shape[0]
    mean_s = mean_over_pairs(mean_over_pairs(logits_ijl, cycle.sign), -1)  # by the index of the answer less l
    cosines_k = jnp.fft.rfft(mean_s)[1:].real / n
    scale = jnp.maximum(jnp.sqrt(jnp.mean(logits_ijl**2)), jnp.finfo(cosines_k.dtype).tiny)
    return cosines_k * jnp.sqrt(one_sided(n, cosines_k.dtype)) / scale


def logits_of_all_pairs(task: "Modular", params: Any, cycle: Cycle) -> jax.Array:
    """The logits of the answer, (i, j, v)."""
    x, y = cycle.elements[:, None], cycle.elements[None]
    pairs_ij = x * task.y_values + y - (task.p - task.y_values)
    return task.logits(params, jnp.array(pairs_ij.ravel())).reshape(*pairs_ij.shape, -1)


def measure(task: "Modular", params: Any, key_k: jax.Array | None = None) -> dict[str, jax.Array]:
    """All measures of a model.

    Key frequencies are those of the mask `key_k`, by default those with `logit_coefficients` of at least
    `KEY_CORRELATION`. Frequencies with much power in the embedding cannot replace them: in a memorising model these are
    nearly all, and the restricted loss with nearly all frequencies falls without a clock.

    Returns:
      Arrays (k,): `is_key`, the mask; `share`, the embedding's `power_shares`; `logit_coefficients`. Numbers:
      `restricted_loss`; `gini` of the shares, and `gini_control` on the other cycle; `key_frequencies`, the number of
      these; `logit_share`, the sum of their squared `logit_coefficients`.

    Raises:
      UsageError: p is 2, where the multiplicative cycle has one element.
    """
    require(task.p > 2, "p", "at least 3 where circuits are measured", task.p)
    cycle, control = Cycle.of(task.p, task.operation), Cycle.of(task.p, task.operation, control=True)
    logits_ijv, embedding_vd = logits_of_all_pairs(task, params, cycle), params["token"]
    share_k, coefficients_k = power_shares(embedding_vd[cycle.elements]), logit_coefficients(logits_ijv, cycle)
    key_k = coefficients_k >= KEY_CORRELATION if key_k is None else key_k
    return {
        "is_key": key_k,
        "share": share_k,
        "logit_coefficients": coefficients_k,
        "restricted_loss": restricted_loss(logits_ijv, cycle, key_k),
        "gini": gini(share_k),
        "gini_control": gini(power_shares(embedding_vd[control.elements])),
        "key_frequencies": key_k.sum(),
        "logit_share": jnp.sum(jnp.where(key_k, coefficients_k**2, 0)),
    }


def metrics(task: "Modular", params: Any, data: Data) -> dict[str, jax.Array]:
    """The measures that are numbers, and for each frequency k its `share_k` and its logit coefficient `logit_k`."""
    del data
    measured = measure(task, params)
    shares = {f"share_{k}": value for k, value in enumerate(measured["share"], 1)}
    logits = {f"logit_{k}": value for k, value in enumerate(measured["logit_coefficients"], 1)}
    return {name: value for name, value in measured.items() if value.ndim == 0} | shares | logits


def plot(rows: Sequence[Row], title: str) -> "Figure":
    """A run's restricted loss, and the frequencies' shares of its embedding's power; final key frequencies in blue."""
    from matplotlib.figure import Figure

    from .harness import plots

    measured = [row for row in rows if "circuit_gini" in row]
    steps, last = [row["step"] for row in measured], measured[-1]
    frequencies = sorted(int(name.split("_")[-1]) for name in last if name.startswith("circuit_share_"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    losses, shares = figure.subplots(1, 2)
    losses.plot(steps, [row["circuit_restricted_loss"] for row in measured], label="the clock alone", color=plots.BLUE)
    # Both cycles of a prime p have (p - 1) / 2 frequencies.
    losses.axhline(math.log(2 * len(frequencies) + 1), color="grey", linestyle=":", label="chance")
    losses.set(ylabel="cross-entropy on all pairs", ylim=(0, None))
    losses.legend()
    for k in frequencies:
        share = [100 * row[f"circuit_share_{k}"] for row in measured]
        is_key = last[f"circuit_logit_{k}"] >= KEY_CORRELATION
        shares.plot(steps, share, color=plots.BLUE if is_key else "lightgrey", zorder=2 + is_key)
        if is_key:
            shares.annotate(str(k), (steps[-1], share[-1]), color=plots.BLUE, fontsize="small")
    shares.set(ylabel="share of embedding power (%)", ylim=(0, None))
    for axes in (losses, shares):
        axes.set(xlabel="optimizer steps", xscale="log")
        plots.number_steps(axes, steps)
        axes.grid(alpha=0.3)
    return figure


def circle_points(task: "Modular", stages: Sequence[Any], k: int) -> np.ndarray:
    """The embeddings of a cycle projected onto the plane of the circle of frequency k: (stage, n, 2).

    `stages` are parameters at several times. The plane is spanned by Σ_j cos(2πjk/n) E_j and Σ_j sin(2πjk/n) E_j of the
    last, k < n/2. Each stage is centred, and scaled to a root mean square distance of 1 from the centre.
    """
    elements = Cycle.of(task.p, task.operation).elements
    embeddings = [np.asarray(params["token"], np.float64)[elements] for params in stages]
    angle = 2 * np.pi * k * np.arange(len(elements)) / len(elements)
    plane, sides = np.linalg.qr(embeddings[-1].T @ np.stack([np.cos(angle), np.sin(angle)], axis=1))
    points = np.stack([(e - e.mean(axis=0)) @ (plane * np.sign(np.diag(sides))) for e in embeddings])
    return points / np.sqrt(np.mean(np.sum(points**2, axis=-1), axis=-1))[:, None, None]


def draw_circles(panels: Any, points: np.ndarray, titles: Sequence[str], k: int) -> None:
    """Draw `circle_points`, a stage on each of the axes; lines and colours follow the angles of the elements."""
    angle = k * np.arange(points.shape[1]) / points.shape[1] % 1
    order = np.argsort(angle, kind="stable")
    limits = 1.05 * np.abs(points).max() * np.array([-1, 1])
    for axes, xy, title in zip(np.ravel(panels), points, titles, strict=True):
        axes.plot(*xy[[*order, order[0]]].T, color="grey", linewidth=0.4, alpha=0.6)
        axes.scatter(*xy.T, c=angle, cmap="twilight", s=18, edgecolors="grey", linewidths=0.3, zorder=2)
        axes.set_title(title, fontsize="medium")
        axes.set(aspect="equal", xticks=[], yticks=[], xlim=limits, ylim=limits)


# One measurement costs 39 % of the matrix products of a chunk; every fifth chunk, that is 8 % of a run.
MEASURE = Measure(metrics, plot, every=5)
