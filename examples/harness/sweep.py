"""Many runs, those that one compiled program can train in groups."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import tqdm

from .config import Config
from .loop import evaluations, stack
from .records import Row, best, format_metric, selection_metric, step_reached
from .task import Task
from .train import Program, program

Finished = Callable[[Config, Sequence[Row]], bool]


class Trained(NamedTuple):
    """A run that has come to its end."""

    number: int  # of its configuration in the list
    rows: list[Row]
    group_size: int
    group_seconds: float


def reached(config: Config, rows: Sequence[Row]) -> bool:
    """Whether a run has reached what it is to stop at."""
    return config.run.stop_at is not None and step_reached(rows, config.run.stop_at, config.run.hold) is not None


def train_all(configs: Sequence[Config], group_size: int = 1, finished: Finished = reached) -> Iterator[Trained]:
    """Train runs with a progress bar, and yield each as soon as its group is done.

    A run ends when it is `finished`, when its loss is no longer finite (its last row then tells so), or when its budget
    is spent. Runs of one group may differ in the seed and in the numbers of `Config.hyper` alone.
    """
    with tqdm.tqdm(total=sum(config.run.budget for config in configs), unit="step", disable=not configs) as bar:
        for group in groups(configs, group_size):
            started = time.perf_counter()
            records = train_group([configs[i] for i in group], bar, finished)
            for index, rows in zip(group, records, strict=True):
                yield Trained(index, rows, len(group), round(time.perf_counter() - started, 1))


def groups(configs: Sequence[Config], size: int) -> Iterator[list[int]]:
    """Indices of runs that one vmapped program can train together."""
    key = lambda i: repr(static(configs[i]))
    for _, members in itertools.groupby(sorted(range(len(configs)), key=key), key):
        while group := list(itertools.islice(members, size)):
            yield group


def static(config: Config) -> tuple[Any, ...]:
    """What must be the same in all runs of one compiled program."""
    return config.task, config.run.budget, config.run.devices, jax.tree.structure(config.hyper)


@functools.lru_cache(maxsize=1)
def compiled_program(task: Task, structure: Any, size: int, devices: int) -> Program:
    """The program of all groups of `size` runs of a task with this structure of hyperparameters."""
    if size == 1:
        return program(task, devices=devices)
    hyper = jax.tree.unflatten(structure, [0.0] * structure.num_leaves)
    return program(task, example=(stack([hyper] * size), stack([jax.random.key(0)] * size)), devices=devices)


def train_group(group: Sequence[Config], bar: tqdm.tqdm, finished: Finished = reached) -> list[list[Row]]:
    """The records of each run of a group, trained until the budget is spent or all have finished or diverged."""
    config = group[0]
    compiled = compiled_program(config.task, jax.tree.structure(config.hyper), len(group), config.run.devices)
    hypers = [one.hyper for one in group]
    keys = [jax.random.key(one.run.seed) for one in group]
    hyper, key = (hypers[0], keys[0]) if len(group) == 1 else (stack(hypers), stack(keys))
    records: list[list[Row]] = [[] for _ in group]
    done = [False] * len(group)
    for evaluation in evaluations(compiled, hyper, key):
        for i, (row, diverged_at) in enumerate(zip(evaluation.rows, evaluation.diverged_at, strict=True)):
            if not done[i]:
                records[i].append(row)
                done[i] = finished(group[i], records[i]) or diverged_at is not None
        bar.update(config.task.steps * len(group))
        metric = selection_metric(evaluation.rows[0])
        now = format_metric(metric, best([rows[-1] for rows in records]))
        bar.set_postfix_str(f"{len(group)} runs, step {evaluation.step:,}, best val {now}", refresh=False)
        if all(done) or evaluation.step >= config.run.budget:
            break
    return records
