"""Which optimizer groks mod 97 in the fewest steps? `python -m benchmarks.study.board`.

Rules.

1. The task is multiplication mod 97 as the paper has it: model, initialisation, split, batches of 512, and the learning
   rate's warm-up of ten steps. Loss and optimizer are the entrant's.
2. Every entrant has nine settings, tried with seed 1000 for 500 steps; the best three are tried with seed 1001, too.
   The best of these in the median of both is entered. Neither seed is reported. The study's methods were tuned there,
   by this rule but for 2,500 steps. The constants within `fastest` come from a longer search, of 90 settings with seeds
   1000 to 1003.
3. Steps are those to the first validation accuracy of 95 %, evaluated every ten steps; a run that needs more than 1,000
   fails. Seeds 0 to 15; the best five also seeds 16 to 63. Two entrants are compared seed by seed.
4. Seeds 0 to 15, of the study's methods 0 to 7, are followed for 50 evaluations more. A run holds 95 % if it is at 95 %
   in all of them.
5. The best, untouched, with seeds 0 to 7 on the other operations, on p = 113 and with 30 % of the pairs.
6. AdamW and Muon, without a filter and behind the published ones, are also tuned with 30 % of the pairs, by rule 2 with
   1,000 steps, and then have 2,000, with seeds 0 to 7. None is followed further.

Results are appended; what is there is not trained again. Several processes may share the file; give each its entrants.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro

from benchmarks import RESULTS, run_command
from examples.harness.optimizers import Optimization, make_optimizer, stacked_muon
from examples.harness.tables import markdown
from examples.modular import Modular
from grokfast_jax import grokfast_ema, grokfast_ma, scale_by_filtered_adam

from .cells import as_cell
from .contest import Chain, Job, Numbers, results, train_missing
from .memory import in_muon, nesterov, stepped, warmed
from .methods import AFTER, check_among
from .statistics import MissingRunError, Results, interval, tuned
from .tables import MISSING, joined, steps

OUT = RESULTS / "board.jsonl"
TIMES = RESULTS / "board_times.json"  # of a step of each entrant, by benchmarks.cost.entrants
CAP = 1_000
TUNING = (1000, 1001)
FINALISTS = 3
SEEDS = tuple(range(16))
MORE_SEEDS = tuple(range(16, 64))
SEEDS_OF_OTHERS = range(8)
Tx = optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class StableMax(Modular):
    """Trained with StableMax, s(x) = x + 1 above 0 and 1 / (1 - x) below, in place of the exponential of softmax."""

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """-log(s(z_answer) / sum of s(z))."""
        s = jnp.where(logits >= 0, jnp.maximum(logits, 0) + 1, 1 / (1 - jnp.minimum(logits, 0)))
        right = jnp.take_along_axis(s, answer[:, None], axis=-1)[:, 0]
        return jnp.log(s.sum(axis=-1)) - jnp.log(right)


@dataclasses.dataclass(frozen=True)
class FewPairs(Modular):
    """Trained with 30 % of the pairs."""

    train_fraction: float = 0.3


@dataclasses.dataclass(frozen=True)
class Scaled(Modular):
    """Trained with logits times a factor: the inverse of a softmax temperature."""

    logit_factor: float = 1.0
    """The factor."""

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """Cross-entropy of the scaled logits."""
        return super().loss(self.logit_factor * logits, answer)


def perpendicular() -> Tx:
    """Remove from each gradient its part along the parameter, so that no step scales the parameter."""

    def update(g: jax.Array, p: jax.Array) -> jax.Array:
        return g - p * jnp.vdot(p, g) / (jnp.vdot(p, p) + 1e-30)

    return optax.stateless(lambda updates, params: jax.tree.map(update, updates, params))


def clipped_rows(max_norm: Any) -> Tx:
    """Scale the weights of each unit of a hidden matrix, after the step, down to a norm; unit j has column j."""

    def update(u: jax.Array, p: jax.Array) -> jax.Array:
        if p.ndim < 2:
            return u
        norm = jnp.linalg.norm(p + u, axis=0, keepdims=True)
        return (p + u) * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30)) - p

    def blocks(updates: Any, params: Any) -> Any:
        return updates | {"blocks": jax.tree.map(update, updates["blocks"], params["blocks"])}

    return optax.stateless(blocks)


def adamw(lr: Any, weight_decay: Any, *, nesterov: bool = False) -> Tx:
    """AdamW with the paper's betas."""
    return stepped(optax.scale_by_adam(0.9, 0.98, nesterov=nesterov), lr, weight_decay)


def muon(lr: Any, weight_decay: Any, beta: Any = 0.95) -> Tx:
    """Muon as optax has it: all matrices; vectors by AdamW."""
    return stacked_muon(warmed(lr), beta=beta, weight_decay=weight_decay, adam_weight_decay=weight_decay, adam_b2=0.98)


def with_embedding_rate(lr: Any, factor: Any) -> Tx:
    """AdamW with another learning rate for the token embedding."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return updates | {"token": factor * updates["token"]}

    return optax.chain(adamw(lr, 1.0), optax.stateless(scale))


class Entrant(NamedTuple):
    """A chain of at most 15 lines, and the nine settings that it is chosen from, or the study's method that it is."""

    make: Callable[..., Tx]
    grid: Mapping[str, Sequence[float]] | str
    task: type[Modular] = Modular
    cap: int = CAP  # steps at most; half as many in tuning

    @property
    def settings(self) -> list[Numbers]:
        """All combinations of the grid."""
        assert not isinstance(self.grid, str)
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


RATES, DECAYS = (1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0)
ADAMW = {"lr": RATES, "weight_decay": DECAYS}
MUON = {"lr": (0.015, 0.03, 0.06), "weight_decay": (0.1, 0.3, 1.0)}
ENTRANTS = {
    "AdamW": Entrant(adamw, "adamw-1"),
    "NAdamW": Entrant(lambda lr, weight_decay: adamw(lr, weight_decay, nesterov=True), "nadamw-1"),
    "AdEMAMix": Entrant(
        lambda lr, weight_decay: stepped(optax.contrib.scale_by_ademamix(0.9, 0.98), lr, weight_decay), "ademamix-1"
    ),
    "Lion": Entrant(lambda lr, weight_decay: stepped(optax.scale_by_lion(), lr, weight_decay), "lion-1"),
    "Lion, row norms clipped": Entrant(
        lambda lr, max_norm: optax.chain(stepped(optax.scale_by_lion(), lr, 0.0), clipped_rows(max_norm)),
        {"lr": (3e-4, 1e-3, 3e-3), "max_norm": (0.5, 1.0, 2.0)},
    ),
    "Grokfast EMA before AdamW": Entrant(
        lambda lr, weight_decay: optax.chain(grokfast_ema(0.98, 2.0), adamw(lr, weight_decay)), "ema+adamw-1"
    ),
    "Grokfast MA before AdamW": Entrant(
        lambda lr, weight_decay: optax.chain(grokfast_ma(100, 5.0), adamw(lr, weight_decay)), "ma+adamw-1"
    ),
    "AdamW, gradient off the weights": Entrant(
        lambda lr, weight_decay: optax.chain(perpendicular(), adamw(lr, weight_decay)), ADAMW
    ),
    "AdamW, StableMax": Entrant(adamw, ADAMW, StableMax),
    "AdamW, logits scaled": Entrant(
        lambda lr, logit_factor: adamw(lr, 1.0), {"lr": RATES, "logit_factor": (0.3, 3.0, 10.0)}, Scaled
    ),
    "AdamW, embedding rate": Entrant(with_embedding_rate, {"lr": RATES, "factor": (0.3, 3.0, 10.0)}),
    "AdamW, kernel of 0.8": Entrant(
        lambda lr, weight_decay: stepped(scale_by_filtered_adam(nesterov(0.8), b2=0.98), lr, weight_decay), ADAMW
    ),
    "Muon": Entrant(lambda lr, beta: muon(lr, 0.3, beta), {"lr": MUON["lr"], "beta": (0.8, 0.9, 0.95)}),
    "Muon, no momentum": Entrant(lambda lr, weight_decay: muon(lr, weight_decay, 0.0), MUON),
    "fastest": Entrant(
        lambda lr, weight_decay: make_optimizer(Optimization("muon-hidden", lr, weight_decay)),
        {"lr": (0.045, 0.06, 0.08), "weight_decay": (0.2, 0.3, 0.4)},
    ),
    "Muon, kernel of 0.8": Entrant(lambda lr, weight_decay: in_muon(nesterov(0.8), lr, weight_decay), MUON),
}
FILTERS: dict[str, Callable[[], Tx]] = {
    "": optax.identity,
    "EMA before ": lambda: grokfast_ema(0.98, 2.0),
    "MA before ": lambda: grokfast_ma(100, 5.0),
}


def _behind(make_filter: Callable[[], Tx], make: Callable[..., Tx]) -> Callable[..., Tx]:
    return lambda lr, weight_decay: optax.chain(make_filter(), make(lr, weight_decay))


FEW_PAIRS = {
    f"30 %: {title}{optimizer}": Entrant(_behind(make_filter, make), grid, FewPairs, 2 * CAP)
    for optimizer, make, grid in (
        ("AdamW", adamw, ADAMW),
        ("Muon", lambda lr, weight_decay: muon(lr, weight_decay, 0.8), MUON),
    )
    for title, make_filter in FILTERS.items()
}
ALL = ENTRANTS | FEW_PAIRS
OTHERS: dict[str, dict[str, Any]] = {  # by stage: what is changed of the task
    "addition": {"operation": "addition"},
    "subtraction": {"operation": "subtraction"},
    "division": {"operation": "division"},
    "p-113": {"p": 113},
    "30-percent": {"train_fraction": 0.3},
}


class Board:
    """The results: what each entrant was tuned to, and its runs."""

    def __init__(self, path: Path, study: Results):
        self.found, self.study = results(path), study

    def runs(self, name: str, numbers: Numbers, seeds: Iterable[int], **changes: Any) -> list[Mapping[str, Any] | None]:
        """What became of these seeds of an entrant with one setting; None where a run is missing."""
        found = []
        for seed in seeds:
            one = self.found.get(as_cell(job(name, numbers, seed, **changes).cell))
            found.append(self.of_study(name, seed) if one is None and not changes else one)
        return found

    def of_study(self, name: str, seed: int) -> Mapping[str, Any] | None:
        """A run of the study, which has more steps; None if the entrant is none of its methods."""
        method = ALL[name].grid
        if not isinstance(method, str):
            return None
        runs = self.study.reported(tuned(self.study, method))
        if seed not in runs.index:
            return None
        run = runs.loc[seed].to_dict()
        return run | {"first_step": run["first_step"] if run["first_step"] <= CAP else None}

    def steps(self, name: str, numbers: Numbers, seeds: Iterable[int], **changes: Any) -> np.ndarray:
        """Steps to the threshold of the runs that there are, infinite for those that fail."""
        runs = [run for run in self.runs(name, numbers, seeds, **changes) if run is not None]
        return np.array([np.inf if run["first_step"] is None else run["first_step"] for run in runs], float)

    def ranked(self, name: str, settings: Sequence[Numbers], seeds: Sequence[int]) -> list[Numbers]:
        """Settings sorted by their median steps with some seeds, those that all fail by their best accuracy."""

        def key(numbers: Numbers) -> tuple[float, float]:
            runs = self.runs(name, numbers, seeds)
            if None in runs:
                raise MissingRunError(f"{name} lacks a tuning run with {dict(numbers)}; run the stages before")
            accuracy = np.median([run["best_val_accuracy"] for run in runs if run is not None])
            return float(np.median(self.steps(name, numbers, seeds))), -float(accuracy)

        return sorted(settings, key=key)

    def finalists(self, name: str) -> list[Numbers]:
        """The settings of an entrant that are tried with the second seed; none of a method of the study."""
        if isinstance(ALL[name].grid, str):
            return []
        return self.ranked(name, ALL[name].settings, TUNING[:1])[:FINALISTS]

    def chosen(self, name: str) -> Numbers:
        """The setting that an entrant is entered with."""
        method = ALL[name].grid
        if isinstance(method, str):
            return tuned(self.study, method).changes
        return self.ranked(name, self.finalists(name), TUNING)[0]

    def best(self, count: int) -> list[str]:
        """The entrants with the fewest steps in the median of the seeds that all have, the best first."""
        done = {}
        for name in ENTRANTS:
            with contextlib.suppress(MissingRunError):
                steps = self.steps(name, self.chosen(name), SEEDS)
                if len(steps) == len(SEEDS):
                    done[name] = np.median(steps), np.mean(np.minimum(steps, 2 * CAP))
        return sorted(done, key=done.__getitem__)[:count]


def job(name: str, numbers: Numbers, seed: int, **changes: Any) -> Job:
    """A run of an entrant, on the task of the board or a changed one."""
    entrant = ALL[name]
    fields = {field.name for field in dataclasses.fields(entrant.task)}
    task = entrant.task(**{key: value for key, value in numbers.items() if key in fields}, **changes)
    label = ", ".join([name, *(f"{key} {value}" for key, value in changes.items())])
    after = AFTER if name in ENTRANTS and seed in SEEDS and not changes else 0
    cap = entrant.cap // 2 if seed in TUNING else entrant.cap
    return Job(Chain(label, entrant.make, task), numbers, seed, cap, after)


def reported(name: str) -> tuple[int, ...]:
    """The seeds that an entrant is judged by."""
    return SEEDS if name in ENTRANTS else tuple(SEEDS_OF_OTHERS)


def jobs(board: Board, stage: str, names: Sequence[str]) -> list[Job]:
    """The runs of a stage, which follow from the stages before."""
    match stage:
        case "tuning":
            own = [name for name in names if not isinstance(ALL[name].grid, str)]
            return [job(name, numbers, TUNING[0]) for name in own for numbers in ALL[name].settings]
        case "finals":
            return [job(name, numbers, TUNING[1]) for name in names for numbers in board.finalists(name)]
        case "seeds":
            settings = {name: board.chosen(name) for name in names}
            return [
                job(name, one, seed)
                for seed in SEEDS
                for name, one in settings.items()
                if seed in reported(name) and board.of_study(name, seed) is None
            ]
        case "more":
            return [job(name, board.chosen(name), seed) for name in names for seed in MORE_SEEDS]
        case _:
            return [job(name, board.chosen(name), seed, **OTHERS[stage]) for name in names for seed in SEEDS_OF_OTHERS]


def compared(board: Board, one: str, other: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Two entrants seed by seed: who takes fewer steps, and a two-sided sign test; a failure takes most steps."""
    first, second = (board.steps(name, board.chosen(name), seeds) for name in (one, other))
    fewer, more = int(np.sum(first < second)), int(np.sum(first > second))
    p = scipy.stats.binomtest(fewer, fewer + more).pvalue if fewer + more else 1.0
    return {"fewer": fewer, "more": more, "p": p}


def table(path: Path, study: Results, times: Path = TIMES) -> str:
    """The board, then the best entrants on other tasks."""
    board = Board(path, study)
    taken = json.loads(times.read_text())["ms_per_step"] if times.exists() else {}
    order = board.best(len(ENTRANTS))
    rows = []
    for name in order:
        chosen = board.chosen(name)
        found = board.steps(name, chosen, SEEDS)
        low, high = interval(found)
        followed = [run for run in board.runs(name, chosen, SEEDS) if run and run.get("evaluations_after") == AFTER]
        held = f"{sum(run['of_these_at_threshold'] == AFTER for run in followed)} of {len(followed)}"
        against = compared(board, order[0], name, SEEDS)
        rows.append(
            {
                "entrant": name,
                "chosen": ", ".join(f"{key} {value:g}" for key, value in chosen.items()),
                "steps to 95 %, median (95 % interval)": f"{steps(np.median(found), CAP)} ({steps(low, CAP)} to "
                f"{steps(high, CAP)})",
                "fail": f"{np.isinf(found).sum()} of {len(found)}",
                "hold": held if followed else "",
                **seconds(taken.get(name), float(np.median(found))),
                f"against {order[0]}: fewer steps, more (p)": ""
                if name == order[0]
                else f"{against['more']}, {against['fewer']} ({against['p']:.2g})",
            }
        )
    if not rows:
        return MISSING
    return joined(markdown(rows), more_table(board, order), others_table(board, order), few_pairs_table(board))


def seconds(times: Mapping[str, float] | None, steps: float) -> dict[str, str]:
    """Time of all steps to 95 % and of one, as a cell of a table; none if the entrant has not been timed."""
    if times is None:
        return {}
    to_threshold = f"{times['median'] * steps / 1e3:.1f} " if np.isfinite(steps) else ""
    return {"s to 95 % (ms per step)": f"{to_threshold}({times['median']:.1f})"}


def more_table(board: Board, order: Sequence[str]) -> str:
    """The entrants with all seeds."""
    rows = []
    seeds = [*SEEDS, *MORE_SEEDS]
    for name in order:
        found = board.steps(name, board.chosen(name), seeds)
        if len(found) == len(seeds):
            low, high = interval(found)
            middle = f"{steps(np.median(found), CAP)} ({steps(low, CAP)} to {steps(high, CAP)})"
            slowest = steps(found.max(), CAP)
            rows.append({"entrant": name, "seeds": len(found), "median (95 % interval)": middle, "slowest": slowest})
    return markdown(rows) if rows else ""


def others_table(board: Board, order: Sequence[str]) -> str:
    """Entrants on the other tasks: the median of the steps, and failures if there are any."""
    rows = []
    for name in order:
        row = {"entrant": name}
        for title, changes in OTHERS.items():
            found = board.steps(name, board.chosen(name), SEEDS_OF_OTHERS, **changes)
            row[title] = ""
            if len(found):
                failed = int(np.isinf(found).sum())
                row[title] = f"{steps(np.median(found), CAP)}" + f", {failed} of {len(found)} fail" * (failed > 0)
        if any(value for key, value in row.items() if key != "entrant"):
            rows.append(row)
    return markdown(rows) if rows else ""


def few_pairs_table(board: Board) -> str:
    """What is tuned with 30 % of the pairs, with the seeds that all methods of an optimizer have; may be empty."""
    rows = []
    for alone in [name for name in FEW_PAIRS if " before " not in name]:
        names = [name for name in FEW_PAIRS if name.split()[-1] == alone.split()[-1]]
        with contextlib.suppress(MissingRunError):
            runs = [board.runs(name, board.chosen(name), SEEDS_OF_OTHERS) for name in names]
            seeds = [seed for seed, found in zip(SEEDS_OF_OTHERS, zip(*runs, strict=True), strict=True) if all(found)]
            rows += [few_pairs_row(board, name, alone, seeds) for name in names if seeds]
    return markdown(rows) if rows else ""


def few_pairs_row(board: Board, name: str, alone: str, seeds: Sequence[int]) -> dict[str, str]:
    """A method with some seeds, and how it compares with the optimizer alone."""
    chosen, cap = board.chosen(name), FEW_PAIRS[name].cap
    found = board.steps(name, chosen, seeds)
    low, high = interval(found)
    against = compared(board, name, alone, seeds)
    return {
        "with 30 % of the pairs": name.removeprefix("30 %: "),
        "chosen": ", ".join(f"{key} {value:g}" for key, value in chosen.items()),
        "steps to 95 %, median (95 % interval)": f"{steps(np.median(found), cap)} ({steps(low, cap)} to "
        f"{steps(high, cap)})",
        "fail": f"{np.isinf(found).sum()} of {len(found)}",
        "against no filter: fewer steps, more (p)": ""
        if name == alone
        else f"{against['fewer']}, {against['more']} ({against['p']:.2g})",
    }


STAGES = ("tuning", "finals", "seeds", "more", *OTHERS)
BEST = {"more": 5} | dict.fromkeys(OTHERS, 1)  # so many of the best, in these stages


def main(
    stages: Annotated[tuple[str, ...], tyro.conf.Positional] = STAGES,
    entrants: tuple[str, ...] = (),
    study: Path = RESULTS / "study",
    out: Path = OUT,
) -> None:
    """Train what is missing.

    Args:
      stages: Which of tuning, finals, seeds, more, and the other tasks addition, subtraction, division, p-113 and
        30-percent, in this order.
      entrants: Only these; by default all, and from the stage more on the best.
      study: Folder of the study's results.
      out: File for the results.
    """
    check_among("STAGES", stages, STAGES)
    check_among("--entrants", entrants or tuple(ALL), ALL)
    for stage in stages:
        board = Board(out, Results.load(study))
        names = entrants or (board.best(BEST[stage]) if stage in BEST else tuple(ALL))
        train_missing(jobs(board, stage, names), out)
    print(table(out, Results.load(study)))


if __name__ == "__main__":
    run_command(main, "benchmarks.study.board")
