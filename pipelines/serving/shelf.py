"""Loaded versions of an index, several at once."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection
from typing import Generic, TypeVar

from slq.errors import HardwareError, ServiceError, StorageError, UnavailableError

T = TypeVar("T")
PASSING = (ServiceError, StorageError, HardwareError, OSError, MemoryError)
"""Errors that say nothing of a version: this machine, or a part of the service, cannot load it now."""


async def _anything(_: object) -> None:
    """Every version that can be loaded is good."""


class Shelf(Generic[T]):
    """Versions by name. Whoever took one may keep it for as long as he needs it, whatever becomes of the shelf.

    Args:
        load: Loads a version, in a thread.
        admit: Raises where a loaded version must not be served.
    """

    def __init__(
        self, load: Callable[[str], T], admit: Callable[[T], Awaitable[None]] = _anything
    ) -> None:
        self._load = load
        self._admit = admit
        self._held: dict[str, T] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}

    @property
    def held(self) -> list[str]:
        """Names of versions that are there."""
        return list(self._held)

    @property
    def coming(self) -> list[str]:
        """Names of versions that are being loaded."""
        return list(self._coming)

    def get(self, version: str) -> T | None:
        """A version; None where it is not there."""
        return self._held.get(version)

    def put(self, version: str, loaded: T) -> None:
        """Put up a version that is loaded already."""
        self._held[version] = loaded

    async def bring(self, version: str) -> None:
        """Load a version, unless it is there; whoever asks meanwhile waits for the same.

        Raises:
            Exception: Whatever `load` and `admit` raise; it is not there then.
        """
        if version in self._held:
            return
        task = self._coming.get(version)
        if task is None:
            # Not in the context of whoever asks: calls of a request of Ray Serve end with its client.
            task = asyncio.create_task(self._bring(version), context=contextvars.Context())
            self._coming[version] = task
        await asyncio.shield(task)  # whoever gives up does not end it for the others

    async def _bring(self, version: str) -> None:
        try:
            loaded = await asyncio.to_thread(self._load, version)
            await self._admit(loaded)
            self._held[version] = loaded
        except asyncio.CancelledError:  # of a call, as nobody cancels this task
            raise UnavailableError(f"loading version {version} was cut off; try again") from None
        finally:
            del self._coming[version]

    def drop_all_but(self, versions: Collection[str]) -> None:
        """Let go of others; their memory is free when the last who took them has done with them."""
        self._held = {name: one for name, one in self._held.items() if name in versions}
