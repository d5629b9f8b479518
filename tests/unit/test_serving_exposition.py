"""`GET /metrics`: what all nodes export, ours alone, each series once."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pipelines.serve import APP_NAME
from pipelines.serving import exposition as module
from pipelines.serving.exposition import APPLICATION, Gathering, agents, exposition
from slq.errors import UnavailableError

SCOPE = 'otel_scope_name="ray",otel_scope_schema_url="",otel_scope_version=""'
REQUESTS = """# HELP ray_slq_serve_request_seconds Requests.
# TYPE ray_slq_serve_request_seconds histogram
ray_slq_serve_request_seconds_bucket{{WorkerId="{w}",le="0.1",route="/search",{s}}} {n}.0
ray_slq_serve_request_seconds_bucket{{WorkerId="{w}",le="+Inf",route="/search",{s}}} {n}.0
ray_slq_serve_request_seconds_count{{WorkerId="{w}",route="/search",{s}}} {n}.0
ray_slq_serve_request_seconds_sum{{WorkerId="{w}",route="/search",{s}}} 0.5
"""
OTHERS = """# HELP ray_tasks Tasks by state.
# TYPE ray_tasks gauge
ray_tasks{Name="a secret job",State="RUNNING"} 3.0
# HELP ray_serve_deployment_replica_healthy Healthy.
# TYPE ray_serve_deployment_replica_healthy gauge
ray_serve_deployment_replica_healthy{WorkerId="WORKER",application="slq",deployment="Ingress"} 1.0
ray_serve_deployment_replica_healthy{application="others",deployment="Secret"} 1.0
# HELP ray_serve_proxy_status Of no application.
# TYPE ray_serve_proxy_status gauge
ray_serve_proxy_status{node_id="secret"} 2.0
"""
COUNTER = """# HELP ray_slq_serve_degraded_total Degraded.
# TYPE ray_slq_serve_degraded_total counter
ray_slq_serve_degraded_total{{WorkerId="{w}",reason="budget"}} {n}.0
"""


def page(worker: str, requests: int, degraded: int) -> str:
    return (
        OTHERS.replace("WORKER", worker)
        + REQUESTS.format(w=worker, n=requests, s=SCOPE)
        + COUNTER.format(w=worker, n=degraded)
    )


@contextmanager
def node(text: str, status: int = 200) -> Iterator[str]:
    """An agent of a node on this machine; gives its URL."""

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Agent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


def scraped(*nodes: tuple[str, int], lost: int = 0) -> str:
    with ExitStack() as stack:
        urls = [stack.enter_context(node(*one)) for one in nodes]
        urls += lost * ["http://127.0.0.1:9/metrics"]
        return asyncio.run(exposition(urls)).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Value of each series; fails where one stands twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def total(text: str, name: str) -> float:
    return sum(value for (series, _), value in samples(text).items() if series == name)


def test_the_totals_are_those_of_all_nodes_and_each_family_stands_once() -> None:
    text = scraped((page("w1", 3, 1), 200), (page("w2", 4, 5), 200))
    assert total(text, "ray_slq_serve_request_seconds_count") == 7
    assert total(text, "ray_slq_serve_degraded_total") == 6
    declared = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared)) == 4
    assert "# TYPE ray_slq_serve_request_seconds histogram" in declared
    assert "# TYPE ray_slq_serve_degraded_total counter" in declared


def test_nothing_of_others_is_handed_out() -> None:
    text = scraped((page("w1", 3, 1), 200))
    assert "secret" not in text.lower()
    assert "otel_scope" not in text
    assert total(text, "ray_serve_deployment_replica_healthy") == 1


def test_nodes_that_do_not_answer_are_left_out_and_counted() -> None:
    text = scraped((page("w1", 3, 1), 200), ("broken", 500), lost=1)
    assert total(text, "ray_slq_serve_request_seconds_count") == 3
    assert samples(text)["slq_serve_metrics_nodes", frozenset({("state", "ok")})] == 1
    assert samples(text)["slq_serve_metrics_nodes", frozenset({("state", "lost")})] == 2


def test_without_any_node_it_is_told_that_there_are_no_metrics() -> None:
    with pytest.raises(UnavailableError, match="no node of the cluster gives metrics"):
        scraped(lost=2)
    with pytest.raises(UnavailableError, match="no node"):
        scraped()


def test_only_nodes_that_live_and_export_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8080},
        {"Alive": False, "NodeManagerAddress": "10.0.0.2", "MetricsExportPort": 8080},
        {"Alive": True, "NodeManagerAddress": "fd00::3", "MetricsExportPort": 9090},
        {"Alive": True, "NodeManagerAddress": "10.0.0.4", "MetricsExportPort": -1},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert agents() == ["http://10.0.0.1:8080/metrics", "http://[fd00::3]:9090/metrics"]


class Numbers:
    """Gathers when it is let, and counts how often."""

    def __init__(self) -> None:
        self.now, self.count = 100.0, 0
        self.let = asyncio.Event()
        self.fault: Exception | None = None
        self.gathering = Gathering(self.gather, 1.0, lambda: self.now)

    async def gather(self) -> bytes:
        self.count += 1
        number = self.count
        await self.let.wait()
        if self.fault is not None:
            raise self.fault
        return b"%d" % number


def test_whoever_asks_meanwhile_or_soon_after_gets_the_same_numbers() -> None:
    async def scenario() -> None:
        numbers = Numbers()
        asking = [asyncio.create_task(numbers.gathering.text()) for _ in range(5)]
        await asyncio.sleep(0)
        asking[0].cancel()  # the one that began it leaves
        await asyncio.sleep(0)
        numbers.let.set()
        assert await asyncio.gather(*asking[1:]) == [b"1"] * 4
        numbers.now += 0.9
        assert await numbers.gathering.text() == b"1"
        numbers.now += 0.2
        assert await numbers.gathering.text() == b"2"
        assert numbers.count == 2

    asyncio.run(scenario())


def test_a_failure_is_told_to_all_who_wait_and_not_kept() -> None:
    async def scenario() -> None:
        numbers = Numbers()
        numbers.fault = UnavailableError("no node")
        asking = [asyncio.create_task(numbers.gathering.text()) for _ in range(2)]
        await asyncio.sleep(0)
        numbers.let.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert found == [numbers.fault] * 2
        numbers.fault = None
        assert await numbers.gathering.text() == b"2"

    asyncio.run(scenario())


def test_the_route_gathers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()
    numbers.let.set()
    monkeypatch.setattr(module, "_GATHERING", numbers.gathering)
    first, second = (asyncio.run(module.metrics()).body for _ in range(2))
    assert (first, second, numbers.count) == (b"1", b"1", 1)


def test_the_application_is_the_one_that_is_started() -> None:
    assert APPLICATION == APP_NAME
