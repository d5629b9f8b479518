"""Parts of the service in the process that asks them, behind what looks like the handle of a deployment."""

import asyncio
import inspect
from typing import Any


class Here:
    """Stands for a handle.

    Args:
        part: Whose methods are called.
    """

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> "HereMethod":
        return HereMethod(getattr(self._part, name))


class HereMethod:
    """Stands for a method of a handle."""

    def __init__(self, method: Any) -> None:
        self._method = method

    async def remote(self, *arguments: Any, **named: Any) -> Any:
        """What the method gives; one that waits for something else than a coroutine does so in a thread."""
        if inspect.iscoroutinefunction(self._method):
            return await self._method(*arguments, **named)
        return await asyncio.to_thread(self._method, *arguments, **named)
