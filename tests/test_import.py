"""What importing the library costs."""

import subprocess
import sys

SCRIPT = """
import sys, jax, optax
before = set(sys.modules)
import grokfast_jax
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_nothing_beyond_jax_and_optax_but_the_library():
    loaded = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout.split()
    assert "grokfast_jax" in loaded
    assert all(name.partition(".")[0] == "grokfast_jax" for name in loaded)
