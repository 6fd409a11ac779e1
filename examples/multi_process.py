"""The mod-97 model trained data-parallel by several processes: `python -m examples.multi_process --processes 2`.

Each batch is divided among the processes; parameters and optimizer state are the same in all of them. This command
starts them on this machine, on its CPU. On a cluster, whose nodes are each started by its scheduler,
`jax.distributed.initialize()` takes the place of what this command does; all else is the same.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import modular
from .harness.batches import Batch
from .harness.errors import UserError, plain_errors
from .harness.run import Output, deferred_interrupts, parse, train
from .harness.train import program


def over_all_devices(*axes: str | None) -> NamedSharding:
    """Axes called "data" are divided among all devices of all processes, the others are whole on each."""
    return NamedSharding(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)), P(*axes))


class DataParallel(modular.Modular):
    """The task with each of its batches divided among the devices; XLA sums up loss, gradients and counts."""

    def batches(self, data: Any, key: jax.Array) -> Batch:
        """The batches of one chunk."""
        return lax.with_sharding_constraint(super().batches(data, key), over_all_devices(None, "data"))

    def validation(self, data: Any) -> Batch:
        """The validation pairs."""
        return lax.with_sharding_constraint(super().validation(data), over_all_devices(None, "data"))


@dataclasses.dataclass(frozen=True)
class Config(modular.Config):
    """Grokking of modular arithmetic, data-parallel in several processes."""

    processes: int = 2
    """Processes to start, each with one CPU device; may change when a run is resumed."""

    def __post_init__(self) -> None:
        """Refuse what no run can be made of."""
        super().__post_init__()
        self.require(self.processes >= 1, "processes", "at least 1")
        whole = self.batch_size % self.processes == 0
        self.require(whole, "batch_size", f"a multiple of --processes ({self.processes})")

    def task(self) -> DataParallel:
        """The task of this run."""
        return DataParallel(**dataclasses.asdict(super().task()))


PRESETS = {name: Config(**dataclasses.asdict(preset)) for name, preset in modular.PRESETS.items()}


def work(address: str, process: int, config: Config, output: Output) -> None:
    """What each process does; the first one shows the progress."""
    os.setsid()  # Ctrl-C is for the process that started this one
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, config.processes, process)
    with contextlib.ExitStack() as stack:
        if process > 0:
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        train("multi_process", config, output, build=functools.partial(program, sharding=over_all_devices()))
    jax.distributed.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Start the processes and wait for them; if one ends before its time, end them all."""
    config, output = parse("multi_process", PRESETS, "ema", sys.argv[1:] if argv is None else argv)
    assert isinstance(config, Config)
    if output.out is None and output.resume is None:
        name = f"multi_process-{config.filter}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        output = dataclasses.replace(output, out=Path("runs") / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        deferred_interrupts() as interrupts,
        ProcessPoolExecutor(config.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        futures = [pool.submit(work, address, process, config, output) for process in range(config.processes)]
        workers = multiprocessing.active_children()
        asked = killed = False
        while True:
            done, waiting = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception()) is not None]
            if errors or not waiting:
                break
            if interrupts and not asked:
                asked = True
                for worker in workers:
                    worker.terminate()  # that is SIGTERM, at which they stop together after the chunk at hand
        if errors:
            wait(waiting, timeout=10)  # the one that failed is not always the one that draws the picture
            # What the others say when one is killed, of a lost connection or a checkpoint, is but a consequence.
            killed = any(isinstance(future.exception(), BrokenProcessPool) for future in futures if future.done())
            for worker in workers:
                worker.kill()
    if killed and interrupts:  # it had hardly begun
        raise KeyboardInterrupt
    if killed:
        raise UserError(
            f"a process was killed, so the others were ended; go on with --resume {output.out or output.resume}"
        )
    if errors:
        raise errors[0]


if __name__ == "__main__":
    sys.exit(plain_errors(main))
