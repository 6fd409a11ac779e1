"""The quick start is one short, self-contained file, and shows what its docstring says."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grokfast_jax

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"
OF_THE_EXTRA_EXAMPLES = {"jax", "optax", "flax", "numpy", "matplotlib", "tqdm", "grokfast_jax"}


@pytest.fixture
def python_in_empty_folder(tmp_path):
    """Return a function that runs Python in a folder that contains only a copy of the quick start."""
    shutil.copy(QUICKSTART, tmp_path)
    # As users run it, not with the flags of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(grokfast_jax.__file__).parents[1])

    def python(*arguments):
        # A donated array that XLA cannot reuse is a UserWarning.
        command = [sys.executable, "-W", "error::UserWarning", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return python


def test_is_one_short_file_without_the_harness():
    source = QUICKSTART.read_text()
    assert len(source.splitlines()) <= 150
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports from the folder of the quick start"
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == OF_THE_EXTRA_EXAMPLES


@pytest.mark.slow
def test_only_the_filter_or_the_tuned_learning_rate_reaches_the_goal(python_in_empty_folder, tmp_path):
    run = "import quickstart; quickstart.main(num_seeds=4, num_steps=4_000)"
    printed, progress = python_in_empty_folder("-c", run)
    methods = [
        re.fullmatch(r"(.+): (\d) of 4 seeds reach 95 %(?:, after ([\d,]+) steps in the median)?", line)
        for line in printed.splitlines()
    ]
    reached = {match[1]: int(match[2]) for match in methods if match}
    steps = {match[1]: float((match[3] or "inf").replace(",", "")) for match in methods if match}
    alone, filtered, tuned = "AdamW", "Grokfast before AdamW", "AdamW, ten times the learning rate"
    assert list(steps) == [alone, filtered, tuned], printed
    assert reached[alone] < reached[filtered] <= reached[tuned] == 4
    assert steps[tuned] < steps[filtered] < steps[alone]
    assert f"{filtered}: 100%" in progress
    assert "4000/4000" in progress
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
