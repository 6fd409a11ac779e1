"""Time per step of every optimizer of the board on this machine: `python -m benchmarks.cost.entrants`.

Chunks of all are timed in turn. Evaluation is included, as in the steps that the board counts, and compilation is not.
"""

from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import RESULTS, run_command
from benchmarks.study.board import ENTRANTS, OUT, TIMES, Board, job
from benchmarks.study.statistics import Results
from examples.harness.files import provenance
from examples.harness.loop import evaluations
from examples.harness.train import program

from .timing import in_turn, spread, write


def chunks(board: Board, name: str) -> tuple[int, Callable[[], object]]:
    """Steps of a chunk of an entrant's run, and a function that trains the next."""
    one = job(name, board.chosen(name), 0)
    compiled = program(one.chain.task, lambda numbers: one.chain.make(**numbers))
    run = evaluations(compiled, dict(one.numbers), jax.random.key(one.seed))
    return one.chain.task.steps, lambda: next(run)


def main(rounds: int = 9, study: Path = RESULTS / "study", board: Path = OUT, out: Path = TIMES) -> None:
    """Time the entrants, each with the setting that it was tuned to.

    Args:
      rounds: Timed chunks of each.
      study: Folder of the study's results.
      board: File of the board's results.
      out: File for the results.
    """
    tuned = Board(board, Results.load(study))
    runs = {name: chunks(tuned, name) for name in ENTRANTS}
    taken = in_turn({name: train for name, (_, train) in runs.items()}, rounds)
    milliseconds = {name: spread([1e3 * one / runs[name][0] for one in values]) for name, values in taken.items()}
    write(out, {**provenance(), "rounds": rounds, "ms_per_step": milliseconds})
    for name, values in sorted(milliseconds.items(), key=lambda item: item[1]["median"]):
        print(f"{values['median']:6.1f} ms  {name}")


if __name__ == "__main__":
    run_command(main, "benchmarks.cost.entrants")
