"""Medians with failures, their intervals, and comparisons seed by seed."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

Frame = Any  # pandas.DataFrame, of whose columns type checkers know nothing


class Comparison(NamedTuple):
    """Two methods compared seed by seed. A run that fails takes more steps than any that does not."""

    fewer: int  # seeds with which the first takes fewer steps
    more: int
    ties: int  # also seeds with which both fail
    p: float  # exact two-sided sign test
    ratio: float  # median ratio of steps over the seeds with which both reach the threshold, NaN without any
    both: int  # these seeds


def paired(first: pd.DataFrame, second: pd.DataFrame, column: str = "steps_to_95") -> Comparison:
    """Compare two methods over the seeds that both frames have."""
    steps = pd.concat([frame.set_index("seed")[column] for frame in (first, second)], axis=1, join="inner")
    one, other = steps.to_numpy(float).T
    fewer, more = int(np.sum(one < other)), int(np.sum(one > other))
    p = float(scipy.stats.binomtest(fewer, fewer + more).pvalue) if fewer + more else 1.0
    both = np.isfinite(one) & np.isfinite(other) & (other > 0)
    ratio = float(np.median(one[both] / other[both])) if both.any() else np.nan
    return Comparison(fewer, more, len(one) - fewer - more, p, ratio, int(both.sum()))
