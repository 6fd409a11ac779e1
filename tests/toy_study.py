"""Does a larger λ reach 80 % in fewer steps? A study in one file outside the benchmarks."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pandas as pd

from benchmarks import views
from benchmarks.study import Rows, Study
from examples.harness.engine import Results, product
from examples.harness.experiment import Run

from . import toy


def norm(task: Any, state: Any, data: Any) -> dict[str, jax.Array]:
    return {"norm": jnp.linalg.norm(state.params["w"])}


def runs(results: Results) -> Iterator[Run]:
    """The filter with two λ, then no filter at the learning rate times 1 + the λ that reaches it first."""
    filtered = product(toy.Toy(), toy.ema, lamb=[1.0, 4.0], seed=range(4), group_size=4)
    yield from filtered
    best = results.of(filtered).groupby("lamb")["steps_to_80"].median().idxmin()
    yield from product(toy.Toy(), toy.adam, lr=0.01 * (1 + best), seed=range(2))


STUDY = Study("toy_study", runs, measure=norm, reduce=lambda values: values[-1])


@STUDY.table
def table(frame: pd.DataFrame) -> Rows:
    for (method, lr), found in frame.groupby(["method", "lr"]):
        steps = views.steps_and_failures(found["steps_to_80"], 80)
        yield {"method": method, "rate": f"{lr:g}", "runs": len(found), "steps": steps}


@STUDY.table
def norms(frame: pd.DataFrame) -> Rows:
    for name, found in frame.groupby("method"):
        yield {"method": name, "norm": f"{found['norm'].median():.3g}"}


@STUDY.figure("A larger λ reaches 80 % in fewer steps")
def figure(frame: pd.DataFrame, axes: Any) -> None:
    groups = {f"λ {lamb:g}": found["steps_to_80"].to_numpy() for lamb, found in frame.groupby("lamb")}
    axes.set_xlim(0, 120)
    views.dots(axes, {name: (steps, views.FILTER) for name, steps in groups.items()}, end=80)
