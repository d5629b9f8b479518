"""Work in Ray tasks: how it is cut, and waiting for the results with a line of progress."""

import time
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.progress import show
from slq.errors import SlqError


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

    waiting, started = list(tasks), time.monotonic()
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=1)
        ended = len(tasks) - len(waiting)
        eta = (time.monotonic() - started) / ended * len(waiting)
        show(f"{what} {ended}/{len(tasks)}  ETA {eta:.0f} s")
    try:
        results: list[Any] = ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SlqError):
            raise error.cause from None  # ours say all in one line; Ray's wrapper adds a traceback
        raise
    return results
