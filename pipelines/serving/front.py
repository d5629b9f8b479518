"""What stands in Ray Serve's HTTP proxies, before they call an ingress replica.

A proxy says nothing where the replica that it called dies, of which its server makes a 500, and answers 503 in plain
text where no replica takes the call (Ray 2.60). Here the first is tried again with another replica, and the second is
put into OpenAI's shape. What clients could steer a proxy by, or fill it with, ends here.
Proxies load it where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares` when their Ray starts; `slq serve`
sees to it in a Ray of its own, and a cluster's containers set it. A service whose proxies lack it answers as well, but
for requests that a dying ingress replica has in hand.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.messages import error_body
from pipelines.serving.access import REQUEST_ID, request_id_of
from pipelines.serving.bodies import MOST_DIGITS
from pipelines.serving.incoming import MOST_BYTES, Body

log = logging.getLogger("ray.serve")  # whose records a proxy writes
VARIABLE, IMPORT_PATH = (
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "pipelines.serving.front:middlewares",
)
_ATTEMPTS = 2
_RETRY_AFTER_S = 1
_TYPE = b"content-type"
_OF_RAY = "/-/"  # how the proxies themselves are
_STEERING = frozenset(
    name.lower().replace("_", "-").encode()
    for name in (
        "x-request-timeout-seconds",
        "x-request-disconnect-disabled",
        "serve_multiplexed_model_id",
        os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id"),
    )
)
"""Headers that a proxy of Ray Serve obeys (2.60): how long it waits, whether it lets go of a call whose client is gone,
and which replica it asks."""
_IS_FULL = b"backpressure"
"""In what a proxy says where too many requests wait; it says 503 of a deployment that failed, too."""
_MOST_WORDS_BYTES = 1000


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(Front)]


class Front:
    """ASGI middleware.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by another replica where the first dies."""
        if scope["type"] != "http" or scope["path"].startswith(_OF_RAY):
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        scope = {**scope, "headers": [one for one in scope["headers"] if not _steers(one[0])]}
        if not all(_is_utf8(name) and _is_utf8(value) for name, value in scope["headers"]):
            error = error_body("header values must be UTF-8", "invalid_request_error")
            await _say(send, request_id, 400, error)
            return
        if _is_announced_too_long(Headers(scope=scope)):
            await _refuse_length(send, request_id)
            return
        # Ray Serve takes any id into its logs, and sends it back beside ours (2.60).
        MutableHeaders(scope=scope)[REQUEST_ID] = request_id
        body = Body(receive)
        answer = _Answer(send, request_id, body)
        for _ in range(_ATTEMPTS):
            answer = _Answer(send, request_id, body)
            await self._ask(scope, body, answer)
            if not answer.is_lost or body.is_over or not body.is_kept:
                break
        await answer.finish()

    async def _ask(self, scope: Scope, body: Body, answer: "_Answer") -> None:
        """Let the proxy call a replica."""
        try:
            # Copied: the proxy writes into it, and a path that it cut would be cut again.
            copied = {**scope, "headers": list(scope["headers"])}
            await self._app(copied, body.from_start(), answer.send)
        except Exception as error:
            if answer.is_begun:
                raise
            log.warning("a proxy failed before its answer began: %r", error)


class _Answer:
    """An answer on its way to the client: passed on at once, unless it is a proxy's own.

    Args:
        send: To the client.
        request_id: Of the request.
        body: Of the request; it is let go as soon as it need not be sent again.

    Attributes:
        is_begun: Whether the client has some of it.
    """

    def __init__(self, send: Send, request_id: str, body: Body) -> None:
        self._send = send
        self._request_id = request_id
        self._body = body
        self._own: bytes | None = None  # words of the proxy
        self.is_begun = False

    @property
    def is_lost(self) -> bool:
        """Whether the replica that should have answered died.

        Then a proxy of Ray 2.60 says nothing at all; what it says itself, with 503, is that no replica takes the call.
        """
        return self._own is None and not self.is_begun

    async def send(self, message: Message) -> None:
        """Take a message of the application."""
        self._body.let_go()
        if message["type"] == "http.response.start" and _is_of_proxy(message):
            self._own = b""
        elif self._own is not None:
            self._own = (self._own + message.get("body", b""))[:_MOST_WORDS_BYTES]
        else:
            if message["type"] == "http.response.start":
                message["headers"] = [(name.lower(), value) for name, value in message["headers"]]
                MutableHeaders(scope=message)[REQUEST_ID] = self._request_id
            self.is_begun = True
            await self._send(message)

    async def finish(self) -> None:
        """Tell the client what the proxy said, in OpenAI's shape."""
        if self.is_begun:
            return
        if self._body.is_too_long:
            await _refuse_length(self._send, self._request_id)
            return
        is_full = self._own is not None and _IS_FULL in self._own
        words = "too many requests wait" if is_full else "the service is down or restarting"
        error = error_body(f"{words}; try again later", "service_unavailable")
        await _say(self._send, self._request_id, 503, error, {"retry-after": str(_RETRY_AFTER_S)})


async def _refuse_length(send: Send, request_id: str) -> None:
    error = error_body(f"the body exceeds {MOST_BYTES} bytes", "too_large")
    await _say(send, request_id, 413, error, {"connection": "close"})


async def _say(
    send: Send,
    request_id: str,
    status: int,
    body: dict[str, Any],
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer a client from here."""
    payload = json.dumps(body).encode()
    told = {
        "content-type": "application/json",
        "content-length": str(len(payload)),
        "x-content-type-options": "nosniff",
        REQUEST_ID: request_id,
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": payload})


def _steers(name: bytes) -> bool:
    return name.lower().replace(b"_", b"-") in _STEERING


def _is_utf8(value: bytes) -> bool:
    """Else a proxy would fail over a header, after it has begun to read the body (Ray 2.60)."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_announced_too_long(headers: Headers) -> bool:
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return False  # a replica refuses what is no number
    return len(length) > MOST_DIGITS or int(length) > MOST_BYTES


def _is_of_proxy(start: Message) -> bool:
    """Whether the proxy says this itself: our own errors are JSON."""
    kinds = [value for key, value in start["headers"] if key.lower() == _TYPE]
    return start["status"] == 503 and any(kind.startswith(b"text/plain") for kind in kinds)
