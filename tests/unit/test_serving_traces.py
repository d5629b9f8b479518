"""Spans of a request: one trace from the client's header through every deployment, and out over OTLP."""

import asyncio
import builtins
import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pipelines.recipe import Recipe
from pipelines.serve import check_before_start
from pipelines.serving import traces
from pipelines.serving.asked import Asked, answering
from pipelines.serving.config import ServeConfig
from pipelines.serving.telemetry import (
    heard,
    replying,
    results_of,
    shared_pass,
    stage,
    told,
)
from pipelines.serving.watch import Watch
from slq.errors import ConfigError
from tests.integration.runs import changed
from tests.otlp import Collector, collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ONE = ThreadPoolExecutor(1)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces.use(provider)
    yield exporter
    traces.use(None)
    provider.shutdown()


class Backbone:
    """A deployment, whose calls cross to another process."""

    @replying
    async def embed(self, texts: list[str]) -> list[str]:
        return results_of("embed", await shared_pass(ONE, list, texts, size=len(texts)))

    @replying
    async def rank(self) -> None:
        def read() -> None:
            with stage("fetch"):
                pass

        with stage("fine"):
            await asyncio.to_thread(read)


async def crossed(call: Any) -> Any:
    """In a context of its own, where nothing is known but what the call holds."""
    return heard(await asyncio.create_task(call, context=contextvars.Context()))


async def app(scope: Any, receive: Any, send: Any) -> None:
    answering(Asked(request_id="r-1"))
    scope["route"] = type("Route", (), {"path": "/search"})
    backbone = Backbone()
    with stage("embed"), stage("queue"):
        await crossed(backbone.embed(["a", "b"], told=told()))
    with stage("search"):
        pass
    with stage("fine"), stage("queue"):
        await crossed(backbone.rank(told=told()))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(application: Any = app, *, traceparent: str | None = None, path: str = "/search") -> None:
    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    headers = [] if traceparent is None else [(b"traceparent", traceparent.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(
        Watch(application, guarded=lambda: SimpleNamespace(settings=ServeConfig()))(
            scope, nothing, nothing
        )
    )


def tree(found: tuple[ReadableSpan, ...]) -> list[tuple[str, str | None]]:
    """(name, name of its parent) of each span; the parent of another process has none."""
    names = {span.context.span_id: span.name for span in found}
    return sorted(
        (span.name, names.get(span.parent.span_id) if span.parent else None) for span in found
    )


def test_a_request_is_one_trace_of_its_client_through_every_deployment(
    spans: InMemorySpanExporter,
) -> None:
    ask(traceparent=f"00-{TRACE}-{PARENT}-01")
    found = spans.get_finished_spans()
    assert tree(found) == sorted(
        [
            ("POST /search", None),
            ("embed", "POST /search"),
            ("embed", "embed"),
            ("search", "POST /search"),
            ("fine", "POST /search"),
            ("fine", "fine"),
            ("fetch", "fine"),
        ]
    )
    assert {f"{span.context.trace_id:032x}" for span in found} == {TRACE}
    root = next(span for span in found if span.name == "POST /search")
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/search",
        "http.response.status_code": 200,
        "request_id": "r-1",
    }
    inner = [span for span in found if (span.attributes or {}).get("batch_size") == 2]
    assert len(inner) == 1
    outer = next(span for span in found if span.name == "embed" and span not in inner)
    assert outer.start_time <= inner[0].start_time + 10**6  # two clocks, one of them rounded
    assert inner[0].end_time <= outer.end_time + 10**6


def test_what_the_client_does_not_sample_is_not_sampled_here(spans: InMemorySpanExporter) -> None:
    ask(traceparent=f"00-{TRACE}-{PARENT}-00")
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_header_that_is_none_begins_a_new_trace(header: str, spans: InMemorySpanExporter) -> None:
    ask(traceparent=header)
    roots = [span for span in spans.get_finished_spans() if span.parent is None]
    assert [span.name for span in roots] == ["POST /search"]


def test_requests_one_after_another_have_traces_of_their_own(spans: InMemorySpanExporter) -> None:
    ask()
    ask()
    assert len({span.context.trace_id for span in spans.get_finished_spans()}) == 2


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_probes_leave_no_trace(path: str, spans: InMemorySpanExporter) -> None:
    async def fine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    ask(fine, path=path)
    assert spans.get_finished_spans() == ()


def test_an_error_is_named_by_its_kind_alone(spans: InMemorySpanExporter) -> None:
    async def broken(*_: Any) -> None:
        raise ValueError("the query was: my secret")

    with pytest.raises(ValueError, match="my secret"):
        ask(broken)
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "ValueError"
    assert "secret" not in span.to_json()


def test_without_traces_calls_say_nothing_of_any() -> None:
    ask(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert told().trace == {}
    assert traces.trace_id() == ""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found
    traces.use(None)


def test_spans_are_posted_to_the_endpoint_that_is_named(collector: Collector) -> None:
    provider = traces.begin(collector.url, 1.0, {"slq.deployment": "Ingress"})
    ask()
    provider.shutdown()
    assert collector.paths == {"/v1/traces"}
    assert sorted(span.name for span in collector.spans) == sorted(
        ["POST /search", *2 * ["embed", "fine"], "search", "fetch"]
    )
    assert {span.about["slq.deployment"] for span in collector.spans} == {"Ingress"}


def test_of_a_share_of_none_only_what_clients_sample_is_sent(collector: Collector) -> None:
    provider = traces.begin(collector.url, 0.0, {})
    ask()
    with traces.continued({"traceparent": f"00-{TRACE}-{PARENT}-01"}), traces.span("theirs"):
        assert traces.trace_id() == TRACE
    provider.shutdown()
    assert [(span.name, span.trace_id) for span in collector.spans] == [("theirs", TRACE)]


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c:4318/", "https://c:4318/v1/traces"),
        ("http://c/otlp/v1/traces", "http://c/otlp/v1/traces"),
    ],
)
def test_a_url_without_a_path_gets_that_of_otlp(given: str, endpoint: str) -> None:
    assert traces.endpoint_of(given) == endpoint


def test_traces_without_opentelemetry_are_refused_before_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return there(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    recipe = changed(Recipe(), serve={"telemetry": {"traces": "http://127.0.0.1:4318"}})
    with pytest.raises(ConfigError, match=r"pip install 'slq\[otel\]'"):
        check_before_start(recipe)
