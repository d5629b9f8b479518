"""What the load generator notes of each request, and how it is kept in a file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REFUSED = (429, 503)
"""Statuses by which a service says that it has too much to do."""
_LONGEST_ERROR = 60


@dataclass(frozen=True, slots=True)
class Records:
    """Requests in the order of their scheduled times; all times in seconds of `time.monotonic`.

    Attributes:
        target: (n,) which of the load's targets was asked.
        scheduled: (n,) when it should have been sent.
        sent: (n,) when it was; NaN where the load was stopped before.
        first: (n,) when the answer's head was there; NaN without an answer.
        done: (n,) when all of it was there, or when it failed.
        status: (n,) of the answer; 0 without one.
        retry_after: (n,) seconds of the answer's header; NaN without one.
        degraded: (n,) whether the answer calls itself so.
        error: (n,) name of what went wrong without an answer; empty with one.
    """

    target: NDArray[np.int64]
    scheduled: NDArray[np.float64]
    sent: NDArray[np.float64]
    first: NDArray[np.float64]
    done: NDArray[np.float64]
    status: NDArray[np.int64]
    retry_after: NDArray[np.float64]
    degraded: NDArray[np.bool_]
    error: NDArray[np.str_]

    @classmethod
    def planned(cls, target: NDArray[np.int64], scheduled: NDArray[np.float64]) -> "Records":
        """Of requests of which none is sent yet."""
        count = len(target)
        sent, first, done, retry_after = np.full((4, count), np.nan)
        status, degraded = np.zeros(count, np.int64), np.zeros(count, bool)
        error = np.zeros(count, f"U{_LONGEST_ERROR}")
        return cls(target, scheduled, sent, first, done, status, retry_after, degraded, error)

    def __len__(self) -> int:
        return len(self.target)

    def chosen(self, which: NDArray[np.bool_]) -> "Records":
        """Some of them."""
        return replace(self, **{one.name: getattr(self, one.name)[which] for one in fields(self)})

    def between(self, start: float, end: float) -> "Records":
        """Those scheduled in a stretch of time."""
        return self.chosen((self.scheduled >= start) & (self.scheduled < end))

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(n,) whether the answer is one."""
        return np.equal(self.status, 200)

    @property
    def refused(self) -> NDArray[np.bool_]:
        """(n,) whether it was refused for too much to do."""
        return np.isin(self.status, REFUSED)

    @property
    def failed(self) -> NDArray[np.bool_]:
        """(n,) neither answered nor refused."""
        return ~self.answered & ~self.refused

    @property
    def latency(self) -> NDArray[np.float64]:
        """(n,) seconds from when the request was due: a client that had to wait to send it would count that, too."""
        return self.done - self.scheduled

    def save(self, path: Path) -> None:
        """Write them as NPZ."""
        np.savez(path, **{one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Records":
        """Read what `save` wrote."""
        with np.load(path) as columns:
            return cls(**columns)


def joined(parts: Mapping[str, Records] | list[Records]) -> Records:
    """Several runs' requests as one; times of different runs do not compare."""
    runs = list(parts.values()) if isinstance(parts, Mapping) else parts
    columns = {
        one.name: np.concatenate([getattr(run, one.name) for run in runs])
        for one in fields(Records)
    }
    return Records(**columns)
