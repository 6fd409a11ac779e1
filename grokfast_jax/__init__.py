"""Grokfast for JAX: amplify the slow part of the gradients, as optax transformations."""

from ._amplify import AmplifyState as AmplifyState
from ._amplify import ParallelState as ParallelState
from ._amplify import amplify as amplify
from ._amplify import grokfast_ema as grokfast_ema
from ._amplify import grokfast_ma as grokfast_ma
from ._amplify import parallel as parallel
from ._ema import EmaState as EmaState
from ._ema import ema as ema
from ._filtered_adam import FilteredAdamState as FilteredAdamState
from ._filtered_adam import scale_by_filtered_adam as scale_by_filtered_adam
from ._lfilter import LfilterState as LfilterState
from ._lfilter import SosfiltState as SosfiltState
from ._lfilter import lfilter as lfilter
from ._lfilter import sosfilt as sosfilt
from ._moving_average import MovingAverageState as MovingAverageState
from ._moving_average import moving_average as moving_average
from ._response import dc_gain as dc_gain
from ._response import frequency_response as frequency_response
from ._response import impulse_response as impulse_response
from ._response import mean_age as mean_age
from ._response import stability_limit as stability_limit

__version__ = "0.1.0"

__all__ = [
    "AmplifyState",
    "EmaState",
    "FilteredAdamState",
    "LfilterState",
    "MovingAverageState",
    "ParallelState",
    "SosfiltState",
    "amplify",
    "dc_gain",
    "ema",
    "frequency_response",
    "grokfast_ema",
    "grokfast_ma",
    "impulse_response",
    "lfilter",
    "mean_age",
    "moving_average",
    "parallel",
    "scale_by_filtered_adam",
    "sosfilt",
    "stability_limit",
]
