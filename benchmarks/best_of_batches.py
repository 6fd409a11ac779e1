"""What the best of many small validation batches shows of a model: `python -m benchmarks.best_of_batches`.

A model that is right on so many of 250 reviews is evaluated on random batches of 50. The highest accuracy of 10,000
such evaluations lies far above its accuracy on all of them, although the model never changes.
"""

import dataclasses

import numpy as np
import tyro
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Median of the highest accuracy that any of many random batches shows."""

    correct: tuple[int, ...] = (150, 157, 168, 173)
    """How many of all examples the model is right on."""
    examples: int = 250
    """All validation examples."""
    batch_size: int = 50
    """Examples of a batch, drawn without replacement."""
    batches: int = 10_000
    """Independent batches."""


def median_best(correct: int, examples: int, batch_size: int, batches: int) -> float:
    """Median of the highest accuracy: P(highest <= k) is the hypergeometric P(one <= k) to the power of `batches`."""
    highest = stats.hypergeom(examples, correct, batch_size).cdf(np.arange(batch_size + 1)) ** batches
    return float(np.argmax(highest >= 0.5)) / batch_size


def main(arguments: Arguments) -> None:
    """Print a line for each model."""
    a = arguments
    for correct in a.correct:
        best = median_best(correct, a.examples, a.batch_size, a.batches)
        print(
            f"accuracy {correct / a.examples:.1%}: the best of {a.batches:,} batches of {a.batch_size} has {best:.0%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.best_of_batches"))
