"""What stands in Ray Serve's HTTP proxies, before they call an ingress replica.

A proxy says nothing where the replica that it called dies, of which its server makes a 500, and answers 503 in plain
text where no replica takes the call (Ray 2.60). Here the first is tried again with another replica, and the second is
put into OpenAI's shape.
Proxies load it where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares` when their Ray starts; `slq serve`
sees to it in a Ray of its own, and a cluster's containers set it. A service whose proxies lack it answers as well, but
for requests that a dying ingress replica has in hand.
"""

import json
import logging
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.messages import error_body
from pipelines.serving.access import REQUEST_ID, request_id_of

log = logging.getLogger("ray.serve")  # whose records a proxy writes
VARIABLE, IMPORT_PATH = (
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "pipelines.serving.front:middlewares",
)
_KEPT_BYTES = 32 * 2**20  # of a body, to send it again; a longer one is sent once
_ATTEMPTS = 2
_RETRY_AFTER_S = 1
_TYPE = b"content-type"
_OF_RAY = "/-/"  # how the proxies themselves are


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(Front)]


@dataclass(slots=True)
class _Body:
    """A request's body as it comes in, kept so that it can be read from the start again."""

    receive: Receive
    kept: list[Message] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all that was read is kept."""
        return self.num_bytes <= _KEPT_BYTES

    def from_start(self) -> Receive:
        """Gives what was read already, then what still comes."""
        told = 0

        async def receive() -> Message:
            nonlocal told
            if told < len(self.kept):
                told += 1
                return self.kept[told - 1]
            message = await self.receive()
            self.num_bytes += len(message.get("body", b""))
            if self.is_whole:
                self.kept.append(message)
                told += 1
            else:
                self.kept.clear()
            return message

        return receive

    @property
    def is_over(self) -> bool:
        """Whether the client is gone."""
        return any(message["type"] == "http.disconnect" for message in self.kept)


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
        scope = {**scope, "headers": list(scope["headers"])}
        # Ray Serve takes any id into its logs, and sends it back beside ours (2.60).
        MutableHeaders(scope=scope)[REQUEST_ID] = request_id
        body, answer = _Body(receive), _Answer(send, request_id)
        for _ in range(_ATTEMPTS):
            answer = _Answer(send, request_id)
            await self._ask(scope, body, answer)
            if not answer.is_lost or body.is_over or not body.is_whole:
                break
        await answer.finish()

    async def _ask(self, scope: Scope, body: _Body, answer: "_Answer") -> None:
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

    Attributes:
        is_begun: Whether the client has some of it.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._own: Message | None = None
        self.is_begun = False

    @property
    def is_lost(self) -> bool:
        """Whether the replica that should have answered died.

        Then a proxy of Ray 2.60 says nothing at all; what it says itself, with 503, is that no replica takes the call.
        """
        return self._own is None and not self.is_begun

    async def send(self, message: Message) -> None:
        """Take a message of the application."""
        if message["type"] == "http.response.start" and _is_of_proxy(message):
            self._own = message
        elif self._own is None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name.lower(), value) for name, value in message["headers"]]
                MutableHeaders(scope=message)[REQUEST_ID] = self._request_id
            self.is_begun = True
            await self._send(message)

    async def finish(self) -> None:
        """Tell the client what the proxy said, in OpenAI's shape."""
        if self.is_begun:
            return
        words = "the service is down or restarting" if self.is_lost else "too many requests wait"
        kind = "service_unavailable"
        payload = json.dumps(error_body(f"{words}; try again later", kind)).encode()
        headers = [
            (_TYPE, b"application/json"),
            (b"content-length", str(len(payload)).encode()),
            (b"retry-after", str(_RETRY_AFTER_S).encode()),
            (REQUEST_ID.encode(), self._request_id.encode()),
        ]
        await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": payload})


def _is_of_proxy(start: Message) -> bool:
    """Whether the proxy says this itself: our own errors are JSON."""
    kinds = [value for key, value in start["headers"] if key.lower() == _TYPE]
    return start["status"] == 503 and any(kind.startswith(b"text/plain") for kind in kinds)
