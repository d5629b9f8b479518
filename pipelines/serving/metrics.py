"""What the service counts and measures, for Prometheus: every series by its name, here and nowhere else.

Each replica records into Ray's own metrics (`ray.util.metrics`), which the agent of its node exports with the prefix
`ray_`, counters with the suffix `_total`. The agent keeps totals of replicas that are gone, and tells replicas apart by
the label `WorkerId`, so that a sum over it is right whatever was restarted, and counts nothing twice.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from ray.util import metrics as ray_metrics

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_AGAIN_S = 1.0  # Ray's shortest report interval
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Series:
    """One metric.

    Attributes:
        name: As it is recorded.
        description: What it says, with its unit.
        kind: Of metric.
        tags: Names of its labels, beside those of Ray.
        bounds: Upper bounds of a histogram's buckets.
    """

    name: str
    description: str
    kind: Literal["counter", "gauge", "histogram"]
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus; that of a histogram is followed by `_bucket`, `_count` or `_sum`."""
        return f"ray_{self.name}{'_total' if self.kind == COUNTER else ''}"


REQUEST_SECONDS = Series(
    "slq_serve_request_seconds",
    "Requests by how long their answer took (s).",
    HISTOGRAM,
    ("route", "method", "status"),
    _SECONDS,
)
STAGE_SECONDS = Series(
    "slq_serve_stage_seconds",
    "Stages of answers by how long they took (s); a request's stages do not overlap.",
    HISTOGRAM,
    ("stage",),
    _SECONDS,
)
BATCH_SIZE = Series(
    "slq_serve_batch_size",
    "Embedding passes by how many inputs shared them.",
    HISTOGRAM,
    (),
    _COUNTS,
)
RERANK_DEPTH = Series(
    "slq_serve_rerank_depth",
    "Answers of the fine stage by how many candidates it scored.",
    HISTOGRAM,
    (),
    _COUNTS,
)
DEGRADED = Series("slq_serve_degraded", "Degraded answers.", COUNTER, ("reason",))
REFUSED = Series(
    "slq_serve_refused", "Requests that were answered with an error.", COUNTER, ("status", "kind")
)
RETRIED = Series(
    "slq_serve_retried", "Calls inside that were made again.", COUNTER, ("deployment",)
)
IN_FLIGHT = Series("slq_serve_in_flight", "Requests that are being answered.", GAUGE)
CACHE_LOOKUPS = Series(
    "slq_serve_cache_lookups", "Images looked for among those kept.", COUNTER, ("cache", "result")
)
CACHE_BYTES = Series(
    "slq_serve_cache_bytes", "Memory of what is kept of images.", GAUGE, ("cache",)
)
INDEX_INFO = Series(
    "slq_serve_index_info",
    "1 for the index version that answers, 0 for others.",
    GAUGE,
    ("version",),
)
RECALL = Series(
    "slq_serve_recall",
    "Mean share of the exact top k that coarse searches found, of the last that were compared.",
    GAUGE,
    ("k", "version"),
)
RECALL_CHECKS = Series(
    "slq_serve_recall_checks",
    "Coarse searches chosen to be compared with an exact one.",
    COUNTER,
    ("result",),
)
ALL = (
    *(REQUEST_SECONDS, STAGE_SECONDS, BATCH_SIZE, RERANK_DEPTH, DEGRADED, REFUSED, RETRIED),
    *(IN_FLIGHT, CACHE_LOOKUPS, CACHE_BYTES, INDEX_INFO, RECALL, RECALL_CHECKS),
)


class Recorder(Protocol):
    """Where values go."""

    def record(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """Add to a counter, set a gauge, or put into a histogram."""

    def forget(self, series: Series, tags: dict[str, str]) -> None:
        """Show a gauge no more."""


class RayRecorder:
    """Ray's metrics; each is made when it is first recorded, in a few microseconds each time.

    A gauge of Ray is forgotten where it was not set for two of its report intervals (Ray 2.60), so a thread sets them
    again as they are.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, frozenset[tuple[str, str]]], tuple[Any, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def record(self, series: Series, value: float, tags: dict[str, str]) -> None:
        """See `Recorder.record`."""
        made = self._made.get(series.name) or self._make(series)
        if series.kind == COUNTER:
            made.inc(value, tags)
        elif series.kind == HISTOGRAM:
            made.observe(value, tags)
        else:
            with self._lock:
                made.set(value, tags)
                self._gauges[series.name, frozenset(tags.items())] = (made, value)
                self._keep_showing()

    def forget(self, series: Series, tags: dict[str, str]) -> None:
        """See `Recorder.forget`; it takes up to two report intervals."""
        with self._lock:
            self._gauges.pop((series.name, frozenset(tags.items())), None)

    def _make(self, series: Series) -> Any:
        named = {"name": series.name, "description": series.description, "tag_keys": series.tags}
        if series.kind == HISTOGRAM:
            made = ray_metrics.Histogram(**named, boundaries=list(series.bounds))
        else:
            made = (ray_metrics.Counter if series.kind == COUNTER else ray_metrics.Gauge)(**named)
        return self._made.setdefault(series.name, made)

    def _keep_showing(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._show, name="gauges", daemon=True)
            self._thread.start()

    def _show(self) -> None:
        while True:
            time.sleep(_AGAIN_S)
            with self._lock:
                for (_, tags), (made, value) in self._gauges.items():
                    made.set(value, dict(tags))


recorder: Recorder = RayRecorder()
"""Where this process records."""


def record(series: Series, value: float = 1.0, **tags: str) -> None:
    """Record a value of one of the series above.

    Args:
        series: Which.
        value: To add to a counter, above 0; to set a gauge to; or to put into a histogram.
        tags: A value for each of its labels.
    """
    recorder.record(series, value, tags)


def forget(series: Series, **tags: str) -> None:
    """Show a gauge with these labels no more, as what it tells of is gone."""
    recorder.forget(series, tags)


class CacheMeter:
    """Tells of caches what changed since it last did."""

    def __init__(self) -> None:
        self._told: dict[str, dict[str, int]] = {}

    def tell(self, caches: Mapping[str, Mapping[str, int]]) -> None:
        """Record what changed.

        Args:
            caches: By name, `hits`, `misses` and `bytes`, as of `slq.kept.Kept.counters`.
        """
        for cache, now in caches.items():
            before = self._told.get(cache, {"hits": 0, "misses": 0, "bytes": 0})
            for result, total in (("hit", "hits"), ("miss", "misses")):
                if now[total] > before[total]:
                    added = now[total] - before[total]
                    record(CACHE_LOOKUPS, added, cache=cache, result=result)
            if now["bytes"] != before["bytes"]:
                record(CACHE_BYTES, now["bytes"], cache=cache)
            self._told[cache] = dict(now)


class VersionMeter:
    """Tells which index version answers."""

    def __init__(self) -> None:
        self._shown: str | None = None

    def show(self, version: str) -> None:
        """Record that a version answers, and the one before no more."""
        if version == self._shown:
            return
        if self._shown is not None:
            record(INDEX_INFO, 0, version=self._shown)
            forget(INDEX_INFO, version=self._shown)
        record(INDEX_INFO, 1, version=version)
        self._shown = version
