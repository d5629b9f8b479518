"""Work in Ray tasks: how it is cut, and waiting for the results with a line of progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import numpy as np

from pipelines.progress import duration, show
from slq.errors import ClusterError, SlqError

_SHOW_EVERY_S = 1.0
_PATIENCE_S = 20.0  # with a task that was asked to end


def parts(count: int, number: int = 8) -> list[slice]:
    """`number` slices of nearly equal length that cover `count` rows; fewer where there are fewer rows."""
    edges = np.linspace(0, count, min(number, count) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def collect(tasks: list[Any], what: str) -> list[Any]:
    """Results in order, with a line of progress as tasks end.

    Raises:
        SlqError: Ours that ended a task, as it was raised there; so are errors of the file system.
    """
    return collect_windowed(iter(tasks), len(tasks), what, len(tasks))


def collect_windowed(starting: Iterator[Any], count: int, what: str, at_once: int) -> list[Any]:
    """The same of tasks that are started as others end.

    Args:
        starting: Starts a task where the next one is asked for.
        count: How many they are.
        what: What is done, for people.
        at_once: Tasks at work at a time.
    """
    import ray

    tasks: list[Any] = []
    waiting: list[Any] = []
    started, shown = time.monotonic(), -_SHOW_EVERY_S
    try:
        while len(tasks) < count or waiting:
            fresh = list(islice(starting, at_once - len(waiting)))
            tasks += fresh
            waiting += fresh
            ready, waiting = ray.wait(waiting, num_returns=1)
            ray.get(ready)  # raises what ended it
            ended, now = len(tasks) - len(waiting), time.monotonic()
            if now - shown >= _SHOW_EVERY_S or ended == count:
                shown, eta = now, (now - started) / ended * (count - ended)
                show(f"{what} {ended}/{count}  ETA {duration(eta)}")
        results: list[Any] = ray.get(tasks)
    except BaseException as error:
        _end(waiting)  # they would only fail too, one after the other
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(
            error.cause, SlqError | OSError
        ):
            raise error.cause from None  # it says all in one line; Ray's wrapper adds a traceback
        raise
    return results


def _end(tasks: list[Any]) -> None:
    """Cancel tasks, and wait until they are at work no more: what they write may be removed next."""
    import ray

    for is_last in (False, True):
        for task in tasks:
            ray.cancel(task, force=is_last)
        _, tasks = (
            ray.wait(tasks, num_returns=len(tasks), timeout=_PATIENCE_S) if tasks else ([], [])
        )


@contextmanager
def cluster_errors() -> Iterator[None]:
    """Ray's own errors as one of ours; those of a task stay as they are, with their traceback.

    Raises:
        ClusterError: Ray gave up on lost workers.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"Ray gave up: {reason}; committed shards stay, and the same command goes on from there"
        ) from None


def model_task(function: Callable[..., Any], gpus: float, **options: Any) -> Any:
    """A Ray task that keeps the model it has loaded for the next one of its process.

    Args:
        function: Of the task.
        gpus: That it holds; Ray would end a process with one after every task.
        options: Further ones of `ray.remote`.
    """
    import ray

    return ray.remote(num_cpus=1, num_gpus=gpus, max_calls=0, **options)(function)
