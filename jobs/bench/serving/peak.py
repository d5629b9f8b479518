"""The most that a service answers in time: rates are raised until it cannot follow, then the edge is closed in on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.bench.load.arrivals import Piece
from jobs.bench.load.records import Records
from jobs.bench.load.sending import Stream
from jobs.bench.serving.stand import Stand
from jobs.bench.serving.summary import goodput
from pipelines.progress import show

_RAISED_BY = 1.6
_FOLLOWS = 0.9
_CLOSER = 4
_MOST_PROBES = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of a rate.

    Attributes:
        offered: Requests per second that were sent.
        good: Answers in time per second.
    """

    offered: float
    good: float

    @property
    def follows(self) -> bool:
        """Whether nearly all were answered in time."""
        return self.good >= _FOLLOWS * self.offered


def find_peak(ask: Callable[[float], Probe], first: float) -> list[Probe]:
    """Probes in the order they were made; the best one's `good` is the peak.

    Args:
        ask: Offers a rate.
        first: The first rate; where the service cannot follow it, lower ones are tried.
    """
    found: list[Probe] = []
    low, high, rate = 0.0, 0.0, first
    closer = _CLOSER
    while len(found) < _MOST_PROBES and closer:
        probe = ask(rate)
        found.append(probe)
        if probe.follows:
            low = rate
        else:
            high = rate
        if low and high:
            closer -= 1
            rate = (low + high) / 2
        else:
            rate = rate * _RAISED_BY if low else rate / _RAISED_BY
    return found


def best(probes: list[Probe]) -> Probe:
    """The one with most answers in time."""
    return max(probes, key=lambda one: one.good)


def peak_of(
    stand: Stand, name: str, bodies: list[str], *, seconds: float, first: float = 20.0
) -> list[Probe]:
    """Probes of a running service.

    Args:
        stand: The service.
        name: Of these probes, for their random numbers.
        bodies: What is asked.
        seconds: Length of each probe; its first fifth is not counted.
        first: The first rate, in requests per second.
    """
    plan, targets = stand.plan(bodies), range(len(bodies))
    deadline_s = stand.settings.deadline_ms / 1000

    def ask(rate: float) -> Probe:
        stream = Stream(targets, [Piece(seconds, rate)])
        outcome = stand.send(f"{name} {rate:.3f}", plan, [stream])
        start, end = outcome.start + seconds / 5, outcome.start + seconds
        probe = probed(outcome.records, start, end, deadline_s)
        show(f"{name}: {probe.offered:.1f}/s offered, {probe.good:.1f}/s answered in time")
        return probe

    return find_peak(ask, first)


def probed(records: Records, start: float, end: float, deadline_s: float) -> Probe:
    """What came of the requests that were due in a stretch of time."""
    some = records.between(start, end)
    return Probe(len(some) / (end - start), goodput(some, deadline_s, end - start))


def told(probes: list[Probe]) -> list[dict[str, Any]]:
    """Probes as plain values, by rate."""
    return [
        {"offered_per_s": round(one.offered, 2), "goodput_per_s": round(one.good, 2)}
        for one in sorted(probes, key=lambda one: one.offered)
    ]
