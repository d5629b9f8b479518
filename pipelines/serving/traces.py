"""Spans of OpenTelemetry, sent over OTLP; everything here does nothing until `begin` is told where to.

Ray Serve has traces of its own, but for a whole cluster: what exports them is set when Serve starts, takes no argument,
and runs in its proxies. Ours belong to one service, and work where Serve runs already.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slq.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Carrier = dict[str, str]
"""A trace context as W3C's headers `traceparent` and `tracestate`; empty where there is none."""
_OTLP_PATH = "/v1/traces"
_DELAY_MS = 1000  # after which spans are sent; a replica that is killed loses those of this time
_TIMEOUT_S = 3.0  # for all tries to send some; a replica waits for them when it ends
_tracer: "Tracer | None" = None


def require_installed() -> None:
    """Check that spans can be made.

    Raises:
        ConfigError: What makes them is not installed.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise ConfigError(
            "serve.telemetry.traces is set, and OpenTelemetry is not installed: pip install 'slq[otel]'"
        ) from None


def endpoint_of(url: str) -> str:
    """Where spans are posted; a URL without a path gets that of OTLP."""
    return url if urlsplit(url).path.strip("/") else url.rstrip("/") + _OTLP_PATH


def begin(url: str, share: float, about: Mapping[str, str]) -> "TracerProvider":
    """Make spans from now on, and send them.

    Args:
        url: Of an OTLP endpoint over HTTP. Headers that it asks for stand in OTEL_EXPORTER_OTLP_HEADERS.
        share: Of traces that begin here; for others, their beginning decided.
        about: What is said of this process with each span.

    Returns:
        What makes them; it sends what is left when the process ends.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    require_installed()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(share)), resource=Resource.create(dict(about))
    )
    exporter = OTLPSpanExporter(endpoint=endpoint_of(url), timeout=_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
    use(provider)
    return provider


def use(provider: "TracerProvider | None") -> None:
    """Make spans by a provider, or none from now on; not the provider of the whole process, which is others'."""
    global _tracer  # noqa: PLW0603 - one tracer for a process, as with OpenTelemetry's own
    _tracer = None if provider is None else provider.get_tracer("slq")


@contextmanager
def span(name: str, *, is_server: bool = False) -> Iterator["Span | None"]:
    """A span around what is done meanwhile; an error is named by its kind, as its words may hold what was asked."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode

    opened = _tracer.start_as_current_span(
        name,
        kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
        record_exception=False,
        set_status_on_exception=False,
    )
    with opened as current:
        try:
            yield current
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(Status(StatusCode.ERROR))
            raise


def past_span(name: str, began: float, ended: float, **attributes: Any) -> None:
    """A span of what was done elsewhere, below the current one.

    Args:
        name: Of the span.
        began: When (s, of `time.perf_counter` in this process).
        ended: When.
        attributes: Of the span.
    """
    if _tracer is None:
        return
    offset = time.time() - time.perf_counter()
    made = _tracer.start_span(name, start_time=_ns(began + offset), attributes=attributes)
    made.end(_ns(ended + offset))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def carrier() -> Carrier:
    """The current trace context, to be passed on."""
    found: Carrier = {}
    if _tracer is not None:
        _propagator().inject(found)
    return found


@contextmanager
def continued(given: Mapping[str, str]) -> Iterator[None]:
    """Let spans belong to a trace that began elsewhere."""
    if _tracer is None:
        yield
        return
    from opentelemetry import context

    token = context.attach(_propagator().extract(given, context.Context()))
    try:
        yield
    finally:
        context.detach(token)


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def trace_id() -> str:
    """Of the current span in hexadecimal; empty where there is none, or where it is not sampled."""
    if _tracer is None:
        return ""
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid and found.trace_flags.sampled else ""
