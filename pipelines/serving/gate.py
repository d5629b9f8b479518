"""What an ingress replica takes on: so many requests and bytes at once, each for so long, and no more.

More than that is refused at once, before a body is read, so that what waits neither fills the memory nor grows old.
"""

import asyncio
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.messages import error_body
from pipelines.serving.bodies import MOST_DIGITS
from pipelines.serving.config import ServeConfig
from pipelines.serving.guard import Guarded
from pipelines.serving.pace import Pace

RETRY_AFTER_S = 1
_ALWAYS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Whoever watches a service learns of it most where it is full. Only without a body, which could fill it further."""


class Gate:
    """ASGI middleware.

    Args:
        app: What it stands before.
        guarded: Gives the settings; asked at each request, as Ray Serve freezes an app before it has them.
    """

    def __init__(self, app: ASGIApp, guarded: Callable[[], Guarded]) -> None:
        self._app = app
        self._guarded = guarded
        self._num = 0
        self._num_bytes = 0
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request in its time, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._guarded().settings
        size = _size_of(scope, settings.max_body_bytes)
        if scope["path"] in _ALWAYS and not size:
            await self._app(scope, receive, send)
            return
        is_work = scope["method"] == "POST"
        if self._is_full(settings, size) or (
            is_work and self._pace.is_too_slow(settings.max_wait_s)
        ):
            await _refuse(503, "too many requests are in hand; try again later")(
                scope, receive, send
            )
            return
        self._num, self._num_bytes = self._num + 1, self._num_bytes + size
        answer = _Answer(send)
        if is_work:
            self._pace.begin()
        try:
            await self._in_time(settings.timeout_s, scope, receive, answer)
        finally:
            self._num, self._num_bytes = self._num - 1, self._num_bytes - size
            if is_work:
                self._pace.end(is_answered=answer.status == 200)

    def _is_full(self, settings: ServeConfig, size: int) -> bool:
        """A body that is larger than all that may be in hand is taken alone."""
        if self._num >= settings.max_in_flight:
            return True
        return self._num > 0 and self._num_bytes + size > settings.max_in_flight_bytes

    async def _in_time(
        self, limit_s: float, scope: Scope, receive: Receive, answer: "_Answer"
    ) -> None:
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if answer.status is not None or not limit.expired():  # it may be one of the app's own
                raise
            message = f"no answer within {limit_s:g} s (serve.timeout_s); ask for less, or try again later"
            await _refuse(504, message)(scope, receive, answer.send)


class _Answer:
    """An answer as it goes by.

    Args:
        send: To the client.

    Attributes:
        status: Of it; None before it begins.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Pass a part on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _size_of(scope: Scope, most: int) -> int:
    """Bytes of a body as far as they are known; the most there may be where they are not."""
    headers = Headers(scope=scope)
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) <= MOST_DIGITS:
        return min(int(length), most)
    return most if "transfer-encoding" in headers else 0


def _refuse(status: int, message: str) -> JSONResponse:
    kind = "timeout" if status == 504 else "service_unavailable"
    return JSONResponse(
        error_body(message, kind), status, headers={"retry-after": str(RETRY_AFTER_S)}
    )
