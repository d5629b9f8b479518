"""What stands before every route: who asks, and how much a body may hold and take."""

from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serving.access import Access
from pipelines.serving.asked import answering, asked
from pipelines.serving.bodies import (
    BodyLimits,
    ClientGoneError,
    check_headers,
    check_json,
    has_body,
    read_body,
    replayed,
)
from pipelines.serving.config import ServeConfig
from pipelines.serving.forms import as_json
from pipelines.serving.refusal import RequestRefusedError

_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})


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
        try:
            inner = await self._admitted(scope, receive)
        except RequestRefusedError as refusal:
            await refusal.answer()(scope, receive, send)
        except ClientGoneError:
            return
        else:
            await self._app(scope, inner, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """What the app receives of a request that may pass.

        Raises:
            RequestRefusedError: It may not.
            ClientGoneError: Its client went away.
        """
        headers, guarded = Headers(scope=scope), self._guarded()
        settings = guarded.settings
        check_headers(headers, settings.max_body_bytes)
        path, method = scope["path"], scope["method"]
        request = guarded.access.admit(path, headers, asked().request_id)
        answering(request)
        # Where no key is needed, nothing is taken that fills the memory.
        if method in _WITHOUT_BODY or not request.scopes:
            if has_body(headers):
                raise RequestRefusedError(400, f"{method} {path} takes no body; send none")
            return receive
        limits = BodyLimits(settings.max_body_bytes, settings.access.body_timeout_s)
        body = await read_body(receive, limits)
        body = await as_json(scope, path, body, settings)
        check_json(body)
        return replayed(body, receive)
