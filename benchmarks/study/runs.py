"""What trajectories and spectra share: runs that are looked into while they train, and the files of what was found."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm

from examples.harness.config import Config
from examples.harness.errors import UserError
from examples.harness.loop import Evaluation, evaluations
from examples.harness.train import Program, TrainState

from .cells import differences, read
from .methods import method_of


def train(compiled: Program, config: Config, bar: tqdm.tqdm, state: TrainState | None = None) -> Iterator[Evaluation]:
    """Train one run until its budget is spent.

    Raises:
      UserError: The loss is no longer finite.
    """
    for evaluation in evaluations(compiled, config.hyper, jax.random.key(config.run.seed), state=state):
        (diverged_at,) = evaluation.diverged_at
        if diverged_at is not None:
            raise UserError(
                f"{method_of(differences(config))}, seed {config.run.seed}: the loss is no longer finite at step "
                f"{diverged_at:,}; leave out the method or the seed"
            )
        bar.update(config.task.steps)
        yield evaluation
        if evaluation.step >= config.run.budget:
            return


def stored(path: Path, flags: str, expected: Callable[[dict[str, Any]], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results in a file, each of which must have the values that are `expected` of it with the present `flags`.

    Raises:
      UserError: One has not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(read(path))
    for line in lines:
        if not expected(line.result).items() <= line.result.items():
            raise UserError(f"{line.place} was made with another {flags}; delete it, or choose another --out")
    return [line.result for line in lines]
