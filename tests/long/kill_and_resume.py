"""Kill a run at random moments and resume it each time: `python -m tests.long.kill_and_resume`.

The mod-97 model trains without a disturbance, and again while SIGKILL strikes it at random moments: one time in five
while it starts, else some records later, among its training steps, evaluations and checkpoints. Both must end with the
same metrics file, byte for byte, and the same parameters. Takes about ten minutes on two CPU cores.
"""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from examples.harness.files import provenance, write_whole
from examples.harness.run_folder import RunFolder
from examples.harness.train import program
from examples.modular import EXPERIMENT

OUT = Path(__file__).parents[2] / "benchmarks" / "results" / "kill_and_resume.json"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kill a run at random moments and resume it each time."""

    kills: int = 20
    """How many times the run is killed."""
    max_steps: int = 900
    """Steps of the run."""
    checkpoint_every: int = 2
    """Records between two checkpoints."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = OUT
    """File for the results."""


def final_parameters(folder: Path) -> list[np.ndarray]:
    """The parameters in the last checkpoint of a run of the default method."""
    run = EXPERIMENT.run()
    like = program(run).init(run.traced, jax.random.key(run.seed))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(RunFolder(folder).restore(like).params)]


def records(folder: Path) -> int:
    """Complete lines of the metrics file, the header included."""
    path = folder / "metrics.csv"
    return path.read_text("ascii").count("\n") if path.exists() else 0


def wait_for_records(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Wait until a run has written a number of records, or has ended."""
    seen, last = 0, records(folder)
    while seen < number and process.poll() is None:
        time.sleep(0.01)
        now = records(folder)  # falls when a resumed run cuts the file to its checkpoint
        seen += max(now - last, 0)
        last = now


def main(arguments: Arguments) -> None:
    """Run, kill, resume, compare, and write the result."""
    rng = random.Random(arguments.seed)
    flags = ["--max-steps", str(arguments.max_steps), "--stop-at", "None"]
    start = [sys.executable, "-m", "examples.modular", *flags, "--out"]
    resume = [sys.executable, "-m", "examples.resume"]
    every = ["--checkpoint-every", str(arguments.checkpoint_every)]
    moments = []
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        subprocess.run([*start, whole], check=True, stderr=subprocess.DEVNULL)
        while len(moments) < arguments.kills:
            command = [*resume, killed] if killed.exists() else [*start, killed, *every]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            early = len(moments) % 5 == 0
            wait_for_records(process, killed, 0 if early else rng.randint(1, 5))
            delay = rng.uniform(0.5, 8.0) if early else rng.uniform(0.0, 1.0)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it still runs, and is killed below
                if process.wait(delay) != 0:
                    raise SystemExit("a resumed run failed by itself")
                break  # it ended before all kills were done
            process.kill()
            process.wait()
            moments.append({"early": early, "delay_seconds": round(delay, 2), "records_in_file": records(killed)})
            print(f"kill {len(moments)} of {arguments.kills}: {moments[-1]}", flush=True)
        subprocess.run([*resume, killed], check=True, stderr=subprocess.DEVNULL)
        same_metrics = (whole / "metrics.csv").read_bytes() == (killed / "metrics.csv").read_bytes()
        pairs = zip(final_parameters(whole), final_parameters(killed), strict=True)
        same_parameters = all(np.array_equal(a, b) for a, b in pairs)
    result = {
        **{name: value for name, value in dataclasses.asdict(arguments).items() if name != "out"},
        **provenance(),
        "kills_done": len(moments),
        "moments": moments,
        "same_metrics": same_metrics,
        "same_parameters": same_parameters,
    }
    write_whole(arguments.out, json.dumps(result, indent=1) + "\n")
    print(f"{len(moments)} kills: same metrics {same_metrics}, same parameters {same_parameters}; {arguments.out}")
    if not (same_metrics and same_parameters):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m tests.long.kill_and_resume"))
