"""How busy a model is, and how many replicas follow from that.

Calls in hand, which Ray Serve scales by, say little of a model: they hardly grow until it is busy all the time, then as
fast as the queue may. So two replicas that share what was too much for one look idle, one of them goes, and so on. The
share of time in which passes run adds up over replicas instead: what fills one fills two by half.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve.config import AutoscalingContext

BUSY = "busy"
POLICY = "pipelines.serving.load:ByLoad"
_SLACK = (
    0.85  # of the load that fewer replicas aim at: a load about a bound moves nothing to and fro
)


class Busy:
    """Counts the time in which at least one pass runs.

    Args:
        clock: Gives the time (s).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_passes = 0
        self._busy_s = 0.0
        self._at = self._asked_at = clock()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A pass runs meanwhile; several may, in several threads."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def share(self) -> float:
        """Share of the time since it was last asked for, in 0..1."""
        with self._lock:
            now = self._count()
            elapsed = now - self._asked_at
            found = self._busy_s / elapsed if elapsed > 0 else 0.0
            self._busy_s, self._asked_at = 0.0, now
        return min(1.0, found)

    def _change(self, number: int) -> None:
        with self._lock:
            self._count()
            self._num_passes += number

    def _count(self) -> float:
        now = self._clock()
        if self._num_passes:
            self._busy_s += now - self._at
        self._at = now
        return now


class ByLoad:
    """Autoscaling policy of Ray Serve: as many replicas as keep the model busy for a share of the time.

    Calls in hand count beside, as they do without a policy, so that a queue before a model that waits for something
    else is noticed too.

    Args:
        target_busy: Share of time that each replica should be busy, in 0..1.
    """

    def __init__(self, target_busy: float) -> None:
        self._target_busy = target_busy

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas that are wanted; Ray applies bounds and delays."""
        calls = context.total_num_requests / context.config.get_target_ongoing_requests()
        shares = (context.aggregated_metrics or {}).get(BUSY, {})
        known = [shares[one] for one in context.running_replicas if one in shares]
        return wanted(known, context.current_num_replicas, calls, self._target_busy), {}


def wanted(shares: list[float], current: int, calls: float, target_busy: float) -> int:
    """How many replicas should run.

    Args:
        shares: Share of time that each replica was busy, of those that have told it.
        current: Replicas that run or start.
        calls: Replicas that the calls in hand would fill.
        target_busy: Share that each should have.
    """
    if current == 0:
        return math.ceil(calls)
    if (
        len(shares) < current
    ):  # the others take on their share soon; until then there is nothing to go by
        return max(current, math.ceil(calls)) if calls > current else current
    load = max(sum(shares) / target_busy, calls)
    if load > current:
        return math.ceil(load)
    return min(current, max(1, math.ceil(load / _SLACK)))
