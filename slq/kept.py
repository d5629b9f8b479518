"""Least-recently-used values in memory, bounded in bytes, safe between threads."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""


V = TypeVar("V", bound=Sized)


class Kept(Generic[V]):
    """A cache of values by key.

    Args:
        max_bytes: Held at most; 0 keeps nothing.

    Attributes:
        hits: Values that were found.
        misses: Values that had to be computed.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = Lock()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def counters(self) -> dict[str, int]:
        """What is held, and how often it was found and not."""
        with self._lock:
            return {
                "values": len(self._values),
                "bytes": self.num_bytes,
                "hits": self.hits,
                "misses": self.misses,
            }

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[V]]) -> list[V]:
        """The values of `keys`, which differ from one another.

        Args:
            keys: What identifies each value.
            compute: Called once with the positions in `keys` that are missing, if any; without the lock, so that two
                threads may compute the same value.
        """
        with self._lock:
            found = {key: self._values[key] for key in keys if key in self._values}
            for key in found:
                self._values.move_to_end(key)
            missing = [number for number, key in enumerate(keys) if key not in found]
            self.hits += len(keys) - len(missing)
            self.misses += len(missing)
        if missing:
            computed = dict(zip((keys[n] for n in missing), compute(missing), strict=True))
            with self._lock:
                for key, value in computed.items():
                    self._keep(key, value)
            found |= computed
        return [found[key] for key in keys]

    def _keep(self, key: Hashable, value: V) -> None:
        size = value.num_bytes
        if key in self._values or size > self._max_bytes:
            return  # a larger one would only push out all others, and then itself
        self._values[key] = value
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            _, dropped = self._values.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
