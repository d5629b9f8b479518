"""A request's body in a proxy: handed on as it comes, and kept until it need not be sent again."""

import asyncio
from collections import deque

from starlette.types import Message, Receive

KEPT_BYTES = 32 * 2**20
"""Of a body, to send it again; a longer one is sent once."""
MOST_BYTES = 64 * 2**20
"""Of a body at all; `serve.max_body_bytes` is meant to be below. A proxy of Ray Serve takes in what comes as fast as it
comes, whether or not a replica reads it (2.60), so whoever sends without end would fill its memory."""


class Body:
    """A request's body as it comes in.

    Args:
        receive: Of the client.

    Attributes:
        is_kept: Whether it can be read from the start again.
        is_over: Whether nothing more comes: the client is gone, or was cut off.
        is_too_long: Whether it was cut off.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._unread: deque[Message] = deque()  # by the reader that was made last
        self._reader = 0
        self._num_bytes = 0
        self._one_at_a_time = asyncio.Lock()
        self.is_kept = True
        self.is_over = False
        self.is_too_long = False

    def from_start(self) -> Receive:
        """Gives what was read already, then what still comes; to a reader that was made before, nothing more.

        A proxy reads in a task of its own, which it does not wait for when it ends it. So one may still be waiting
        while the next one begins, and what it waits for belongs to the next one.
        """
        self._reader += 1
        self._unread = deque(self._kept)
        reader = self._reader

        async def receive() -> Message:
            while reader == self._reader and not self._unread:
                async with self._one_at_a_time:
                    if reader == self._reader and not self._unread:
                        await self._take()
            if reader != self._reader:
                return {"type": "http.disconnect"}
            return self._unread.popleft()

        return receive

    def let_go(self) -> None:
        """Keep nothing any more: it need not be sent again."""
        self.is_kept = False
        self._kept.clear()

    async def _take(self) -> None:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MOST_BYTES:
            self.is_too_long = True
            message = {"type": "http.disconnect"}
        self.is_over = self.is_over or message["type"] == "http.disconnect"
        self._unread.append(message)
        if self._num_bytes > KEPT_BYTES:
            self.let_go()
        if self.is_kept:
            self._kept.append(message)
