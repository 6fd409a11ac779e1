"""What processes that train together agree on. Alone, a process agrees with itself."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_primary_process() -> bool:
    """Whether this process is the one that writes what all of them know."""
    return jax.process_index() == 0


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in this process, or in any that trains together with it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag
