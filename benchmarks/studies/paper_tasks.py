"""Is it the filter or the weight decay that the paper's other tasks gain from?

MNIST, QM9 and IMDb are trained with the weak and the strong weight decay that the paper compares, each with and without
its filter. The paper's filter and strong decay are its method; the weak decay without a filter is its baseline.

One more part is of mod 97: the paper's MA with a smaller ring buffer.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.ticker import MaxNLocator

from benchmarks import views
from benchmarks.study import Frame, Results, Rows, Run, Study, paired, product
from examples import modular
from examples.harness.experiment import Experiment
from examples.harness.methods import Tx
from examples.harness.plots import GREY
from examples.harness.tables import median_and_range
from examples.imdb import EXPERIMENT as IMDB
from examples.mnist import EXPERIMENT as MNIST
from examples.qm9 import EXPERIMENT as QM9
from grokfast_jax import grokfast_ma

NAMES = ("baseline", "filter-only", "decay-only", "paper")  # the methods of each task
OUTCOMES: dict[str, tuple[Experiment, str, float, str]] = {  # by title: column, factor and format
    "MNIST: steps to 85 %": (MNIST, "steps_to_85", 1, ",.0f"),
    "QM9: lowest loss": (QM9, "min_val_loss", 1, ".2f"),
    "IMDb: best accuracy (%)": (IMDB, "best_val_accuracy", 100, ".1f"),
}
BUFFERS = [{"stride": stride, "buffer_dtype": dtype} for stride in (1, 10) for dtype in (None, "bfloat16")]


def small_buffer_ma(
    lr: float = 1e-3, weight_decay: float = 0.01, lamb: float = 5.0, stride: int = 1, buffer_dtype: str | None = None
) -> Tx:
    """The paper's Grokfast-MA before Adam; its ring buffer may be of a narrower dtype, or hold sums of gradients."""
    lowpass = grokfast_ma(100, lamb, stride=stride, buffer_dtype=buffer_dtype)
    return optax.chain(lowpass, modular.adam(lr, weight_decay))


def runs(_results: Results) -> Iterator[Run]:
    """Filter and weight decay, two by two; the seed draws the split of QM9 and IMDb. Then the MA on mod 97."""
    for experiment, seeds, max_steps in ((MNIST, 5, 100_000), (QM9, 5, 100_000), (IMDB, 3, 750)):
        for name in NAMES:
            yield from product(experiment.task, experiment.methods[name], seed=range(seeds), max_steps=max_steps)
    for options in BUFFERS:
        yield from product(modular.Modular(), small_buffer_ma, **options, seed=range(3))


STUDY = Study("paper_tasks", runs)


def outcomes(frame: Frame, title: str) -> dict[str, Frame]:
    """The seeds of each method of a task, with their `outcome`."""
    experiment, column, factor, _ = OUTCOMES[title]
    frame = frame[frame["task"] == type(experiment.task).__name__]
    frame = frame.assign(outcome=factor * frame[column])
    return {name: views.runs_of(frame, experiment.methods[name]) for name in NAMES}


@STUDY.table
def two_by_two(frame: Frame) -> Rows:
    """Each task without and with the filter, with the weak and the strong weight decay."""
    for title, (*_, form) in OUTCOMES.items():
        runs = outcomes(frame, title)
        for without, filtered in (NAMES[:2], NAMES[2:]):
            compared = paired(runs[filtered], runs[without], "outcome")
            better, worse = compared[:2] if "accuracy" not in title else compared[1::-1]
            yield {
                "task": title,
                "weight decay": f"{runs[without]['weight_decay'].iloc[0]:g}",
                "without a filter": median_and_range(runs[without]["outcome"].to_numpy(), form),
                "with the EMA": median_and_range(runs[filtered]["outcome"].to_numpy(), form),
                "better, worse": f"{better}, {worse} of {len(runs[filtered])}",
                "p": f"{compared.p:.2g}",
            }


@STUDY.table
def buffers(frame: Frame) -> Rows:
    """Steps of the MA to 95 % by dtype and stride of its buffer, and the memory that the buffer takes."""
    for options in BUFFERS:
        method = functools.partial(small_buffer_ma, **options)
        ring = optax.tree_utils.tree_get(jax.eval_shape(method().init, jnp.zeros(())), "ring")
        yield {
            "buffer": options["buffer_dtype"] or "float32",
            "stride": str(options["stride"]),
            "copies of the parameters": f"{ring.size * ring.dtype.itemsize / 4:g}",
            **views.range_cells(views.runs_of(frame, method), {"steps to 95 %": ("steps_to_95", ",.0f")}),
        }


@STUDY.figure("On MNIST and IMDb, weight decay changes more than the filter", width=9, height=4, columns=3)
def figure(frame: Frame, panels: np.ndarray) -> None:
    """The outcomes of each task without and with the filter, a line per seed."""
    for axes, title in zip(panels, OUTCOMES, strict=True):
        runs = outcomes(frame, title)
        for left, pair in enumerate((NAMES[:2], NAMES[2:])):
            of_seeds = pd.concat([runs[name].set_index("seed")["outcome"] for name in pair], axis=1, join="inner")
            x = np.array([0, 0.6]) + 1.4 * left
            axes.plot(x, of_seeds.T, color=GREY, linewidth=1, alpha=0.5)
            for place, column, colour in zip(x, of_seeds.to_numpy().T, (views.NO_FILTER, views.FILTER), strict=True):
                axes.plot(np.full(len(column), place), column, "o", color=colour, markersize=8, alpha=0.7)
        axes.set_xticks([0.3, 1.7], ["weak decay", "strong decay"])
        axes.set_xlim(-0.4, 2.4)
        axes.grid(visible=False, axis="x")
        axes.set_title(title, fontsize="large")
        if "steps" in title:
            axes.set_yscale("log")
            axes.set_yticks([2_000, 10_000, 50_000], ["2,000", "10,000", "50,000"])
            axes.set_yticks([], minor=True)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    views.legend(panels[0].figure, {"without a filter": views.NO_FILTER, "with the EMA": views.FILTER})
