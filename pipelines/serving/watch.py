"""What stands before everything else: it gives each request its id, and tells of it in a log line, metrics, a span."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving import logs, metrics, traces
from pipelines.serving.access import REQUEST_ID, request_id_of
from pipelines.serving.asked import Asked, answering, asked
from pipelines.serving.guard import Guarded
from pipelines.serving.metrics import record
from pipelines.serving.telemetry import Account, accounting

log = logging.getLogger(__name__)
_PROBES = ("/healthz", "/readyz", "/metrics")  # asked for every few seconds
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_GONE = 499  # the client, before it was answered
_LARGEST_ERROR_BYTES = 65_536


class Exchange:
    """A request and its answer as they pass by.

    Args:
        scope: Of ASGI.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.began = time.perf_counter()
        self.status = 500  # where an error leaves the app before its answer begins
        self.kind = ""
        self.bytes_in = 0
        self.bytes_out = 0

    @property
    def is_probe(self) -> bool:
        """Whether a machine asks, for health or metrics; there is no trace of it."""
        return self.scope["path"] in _PROBES

    @property
    def route(self) -> str:
        """The template of its route: a path may hold an item's id, and there would be as many series as items."""
        return getattr(self.scope.get("route"), "path", "none")

    @property
    def method(self) -> str:
        """Its method, of those that HTTP knows."""
        found: str = self.scope["method"]
        return found if found in _METHODS else "other"

    def came(self, message: Message) -> None:
        """Note a part of the request."""
        self.bytes_in += len(message.get("body", b""))

    def went(self, message: Message) -> None:
        """Note a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self.status >= 400 and not self.bytes_out:
                self.kind = kind_of(body)
            self.bytes_out += len(body)


def kind_of(body: bytes) -> str:
    """The type that an error of ours tells in its body; `other` of a body that is none."""
    if len(body) > _LARGEST_ERROR_BYTES:
        return "other"
    try:
        return str(json.loads(body)["error"]["type"])
    except (ValueError, KeyError, TypeError):
        return "other"


class Watch:
    """ASGI middleware.

    Args:
        app: What it stands before, the guard included, whose refusals it tells of, too.
        guarded: Gives the settings; asked at each request, as Ray Serve freezes an app before it has them.
    """

    def __init__(self, app: ASGIApp, guarded: Callable[[], Guarded]) -> None:
        self._app = app
        self._guarded = guarded
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange, headers = Exchange(scope), Headers(scope=scope)
        request_id = request_id_of(headers)

        async def coming() -> Message:
            message = await receive()
            exchange.came(message)
            return message

        async def going(message: Message) -> None:
            exchange.went(message)
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer[REQUEST_ID] = request_id
                answer["x-content-type-options"] = "nosniff"
            await send(message)

        answering(Asked(request_id=request_id))
        self._count(1)
        try:
            with accounting() as account, traces.continued(dict(headers)):
                await self._traced(exchange, account, coming, going)
        finally:
            self._count(-1)

    async def _traced(
        self, exchange: Exchange, account: Account, coming: Receive, going: Send
    ) -> None:
        opened = traces.span(exchange.method, is_server=True)
        with nullcontext() if exchange.is_probe else opened as span:
            try:
                await self._app(exchange.scope, coming, going)
            except asyncio.CancelledError:
                exchange.status, exchange.kind = _GONE, "client_gone"
                raise
            except Exception:
                exchange.kind = "server_error"  # what answers to it stands before this
                raise
            finally:
                if span is not None:
                    span.update_name(f"{exchange.method} {exchange.route}")
                    span.set_attributes(_attributes(exchange))
                self._tell(exchange, account)

    def _count(self, change: int) -> None:
        self._in_flight += change
        record(metrics.IN_FLIGHT, self._in_flight)

    def _tell(self, exchange: Exchange, account: Account) -> None:
        seconds = time.perf_counter() - exchange.began
        _measure(exchange, account, seconds)
        settings = self._guarded().settings.telemetry
        if settings.access_log:
            _log_line(exchange, account, seconds, as_text=settings.logs == "text")


def _attributes(exchange: Exchange) -> dict[str, str | int]:
    """Of a request's span, by the names that OpenTelemetry gives them."""
    return {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "request_id": asked().request_id,
    }


def _measure(exchange: Exchange, account: Account, seconds: float) -> None:
    status = str(exchange.status)
    route = {"route": exchange.route, "method": exchange.method}
    record(metrics.REQUEST_SECONDS, seconds, **route, status=status)
    if exchange.status >= 400:
        record(metrics.REFUSED, status=status, kind=exchange.kind or "other")
    for stage, taken in account.stages.items():
        record(metrics.STAGE_SECONDS, taken, stage=stage)
    for reason in account.facts.get("degraded_reasons", ()):
        record(metrics.DEGRADED, reason=reason)
    if account.facts.get("reranked"):
        record(metrics.RERANK_DEPTH, account.facts["reranked"])


def _log_line(exchange: Exchange, account: Account, seconds: float, *, as_text: bool) -> None:
    """Tell of a request; nothing of what it holds, and of its key only the name."""
    level = logging.DEBUG if exchange.is_probe and exchange.status < 400 else logging.INFO
    if not log.isEnabledFor(level):
        return
    request = asked()
    facts: dict[str, Any] = {
        "request_id": request.request_id,
        "client": request.client,
        "tenant": request.tenant,
        "method": exchange.method,
        "http_route": exchange.route,  # Serve calls the application's prefix `route`
        "status": exchange.status,
        "kind": exchange.kind,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "duration_ms": round(1000 * seconds, 3),
        "stages_ms": {name: round(1000 * took, 3) for name, took in account.stages.items()},
        "trace_id": traces.trace_id(),
        **{name: logs.cut(value) for name, value in account.facts.items()},
    }
    said = logs.as_text(facts) if as_text else f"{exchange.method} {exchange.route}"
    log.log(level, "request %s", said, extra=facts)
