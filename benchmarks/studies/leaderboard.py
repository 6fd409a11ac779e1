"""Which optimizer groks mod 97 in the fewest steps, with equal tuning?

Rules.

1. The task is multiplication mod 97 as the paper has it: model, initialisation, split, batches of 512, and a learning
   rate that rises in ten steps. Loss and optimizer are the entrant's.
2. Every entrant tries the same 32 points of a Sobol sequence, in log-uniform ranges of the learning rate, of learning
   rate times weight decay, and of one number of its own. One tuning seed, at most 1,000 steps. The best four are tried
   with two further tuning seeds; the best median of three is entered. A best setting in the outer
   twentieth of a range is marked: the ranges are then to be widened for all.
3. Steps are those to the first validation accuracy of 95 %, evaluated every ten steps; a run that needs more than 1,000
   fails. 32 fresh seeds, followed for 50 evaluations. All entrants are compared seed by seed with the first.
4. With 30 % of the pairs, AdamW and Muon, alone and with the published filters before them, by the same rules.
5. The best five, untouched, with sixteen seeds on the other operations and on p = 113.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import grokfast_jax
from benchmarks import views
from benchmarks.statistics import Frame, paired
from benchmarks.study import Study
from examples.harness.engine import Results, product
from examples.harness.experiment import Run
from examples.harness.methods import Tx
from examples.harness.optimizers import stacked_muon, warmup
from examples.harness.tables import markdown
from examples.modular import Modular
from grokfast_jax import grokfast_ema, grokfast_ma, scale_by_filtered_adam

CAP, HOLD = 1_000, 50
TUNING_SEEDS, SEEDS = (1000, 1001, 1002), range(400, 432)
SETTINGS, FINALISTS = 32, 4
OTHERS: list[dict[str, Any]] = [{"operation": "addition"}, {"operation": "subtraction"}, {"operation": "division"}]
OTHERS += [{"p": 113}]
FEW_PAIRS = Modular(train_fraction=0.3)


@dataclasses.dataclass(frozen=True)
class StableMax(Modular):
    """Trained with StableMax, s(x) = x + 1 above 0 and 1 / (1 - x) below, in place of the exponential of softmax."""

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """-log(s(z_answer) / sum of s(z))."""
        s = jnp.where(logits >= 0, jnp.maximum(logits, 0) + 1, 1 / (1 - jnp.minimum(logits, 0)))
        return jnp.log(s.sum(axis=-1)) - jnp.log(jnp.take_along_axis(s, answer[:, None], axis=-1)[:, 0])


def perpendicular() -> Tx:
    """Remove from each gradient its part along the parameter, so that no step scales the parameter."""

    def update(g: jax.Array, p: jax.Array) -> jax.Array:
        return g - p * jnp.vdot(p, g) / (jnp.vdot(p, p) + 1e-30)

    return optax.stateless(lambda updates, params: jax.tree.map(update, updates, params))


def decoupled(scale: Tx, lr: float, weight_decay: float) -> Tx:
    """A scaled gradient, decoupled weight decay and the learning rate."""
    return optax.chain(scale, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(warmup(lr)))


def nesterov(one_minus_beta: float) -> Tx:
    """Nesterov's form of the EMA."""
    ema = grokfast_jax.ema(1 - one_minus_beta, start="debiased")
    return grokfast_jax.parallel((one_minus_beta, optax.identity()), (1 - one_minus_beta, ema))


def adamw_tuned(lr: float, weight_decay: float, one_minus_b1: float) -> Tx:
    """AdamW."""
    return decoupled(optax.scale_by_adam(1 - one_minus_b1, 0.98), lr, weight_decay)


def nadamw_tuned(lr: float, weight_decay: float, one_minus_b1: float) -> Tx:
    """AdamW with Nesterov's momentum."""
    return decoupled(optax.scale_by_adam(1 - one_minus_b1, 0.98, nesterov=True), lr, weight_decay)


def ademamix_tuned(lr: float, weight_decay: float, one_minus_b3: float) -> Tx:
    """AdEMAMix."""
    return decoupled(optax.contrib.scale_by_ademamix(0.9, 0.98, b3=1 - one_minus_b3), lr, weight_decay)


def lion_tuned(lr: float, weight_decay: float, one_minus_b2: float) -> Tx:
    """Lion."""
    return decoupled(optax.scale_by_lion(0.9, 1 - one_minus_b2), lr, weight_decay)


def ema_adamw_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The published EMA before AdamW."""
    return optax.chain(grokfast_ema(0.98, lamb), adamw_tuned(lr, weight_decay, 0.1))


def ma_adamw_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The published MA before AdamW."""
    return optax.chain(grokfast_ma(100, lamb), adamw_tuned(lr, weight_decay, 0.1))


def adamw_perpendicular(lr: float, weight_decay: float, one_minus_b1: float) -> Tx:
    """AdamW; of each gradient the part along the weights is removed."""
    return optax.chain(perpendicular(), adamw_tuned(lr, weight_decay, one_minus_b1))


def adamw_nesterov_kernel(lr: float, weight_decay: float, one_minus_beta: float) -> Tx:
    """AdamW with Nesterov's form of the EMA in place of its first moment."""
    return decoupled(scale_by_filtered_adam(nesterov(one_minus_beta), b2=0.98), lr, weight_decay)


def muon_tuned(lr: float, weight_decay: float, one_minus_beta: float) -> Tx:
    """Muon on all matrices, Nesterov's AdamW on the rest."""
    decays = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
    return stacked_muon(warmup(lr), beta=1 - one_minus_beta, adam_b2=0.98, **decays)


def ema_muon_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The published EMA before Muon."""
    return optax.chain(grokfast_ema(0.98, lamb), muon_tuned(lr, weight_decay, 0.2))


def ma_muon_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The published MA before Muon."""
    return optax.chain(grokfast_ma(100, lamb), muon_tuned(lr, weight_decay, 0.2))


def muon_hidden(lr: float, weight_decay: float, one_minus_beta: float) -> Tx:
    """Muon on the matrices of blocks alone, with Nesterov's form of the EMA; Nesterov's AdamW on the rest."""

    def group_of(path: Any, p: jax.Array) -> str:
        return "hidden" if "blocks" in jax.tree_util.keystr(path) and p.ndim == 2 else "rest"

    muon = stacked_muon(warmup(lr), beta=0.0, weight_decay=weight_decay)
    groups: dict[Any, Tx] = {
        "hidden": optax.chain(nesterov(one_minus_beta), muon),
        "rest": nadamw_tuned(lr, weight_decay, 0.1),
    }
    return optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(group_of, params))


class Entrant(NamedTuple):
    """A method, its number beside rate and decay with its log-uniform range, and the range of its learning rate."""

    method: Callable[..., Tx]
    own: str
    own_range: tuple[float, float]
    lr: tuple[float, float]
    task: Modular = Modular()


DECAY = (1e-4, 3e-2)  # learning rate times weight decay, of all entrants
ADAM, LION, MUON = (5e-4, 5e-2), (5e-5, 5e-3), (3e-3, 3e-1)
MOMENTUM, LAMB = (0.02, 1.0), (0.2, 20.0)
ENTRANTS = {
    "AdamW": Entrant(adamw_tuned, "one_minus_b1", MOMENTUM, ADAM),
    "NAdamW": Entrant(nadamw_tuned, "one_minus_b1", MOMENTUM, ADAM),
    "AdEMAMix": Entrant(ademamix_tuned, "one_minus_b3", (1e-4, 0.1), ADAM),
    "Lion": Entrant(lion_tuned, "one_minus_b2", (0.003, 0.3), LION),
    "EMA before AdamW": Entrant(ema_adamw_tuned, "lamb", LAMB, ADAM),
    "MA before AdamW": Entrant(ma_adamw_tuned, "lamb", LAMB, ADAM),
    "AdamW, perpendicular gradients": Entrant(adamw_perpendicular, "one_minus_b1", MOMENTUM, ADAM),
    "AdamW, StableMax": Entrant(adamw_tuned, "one_minus_b1", MOMENTUM, ADAM, StableMax()),
    "AdamW, Nesterov kernel": Entrant(adamw_nesterov_kernel, "one_minus_beta", MOMENTUM, ADAM),
    "Muon": Entrant(muon_tuned, "one_minus_beta", MOMENTUM, MUON),
    "Muon on hidden matrices": Entrant(muon_hidden, "one_minus_beta", MOMENTUM, MUON),
}
BEFORE_MUON = {
    "EMA before Muon": Entrant(ema_muon_tuned, "lamb", LAMB, MUON),
    "MA before Muon": Entrant(ma_muon_tuned, "lamb", LAMB, MUON),
}
WITH_FEW_PAIRS = {k: ENTRANTS[k] for k in ("AdamW", "EMA before AdamW", "MA before AdamW", "Muon")} | BEFORE_MUON


def points(entrant: Entrant) -> list[dict[str, float]]:
    """The settings that an entrant tries, with three digits: learning rate, weight decay and its own number."""
    unit = scipy.stats.qmc.Sobol(3, rng=0).random(SETTINGS)
    low, high = np.log([entrant.lr, DECAY, entrant.own_range]).T
    found = []
    for lr, product_, own in np.exp(scipy.stats.qmc.scale(unit, low, high)):
        setting = {"lr": lr, "weight_decay": product_ / lr, entrant.own: own}
        found.append({name: float(f"{value:.3g}") for name, value in setting.items()})
    return found


def trial(
    entrant: Entrant, setting: Mapping[str, float], task: Modular, seeds: Sequence[int], hold: int = 0
) -> list[Run]:
    """Runs of one setting."""
    return product(task, entrant.method, **setting, seed=list(seeds), max_steps=CAP, hold_evals=hold)


def order(found: Frame) -> tuple[float, float]:
    """Median steps, then the best accuracy: what settings and entrants are sorted by."""
    return float(found["steps_to_95"].median()), -float(found["best_val_accuracy"].fillna(0).median())


def finals(results: Results, entrant: Entrant, task: Modular) -> list[Run]:
    """The runs of the best setting with the fresh seeds; empty while the tuning is not complete."""
    tried = points(entrant)
    results.of(run for setting in tried for run in trial(entrant, setting, task, TUNING_SEEDS[:1]))
    for seeds in (TUNING_SEEDS[:1], TUNING_SEEDS):
        found = [results.of(trial(entrant, setting, task, seeds)) for setting in tried]
        if min(map(len, found)) < len(seeds):
            return []
        tried = [tried[i] for i in sorted(range(len(tried)), key=lambda i: order(found[i]))[:FINALISTS]]
    return trial(entrant, tried[0], task, SEEDS, HOLD)


def elsewhere(run: Run) -> list[Run]:
    """The setting of a run on the other operations and on p = 113, with sixteen seeds."""
    task: Any = run.task
    tasks = [dataclasses.replace(task, **changes) for changes in OTHERS]
    return [dataclasses.replace(run, task=task, seed=seed, hold_evals=0) for task in tasks for seed in SEEDS[:16]]


def runs(results: Results) -> Iterator[Run]:
    """Tuning and finals of every entrant, then with 30 % of the pairs, then the best five on the other tasks."""
    found = {}
    for entrant in ENTRANTS.values():
        entered = finals(results, entrant, entrant.task)
        yield from entered
        if len(outcomes := results.of(entered)) == len(SEEDS):
            found[entered[0].key["method"], type(entrant.task)] = order(outcomes), entered[0]
    for entrant in WITH_FEW_PAIRS.values():
        yield from finals(results, entrant, FEW_PAIRS)
    for _, run in sorted(found.values(), key=lambda pair: pair[0])[:5]:
        yield from elsewhere(run)


STUDY = Study("leaderboard", runs)


def of_entrant(frame: Frame, entrant: Entrant, task: Modular) -> Frame:
    """All runs of an entrant on a task."""
    same = (frame["task"] == type(task).__name__) & (frame["method"] == entrant.method.__name__)
    return frame[same & (frame["train_fraction"] == task.train_fraction) & (frame["p"] == task.p)]


def entered(frame: Frame, entrants: Mapping[str, Entrant], task: Modular | None = None) -> dict[str, Frame]:
    """The final runs of every entrant that has them all, the fewest steps first."""
    found = {name: of_entrant(frame, entrant, task or entrant.task) for name, entrant in entrants.items()}
    found = {name: runs[runs["seed"].isin(SEEDS) & (runs["hold_evals"] == HOLD)] for name, runs in found.items()}
    complete = {name: runs for name, runs in found.items() if len(runs) == len(SEEDS)}
    return dict(sorted(complete.items(), key=lambda item: order(item[1])))


def standings(found: Mapping[str, Frame], entrants: Mapping[str, Entrant], against: str) -> str:
    """A row per entrant, compared seed by seed with one of them."""
    rows = []
    for name, runs in found.items():
        cells = views.outcome_cells(runs)
        setting = {key: runs[key].iloc[0] for key in ("lr", "weight_decay", entrants[name].own)}
        wins = "" if name == against else views.seed_counts(paired(found[against], runs))
        rows.append(
            {
                "entrant": name,
                "rate, decay, own number": ", ".join(f"{value:.3g}" for value in setting.values()),
                **{key: cells[key] for key in ("steps to 95 %", "fail", "hold")},
                f"{against} needs fewer : more steps": wins,
            }
        )
    return markdown(rows) if rows else views.MISSING


@STUDY.table
def table(frame: Frame) -> str:
    """All entrants, against the first."""
    found = entered(frame, ENTRANTS)
    return standings(found, ENTRANTS, next(iter(found))) if found else views.MISSING


@STUDY.table
def few_pairs(frame: Frame) -> str:
    """With 30 % of the pairs, against AdamW alone."""
    found = entered(frame, WITH_FEW_PAIRS, FEW_PAIRS)
    return standings(found, WITH_FEW_PAIRS, "AdamW") if "AdamW" in found else views.MISSING


def best_of(steps: np.ndarray, k: int) -> float:
    """Expected steps of the best of k of the settings, drawn without replacement; a failure counts as the cap."""
    values, n = np.sort(np.minimum(steps, CAP)), len(steps)
    chance = [math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(values @ np.array(chance))


@STUDY.figure("What tuning costs: expected steps of the best of k settings", width=8, height=4.4)
def budget(frame: Frame, axes: Any) -> None:
    """Steps of the best of k settings on the tuning seed, for each entrant."""
    for i, (name, entrant) in enumerate(ENTRANTS.items()):
        runs = of_entrant(frame, entrant, entrant.task)
        tuning = (runs["seed"] == TUNING_SEEDS[0]) & (runs["max_steps"] == CAP)  # earlier rules had another cap
        steps = runs.loc[tuning, "steps_to_95"].to_numpy()
        if len(steps) == SETTINGS:
            ks = range(1, SETTINGS + 1)
            style = ("-", "--", ":")[i // 4]
            axes.plot(ks, [best_of(steps, k) for k in ks], style, color=f"C{i % 8}", linewidth=2, label=name)
    axes.set(xscale="log", xticks=[1, 2, 4, 8, 16, 32], xticklabels=[1, 2, 4, 8, 16, 32])
    axes.minorticks_off()
    views.label(axes, "settings tried", "steps to 95 % of the best, expected")
    if axes.has_data():
        axes.figure.legend(loc="outside right center", frameon=False)
