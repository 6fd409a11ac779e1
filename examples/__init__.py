"""The experiments of the Grokfast paper in Flax, one task a module."""

import sys

from .harness.errors import prepare_process

if sys.argv[0] == "-m":  # a command that is not yet imported
    prepare_process()
