"""`GET /metrics`: the numbers of the whole service, whichever replica is asked.

They are those that the metrics agents of all of Ray's nodes export, of which ours are taken, and what Ray Serve tells
of our application. So there is one place that adds up, one answer however many replicas there are, and totals that
outlive them. They are as old as Ray's report interval: up to ten seconds. Whoever scrapes Ray's agents already has
these series, and should not scrape this too.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import httpx
import ray
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from pipelines.serving.described import TOLD, Responses
from slq.errors import UnavailableError

APPLICATION = "slq"
NODES = "slq_serve_metrics_nodes"
_TIMEOUT_S = 5.0
_KEPT_S = 1.0  # nothing to numbers that are up to ten seconds old; nobody needs a key to ask for them by default
OURS = "ray_slq_"
_OF_SERVE = "ray_serve_"
_NOISE = ("otel_scope_name", "otel_scope_schema_url", "otel_scope_version")  # the same everywhere
_TEXT = {"schema": {"type": "string"}}
_ANSWERS: Responses = {
    200: {"description": "Prometheus' text format", "content": {"text/plain": _TEXT}},
    **TOLD,
}
router = APIRouter()


class Gathering:
    """Gathers the numbers once for all who ask at the same time, and a little later.

    Args:
        gather: Does it.
        kept_s: How long an answer is given again. A failure is not, but to those who waited for it.
        clock: Seconds.
    """

    def __init__(
        self,
        gather: Callable[[], Awaitable[bytes]],
        kept_s: float = _KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gather = gather
        self._kept_s = kept_s
        self._clock = clock
        self._text, self._until = b"", -1.0
        self._running: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        """What was gathered.

        Raises:
            UnavailableError: As `exposition`.
        """
        if self._clock() < self._until:
            return self._text
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)  # whoever leaves takes it from nobody

    async def _run(self) -> bytes:
        text = await self._gather()
        self._text, self._until = text, self._clock() + self._kept_s
        return text


async def _gather() -> bytes:
    return await exposition(await asyncio.to_thread(agents))


_GATHERING = Gathering(_gather)


@router.get("/metrics", response_class=Response, responses=_ANSWERS)
async def metrics() -> Response:
    """Metrics of the whole service for Prometheus, up to ten seconds old."""
    return Response(await _GATHERING.text(), media_type=CONTENT_TYPE_LATEST)


def agents() -> list[str]:
    """URLs of the metrics of each of Ray's nodes that is alive."""
    return [
        f"http://{_host(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


async def exposition(urls: Sequence[str]) -> bytes:
    """Our metrics of all nodes, in Prometheus' text format; how many nodes did not answer is among them.

    Args:
        urls: Of the metrics of each node.

    Raises:
        UnavailableError: None answers.
    """
    # Never through a proxy of the environment: these are nodes of the cluster.
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        pages = await asyncio.gather(*[_page(client, url) for url in urls])
    found = [page for page in pages if page is not None]
    if not found:
        raise UnavailableError("no node of the cluster gives metrics now; try again later")
    return await asyncio.to_thread(_rendered, found, len(urls) - len(found))


async def _page(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        answer = await client.get(url)
    except httpx.HTTPError:
        return None
    return answer.text if answer.is_success else None


class _Families:
    """A collector, as `prometheus_client` calls what it asks for metrics."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _rendered(pages: Sequence[str], num_lost: int) -> bytes:
    nodes = GaugeMetricFamily(
        NODES, "Nodes of the cluster by whether they gave metrics.", labels=["state"]
    )
    nodes.add_metric(["ok"], len(pages))
    nodes.add_metric(["lost"], num_lost)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*merged(pages), nodes]))
    return generate_latest(registry)


def merged(pages: Iterable[str]) -> list[Metric]:
    """Our families of several pages: each stands once, with the samples of all."""
    families: dict[str, Metric] = {}
    for page in pages:
        lines = [line for line in page.splitlines() if _may_be_ours(line)]
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            into = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in _NOISE}
                if _is_ours(sample.name, labels):
                    into.samples.append(sample._replace(labels=labels))
    return [families[name] for name in sorted(families) if families[name].samples]


def _may_be_ours(line: str) -> bool:
    name = line.split(" ", 3)[2] if line.startswith("# ") else line
    return name.startswith((OURS, _OF_SERVE))


def _is_ours(name: str, labels: dict[str, str]) -> bool:
    return name.startswith(OURS) or labels.get("application") == APPLICATION
