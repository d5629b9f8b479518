"""How much each key may ask: token buckets, counted in each ingress replica for itself."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from pipelines.serving.keys import ApiKey

_NOW: ContextVar["Bucket | None"] = ContextVar("bucket", default=None)


@dataclass(slots=True)
class Bucket:
    """A token bucket that may be overdrawn.

    A request is let in while there is a whole token. What turns out later, when its body has been read, to be more work
    than one token pays is taken all the same, so the next requests wait: a large request need not fit into the burst.

    Attributes:
        per_s: Tokens that come in a second.
        size: Tokens that it holds at most, at least 1.
        clock: Seconds.
    """

    per_s: float
    size: float
    clock: Callable[[], float] = time.monotonic
    _tokens: float = field(init=False)
    _seen: float = field(init=False)

    def __post_init__(self) -> None:
        self._tokens, self._seen = self.size, self.clock()

    def enter(self) -> float:
        """Take a token; gives 0, or how many seconds it will be until there is one, and none is taken."""
        now = self.clock()
        self._tokens = min(self.size, self._tokens + (now - self._seen) * self.per_s)
        self._seen = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.per_s
        self._tokens -= 1
        return 0.0

    def take(self, tokens: float) -> None:
        """Take more, though it may not have as many."""
        self._tokens -= tokens


class Rates:
    """The buckets of keys.

    Args:
        shares: Replicas that share each key's rate.
        clock: Seconds.
    """

    def __init__(self, shares: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares = shares
        self._clock = clock
        self._buckets: dict[ApiKey, Bucket] = {}

    def enter(self, key: ApiKey) -> float:
        """Let a request of a key in; gives 0, or in how many seconds it may come again."""
        _NOW.set(None)
        if key.requests_per_s is None:
            return 0.0
        bucket = self._buckets.get(key)
        if bucket is None:
            size = max(key.burst or key.requests_per_s, 1) / self._shares
            bucket = Bucket(key.requests_per_s / self._shares, max(size, 1.0), self._clock)
            self._buckets[key] = bucket
        wait_s = bucket.enter()
        if not wait_s:
            _NOW.set(bucket)
        return wait_s

    def keep_only(self, keys: list[ApiKey]) -> None:
        """Forget the buckets of keys that are gone, or whose rate is another now."""
        known = set(keys)
        self._buckets = {key: one for key, one in self._buckets.items() if key in known}


def charge(parts: int) -> None:
    """Count the request that is being answered as one for each of its parts; it is counted as one already."""
    bucket = _NOW.get()
    if bucket is not None and parts > 1:
        bucket.take(parts - 1)
