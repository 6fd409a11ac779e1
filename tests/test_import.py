"""Importing the library loads only the library, jax and optax."""

import subprocess
import sys

SCRIPT = """
import sys, jax, optax
before = set(sys.modules)
import grokfast_jax
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_only_the_library_beyond_jax_and_optax():
    loaded = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout.split()
    assert "grokfast_jax" in loaded
    assert all(name.partition(".")[0] == "grokfast_jax" for name in loaded)
