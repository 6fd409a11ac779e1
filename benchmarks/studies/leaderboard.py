"""Which optimizer needs the fewest steps, with equal tuning? On sparse parity, MNIST and mod 97.

Rules.

1. Model, data, initialisation and batches are those of the task. Loss and optimizer are the entrant's. The learning
   rate rises in ten steps.
2. Every entrant tries the same 32 points of a Sobol sequence, in log-uniform ranges of the learning rate, of learning
   rate times weight decay, and of one number of its own. One tuning seed, and a cap on the steps for all. The best four
   are tried with two further tuning seeds; the best median of three is entered. A number of the entered setting in the
   outer twentieth of its range is marked: the ranges are then to be widened for all.
3. Steps are those to the first validation accuracy at the task's threshold; a run that needs more than the cap fails.
   Sixteen fresh seeds. All entrants are compared seed by seed with one of them.
4. Before AdamW the filters' β1 is 0.9, and AdamW's is tuned. On sparse parity and MNIST AdamW is therefore entered with
   β1 0.9, too. The EMA is the published one; except on sparse parity it is entered with a debiased start, too, and on
   MNIST with the paper's α for this task.
5. With 30 % of the pairs: AdamW and Muon, alone and with the published filters before them. The main entrants, AdamW,
   both filters before it and Muon, with their settings of mod 97 untouched, on the other operations and on p = 113.

`fastest` is an example, not an entrant: its constants come from a search of 90 settings.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import grokfast_jax
from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples.harness.methods import Tx
from examples.harness.optimizers import stacked_muon, warmup
from examples.harness.plots import GREY
from examples.harness.task import Task
from examples.mnist import Mnist
from examples.modular import Modular, fastest
from examples.parity import Parity
from grokfast_jax import grokfast_ema, grokfast_ma, scale_by_filtered_adam

from .staying_grokked import remove_along

Range = tuple[float, float]
TUNING_SEEDS, SEEDS = (1000, 1001, 1002), range(400, 416)
SETTINGS, FINALISTS = 32, 4
OTHER_TASKS = {
    "addition": Modular(operation="addition"),
    "subtraction": Modular(operation="subtraction"),
    "division": Modular(operation="division"),
    "p = 113": Modular(p=113),
}


@dataclasses.dataclass(frozen=True)
class StableMax(Modular):
    """Trained with StableMax, s(x) = x + 1 above 0 and 1 / (1 - x) below, in place of the exponential of softmax."""

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """-log(s(z_answer) / sum of s(z))."""
        s = jnp.where(logits >= 0, jnp.maximum(logits, 0) + 1, 1 / (1 - jnp.minimum(logits, 0)))
        return jnp.log(s.sum(axis=-1)) - jnp.log(jnp.take_along_axis(s, answer[:, None], axis=-1)[:, 0])


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


def short_ema_adamw_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The EMA before AdamW, with the α that the paper has for MNIST."""
    return optax.chain(grokfast_ema(0.8, lamb), adamw_tuned(lr, weight_decay, 0.1))


def debiased_ema_adamw_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The EMA before AdamW, with a debiased start."""
    return optax.chain(grokfast_ema(0.98, lamb, start="debiased"), adamw_tuned(lr, weight_decay, 0.1))


def adamw_fixed_momentum(lr: float, weight_decay: float, one_minus_b1: float) -> Tx:
    """AdamW with one momentum; a method of its own, because the runs of entrants are told apart by their methods."""
    return adamw_tuned(lr, weight_decay, one_minus_b1)


def ma_adamw_tuned(lr: float, weight_decay: float, lamb: float) -> Tx:
    """The published MA before AdamW."""
    return optax.chain(grokfast_ma(100, lamb), adamw_tuned(lr, weight_decay, 0.1))


def adamw_perpendicular(lr: float, weight_decay: float, one_minus_b1: float) -> Tx:
    """AdamW; of each gradient the part along the weights is removed."""
    return optax.chain(remove_along(optax.constant_schedule(1.0)), adamw_tuned(lr, weight_decay, one_minus_b1))


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
    """A method, its number beside rate and decay with its log-uniform range, and its kind of learning rate."""

    method: Callable[..., Tx]
    own: str
    own_range: Range
    lr: Literal["adam", "lion", "muon"]
    task: Task | None = None  # in place of the board's


MOMENTUM, LAMB = (0.02, 1.0), (0.02, 20.0)
ENTRANTS = {
    "AdamW": Entrant(adamw_tuned, "one_minus_b1", MOMENTUM, "adam"),
    "EMA before AdamW": Entrant(ema_adamw_tuned, "lamb", LAMB, "adam"),
    "MA before AdamW": Entrant(ma_adamw_tuned, "lamb", LAMB, "adam"),
    "Muon": Entrant(muon_tuned, "one_minus_beta", MOMENTUM, "muon"),
    "AdamW, Nesterov kernel": Entrant(adamw_nesterov_kernel, "one_minus_beta", MOMENTUM, "adam"),
    "AdEMAMix": Entrant(ademamix_tuned, "one_minus_b3", (1e-4, 0.1), "adam"),
    "AdamW, perpendicular gradients": Entrant(adamw_perpendicular, "one_minus_b1", MOMENTUM, "adam"),
    "NAdamW": Entrant(nadamw_tuned, "one_minus_b1", MOMENTUM, "adam"),
    "AdamW, StableMax": Entrant(adamw_tuned, "one_minus_b1", MOMENTUM, "adam", StableMax()),
    "Muon on hidden matrices": Entrant(muon_hidden, "one_minus_beta", MOMENTUM, "muon"),
    "Lion": Entrant(lion_tuned, "one_minus_b2", (0.003, 0.3), "lion"),
}
BEFORE_MUON = {
    "EMA before Muon": Entrant(ema_muon_tuned, "lamb", LAMB, "muon"),
    "MA before Muon": Entrant(ma_muon_tuned, "lamb", LAMB, "muon"),
}
# Controls: the filters' momentum without a filter, the start that we recommend, and the paper's α for MNIST
FIXED_MOMENTUM = {"AdamW, β1 0.9": Entrant(adamw_fixed_momentum, "one_minus_b1", (0.1, 0.1), "adam")}
DEBIASED = {"EMA before AdamW, debiased": Entrant(debiased_ema_adamw_tuned, "lamb", LAMB, "adam")}
SHORT = {"EMA before AdamW, α 0.8": Entrant(short_ema_adamw_tuned, "lamb", LAMB, "adam")}
CONTROLS = FIXED_MOMENTUM | DEBIASED | SHORT
MAIN = {k: ENTRANTS[k] for k in ("AdamW", "EMA before AdamW", "MA before AdamW", "Muon")}
FILTERS = MAIN | BEFORE_MUON


class Board(NamedTuple):
    """A task and its rules."""

    task: Task
    entrants: Mapping[str, Entrant]
    lr: Mapping[str, Range]  # by the kind of learning rate
    cap: int  # steps
    threshold: float = 0.95
    group_size: int = 1
    product: Range = (1e-5, 3e-2)  # of learning rate and weight decay

    @property
    def steps_to(self) -> str:
        """The column of the steps to the threshold."""
        return f"steps_to_{round(100 * self.threshold)}"

    def ranges(self, entrant: Entrant) -> dict[str, Range]:
        """Log-uniform ranges: of the learning rate, of its product with the weight decay, and of the own number."""
        return {"lr": self.lr[entrant.lr], "weight_decay": self.product, entrant.own: entrant.own_range}

    def points(self, entrant: Entrant) -> list[dict[str, float]]:
        """The settings that an entrant tries, with three digits: learning rate, weight decay and its own number."""
        unit = scipy.stats.qmc.Sobol(3, rng=0).random(SETTINGS)
        low, high = np.log([*self.ranges(entrant).values()]).T
        settings = []
        for lr, product_, own in np.exp(low + unit * (high - low)):
            setting = {"lr": lr, "weight_decay": product_ / lr, entrant.own: own}
            settings.append({name: float(f"{value:.3g}") for name, value in setting.items()})
        return settings

    def trial(self, entrant: Entrant, setting: Mapping[str, float], seeds: Sequence[int]) -> list[Run]:
        """Runs of one setting."""
        rule = {"max_steps": self.cap, "stop_at": self.threshold, "group_size": self.group_size}
        return product(entrant.task or self.task, entrant.method, **setting, **rule, seed=list(seeds))

    def order(self, runs: Frame) -> tuple[float, float]:
        """Median steps, then the best accuracy: what settings and entrants are sorted by."""
        return float(runs[self.steps_to].median()), -float(runs["best_val_accuracy"].fillna(0).median())

    def finals(self, results: Results, entrant: Entrant) -> list[Run]:
        """The runs of the best setting with the fresh seeds; empty while the tuning is not complete."""
        settings = self.points(entrant)
        for seeds in (TUNING_SEEDS[:1], TUNING_SEEDS):
            tried = results.of(run for setting in settings for run in self.trial(entrant, setting, seeds))
            if len(tried) < len(settings) * len(seeds):
                return []
            groups = (tried.iloc[i : i + len(seeds)] for i in range(0, len(tried), len(seeds)))
            ranked = sorted(zip(settings, groups, strict=True), key=lambda item: self.order(item[1]))
            settings = [setting for setting, _ in ranked[:FINALISTS]]
        return self.trial(entrant, settings[0], SEEDS)

    def of_entrant(self, frame: Frame, entrant: Entrant) -> Frame:
        """All runs of an entrant under these rules."""
        key = self.trial(entrant, self.points(entrant)[0], [0])[0].key
        fixed = {f.name for f in dataclasses.fields(self.task)} | {"task", "method", "max_steps"}
        frame = frame.reindex(columns=[*dict.fromkeys([*frame, *key])])
        return frame[np.logical_and.reduce([frame[name] == key[name] for name in fixed & key.keys()])]

    def entered(self, frame: Frame) -> dict[str, Frame]:
        """The final runs of every entrant that has them all, the fewest steps first."""
        final = {}
        for name, entrant in self.entrants.items():
            runs = self.of_entrant(frame, entrant)
            runs = runs[runs["seed"].isin(SEEDS)]
            if len(runs) == len(SEEDS):
                final[name] = runs
        return dict(sorted(final.items(), key=lambda item: self.order(item[1])))

    def standings(self, frame: Frame, against: str = "AdamW") -> Rows:
        """A row per entrant, compared seed by seed with one of them."""
        final = self.entered(frame)
        for name, runs in final.items() if against in final else ():
            row = {"method": name, "rate, decay, λ or 1 - β": self.setting(self.entrants[name], runs)}
            row["steps"] = views.median_and_interval(runs[self.steps_to].to_numpy(), self.cap)
            row["fail"] = f"{np.isinf(runs[self.steps_to]).sum()} of {len(runs)}"
            comparison = paired(runs, final[against], self.steps_to)
            yield row | {"fewer : more": "" if name == against else views.seed_counts(comparison)}

    def setting(self, entrant: Entrant, runs: Frame) -> str:
        """The numbers of the entered setting; those near an end of their range are marked."""
        values = {name: float(runs[name].iloc[0]) for name in self.ranges(entrant)}
        ranged = values | {"weight_decay": values["weight_decay"] * values["lr"]}
        cells = []
        for name, (low, high) in self.ranges(entrant).items():
            place = math.log(ranged[name] / low) / math.log(high / low) if low < high else 0.5
            cells.append(f"{values[name]:.3g}" + " (edge)" * (not 0.05 <= place <= 0.95))
        return ", ".join(cells)


LR = {"adam": (5e-4, 5e-2), "lion": (5e-5, 5e-3), "muon": (3e-3, 3e-1)}
PARITY_LR = {"adam": (1e-2, 1.0), "lion": (1e-3, 0.1), "muon": (1e-2, 1.0)}
ON_ANY_TASK = {name: entrant for name, entrant in ENTRANTS.items() if not entrant.task and "hidden" not in name}
ON_PARITY = ON_ANY_TASK | BEFORE_MUON | FIXED_MOMENTUM
PARITY = Board(Parity(eval_every=10), ON_PARITY, PARITY_LR, 2_000, group_size=16)
MNIST = Board(Mnist(epochs=10), MAIN | CONTROLS, LR, 2_000, threshold=0.85)
MOD97 = Board(Modular(), ENTRANTS | DEBIASED, LR, 1_000, product=(1e-4, 1e-1))
FEW_PAIRS = Board(Modular(train_fraction=0.3), FILTERS | DEBIASED, LR, 1_000, product=(1e-4, 1e-1))
BOARDS = (PARITY, MNIST, MOD97, FEW_PAIRS)


def on_other_tasks(run: Run, seeds: Sequence[int]) -> list[Run]:
    """The setting of a run on the other operations and on p = 113."""
    return [dataclasses.replace(run, task=task, seed=seed) for task in OTHER_TASKS.values() for seed in seeds]


# Multiplication with 56 seeds, and the other tasks with eight
FASTEST = product(Modular(), fastest, max_steps=MOD97.cap, seed=range(8, 64))
FASTEST += on_other_tasks(FASTEST[0], range(8))


def parts(results: Results) -> Iterator[list[Run]]:
    """The final runs of every entrant on every board: the main ones, these on the other tasks, controls, the others."""
    for board in BOARDS:
        yield from (board.finals(results, entrant) for entrant in MAIN.values())
    for entrant in MAIN.values():
        yield from (on_other_tasks(run, SEEDS) for run in MOD97.finals(results, entrant)[:1])
    for are_controls, board in itertools.product((True, False), BOARDS):
        for name, entrant in board.entrants.items():
            if name not in MAIN and (name in CONTROLS) == are_controls:
                yield board.finals(results, entrant)
    yield FASTEST


def runs(results: Results) -> Iterator[Run]:
    """All but the tuning runs, which are trained when the final ones are asked for."""
    for part in parts(results):
        results.of(part)
        yield from part


STUDY = Study("leaderboard", runs)


@STUDY.table
def parity(frame: Frame) -> Rows:
    """Sparse parity."""
    return PARITY.standings(frame)


@STUDY.table
def mnist(frame: Frame) -> Rows:
    """MNIST."""
    return MNIST.standings(frame)


@STUDY.table
def table(frame: Frame) -> Rows:
    """Mod 97."""
    return MOD97.standings(frame)


@STUDY.table
def few_pairs(frame: Frame) -> Rows:
    """Mod 97 with 30 % of the pairs."""
    return FEW_PAIRS.standings(frame)


@STUDY.table
def elsewhere(frame: Frame) -> Rows:
    """Median steps of the main entrants on the tasks beside mod 97, compared seed by seed with AdamW."""
    boards = {name: MOD97._replace(task=task, entrants=MAIN) for name, task in OTHER_TASKS.items()}
    final = {name: board.entered(frame) for name, board in boards.items()}
    for entrant in filter(lambda name: all({name, "AdamW"} <= entered.keys() for entered in final.values()), MAIN):
        row = {"method": entrant}
        for name, entered in final.items():
            row[name] = views.steps_and_failures(entered[entrant]["steps_to_95"].to_numpy(), MOD97.cap)
            if entrant != "AdamW":
                row[name] += f"; {views.seed_counts(paired(entered[entrant], entered['AdamW']))}"
        yield row


def best_of(steps: np.ndarray, k: int, cap: int) -> float:
    """Expected steps of the best of k of the settings, drawn without replacement; a failure counts as the cap."""
    values, n = np.sort(np.minimum(steps, cap)), len(steps)
    chance = [math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(values @ np.array(chance))


@STUDY.figure("On sparse parity and MNIST, AdamW takes less tuning without a filter", width=10, height=4, columns=3)
def budget(frame: Frame, panels: Any) -> None:
    """Expected steps of the best of k settings on the tuning seed, with and without a filter."""
    ks = range(1, SETTINGS + 1)
    boards = {"sparse parity": PARITY, "MNIST": MNIST, "mod 97": MOD97}
    for axes, (title, board) in zip(panels, boards.items(), strict=True):
        for name, entrant in (FILTERS | FIXED_MOMENTUM).items():
            runs = board.of_entrant(frame, entrant)
            steps = runs[runs["seed"] == TUNING_SEEDS[0]].reindex(columns=[board.steps_to]).to_numpy()[:, 0]
            if len(steps) == SETTINGS:
                style = "--" if "EMA" in name else ":" if "MA before" in name else "-." if "β1" in name else "-"
                colour = GREY if "Muon" in name else views.FILTER if " before " in name else views.NO_FILTER
                axes.plot(ks, [best_of(steps, k, board.cap) for k in ks], style, color=colour, linewidth=2, label=name)
        axes.set_title(f"{title}, {round(100 * board.threshold)} %", fontsize="large", loc="left")
        axes.set(xscale="log", xticks=[1, 2, 4, 8, 16, 32], xticklabels=[1, 2, 4, 8, 16, 32], ylim=(0, None))
        axes.minorticks_off()
        views.label(axes, "settings tried", "expected steps of the best" if board is PARITY else "")
    panels[0].legend(frameon=False, fontsize="medium")


@STUDY.figure("On mod 97, no filter before AdamW clearly gains", width=8, height=4)
def figure(frame: Frame, axes: Any) -> None:
    """Steps to 95 % of every entrant on mod 97, a dot per seed."""
    colour = lambda name: views.FILTER if " before " in name else views.NO_FILTER
    groups = {name: (runs, colour(name)) for name, runs in MOD97.entered(frame).items()}
    if groups:
        views.step_dots(axes, groups)
