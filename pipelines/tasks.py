"""Work in Ray tasks: how it is cut, and waiting for the results with a line of progress."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import numpy as np

from pipelines.progress import duration, show
from slq.errors import ClusterError, ConfigError, HardwareError, SlqError

_SHOW_EVERY_S = 1.0
_PATIENCE_S = 20.0  # with a task that was asked to end


def parts(count: int, number: int = 8) -> list[slice]:
    """`number` slices of nearly equal length that cover `count` rows; fewer where there are fewer rows."""
    edges = np.linspace(0, count, min(number, count) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def collect(tasks: list[Any], what: str, keep: Callable[[Any], object] | None = None) -> list[Any]:
    """Results in order, with a line of progress as tasks end.

    Args:
        tasks: That are started.
        what: What is done, for people.
        keep: Is given each result as it comes, in any order.

    Raises:
        SlqError: Ours that ended a task, as it was raised there; so are errors of the file system.
    """
    return collect_windowed(iter(tasks), len(tasks), what, len(tasks), keep)


class Countdown:
    """A line of progress as parts of a step end, at most one a second, and one at the end.

    Args:
        what: What is done, for people.
        count: Parts.
        quiet_s: Before the first line; a step that takes no longer shows none.
    """

    def __init__(self, what: str, count: int, *, quiet_s: float = 0.0) -> None:
        self._what, self._count, self._ended = what, count, 0
        self._started = time.monotonic()
        self._next = self._started + quiet_s
        self._counting = threading.Lock()

    def ended(self, number: int = 1) -> None:
        """So many more have; any thread may say so."""
        with self._counting:
            self._ended += number
            now, left = time.monotonic(), self._count - self._ended
            if now >= self._next or (not left and self._next > self._started + _SHOW_EVERY_S):
                self._next = now + _SHOW_EVERY_S
                eta = (now - self._started) / self._ended * left
                show(f"{self._what} {self._ended}/{self._count}  ETA {duration(eta)}")


def collect_windowed(
    starting: Iterator[Any],
    count: int,
    what: str,
    at_once: int,
    keep: Callable[[Any], object] | None = None,
) -> list[Any]:
    """The same of tasks that are started as others end.

    Args:
        starting: Starts a task where the next one is asked for.
        count: How many they are.
        what: What is done, for people.
        at_once: Tasks at work at a time.
        keep: Is given each result as it comes, in any order.
    """
    import ray

    tasks: list[Any] = []
    waiting: list[Any] = []
    countdown = Countdown(what, count)
    try:
        while len(tasks) < count or waiting:
            fresh = list(islice(starting, at_once - len(waiting)))
            tasks += fresh
            waiting += fresh
            ready, waiting = ray.wait(waiting, num_returns=1)
            for result in ray.get(ready):  # raises what ended it
                if keep is not None:
                    keep(result)
            countdown.ended(len(ready))
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


def require_gpus(key: str, asked: float, way_out: str) -> None:
    """Check that the connected cluster has GPUs; Ray would wait for them for ever.

    Args:
        key: Of the recipe, that asks for them.
        asked: How many.
        way_out: What to do instead, for the message.

    Raises:
        HardwareError: It has fewer.
    """
    import ray

    present = ray.cluster_resources().get("GPU", 0)
    if asked > present:
        raise HardwareError(f"{key} is {asked:g}, but the cluster has {present:g} GPUs; {way_out}")


def require_actors(key: str, workers: int, gpus: float) -> None:
    """Check that actors leave the connected cluster a place for anything else, or they would wait for ever.

    Args:
        key: Of the recipe, that says how many there are.
        workers: How many.
        gpus: Of each; one without takes a CPU.

    Raises:
        ConfigError: They would hold more CPUs than there are.
        HardwareError: There are fewer GPUs than they ask for.
    """
    import ray

    cpus = ray.cluster_resources().get("CPU", 0.0)
    if not gpus and workers > cpus:
        raise ConfigError(
            f"{key} is {workers}, but the cluster has {cpus:g} CPUs; set it to at most {max(1, int(cpus))}"
        )
    require_gpus(f"{key} x resources.gpus_per_worker", workers * gpus, "lower either")


def model_task(function: Callable[..., Any], gpus: float, **options: Any) -> Any:
    """A Ray task that keeps the model it has loaded for the next one of its process.

    Args:
        function: Of the task.
        gpus: That it holds; Ray would end a process with one after every task.
        options: Further ones of `ray.remote`.
    """
    import ray

    return ray.remote(num_cpus=1, num_gpus=gpus, max_calls=0, **options)(function)
