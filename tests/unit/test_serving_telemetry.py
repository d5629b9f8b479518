"""What is told of a request: stages that do not overlap, wherever they are measured, and the log line made of them."""

import asyncio
import json
import logging
import logging.handlers
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pipelines.messages import error_body
from pipelines.serving import logs, metrics, telemetry, traces
from pipelines.serving.access import Access
from pipelines.serving.asked import Asked, answering, asked
from pipelines.serving.candidates import Candidates
from pipelines.serving.config import ServeConfig, TelemetryConfig
from pipelines.serving.guard import Guard
from pipelines.serving.logs import ToServe, as_text, logging_config
from pipelines.serving.metrics import CacheMeter, Series, VersionMeter
from pipelines.serving.telemetry import (
    Reply,
    accounting,
    heard,
    note,
    replying,
    results_of,
    shared_pass,
    spent,
    stage,
    timings_ms,
    told,
)
from pipelines.serving.watch import Watch
from slq.errors import ConfigError
from slq.schema import Item

ONE = ThreadPoolExecutor(1)


class Heard:
    """Takes what would go to Ray's metrics."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, dict[str, str]]] = []
        self.forgotten: list[tuple[str, dict[str, str]]] = []

    def record(self, series: Series, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(series.tags), series.name
        self.values.append((series.name, value, tags))

    def forget(self, series: Series, tags: dict[str, str]) -> None:
        self.forgotten.append((series.name, tags))

    def of(self, series: Series) -> list[tuple[float, dict[str, str]]]:
        return [(value, tags) for name, value, tags in self.values if name == series.name]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found = Heard()
    monkeypatch.setattr(metrics, "recorder", found)
    return found


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(telemetry.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# ---- stages ----


def test_stages_do_not_overlap_and_add_up_to_the_time_of_the_outermost(clock: Clock) -> None:
    with accounting() as account:
        with stage("fine"):
            clock.now += 1
            with stage("fetch"):
                clock.now += 10
            with stage("fetch"):
                clock.now += 20
            clock.now += 100
        with stage("search"):
            clock.now += 1000
    assert account.stages == {"fetch": 30, "fine": 101, "search": 1000}
    assert sum(account.stages.values()) == clock.now - 100


def test_what_another_process_took_is_not_counted_as_waiting_for_it(clock: Clock) -> None:
    reply = Reply("answer", {"embed": 3.0, "fetch": 1.0})
    with accounting() as account, stage("embed"), stage("queue"):
        clock.now += 6
        assert heard(reply) == "answer"
    assert account.stages == {"embed": 3, "fetch": 1, "queue": 2}
    assert heard("no reply") == "no reply"


def test_stages_that_ran_beside_one_another_never_make_one_negative(clock: Clock) -> None:
    with accounting() as account, stage("queue"):
        clock.now += 1
        spent("embed", 5.0)
    assert account.stages == {"embed": 5, "queue": 0}


def test_a_stage_counts_what_a_thread_of_it_does_and_what_fails(clock: Clock) -> None:
    def work() -> None:
        with stage("fetch"):
            clock.now += 2
            raise OSError("gone")

    async def scenario() -> dict[str, float]:
        with accounting() as account, pytest.raises(OSError, match="gone"), stage("fine"):
            await asyncio.to_thread(work)
        return account.stages

    assert asyncio.run(scenario()) == {"fetch": 2, "fine": 0}


def test_requests_that_are_answered_at_once_keep_their_accounts_apart() -> None:
    async def request(name: str) -> dict[str, Any]:
        with accounting() as account:
            await asyncio.sleep(0)
            note(reranked=name)
            with stage("search"):
                await asyncio.sleep(0)
            note(model=name)
        return {**account.facts, "stages": list(account.stages)}

    async def scenario() -> list[dict[str, Any]]:
        return await asyncio.gather(*[request(name) for name in "abc"])

    assert asyncio.run(scenario()) == [
        {"reranked": name, "model": name, "stages": ["search"]} for name in "abc"
    ]


def test_outside_of_a_request_nothing_is_kept() -> None:
    note(model="x")
    spent("embed", 1.0)
    with stage("search"):
        pass
    assert timings_ms() == dict.fromkeys(("queue", "embed", "search", "fetch", "fine"), 0.0)


def test_timings_are_milliseconds_of_every_stage(clock: Clock) -> None:
    with accounting(), stage("search"):
        clock.now += 0.25
        with stage("fine"):
            clock.now += 0.5
        assert timings_ms()["fine"] == pytest.approx(500)
        assert timings_ms()["queue"] == 0


class Deployment:
    @replying
    async def embed(self, text: str, *, loud: bool = False) -> str:
        """Answers."""
        with stage("embed"):
            return f"{text}{'!' if loud else ''} of {asked().request_id}"


def test_a_deployment_tells_its_stages_only_to_whoever_asks_for_a_request() -> None:
    async def scenario() -> tuple[Any, Any]:
        answering(Asked(request_id="r-1"))
        asking = told()
        answering(Asked(request_id="other"))
        return (
            await Deployment().embed("a", loud=True),
            await Deployment().embed("a", told=asking),
        )

    plain, reply = asyncio.run(scenario())
    assert plain == "a! of other"
    assert reply.value == "a of r-1"
    assert list(reply.stages) == ["embed"]
    assert Deployment.embed.__doc__ == "Answers."


def test_a_part_of_the_same_process_leaves_the_request_as_it_is() -> None:
    async def scenario() -> Asked:
        request = Asked("r-1", "alice", "tenant", frozenset({"admin"}))
        answering(request)
        await Deployment().embed("a", told=told())
        assert asked() is request
        with pytest.raises(TypeError):
            await Deployment().embed(told=told())  # type: ignore[call-arg]
        return asked()

    assert asyncio.run(scenario()).scopes == {"admin"}


def test_a_pass_counts_once_for_each_request_and_once_as_a_batch(
    clock: Clock, recorded: Heard
) -> None:
    def run(values: list[int]) -> list[int]:
        clock.now += 4
        return [2 * value for value in values]

    async def scenario() -> tuple[list[int], dict[str, float]]:
        first = await shared_pass(ONE, run, [1, 2, 3], size=3)
        second = await shared_pass(ONE, run, [4], size=1)
        with accounting() as account:
            return results_of("embed", [*first[1:], *second]), account.stages

    results, stages = asyncio.run(scenario())
    assert results == [4, 6, 8]
    assert stages == {"embed": 8}
    assert recorded.of(metrics.BATCH_SIZE) == [(3, {}), (1, {})]


def test_reading_a_candidate_is_a_stage_of_its_own(clock: Clock) -> None:
    class Slow:
        def item(self) -> Item:
            clock.now += 7
            return Item(text="x")

    with accounting() as account, stage("fine"):
        assert Candidates([Slow(), Slow()])[1].text == "x"
    assert account.stages == {"fetch": 7, "fine": 0}


# ---- meters ----


def test_caches_tell_what_was_added_and_nothing_where_nothing_was(recorded: Heard) -> None:
    meter = CacheMeter()
    meter.tell({"vision": {"hits": 0, "misses": 0, "bytes": 0, "values": 0}})
    assert recorded.values == []
    meter.tell({"vision": {"hits": 2, "misses": 3, "bytes": 50, "values": 3}})
    meter.tell({"vision": {"hits": 7, "misses": 3, "bytes": 50, "values": 3}})
    lookups = recorded.of(metrics.CACHE_LOOKUPS)
    total = {
        result: sum(v for v, tags in lookups if tags["result"] == result)
        for result in ("hit", "miss")
    }
    assert total == {"hit": 7, "miss": 3}
    assert recorded.of(metrics.CACHE_BYTES) == [(50, {"cache": "vision"})]


def test_one_index_version_is_shown_at_a_time(recorded: Heard) -> None:
    meter, now = VersionMeter(), {}
    for version in ("v1", "v1", "v2", "v1"):
        meter.show(version)
    for value, tags in recorded.of(metrics.INDEX_INFO):
        now[tags["version"]] = value
    assert now == {"v1": 1, "v2": 0}
    assert len(recorded.values) == 5
    assert [tags["version"] for _, tags in recorded.forgotten] == ["v1", "v2"]


def test_gauges_are_set_again_and_again_until_they_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray shows one that nobody sets no more after a while."""
    seen: queue.Queue[tuple[float, str]] = queue.Queue()

    class Gauge:
        def __init__(self, **_: Any) -> None:
            pass

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen.put((value, tags["version"]))

    monkeypatch.setattr(metrics.ray_metrics, "Gauge", Gauge)
    monkeypatch.setattr(metrics, "_AGAIN_S", 0.001)
    recorder = metrics.RayRecorder()
    recorder.record(metrics.INDEX_INFO, 0, {"version": "v1"})
    recorder.record(metrics.INDEX_INFO, 1, {"version": "v1"})
    while seen.get(timeout=60) != (1, "v1"):
        pass
    assert {seen.get(timeout=60) for _ in range(5)} == {(1, "v1")}
    recorder.record(metrics.INDEX_INFO, 1, {"version": "v2"})
    recorder.forget(metrics.INDEX_INFO, {"version": "v1"})
    with recorder._lock:  # nothing is set meanwhile
        seen.queue.clear()
    assert {seen.get(timeout=60) for _ in range(5)} == {(1, "v2")}
    recorder.forget(metrics.INDEX_INFO, {"version": "v2"})


def test_ray_takes_every_series_under_its_labels() -> None:
    recorder = metrics.RayRecorder()
    for series in metrics.ALL:
        for _ in range(2):
            recorder.record(series, 1.0, dict.fromkeys(series.tags, "x"))
    with pytest.raises(ValueError, match="Missing value for tag"):
        recorder.record(metrics.STAGE_SECONDS, 1.0, {})


# ---- requests ----


async def search(request: Request) -> JSONResponse:
    await request.body()
    with stage("search"):
        note(reranked=3, degraded_reasons=["budget", "candidates"], index_version="v000007")
    return JSONResponse({"results": []})


async def refused(_: Request) -> JSONResponse:
    return JSONResponse(error_body("no secret", "rate_limited"), 429)


async def broken(_: Request) -> PlainTextResponse:
    raise RuntimeError("the query was: my secret")


async def streamed(_: Request) -> StreamingResponse:
    return StreamingResponse(iter([b"ab", b"cde"]))


def client_of(**settings: Any) -> TestClient:
    app = Starlette(
        routes=[
            Route("/search", search, methods=["POST"]),
            Route("/items/{item_id:path}/image", streamed),
            Route("/refused", refused),
            Route("/broken", broken),
            Route("/healthz", streamed),
        ]
    )
    config = ServeConfig(telemetry=TelemetryConfig(**settings), max_body_bytes=1000)
    replica = SimpleNamespace(settings=config, access=Access(config))
    app.add_middleware(Guard, guarded=lambda: replica)
    app.add_middleware(Watch, guarded=lambda: replica)
    return TestClient(with_templates(app), raise_server_exceptions=False)


def with_templates(app: Starlette) -> Starlette:
    """Starlette does not say in its scope which route it found, as FastAPI does."""
    for route in app.router.routes:
        inner = route.app

        async def told_route(scope: Any, receive: Any, send: Any, of: Any = (route, inner)) -> None:
            scope["route"] = of[0]
            await of[1](scope, receive, send)

        route.app = told_route
    return app


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "pipelines.serving.watch")
    return lambda: [r for r in caplog.records if r.name == "pipelines.serving.watch"]


def test_a_request_leaves_one_line_with_what_is_known_of_it(lines: Any, recorded: Heard) -> None:
    body = {"query": {"text": "my secret"}}
    answer = client_of().post("/search", json=body, headers={"x-request-id": "r-7"})
    (line,) = lines()
    assert (line.request_id, line.method, line.http_route, line.status) == (
        *("r-7", "POST", "/search", 200),
    )
    assert line.bytes_in == len(answer.request.content)
    assert line.bytes_out == len(answer.content)
    assert (line.reranked, line.index_version) == (3, "v000007")
    assert line.degraded_reasons == ["budget", "candidates"]
    assert list(line.stages_ms) == ["search"]
    assert line.duration_ms >= line.stages_ms["search"] >= 0
    assert "secret" not in json.dumps(vars(line), default=str)
    assert line.getMessage() == "request POST /search"
    assert recorded.of(metrics.RERANK_DEPTH) == [(3, {})]
    assert [tags["reason"] for _, tags in recorded.of(metrics.DEGRADED)] == ["budget", "candidates"]
    assert [tags for _, tags in recorded.of(metrics.STAGE_SECONDS)] == [{"stage": "search"}]
    assert [value for value, _ in recorded.of(metrics.IN_FLIGHT)] == [1, 0]


def test_a_line_of_text_holds_it_all_in_its_message(lines: Any) -> None:
    client_of(logs="text").post("/search", json={}, headers={"x-request-id": "r-8"})
    (line,) = lines()
    said = dict(part.split("=") for part in line.getMessage().split()[1:])
    assert said["request_id"] == "r-8"
    assert (said["status"], said["reranked"], said["http_route"]) == ("200", "3", "/search")
    assert said["degraded_reasons"] == "budget,candidates"
    assert float(said["duration_ms"]) >= float(said["stages_ms"].removeprefix("search:"))


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "kind"),
    [
        ("GET", "/items/a/b c/image", "/items/{item_id:path}/image", 200, None),
        ("GET", "/refused", "/refused", 429, "rate_limited"),
        ("GET", "/broken", "/broken", 500, "server_error"),
        ("GET", "/no/such/thing", "none", 404, "other"),
        ("POST", "/search", "none", 413, "too_large"),  # refused before its route is known
    ],
)
def test_routes_are_counted_by_template_and_refusals_by_kind(
    method: str, path: str, route: str, status: int, kind: str | None, recorded: Heard
) -> None:
    client_of().request(method, path, content=b"x" * (2000 if method == "POST" else 0))
    ((_, tags),) = recorded.of(metrics.REQUEST_SECONDS)
    assert tags == {"route": route, "method": method, "status": str(status)}
    refusals = [tags for _, tags in recorded.of(metrics.REFUSED)]
    assert refusals == ([] if kind is None else [{"status": str(status), "kind": kind}])
    assert recorded.of(metrics.IN_FLIGHT)[-1] == (0, {})


def test_a_client_that_leaves_is_told_of_as_such(recorded: Heard, lines: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        answering(Asked(request_id="r-9"))
        await asyncio.Event().wait()

    async def nothing(*_: Any) -> Any:
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        watch = Watch(app, guarded=lambda: SimpleNamespace(settings=ServeConfig()))
        scope = {"type": "http", "method": "POST", "path": "/search", "headers": []}
        task = asyncio.create_task(watch(scope, nothing, nothing))
        await asyncio.sleep(0)
        assert recorded.of(metrics.IN_FLIGHT) == [(1, {})]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    ((_, tags),) = recorded.of(metrics.REFUSED)
    assert tags == {"status": "499", "kind": "client_gone"}
    assert recorded.of(metrics.IN_FLIGHT)[-1] == (0, {})
    (line,) = lines()
    assert (line.request_id, line.status) == ("r-9", 499)


def test_an_invented_method_makes_no_series_of_its_own(recorded: Heard) -> None:
    client_of().request("BREW", "/search")
    ((_, tags),) = recorded.of(metrics.REQUEST_SECONDS)
    assert tags["method"] == "other"


def test_probes_are_silent_and_lines_can_be_turned_off(lines: Any, recorded: Heard) -> None:
    client_of().get("/healthz")
    client_of(access_log=False).get("/refused")
    assert lines() == []
    assert len(recorded.of(metrics.REQUEST_SECONDS)) == 2


def test_watching_a_request_takes_little_of_it() -> None:
    """Against a bare app, by counting calls and not time, which other work on this machine would move."""

    async def nothing(*_: Any) -> None:
        return None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    config = ServeConfig(telemetry=TelemetryConfig(access_log=False))
    watch = Watch(app, guarded=lambda: SimpleNamespace(settings=config))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}

    def calls() -> int:
        count = 0

        def counting(_: Any, event: str, __: Any) -> None:
            nonlocal count
            count += event == "call"

        running = watch(scope, nothing, nothing)
        sys.setprofile(counting)
        try:
            with pytest.raises(StopIteration):
                running.send(None)
        finally:
            sys.setprofile(None)
        return count

    calls()
    assert calls() < 150


# ---- settings ----


def test_serve_logs_in_the_form_that_is_asked_for_and_not_each_call() -> None:
    for given, encoding in (("json", "JSON"), ("text", "TEXT")):
        config = logging_config(TelemetryConfig(logs=given, level="WARNING"))
        assert isinstance(config, LoggingConfig)
        assert (config.encoding, config.log_level) == (encoding, "WARNING")
        assert not config.enable_access_log


def test_our_records_reach_the_handlers_that_serve_has_then() -> None:
    found: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    ours, theirs, handler = (
        logging.getLogger("test-ours"),
        logging.getLogger("ray.serve"),
        Handler(),
    )
    forward = ToServe()
    ours.addHandler(forward)
    theirs.addHandler(handler)  # after ours, as Serve configures its own again when it likes
    try:
        ours.warning("candidate %s is gone", "x", extra={"request_id": "r"})
    finally:
        ours.removeHandler(forward)
        theirs.removeHandler(handler)
    assert [(one.getMessage(), one.name) for one in found] == [("candidate x is gone", "test-ours")]


def test_facts_on_one_line_leave_out_what_is_empty() -> None:
    facts = {"a": "", "b": None, "c": 0, "d": 1.25, "e": {"x": 2.0}, "f": ["p", "q"], "g": []}
    assert as_text(facts) == "c=0 d=1.2 e=x:2.0 f=p,q"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x\n2030 ERROR forged", "x\\n2030 ERROR forged"),
        ("a\r\x1b[31m\x85\u2028", "a\\r\\x1b[31m\\x85\\u2028"),
        ("\ud800", "\\ud800"),
        (["p\n", "q"], "p\\n,q"),
        ({"k": "\t"}, "k:\\t"),
        ("für 😀", "für 😀"),
        ("y" * 200, "y" * 200),
        ("y" * 201, "y" * 200 + "..."),
    ],
)
def test_no_fact_breaks_its_line_or_fills_it(value: Any, shown: str) -> None:
    assert as_text({"a": value}) == f"a={shown}"


def test_parts_in_one_process_begin_once(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = SimpleNamespace(replica_tag="one", deployment="Ingress")
    monkeypatch.setattr(telemetry.serve, "get_replica_context", lambda: replica)
    begun: list[str] = []
    monkeypatch.setattr(telemetry.logs, "begin", lambda _: begun.append("logs"))
    monkeypatch.setattr(telemetry.traces, "begin", lambda *_: begun.append("traces"))
    telemetry._begin.cache_clear()
    for _ in range(3):
        telemetry.begin(TelemetryConfig(traces="http://127.0.0.1:1"))
    telemetry._begin.cache_clear()
    assert begun == ["logs", "traces"]


def test_outside_of_a_replica_nothing_is_set_up() -> None:
    before = logging.getLogger("pipelines").handlers[:]
    telemetry.begin(TelemetryConfig(traces="http://127.0.0.1:1"))
    assert logging.getLogger("pipelines").handlers == before
    assert traces.carrier() == {}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"recall_share": 1.5}, "less than or equal to 1"),
        ({"recall_k": 0}, "greater than 0"),
        ({"logs": "xml"}, "'json' or 'text'"),
        ({"traces": "localhost:4318"}, "a URL of http or https"),
        ({"traces": "http:///v1/traces"}, "a URL of http or https"),
        ({"trace": None}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TelemetryConfig(**values)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    values = {"traces": "http://user:hunter2@collector:4318"}
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as refusal:
        TelemetryConfig.parse(values, source="recipe")
    assert "hunter2" not in str(refusal.value)


def test_handlers_that_a_package_has_closed_keep_no_replica_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As pymilvus does where it sets up logging for itself."""
    whole, closed = logging.handlers.MemoryHandler(1), logging.handlers.MemoryHandler(1)
    target = logging.NullHandler()
    target.setFormatter(logging.Formatter("%(message)s!"))
    whole.setTarget(target)
    stream = logging.StreamHandler()
    monkeypatch.setattr(logs, "OURS", ())  # the loggers of this process stay as they are
    for handlers in ([closed, stream], [closed, whole, stream]):
        monkeypatch.setattr(logs, "SERVE", SimpleNamespace(handlers=handlers))
        logs.begin(TelemetryConfig())
    assert stream.formatter is target.formatter
