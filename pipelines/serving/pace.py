"""How fast a replica answers what asks for work, and so how long one more would wait."""

import time
from collections.abc import Callable

_WEIGHT = 0.05  # of the newest interval: the last twenty answers count most
_LEAST = 4  # requests that are taken whatever the pace is, or it would never be learnt again


class Pace:
    """Counts answers while there is something to do; by Little's law the wait is what is in hand over their rate.

    Where a replica is idle between answers their rate tells what is asked, not what it can do, so that is left out.

    Args:
        clock: Gives the time (s).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num = 0
        self._last: float | None = None
        self._interval_s = 0.0

    def is_too_slow(self, limit_s: float) -> bool:
        """Whether one more would wait for longer than this."""
        return self._num >= _LEAST and self._num * self._interval_s > limit_s

    def begin(self) -> None:
        """A request is taken."""
        self._num += 1

    def end(self, *, is_answered: bool) -> None:
        """A request is done with.

        Args:
            is_answered: Whether work was done for it; refusals are fast and tell nothing of the pace.
        """
        now = self._clock()
        if is_answered:
            if self._last is not None:
                newest = now - self._last
                known = self._interval_s or newest
                self._interval_s = known + _WEIGHT * (newest - known)
            self._last = now
        self._num -= 1
        if self._num == 0:
            self._last = None
