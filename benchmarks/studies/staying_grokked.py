"""What keeps a model at its accuracy after it has grokked?

Multiplication mod 97 with AdamW at the paper's learning rate and a weight decay of 1. Each run is the same up to the
first evaluation with 95 % validation accuracy. There one thing changes, and 200 evaluations follow. All changes are
numbers of one method: one compiled program serves all runs of a seed, and up to the change they compute the same
digits. The loss without cancellation is the exception: it replaces the loss from the first step.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples.harness.engine import four_digits
from examples.harness.optimizers import from_step, warmup
from examples.harness.plots import BLUE, GREY, ORANGE
from examples.harness.records import Row, reaches
from examples.harness.tables import median_and_range
from examples.harness.task import Data
from examples.harness.train import TrainState
from examples.modular import Modular
from grokfast_jax import amplify, ema, moving_average, scale_by_filtered_adam

SEEDS = range(500, 516)
EVALS = 200
STEPS = EVALS * Modular().steps
NEVER = 5_000  # steps, at which every run has ended
CHANGES: Mapping[str, dict[str, float]] = {
    "no change": {},
    "MA, λ 5": {"ma_lamb": 5.0},
    "cosine decay of the rate to 0": {"cosine": 1.0},
    "a third of the rate": {"rate": 1 / 3},
    "EMA, λ 2": {"ema_lamb": 2.0},
    "β1 0.98": {"b1": 0.98},
    "gradient perpendicular to the weights": {"perpendicular": 1.0},
    "the same, decay 0.3": {"perpendicular": 1.0, "weight_decay": 0.3},
    "decay 0.3": {"weight_decay": 0.3},
    "embedding and output frozen": {"frozen": 1.0},
}
EXACT_LOSS = "loss without cancellation"


@dataclasses.dataclass(frozen=True)
class ExactLoss(Modular):
    """Cross-entropy with a value and a gradient that keep their digits as the probability of the answer approaches 1.

    The usual form rounds them as numbers near 1 are, to 6e-8; a loss in float64 would round to 1e-16.
    """

    def loss(self, logits: jax.Array, answer: jax.Array) -> jax.Array:
        """log(1 + sum of exp(z - z_answer) over the other tokens)."""
        is_answer = jax.nn.one_hot(answer, logits.shape[-1], dtype=bool)
        others = jax.nn.logsumexp(jnp.where(is_answer, -jnp.inf, logits), axis=-1)
        return jax.nn.softplus(others - jnp.take_along_axis(logits, answer[:, None], axis=-1)[:, 0])


def changed_adamw(
    change_step: float,
    rate: float = 1.0,
    cosine: float = 0.0,
    b1: float = 0.9,
    weight_decay: float = 1.0,
    ema_lamb: float = 0.0,
    ma_lamb: float = 0.0,
    perpendicular: float = 0.0,
    frozen: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (learning rate 0.001, decay 1) until a step; from there on with some things changed.

    Args:
      change_step: The first step with the changes, counted from 0.
      rate: Factor of the learning rate.
      cosine: Weight of a cosine decay of the learning rate, to 0 after 2,000 steps; 0 or 1.
      b1: Adam's beta1.
      weight_decay: Decoupled weight decay.
      ema_lamb: Amplification of an EMA (alpha 0.98) before Adam. It collects from the first step on.
      ma_lamb: Amplification of a moving average (100 gradients) before Adam. It collects from the first step on.
      perpendicular: Share of each gradient's part along its parameter that is removed.
      frozen: 1 to keep embeddings and output matrix as they are.
    """
    from_here = functools.partial(from_step, change_step)  # type: ignore[arg-type]

    def lr(step: Any) -> Any:
        decayed = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - change_step) / STEPS, 0, 1)))
        return warmup(1e-3)(step) * from_here(rate * (1 - cosine * (1 - decayed)), 1.0)(step)

    return optax.chain(
        amplify(ema(0.98), from_here(ema_lamb)),
        amplify(moving_average(100), from_here(ma_lamb)),
        remove_along(from_here(perpendicular)),
        scale_by_filtered_adam(ema(from_here(b1, 0.9), start="debiased"), b2=0.98),
        optax.add_decayed_weights(from_here(weight_decay, 1.0)),
        optax.masked(optax.scale_by_schedule(from_here(1 - frozen, 1.0)), is_embedding_or_output),
        optax.scale_by_learning_rate(lr),
    )


def remove_along(share: optax.Schedule) -> optax.GradientTransformation:
    """Remove a share of each gradient's part along its parameter; with all of it gone, no step scales the parameter."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:  # the state is the step
        along = lambda g, p: p * jnp.vdot(p, g) / (jnp.vdot(p, p) + 1e-30)
        return jax.tree.map(lambda g, p: g - share(state) * along(g, p), updates, params), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def is_embedding_or_output(params: Any) -> Any:
    """A mask of the embeddings and the output matrix."""
    names = ("token", "position", "head")
    return jax.tree_util.tree_map_with_path(lambda path, _: any(n in jax.tree_util.keystr(path) for n in names), params)


RULE: dict[str, Any] = {"max_steps": NEVER, "hold_evals": EVALS}
run_of = functools.partial(product, Modular(), changed_adamw, **RULE)


def change_steps(frame: Frame) -> dict[int, float]:
    """By seed, the step at which a run without a change reaches 95 %."""
    if frame.empty:  # an empty frame lacks the column of steps
        return {}
    plain = frame[(frame["task"] == "Modular") & (frame["change_step"] == NEVER) & (frame["steps_to_95"] < NEVER)]
    return dict(zip(plain["seed"], plain["steps_to_95"], strict=True))


def runs(results: Results) -> Iterator[Run]:
    """Runs without a change, then those with one."""
    plain = run_of(change_step=NEVER, seed=SEEDS)
    exact = product(ExactLoss(), changed_adamw, change_step=NEVER, seed=SEEDS, **RULE)
    yield from [*plain, *exact]
    results.of(exact)
    steps: Any = change_steps(results.of(plain))
    for numbers in [numbers for numbers in CHANGES.values() if numbers]:
        changed = [run for seed in steps for run in run_of(change_step=steps[seed], **numbers, seed=seed)]
        yield from changed
        results.of(changed)


def observe(run: Run, history: Iterator[tuple[Row, TrainState]], data: Data) -> dict[str, float]:
    """The lowest validation accuracy after the first at 95 %, and the norm of all parameters then and at the end."""
    del data
    norms, accuracies = [], []
    for row, state in history:
        if accuracies or reaches(row, run.stop_at or 1.0, run.task.metric):
            accuracies.append(row["val_accuracy"])
            norms.append(optax.tree_utils.tree_norm(state.params))
    if not norms:
        return {}
    return {"lowest": min(accuracies), "norm": four_digits(norms[0]), "last_norm": four_digits(norms[-1])}


STUDY = Study("staying_grokked", runs, observe=observe)


def by_change(frame: Frame) -> dict[str, Frame]:
    """The runs of each change, with the share of the evaluations after the first at 95 % that are at it too.

    Changes that lack seeds are left out, and without a change to compare, all are.
    """
    steps = change_steps(frame)
    frame = frame[frame["seed"].isin(list(steps))].assign(share=100 * frame["held_evals"] / frame["hold_evals"])
    found = {}
    for name, numbers in CHANGES.items():
        of_step = frame[frame["change_step"] == (frame["seed"].map(steps) if numbers else NEVER)]
        method = functools.partial(changed_adamw, change_step=NEVER, **numbers)
        found[name] = views.runs_of(of_step, method, ["change_step"], task="Modular")
    found[EXACT_LOSS] = frame[frame["task"] == "ExactLoss"]
    found = {name: runs for name, runs in found.items() if len(runs) == len(SEEDS)}
    return found if len(found) > 1 else {}


@STUDY.table
def table(frame: Frame) -> Rows:
    """How the runs with each change stay at 95 %, compared seed by seed with those without one and with the MA."""
    groups = by_change(frame)
    for name, runs in groups.items():
        row = {"change": name, "always at 95 %": f"{(runs['share'] == 100).sum()} of {len(runs)}"}
        row["evaluations at 95 %"] = median_and_range(runs["share"].to_numpy(), ".0f") + " %"
        row["lowest accuracy"] = median_and_range(100 * runs["lowest"].to_numpy(), ".0f") + " %"
        row["norm, last over first"] = median_and_range((runs["last_norm"] / runs["norm"]).to_numpy(), ".2f")
        for title, base in (("more : fewer than without", "no change"), ("more : fewer than the MA", "MA, λ 5")):
            pair = paired(groups[base], runs, "share")
            row[title] = "" if name == base else views.seed_counts(pair)
        yield row


@STUDY.figure("The MA and β1 0.98 prevent most of the deep falls", width=8, height=5)
def figure(frame: Frame, axes: Any) -> None:
    """The lowest validation accuracy after the first at 95 %, a dot per seed."""
    colour = lambda name: ORANGE if name[:2] in ("MA", "EM") else BLUE if name == "no change" else GREY
    groups = {name: (100 * runs["lowest"].to_numpy(), colour(name)) for name, runs in by_change(frame).items()}
    views.dots(axes, groups)
    axes.set_xlim(0, 100)
    views.label(axes, "lowest accuracy in 200 evaluations (%; bar: the median)")
