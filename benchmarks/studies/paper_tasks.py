"""Is it the filter or the weight decay that the paper's other tasks gain from?

MNIST, QM9 and IMDb are trained with the weak and the strong weight decay that the paper compares, each with and without
its filter. The paper's filter and strong decay are its method; the weak decay without a filter is its baseline.

One more part is of mod 97: the paper's MA with a smaller ring buffer.
"""

import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.axes import Axes

from benchmarks import views
from benchmarks.study import Study
from examples import modular
from examples.harness.engine import Results, product
from examples.harness.experiment import Experiment, Run
from examples.harness.methods import Tx
from examples.harness.plots import GREY, number_steps
from examples.harness.tables import markdown
from examples.imdb import EXPERIMENT as IMDB
from examples.mnist import EXPERIMENT as MNIST
from examples.qm9 import EXPERIMENT as QM9
from grokfast_jax import grokfast_ma

# Methods of each task, and how the figures call them.
NAMES = ("baseline", "filter-only", "decay-only", "paper")
TWO_BY_TWO: dict[str, str] = dict(
    zip(NAMES, ("neither", "filter", "weight decay", "filter and weight decay"), strict=True)
)
BUFFERS = [{"stride": stride, "buffer_dtype": dtype} for stride in (1, 10) for dtype in (None, "bfloat16")]


def small_buffer_ma(
    lr: float = 1e-3, weight_decay: float = 0.01, lamb: float = 5.0, stride: int = 1, buffer_dtype: str | None = None
) -> Tx:
    """The paper's Grokfast-MA before Adam; its ring buffer may be of a narrower dtype, or hold sums of gradients."""
    lowpass = grokfast_ma(100, lamb, stride=stride, buffer_dtype=buffer_dtype)
    return optax.chain(lowpass, modular.adam(lr, weight_decay))


def runs(results: Results) -> Iterator[Run]:
    """Filter and weight decay, two by two; the seed draws the split of QM9 and IMDb. Then the MA on mod 97."""
    del results
    for experiment, seeds, max_steps in ((MNIST, 5, 100_000), (QM9, 5, 100_000), (IMDB, 3, 750)):
        for name in TWO_BY_TWO:
            yield from product(experiment.task, experiment.methods[name], seed=range(seeds), max_steps=max_steps)
    for options in BUFFERS:
        yield from product(modular.Modular(), small_buffer_ma, **options, seed=range(3))


STUDY = Study("paper_tasks", runs)


def two_by_two(frame: pd.DataFrame, experiment: Experiment) -> dict[str, pd.DataFrame]:
    """The runs of a task by the label of its method."""
    task = type(experiment.task).__name__
    return {name: views.runs_of(frame, experiment.methods[name], task=task) for name in TWO_BY_TWO}


ACCURACY = {"best val. accuracy (%)": ("best_val_accuracy", 100, ".1f")}


@STUDY.table
def mnist_steps(frame: pd.DataFrame) -> str:
    """Steps to three test accuracies, and the best."""
    steps = {f"steps to {percent} %": (f"steps_to_{percent}", 1, ",.0f") for percent in (80, 85, 88)}
    return views.ranges(two_by_two(frame, MNIST), steps | ACCURACY)


@STUDY.table
def qm9_losses(frame: pd.DataFrame) -> str:
    """The lowest validation loss of each split."""
    rows = []
    for name, of_method in two_by_two(frame, QM9).items():
        losses = of_method.set_index("seed")["min_val_loss"]
        cells = {f"seed {seed}": f"{loss:.2f}" for seed, loss in losses.items()}
        rows.append({"method": name, **cells, "median": f"{losses.median():.2f}"})
    return markdown(rows)


@STUDY.table
def imdb_accuracies(frame: pd.DataFrame) -> str:
    """The best validation accuracy and the lowest loss."""
    return views.ranges(two_by_two(frame, IMDB), ACCURACY | {"lowest val. loss": ("min_val_loss", 1, ".3f")})


@STUDY.table
def buffers(frame: pd.DataFrame) -> str:
    """Steps of the MA to 95 % by dtype and stride of its buffer; its memory as a part of the full one."""

    def cells(**options: Any) -> dict[str, str]:
        ring, full = (
            optax.tree_utils.tree_get(jax.eval_shape(small_buffer_ma(**one).init, jnp.zeros(())), "ring")
            for one in (options, {})
        )
        part = Fraction(ring.size * ring.dtype.itemsize, full.size * full.dtype.itemsize).limit_denominator(20)
        dtype = options["buffer_dtype"] or "float32"
        return {"buffer dtype": dtype, "stride": str(options["stride"]), "memory of the buffer": str(part)}

    groups = [(cells(**one), views.runs_of(frame, functools.partial(small_buffer_ma, **one))) for one in BUFFERS]
    return views.ranges(groups, {"steps to 95 %": ("steps_to_95", 1, ",.0f")})


def two_by_two_dots(axes: Axes, frame: pd.DataFrame, experiment: Experiment, column: str, factor: float = 1) -> None:
    """A dot per seed for each method of a task."""
    colour = lambda name: views.FILTER if "filter" in TWO_BY_TWO[name] else views.NO_FILTER
    groups = two_by_two(frame, experiment)
    views.dots(axes, {TWO_BY_TWO[k]: (factor * v[column].to_numpy(float), colour(k)) for k, v in groups.items()})


@STUDY.figure("On MNIST the weight decay does it", width=8, height=3.2)
def mnist(frame: pd.DataFrame, axes: Axes) -> None:
    """Steps to 85 % test accuracy."""
    two_by_two_dots(axes, frame, MNIST, "steps_to_85")
    axes.set_xscale("log")
    number_steps(axes, axes.get_xlim())
    views.label(axes, "steps to 85 % test accuracy (dot: a seed, bar: the median)")


@STUDY.figure("On QM9 the filter helps only on top of the weight decay", width=8, columns=2, sharey=True)
def qm9(frame: pd.DataFrame, panels: np.ndarray) -> None:
    """Lowest validation loss without and with the filter, a line per split."""
    losses = {k: v.set_index("seed")["min_val_loss"] for k, v in two_by_two(frame, QM9).items()}
    decays = {"without decay": ("baseline", "filter-only"), "with decay": ("decay-only", "paper")}
    for axes, (title, names) in zip(panels, decays.items(), strict=True):
        pairs = pd.concat([losses[name] for name in names], axis=1, join="inner").to_numpy()
        for pair in pairs:
            colour = views.FILTER if pair[1] < pair[0] else GREY
            axes.plot([0, 1], pair, "o-", color=colour, linewidth=2, markersize=8)
        lower = int(np.sum(pairs[:, 1] < pairs[:, 0]))
        axes.set_title(f"{title}: lower in {lower} of {len(pairs)} splits", fontsize="large")
        axes.set_xticks([0, 1], ["no filter", "EMA"])
        axes.set(xlim=(-0.2, 1.2), ylim=(0, None))
    views.label(panels[0], y="lowest validation loss (a0⁶)")


@STUDY.figure("On IMDb the weight decay does most of it, in three splits", width=8, height=3.2)
def imdb(frame: pd.DataFrame, axes: Axes) -> None:
    """Best validation accuracy, above chance."""
    two_by_two_dots(axes, frame, IMDB, "best_val_accuracy", 100)
    axes.axvline(50, color=GREY, linewidth=1.5, linestyle=":")
    axes.text(50.2, 3.45, "chance", color=GREY, fontsize="large")
    axes.set_xlim(49, 75)
    views.label(axes, "best validation accuracy (%; dot: a split, bar: the median)")
