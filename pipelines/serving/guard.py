"""What stands before every route: who asks, and how much a body may hold and take."""

from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.access import REQUEST_ID, Access, request_id_of
from pipelines.serving.asked import Asked, answering
from pipelines.serving.bodies import (
    BodyLimits,
    ClientGoneError,
    check_headers,
    check_values,
    read_body,
    replayed,
)
from pipelines.serving.config import ServeConfig
from pipelines.serving.forms import as_json
from pipelines.serving.refusal import RequestRefusedError


class Guarded(Protocol):
    """What a guard stands before: the replica of an ingress."""

    settings: ServeConfig
    access: Access


class Guard:
    """ASGI middleware.

    Args:
        app: What it stands before.
        guarded: Gives settings and keys; asked at each request, as Ray Serve freezes an app before it has them.
    """

    def __init__(self, app: ASGIApp, guarded: Callable[[], Guarded]) -> None:
        self._app = app
        self._guarded = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "websocket":  # no route has one, so none gets past the keys this way
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        answering(Asked(request_id=request_id, scopes=frozenset()))

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer[REQUEST_ID] = request_id
                answer["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            inner = await self._admitted(scope, receive, request_id)
        except RequestRefusedError as refusal:
            await refusal.answer()(scope, receive, told)
        except ClientGoneError:
            return
        else:
            await self._app(scope, inner, told)

    async def _admitted(self, scope: Scope, receive: Receive, request_id: str) -> Receive:
        """What the app receives of a request that may pass.

        Raises:
            RequestRefusedError: It may not.
            ClientGoneError: Its client went away.
        """
        headers, guarded = Headers(scope=scope), self._guarded()
        settings = guarded.settings
        check_headers(headers, settings.max_body_bytes)
        path = scope["path"]
        answering(guarded.access.admit(path, headers, request_id))
        has_length = "content-length" in headers or "transfer-encoding" in headers
        if not has_length and scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive  # no body (RFC 9112, section 6.3)
        limits = BodyLimits(settings.max_body_bytes, settings.access.body_timeout_s)
        body = await read_body(receive, limits)
        body = await as_json(scope, path, body, settings)
        check_values(body)
        return replayed(body, receive)
