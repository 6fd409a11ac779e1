"""The clock: which circuit a model of modular arithmetic has learned, as measures that are pure and jit-able.

A clock adds angles. It embeds x and y as points on circles, cos and sin of 2πk/n times their places in a cycle of n
elements, for a few key frequencies k. From these its neurons make cos and sin of the sum of the angles, and an answer's
logit is highest where its own angle is that sum (Nanda et al. 2023, arXiv 2301.05217).

Addition and subtraction mod p go round the cycle 0, 1, ..., p - 1 of n = p elements. Multiplication and division go
round that of the powers g^0, g^1, ..., g^(p-2) of a primitive root g, of n = p - 1 elements, for g^i g^j = g^(i+j): the
discrete-log clock (arXiv 2606.17399). Its cos and sin are Dirichlet's characters. 0 is not on that cycle, and is left
out. Another primitive root changes the order of the frequencies and nothing else.

Suffixes name the axes: n place in the cycle, i and j the places of x and y, s that of the answer, v token, d channel,
f neuron, k frequency from 1 to n // 2 (k - 1 is the index), and l the place of an answer that has a logit.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .fast import answer_logits_and_neurons
from .harness.errors import require
from .harness.experiment import Measure
from .harness.records import Row
from .harness.task import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .modular import Modular

KEY = 0.05  # correlation with the logits that a key frequency has at least
TUNED = 0.25  # part of its variance that a neuron owes at least to a frequency that it is tuned to
TUNED_PART = 0.01  # part of all neurons that is tuned at least to a frequency that neurons prefer


def primitive_root(p: int) -> int:
    """The smallest g whose powers g^0, ..., g^(p-2) mod p are all numbers from 1 to p - 1; p is prime."""
    return next(g for g in range(1, p) if len({pow(g, j, p) for j in range(p - 1)}) == p - 1)


class Cycle(NamedTuple):
    """A cyclic group as a numbered cycle, on which an operation moves."""

    numbers: np.ndarray  # (n,) the elements by place
    sign: int  # the answer of the places i and j is at i + sign j mod n

    @classmethod
    def of(cls, p: int, operation: str, root: int | None = None) -> "Cycle":
        """The cycle of an operation mod a prime p; `root`, by default the smallest, orders the multiplicative one."""
        sign = 1 if operation in ("addition", "multiplication") else -1
        if operation in ("addition", "subtraction"):
            return cls(np.arange(p), sign)
        root = primitive_root(p) if root is None else root
        return cls(np.array([pow(root, j, p) for j in range(p - 1)]), sign)

    @classmethod
    def control(cls, p: int, operation: str) -> "Cycle":
        """The other cycle: the additive one of a multiplicative operation, or the reverse."""
        return cls.of(p, "multiplication" if operation in ("addition", "subtraction") else "addition")

    @property
    def answers(self) -> np.ndarray:
        """The place of the answer of each pair of places, (i, j)."""
        places = np.arange(len(self.numbers))
        return (places[:, None] + self.sign * places) % len(places)


def mean_over_pairs(table_ijx: jax.Array, sign: int) -> jax.Array:
    """The mean over the n pairs whose answer is at the place s = i + sign j: (s, x)."""
    place = np.arange(table_ijx.shape[0])
    return table_ijx[place[:, None], sign * (place - place[:, None]) % len(place)].mean(axis=0)


def power(signal_nx: jax.Array) -> jax.Array:
    """The part of each signal's variance that is at each frequency: (k, x).

    P_k = 2 |F_k|² for k < n/2 and |F_k|² for k = n/2, with F_k = Σ_j signal_j exp(-2πi jk/n) / n.
    """
    n = signal_nx.shape[0]
    return weights(n, 2.0, signal_nx.dtype)[:, None] * jnp.abs(jnp.fft.rfft(signal_nx, axis=0)[1:] / n) ** 2


def weights(n: int, usual: float, dtype: Any) -> jax.Array:
    """1 for the frequency n/2, which is its own mirror image, and `usual` for all others: (k,)."""
    return jnp.where(2 * jnp.arange(1, n // 2 + 1) == n, 1.0, usual).astype(dtype)


def spectrum(embedding_nd: jax.Array) -> jax.Array:
    """The share of each frequency in the power of the embeddings of a cycle, of a sum of 1: (k,).

    P_k / Σ_k P_k, with P_k = Σ_d `power`; the mean embedding, of frequency 0, has no part in it.
    """
    power_k = power(embedding_nd).sum(axis=1)
    return power_k / power_k.sum()


def gini(share_k: jax.Array) -> jax.Array:
    """The Gini coefficient of m shares: 0 if all are equal, 1 - 1/m if one has all.

    Σ_r (2r - m - 1) x_r / (m Σ_r x_r) with x sorted, r = 1, ..., m (Hurley and Rickard 2009, arXiv 0811.4706). The
    shares of noise in d channels have about sqrt(1 / (π d)): each is a sum of 2d squares.
    """
    m = share_k.shape[0]
    return jnp.arange(1 - m, m, 2).astype(share_k.dtype) @ jnp.sort(share_k) / (m * share_k.sum())


def fewest(share_k: jax.Array, part: float = 0.9) -> jax.Array:
    """The fewest frequencies that hold `part` of the power: a mask, (k,)."""
    order = jnp.argsort(-share_k)
    before = jnp.cumsum(share_k[order]) - share_k[order]
    return jnp.zeros(share_k.shape, bool).at[order].set(before < part * share_k.sum())


def tuning(neurons_ijf: jax.Array) -> jax.Array:
    """The part of each neuron's variance over all pairs that is of one frequency: (k, f), of a sum of at most 1.

    Of frequency k are, in the two-dimensional Fourier transform over i and j, the components (±k, 0), (0, ±k) and
    (±k, ±k): what functions of x's angle, of y's, of their sum and of their difference have at k, and so the products
    of x's and y's cos and sin, too (the linear and quadratic terms of Nanda et al.).
    """
    n = neurons_ijf.shape[0]
    alone = power(neurons_ijf.mean(axis=1)) + power(neurons_ijf.mean(axis=0))
    together = power(mean_over_pairs(neurons_ijf, 1)) + power(mean_over_pairs(neurons_ijf, -1))
    # At n/2 sum and difference are the same component.
    power_kf = alone + together * weights(n, 2.0, alone.dtype)[:, None] / 2
    variance_f = jnp.maximum(neurons_ijf.var(axis=(0, 1)), jnp.finfo(alone.dtype).tiny)
    return power_kf / variance_f[None]


def tuned_neurons(neurons_ijf: jax.Array) -> jax.Array:
    """The part of all neurons that is tuned to each frequency, which has at least `TUNED` of their variance: (k,)."""
    return (tuning(neurons_ijf) >= TUNED).mean(axis=1, dtype=neurons_ijf.dtype)


def band(signal_sx: jax.Array, key_k: jax.Array) -> jax.Array:
    """The part of a signal along the first axis that is at the frequencies of a mask, (k,): of the signal's shape."""
    keep = jnp.concatenate([jnp.zeros(1, bool), key_k])[:, None]
    return jnp.fft.irfft(jnp.where(keep, jnp.fft.rfft(signal_sx, axis=0), 0), signal_sx.shape[0], axis=0)


def restricted_loss(logits_ijv: jax.Array, cycle: Cycle, key_k: jax.Array) -> jax.Array:
    """The cross-entropy on all pairs of the logits' part that is a function of the answer at the key frequencies.

    Z_K is the projection of the logits Z onto cos and sin of 2πk(i ± j)/n, k in K. What is left of Z is replaced by its
    mean over all pairs. Near 0 where the clock alone computes the answer, log p where there is none.
    """
    mean_sv = mean_over_pairs(logits_ijv, cycle.sign)
    restricted_sv = band(mean_sv, key_k) + mean_sv.mean(axis=0, keepdims=True)
    return optax.softmax_cross_entropy_with_integer_labels(restricted_sv, jnp.array(cycle.numbers)).mean()


def excluded_loss(logits_ijv: jax.Array, cycle: Cycle, key_k: jax.Array, train_ij: jax.Array) -> jax.Array:
    """The cross-entropy on the training pairs, of weight 1 in `train_ij` and 0 otherwise, of Z - Z_K.

    Z_K as for the restricted loss. Near the training loss where the pairs are memorised, high where the clock alone
    computes the answers.
    """
    clock_sv = band(mean_over_pairs(logits_ijv, cycle.sign), key_k)
    excluded_ijv = logits_ijv - clock_sv[cycle.answers]
    loss_ij = optax.softmax_cross_entropy_with_integer_labels(excluded_ijv, jnp.array(cycle.numbers)[cycle.answers])
    return jnp.sum(loss_ij * train_ij) / train_ij.sum()


def logit_coefficients(logits_ijv: jax.Array, cycle: Cycle) -> jax.Array:
    """How much the logits are a clock's: their correlation with cos(2πk(i ± j - l)/n) over i, j and l: (k,).

    Each in [-1, 1]; these cosines are orthogonal, so the squares add up to the share of the logits' variance that is
    in a clock's form, 1 at most. Logits of what is not on the cycle are left out, and each pair's mean.
    """
    logits_ijl = logits_ijv[:, :, cycle.numbers]
    logits_ijl = logits_ijl - logits_ijl.mean(axis=2, keepdims=True)
    n = logits_ijl.shape[0]
    profile = mean_over_pairs(mean_over_pairs(logits_ijl, cycle.sign), -1)  # by the answer's place less l
    cosines = jnp.fft.rfft(profile)[1:].real / n
    size = jnp.maximum(jnp.sqrt(jnp.mean(logits_ijl**2)), jnp.finfo(cosines.dtype).tiny)
    return cosines * jnp.sqrt(weights(n, 2.0, cosines.dtype)) / size


def effective_rank(embedding_nd: jax.Array) -> jax.Array:
    """exp(-Σ q log q), q the singular values of the centred embedding over their sum (Roy and Vetterli 2007).

    It is m if m singular values are equal and all others are 0. A clock on m frequencies has 2m at most.
    """
    centred = embedding_nd - embedding_nd.mean(axis=0, keepdims=True)
    sigma = jnp.linalg.svd(centred, compute_uv=False)
    return jnp.exp(jax.scipy.special.entr(sigma / sigma.sum()).sum())


GROUPS = {
    "embedding": ("token", "position"),
    "attention": ("attention",),
    "mlp": ("up", "down"),
    "layernorm": ("ln", "ln1", "ln2"),
    "head": ("head",),
}


def norms(params: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of each group of the Decoder's parameters."""
    squares: dict[str, list[jax.Array]] = {group: [] for group in GROUPS}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = {str(key.key) for key in path}
        (group,) = (group for group, layers in GROUPS.items() if names & {*layers})
        squares[group].append(jnp.sum(leaf**2))
    return {group: jnp.sqrt(sum(values, jnp.zeros(()))) for group, values in squares.items()}


def tables(task: "Modular", params: Any, cycle: Cycle) -> tuple[jax.Array, jax.Array]:
    """The logits of the answer and the last MLP's neurons there, of all pairs of places: (i, j, v) and (i, j, f)."""
    pairs = jnp.array(pair_numbers(task, cycle))
    logits, neurons = answer_logits_and_neurons(task.with_params(params), task.tokens(pairs.ravel()), prefixes=task.p)
    return logits.reshape(*pairs.shape, -1), neurons.reshape(*pairs.shape, -1)


def pair_numbers(task: "Modular", cycle: Cycle) -> np.ndarray:
    """The task's numbers of all pairs of places: (i, j)."""
    x, y = cycle.numbers[:, None], cycle.numbers[None]
    return x * task.y_values + y - (task.p - task.y_values)


def measure(task: "Modular", params: Any, data: Data, key_k: jax.Array | None = None) -> dict[str, jax.Array]:
    """All measures of a model; `key_k` is a mask of key frequencies to take in place of its own.

    The key frequencies are those whose `logit_coefficients` are at least `KEY`. A model that memorises has hardly any:
    its restricted loss is about log p, its excluded loss the training loss. Two other sets are counted beside them.

    - The frequencies that neurons prefer: at least `TUNED_PART` of those of the last MLP, at the answer's position,
      are tuned to them. A neuron may be tuned to k and contribute to the logits at 2k, which such a set leaves out.
    - The fewest frequencies that hold 90 % of the embedding's power. While a model memorises these are nearly all. Z_K
      of nearly all frequencies is little else than the mean over the pairs with the same answer, half of which are
      memorised, and its restricted loss falls without a clock.

    Returns:
      `key`, the mask; `share`, the embedding's `spectrum`; `neurons`, as by `tuned_neurons`; `logit_coefficients`:
      (k,) each. And numbers: `restricted_loss` and `excluded_loss`; `gini` of the shares, and `gini_control` on the
      other cycle; `key_frequencies`, `neuron_frequencies` and `embedding_frequencies`, how many each of the three sets
      has; `logit_share`, the sum of the squared `logit_coefficients` of key frequencies; `logit_scale`, the root mean
      square of the logits less each pair's mean; `effective_rank`; `norm_GROUP`.

    Raises:
      UsageError: p is 2, where multiplication has nothing to move on.
    """
    require(task.p > 2, "p", "at least 3 where circuits are measured", task.p)
    cycle, control = Cycle.of(task.p, task.operation), Cycle.control(task.p, task.operation)
    logits_ijv, neurons_ijf = tables(task, params, cycle)
    embedding_vd = params["token"]
    share_k, neurons_k = spectrum(embedding_vd[cycle.numbers]), tuned_neurons(neurons_ijf)
    coefficients_k = logit_coefficients(logits_ijv, cycle)
    key_k = coefficients_k >= KEY if key_k is None else key_k
    train = jnp.zeros(task.pairs, logits_ijv.dtype).at[data["train"]].set(1)
    centred_ijv = logits_ijv - logits_ijv.mean(axis=2, keepdims=True)
    return {
        "key": key_k,
        "share": share_k,
        "neurons": neurons_k,
        "logit_coefficients": coefficients_k,
        "restricted_loss": restricted_loss(logits_ijv, cycle, key_k),
        "excluded_loss": excluded_loss(logits_ijv, cycle, key_k, train[pair_numbers(task, cycle)]),
        "gini": gini(share_k),
        "gini_control": gini(spectrum(embedding_vd[control.numbers])),
        "key_frequencies": key_k.sum(),
        "neuron_frequencies": jnp.sum(neurons_k >= TUNED_PART),
        "embedding_frequencies": fewest(share_k).sum(),
        "logit_share": jnp.sum(jnp.where(key_k, coefficients_k**2, 0)),
        "logit_scale": jnp.sqrt(jnp.mean(centred_ijv**2)),
        "effective_rank": effective_rank(embedding_vd[cycle.numbers]),
    } | {f"norm_{group}": norm for group, norm in norms(params).items()}


def columns(task: "Modular", params: Any, data: Data) -> dict[str, jax.Array]:
    """The measures that are numbers, and for each frequency k its `share_k` and its logit coefficient `logit_k`."""
    found = measure(task, params, data)
    shares = {f"share_{k}": value for k, value in enumerate(found["share"], 1)}
    logits = {f"logit_{k}": value for k, value in enumerate(found["logit_coefficients"], 1)}
    return {name: value for name, value in found.items() if value.ndim == 0} | shares | logits


def picture(rows: Sequence[Row], title: str) -> "Figure":
    """A run's accuracy, its losses with nothing but the clock and without it, and the spectrum of its embedding.

    Coloured are the frequencies that are key in the last record with measures, each in one colour throughout.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from .harness import plots

    measured = [row for row in rows if "circuit_gini" in row]
    steps, last = [row["step"] for row in measured], measured[-1]
    curve = lambda name: [row[f"circuit_{name}"] for row in measured]
    by_share = sorted(
        range(1, 1 + sum(name.startswith("circuit_share_") for name in last)), key=lambda k: -last[f"circuit_share_{k}"]
    )
    keys = [k for k in by_share if last[f"circuit_logit_{k}"] >= KEY]
    colour = {k: colormaps["viridis"](0.9 * i / max(1, len(keys) - 1)) for i, k in enumerate(keys)}

    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    (accuracy, losses), (shares, spectrum) = figure.subplots(2, 2)
    plots.draw_curves(accuracy, rows, "accuracy")
    losses.plot(steps, curve("restricted_loss"), label="restricted: the clock alone, all pairs", color="#0072B2")
    losses.plot(steps, curve("excluded_loss"), label="excluded: all else, training pairs", color="#D55E00")
    # Both cycles of a prime p have (p - 1) / 2 frequencies.
    losses.axhline(math.log(2 * len(by_share) + 1), color="grey", linestyle=":", label="chance")
    losses.set(ylabel="cross-entropy", ylim=(0, None))
    for k in reversed(by_share):
        shares.plot(steps, curve(f"share_{k}"), color=colour.get(k, "lightgrey"), linewidth=1.5 if k in colour else 0.6)
    shares.set(ylim=(0, None))
    for axes in (losses, shares):
        axes.set(xlabel="optimizer steps", xscale="log")
        plots.number_steps(axes, steps)
        axes.grid(alpha=0.3)
    losses.legend(fontsize="small")
    spectrum.bar(
        range(len(by_share)),
        [last[f"circuit_share_{k}"] for k in by_share],
        color=[colour.get(k, "lightgrey") for k in by_share],
    )
    keys_shown = f"key: {', '.join(map(str, keys))}" if keys else "none is key"
    spectrum.set(xlabel=f"frequencies by share at step {int(last['step']):,}\n{keys_shown}", xticks=[])
    for axes in (shares, spectrum):
        axes.set(ylabel="share of embedding power (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=None))
    return figure


def circle_points(task: "Modular", stages: Sequence[Any], k: int) -> np.ndarray:
    """Where the embeddings of a cycle lie in the plane of the last one's circle of frequency k: (stage, n, 2).

    `stages` are parameters at several times. The plane is spanned by Σ_j cos(2πjk/n) E_j and Σ_j sin(2πjk/n) E_j of the
    last, k < n/2. Each stage is centred, and scaled to a root mean square distance of 1 from the centre.
    """
    numbers = Cycle.of(task.p, task.operation).numbers
    embeddings = [np.asarray(params["token"], np.float64)[numbers] for params in stages]
    angle = 2 * np.pi * k * np.arange(len(numbers)) / len(numbers)
    plane, sides = np.linalg.qr(embeddings[-1].T @ np.stack([np.cos(angle), np.sin(angle)], axis=1))
    points = np.stack([(e - e.mean(axis=0)) @ (plane * np.sign(np.diag(sides))) for e in embeddings])
    return points / np.sqrt(np.mean(np.sum(points**2, axis=-1), axis=-1))[:, None, None]


def circles(points: np.ndarray, titles: Sequence[str], k: int) -> "Figure":
    """A strip of pictures of `circle_points`, a panel a stage.

    Lines join the elements in the order of their angles, which the colours show.
    """
    from matplotlib.figure import Figure

    angle = k * np.arange(points.shape[1]) / points.shape[1] % 1
    order = np.argsort(angle, kind="stable")
    figure = Figure(figsize=(3 * len(points), 3.9), layout="constrained")
    figure.suptitle(f"The numbers' embeddings on the circle of frequency {k}", fontsize="medium")
    for axes, xy, title in zip(np.ravel(figure.subplots(1, len(points))), points, titles, strict=True):
        axes.plot(*xy[[*order, order[0]]].T, color="grey", linewidth=0.4, alpha=0.6)
        axes.scatter(*xy.T, c=angle, cmap="twilight", s=18, edgecolors="grey", linewidths=0.3, zorder=2)
        axes.set_title(title, fontsize="small")
        axes.set(aspect="equal", xticks=[], yticks=[], xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    return figure


MEASURE = Measure(columns, picture, every=5)  # 0.39 of a chunk's matrix products at the defaults: 8 % of a run's
