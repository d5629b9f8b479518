"""What a running service tells of itself: log lines, metrics and traces of the same requests, by the same names."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pipelines.embed import embed
from pipelines.index import index
from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from tests.integration.runs import changed, with_untrained_adapter
from tests.integration.test_serve_ray import DEPTH, QUERY, REPLACED, recipe_of
from tests.otlp import Collector, collecting

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SECRET = "zebras wear my password"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PATIENCE_S = 90.0  # Ray hands metrics on every ten seconds
T = TypeVar("T")


def awaited(look: Callable[[], T], good: Callable[[T], bool]) -> T:
    """What `look` gives once it is good, or in the end."""
    until = time.monotonic() + PATIENCE_S
    while True:
        found = look()
        if good(found) or time.monotonic() > until:
            return found
        time.sleep(0.5)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def recipe(
    ray_cluster: None,
    scenes_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    collector: Collector,
) -> Recipe:
    """One item's image is gone by the time the service runs; it is the same as another one's."""
    given = with_untrained_adapter(recipe_of(scenes_dir, tmp_path_factory.mktemp("watch")))
    embed(given)
    index(given)
    (given.data.path("corpus").parent / "replaced.png").unlink()
    telemetry = {"recall_share": 1.0, "recall_k": 10, "traces": collector.url}
    return changed(given, serve={"vision_cache_bytes": 2**24, "telemetry": telemetry})


@pytest.fixture(scope="module")
def service(recipe: Recipe) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=start(recipe), timeout=60) as client:
        yield client
    stop()


def logs(pattern: str) -> list[dict[str, Any]]:
    """Lines of the log files of this session's Ray that are JSON."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [line for file in folder.glob(pattern) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def told_of(request_id: str, pattern: str = "serve/replica_*.log") -> list[dict[str, Any]]:
    return [line for line in logs(pattern) if line.get("request_id") == request_id]


def line_of(request_id: str, pattern: str = "serve/replica_*.log") -> dict[str, Any]:
    """The one line that is written when a request ends."""

    def ended() -> list[dict[str, Any]]:
        return [line for line in told_of(request_id, pattern) if "http_route" in line]

    (line,) = awaited(ended, bool)
    return line


def samples(service: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Value of each series by its name and the labels that are not Ray's."""
    answer = service.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            mine = {k: v for k, v in sample.labels.items() if k.islower()}
            key = (sample.name, frozenset(mine.items()))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def test_one_request_is_told_by_the_same_id_wherever_it_went(
    service: httpx.Client, recipe: Recipe
) -> None:
    rows = {row["id"]: row for row in pq.read_table(recipe.data.path("corpus")).to_pylist()}
    twin = next(row for row in rows.values() if row["image"] and row["id"] == "test-00001")
    image = base64.b64encode(twin["image"]).decode()
    body = {"query": {"text": SECRET, "image": image}, "mode": "fine", "rerank_k": 10}
    answer = service.post("/search", json=body, headers={"x-request-id": "watch-1"})
    found = answer.json()
    assert set(answer.headers["x-request-id"].split(", ")) == {"watch-1"}
    timings = found["timings_ms"]
    assert set(timings) == {"queue", "embed", "search", "fetch", "fine"}
    assert min(timings.values()) > 0
    line = line_of("watch-1")
    assert (line["http_route"], line["status"], line["levelname"]) == ("/search", 200, "INFO")
    assert line["reranked"] == found["reranked"]
    assert line["index_version"] == found["index_version"]
    assert line["degraded_reasons"] == found["degraded_reasons"]
    assert line["stages_ms"] == pytest.approx(timings, abs=0.01)
    assert sum(timings.values()) <= line["duration_ms"]
    assert line["bytes_in"] == len(answer.request.content)
    assert line["bytes_out"] == len(answer.content)
    if REPLACED in [result["id"] for result in found["results"] if result["problem"]]:
        warned = [one for one in told_of("watch-1") if of(one) == "BackboneService"]
        assert any("cannot be read" in one["message"] for one in warned)
    assert SECRET not in json.dumps(logs("serve/*.log"))


def of(line: dict[str, Any]) -> str:
    """The deployment that a line is of, without its application."""
    return str(line.get("deployment", "")).removeprefix("slq_")


def test_a_candidate_that_is_gone_is_told_by_the_backbone_with_the_request(
    service: httpx.Client,
) -> None:
    body = {"query": {"text": QUERY}, "mode": "fine", "filter": f"id = '{REPLACED}'"}
    answer = service.post("/search", json=body, headers={"x-request-id": "gone"})
    (result,) = answer.json()["results"]
    assert (result["id"], result["problem"] is not None) == (REPLACED, True)
    line_of("gone")
    (line,) = [one for one in told_of("gone") if of(one) == "BackboneService"]
    assert line["levelname"] == "WARNING"
    assert "replaced.png cannot be read" in line["message"]


def test_standard_error_holds_the_same_lines(service: httpx.Client) -> None:
    service.get("/v1/models", headers={"x-request-id": "watch-2"})
    line = line_of("watch-2", "worker-*.err")
    assert (line["http_route"], line["status"], of(line)) == ("/v1/models", 200, "Ingress")


def test_a_request_without_an_id_gets_the_one_that_serve_gives_it(service: httpx.Client) -> None:
    (given,) = set(service.get("/v1/models").headers["x-request-id"].split(", "))
    assert line_of(given)["http_route"] == "/v1/models"


def test_metrics_rise_by_the_requests_that_were_made(service: httpx.Client) -> None:
    name = "ray_slq_serve_request_seconds_count"
    fine = {"route": "/search", "method": "POST", "status": "200"}
    refused = {"route": "/search", "method": "POST", "status": "400"}
    service.post("/search", json={"query": {"text": QUERY}})
    service.post("/search", json={"query": {}})
    before = settled(service)
    for _ in range(3):
        service.post("/search", json={"query": {"text": QUERY}, "rerank_k": DEPTH})
    for _ in range(2):
        service.post("/search", json={"query": {}})
    after = settled(service)

    def risen(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert risen(name, **fine) == 3
    assert risen(name, **refused) == 2
    errors = {"status": "400", "kind": "invalid_request_error"}
    assert risen("ray_slq_serve_refused_total", **errors) == 2
    assert risen("ray_slq_serve_rerank_depth_count") == 3
    for stage in ("queue", "embed", "search", "fetch", "fine"):
        assert risen("ray_slq_serve_stage_seconds_count", stage=stage) >= 3
    assert risen("ray_slq_serve_batch_size_count") == 3
    assert risen("ray_slq_serve_cache_lookups_total", cache="vision", result="hit") > 0
    assert value(after, "ray_slq_serve_cache_bytes", cache="vision") > 0
    assert value(after, "slq_serve_metrics_nodes", state="lost") == 0


def settled(service: httpx.Client) -> dict[Any, float]:
    """The metrics, once Ray has handed on all that there is: twice the same after more than its interval."""
    before: dict[Any, float] = {}
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        now = {key: one for key, one in samples(service).items() if is_ours(key)}
        if now and now == before:
            return samples(service)
        before = now
        time.sleep(12)
    return samples(service)


def is_ours(key: tuple[str, frozenset[tuple[str, str]]]) -> bool:
    """Whether a series stands still where nobody asks for anything but metrics."""
    is_watching = key[0] == "ray_slq_serve_in_flight" or ("route", "/metrics") in key[1]
    return key[0].startswith("ray_slq_") and not is_watching


def test_recall_and_index_version_are_shown(service: httpx.Client) -> None:
    service.post("/search", json={"query": {"text": QUERY}, "mode": "coarse"})
    shown = {"k": "10", "version": "v000001"}
    name = "ray_slq_serve_recall"
    found = awaited(lambda: samples(service), lambda now: (name, frozenset(shown.items())) in now)
    assert value(found, name, **shown) == 1  # of a flat index
    assert value(found, "ray_slq_serve_index_info", version="v000001") == 1
    healthy = {
        dict(labels)["deployment"]: one
        for (series, labels), one in found.items()
        if series == "ray_serve_deployment_replica_healthy"
    }
    assert {"Ingress", "BackboneService", "IndexService"} <= set(healthy)


def test_a_request_is_one_trace_of_its_client_in_all_deployments(
    service: httpx.Client, collector: Collector
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "watch-3"}
    service.post("/search", json={"query": {"text": QUERY}, "mode": "fine"}, headers=headers)

    def seen() -> set[tuple[str, str]]:
        mine = [span for span in collector.spans if span.trace_id == TRACE]
        return {(span.about["slq.deployment"], span.name) for span in mine}

    expected = {
        *[("Ingress", name) for name in ("POST /search", "embed", "search", "fine")],
        *[("BackboneService", name) for name in ("embed", "fetch", "fine")],
    }
    assert awaited(seen, lambda found: found >= expected) >= expected
    assert line_of("watch-3")["trace_id"] == TRACE
