"""Clients that do harm without asking much: some hardly send anything, and some send far too much."""

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

LARGE_BYTES = 100 * 2**20
_CHUNK = b"x" * 2**16
_BYTE_EVERY_S = 1.0
_PATIENCE_S = 60.0


class Rude:
    """Holds so many slow clients and sends so many large bodies while the block runs.

    Args:
        url: What they ask.
        slow_clients: Connections that send a byte a second; a closed one is opened again.
        large_every_s: How often a body of 100 MiB is sent; 0 for never.

    Attributes:
        outcomes: Of each client: kind, status (0 without one), bytes sent and seconds; `held` of one whose connection
            was still open when the block ended, `error` of one that was cut off or lost its patience.
    """

    def __init__(self, url: str, slow_clients: int, large_every_s: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path or "/"
        self._slow = slow_clients
        self._large_every_s = large_every_s
        self._tasks: list[asyncio.Task[None]] = []
        self.outcomes: list[dict[str, Any]] = []

    async def __aenter__(self) -> "Rude":
        self._tasks = [asyncio.create_task(self._slow_forever()) for _ in range(self._slow)]
        if self._large_every_s:
            self._tasks.append(asyncio.create_task(self._large_forever()))
        return self

    async def __aexit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _slow_forever(self) -> None:
        while True:
            await self._note("slow", 1000, b"{", _BYTE_EVERY_S)
            await asyncio.sleep(
                _BYTE_EVERY_S
            )  # one that is turned away at once comes back in peace

    async def _large_forever(self) -> None:
        while True:
            await self._note("large", LARGE_BYTES, _CHUNK, 0.0)
            await asyncio.sleep(self._large_every_s)

    async def _note(self, kind: str, length: int, piece: bytes, pause_s: float) -> None:
        began = time.monotonic()
        found: dict[str, Any] = {"kind": kind, "status": 0, "bytes": 0}
        try:
            await asyncio.wait_for(self._send(found, length, piece, pause_s), _PATIENCE_S)
        except (OSError, TimeoutError) as error:
            found["error"] = type(error).__name__
        except asyncio.CancelledError:
            found["held"] = True
            raise
        finally:
            found["seconds"] = round(time.monotonic() - began, 3)
            self.outcomes.append(found)

    async def _send(self, found: dict[str, Any], length: int, piece: bytes, pause_s: float) -> None:
        """Send a body until it is all there, or until the other side answers or closes."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        answer = asyncio.create_task(reader.readline())
        try:
            writer.write(
                f"POST {self._path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
                f"content-length: {length}\r\n\r\n".encode()
            )
            with suppress(OSError):  # closed on the other side; there may be an answer all the same
                while found["bytes"] < length and not answer.done():
                    writer.write(piece[: length - found["bytes"]])
                    await writer.drain()
                    found["bytes"] += len(piece)
                    await asyncio.sleep(pause_s)
            words = (await answer).split()
            found["status"] = int(words[1]) if len(words) > 1 else 0
        finally:
            answer.cancel()
            writer.close()
