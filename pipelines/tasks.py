"""Work in Ray tasks: how it is cut, and waiting for the results with a line of progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.progress import duration, show
from slq.errors import ClusterError, SlqError

_SHOW_EVERY_S = 1.0


def parts(count: int, number: int = 8) -> list[slice]:
    """`number` slices of nearly equal length that cover `count` rows; fewer where there are fewer rows."""
    edges = np.linspace(0, count, min(number, count) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def collect(tasks: list[Any], what: str) -> list[Any]:
    """Results in order, with a line of progress as tasks end.

    Raises:
        SlqError: Ours that ended a task, as it was raised there.
    """
    import ray

    waiting, started, shown = list(tasks), time.monotonic(), -_SHOW_EVERY_S
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            ray.get(ready)  # raises what ended it
            ended, now = len(tasks) - len(waiting), time.monotonic()
            if now - shown >= _SHOW_EVERY_S or not waiting:
                shown, eta = now, (now - started) / ended * len(waiting)
                show(f"{what} {ended}/{len(tasks)}  ETA {duration(eta)}")
        results: list[Any] = ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        for task in waiting:  # they would only fail too, one after the other
            ray.cancel(task)
        if isinstance(error.cause, SlqError):
            raise error.cause from None  # ours say all in one line; Ray's wrapper adds a traceback
        raise
    return results


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
