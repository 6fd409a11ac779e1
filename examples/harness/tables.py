"""Numbers as people read them, in Markdown tables."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows of equal columns, whose values are text already."""
    frame = pd.DataFrame(rows).astype(str)
    return frame.to_markdown(index=False, tablefmt="pipe", disable_numparse=True) + "\n"


def median_and_range(values: np.ndarray, form: str, worst: float = math.inf) -> str:
    """Median and range; a run that failed is not finite, and ranks as `worst`."""
    failed = int((~np.isfinite(values)).sum())
    numbers = np.where(np.isfinite(values), values, worst)
    low, middle, high = (
        format(x, form) if math.isfinite(x) else "fails" for x in (numbers.min(), np.median(numbers), numbers.max())
    )
    if low == high:
        return low
    return f"{middle} ({low} to {high})" + (f", {failed} of {len(values)} failed" if failed else "")
