"""What stands before every route: who asks, and how much a body may hold."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.messages import error_body
from pipelines.serving.asked import Asked, answering
from pipelines.serving.config import ServeConfig

REQUEST_ID = "x-request-id"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request does not reach its route."""

    status: int
    message: str
    kind: str


class Guard:
    """ASGI middleware.

    Args:
        app: What it stands before.
        settings: Gives the section `serve`; asked at each request, as Ray Serve freezes an app before it has one.
    """

    def __init__(self, app: ASGIApp, settings: Callable[[], ServeConfig]) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request = Asked(request_id=headers.get(REQUEST_ID) or uuid.uuid4().hex)
        answering(request)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request.request_id
            await send(message)

        refusal = _body_refusal(scope["method"], headers, self._settings().max_body_bytes)
        answer: Any = self._app
        if refusal is not None:
            answer = JSONResponse(error_body(refusal.message, refusal.kind), refusal.status)
        await answer(scope, receive, told)


def _body_refusal(method: str, headers: Headers, limit: int) -> Refusal | None:
    length = headers.get("content-length")
    if length is None and method == "POST":
        return Refusal(
            411, "send a content-length; chunked bodies are not accepted", "length_required"
        )
    if int(length or 0) > limit:
        return Refusal(413, f"the body exceeds {limit} bytes", "too_large")
    return None
