"""An experiment trained by several processes: `python -m examples.launch 2 modular ma`, `... 2 resume FOLDER`.

Each batch is divided among the processes (the flag --devices); parameters and optimizer state are the same in all. This
command starts them on this machine, on its CPU. On a cluster the scheduler starts the nodes, and
`jax.distributed.initialize()` replaces this command.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import tqdm

from examples import resume
from examples.harness.cli import parse
from examples.harness.errors import UsageError, UserError, plain_errors, require
from examples.harness.experiment import Run, find_experiment
from examples.harness.runner import Options, new_path, train, validate


def work(address: str, process: int, name: str, run: Run, options: Options, resumes: bool) -> None:
    """Train in one of the processes; the first one shows the progress."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent: Any = multiprocessing.parent_process()
    end_with_parent = lambda: (multiprocessing.connection.wait([parent.sentinel]), os._exit(1))
    threading.Thread(target=end_with_parent, daemon=True).start()
    if process > 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    tqdm.tqdm.set_lock(threading.RLock())  # by default a semaphore, which a process that is killed leaves behind
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, options.devices, process)
    train(find_experiment(name), run, options, resume=resumes)
    jax.distributed.shutdown()


def launch(processes: int, command: str, argv: Sequence[str]) -> None:
    """Start the processes and wait for them; if one fails, end them all."""
    devices = [word for word in argv if word.partition("=")[0] == "--devices"]
    require(not devices, "devices", "left out, because PROCESSES is their number", " ".join(argv))
    if resumes := command == "resume":
        experiment, run, options = resume.parse(argv)
    else:
        experiment = find_experiment(command)
        run, options = parse(experiment, argv)
    out = options.out or new_path(experiment, run)
    options = dataclasses.replace(options, out=out, devices=processes)
    validate(experiment, run, options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        name = experiment.name
        futures = [pool.submit(work, address, process, name, run, options, resumes) for process in range(processes)]
        workers = multiprocessing.active_children()
        if wait(futures, return_when=FIRST_EXCEPTION).not_done:
            wait(futures, timeout=10)  # the process that failed may not be the process that draws the picture
            for worker in workers:
                worker.kill()
    errors = [error for future in futures if (error := future.exception()) is not None]
    # After a process was killed, errors of other processes, such as a lost connection, only follow from it.
    if any(isinstance(error, BrokenProcessPool) for error in errors):
        raise UserError(
            f"a process was killed, so the others were ended; continue with python -m examples.resume {out}"
        )
    if errors:
        raise errors[0]


def main() -> None:
    """Launch what the command line says."""
    usage = "usage: python -m examples.launch PROCESSES EXPERIMENT [its flags], or PROCESSES resume FOLDER"
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        raise UsageError(f"{usage}, with a positive number of processes")
    # Ctrl-C reaches the processes as well; they stop together after the current chunk. SIGTERM is passed on to them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: [worker.terminate() for worker in multiprocessing.active_children()])
    launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])


if __name__ == "__main__":
    sys.exit(plain_errors(main))
