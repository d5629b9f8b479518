"""Recall measured while the service runs: equal to recall by hand, never in the way of an answer."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.recipe import Recipe
from pipelines.serving import metrics
from pipelines.serving.index_service import Found, IndexSearch
from pipelines.serving.metrics import Series
from pipelines.serving.pinned import Pinned
from pipelines.serving.recall import RecallMeter, recall, require_exact
from slq.engines import SEARCH_ENGINES
from slq.errors import ConfigError, DataError
from slq.index import IndexConfig, SearchIndex, VectorIndex
from slq.index.shares import IndexShare
from tests.integration.runs import changed
from tests.unit.engine_data import opened
from tests.unit.index_data import DIMENSION, FLAT, published, stored, unit_vectors

FEW_PROBES = IndexConfig(kind="ivf", num_lists=16, num_probes=1)
TOP_K = 10


class Gauges:
    """The last value of each gauge, and how often each check ended how."""

    def __init__(self) -> None:
        self.shown: dict[tuple[str, str], float] = {}
        self.checks: list[str] = []

    def record(self, series: Series, value: float, tags: dict[str, str]) -> None:
        if series is metrics.RECALL:
            self.shown[tags["version"], tags["k"]] = value
        elif series is metrics.RECALL_CHECKS:
            self.checks.append(tags["result"])

    def forget(self, series: Series, tags: dict[str, str]) -> None:
        self.shown.pop((tags["version"], tags["k"]), None)


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> Gauges:
    found = Gauges()
    monkeypatch.setattr(metrics, "recorder", found)
    return found


def by_hand(index: VectorIndex, queries: Any) -> float:
    """Mean share of the exact top 10 that an index finds, from the vectors alone."""
    shares = []
    for query in queries:
        best = np.argsort(-(stored() @ query.astype(np.float64)), kind="stable")[:TOP_K]
        (hits,) = index.search(query[None], TOP_K)
        shares.append(len({hit.id for hit in hits} & {f"item-{n}" for n in best}) / TOP_K)
    return float(np.mean(shares))


def measured(index: SearchIndex, queries: Any) -> RecallMeter:
    meter = RecallMeter(1.0, TOP_K)
    for query in queries:
        (hits,) = index.search(query[None], TOP_K)
        meter.consider(index, query, hits, TOP_K)
        with meter._busy:  # its turn is over
            pass
    meter.close()
    return meter


@pytest.mark.parametrize("config", [FEW_PROBES, FLAT], ids=["ivf", "flat"])
def test_the_gauge_is_the_recall_by_hand(
    config: IndexConfig, tmp_path: Path, gauges: Gauges
) -> None:
    index, queries = published(tmp_path, config), unit_vectors(40, seed=5)
    meter, expected = measured(index, queries), by_hand(index, queries)
    assert meter.mean == pytest.approx(expected)
    assert gauges.shown == {(index.version, "10"): meter.mean}
    assert gauges.checks == 40 * ["compared"]
    assert expected == 1 if config is FLAT else 0 < expected < 0.9


def test_recall_of_another_version_begins_anew(tmp_path: Path, gauges: Gauges) -> None:
    queries = unit_vectors(8, seed=5)
    before, after = (published(tmp_path, config) for config in (FEW_PROBES, FLAT))
    meter = RecallMeter(1.0, TOP_K)
    for index, expected in ((before, by_hand(before, queries)), (after, 1.0)):
        for query in queries:
            (hits,) = index.search(query[None], TOP_K)
            meter.consider(index, query, hits, TOP_K)
            with meter._busy:
                pass
        assert gauges.shown == {(index.version, "10"): pytest.approx(expected)}
    meter.close()


@pytest.mark.parametrize(("share", "top_k"), [(0.0, TOP_K), (1.0, TOP_K - 1)])
def test_what_is_not_chosen_is_not_compared(
    share: float, top_k: int, tmp_path: Path, gauges: Gauges
) -> None:
    meter = RecallMeter(share, TOP_K)
    meter.consider(published(tmp_path), unit_vectors(1)[0], [], top_k)
    meter.close()
    assert (gauges.checks, meter.mean) == ([], None)


class Stuck:
    """An index whose exact search waits, or fails."""

    version = "v000003"

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.began, self.error = threading.Event(), threading.Event(), error
        self.threads: list[str] = []

    def search(self, vectors: Any, top_k: int, *, exact: bool) -> list[list[Any]]:
        self.threads.append(threading.current_thread().name)
        self.began.set()
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return [[]]


def test_one_comparison_runs_at_a_time_and_nobody_waits_for_it(gauges: Gauges) -> None:
    index, meter, query = Stuck(), RecallMeter(1.0, TOP_K), unit_vectors(1)[0]
    for _ in range(5):
        meter.consider(index, query, [], TOP_K)  # type: ignore[arg-type]
    assert index.began.wait(60)
    assert len(index.threads) == 1
    assert gauges.checks == 4 * ["dropped"]
    index.go.set()
    meter.close()
    assert gauges.checks[4:] == ["compared"]


def test_a_comparison_that_fails_is_told_and_the_next_one_runs(
    gauges: Gauges, caplog: pytest.LogCaptureFixture
) -> None:
    index, meter, query = (
        Stuck(OSError("disk is gone")),
        RecallMeter(1.0, TOP_K),
        unit_vectors(1)[0],
    )
    index.go.set()
    for _ in range(2):
        meter.consider(index, query, [], TOP_K)  # type: ignore[arg-type]
        with meter._busy:
            pass
    meter.close()
    assert gauges.checks == ["failed", "failed"]
    assert "recall of index version v000003 is unknown: disk is gone" in caplog.text


def test_recall_is_a_share_of_the_best() -> None:
    assert recall(["a", "x", "b"], ["a", "b", "c", "d"]) == 0.5
    assert recall(["a"], []) == 1


def test_comparisons_run_at_the_lowest_priority_of_their_thread_alone(
    tmp_path: Path, gauges: Gauges, priorities: list[tuple[int, ...]]
) -> None:
    measured(published(tmp_path), unit_vectors(1))
    ((_, thread, priority),) = priorities
    assert priority == 19
    assert thread not in (0, threading.get_native_id())


@pytest.mark.parametrize("kind", SEARCH_ENGINES)
def test_other_engines_are_compared_by_their_own_exact_search(
    kind: str, tmp_path: Path, gauges: Gauges
) -> None:
    with opened(kind, tmp_path) as index:
        require_exact(index)
        assert measured(index, unit_vectors(3, seed=5)).mean == 1
    assert gauges.checks == 3 * ["compared"]


def test_an_engine_without_exact_search_is_refused_with_a_way_out() -> None:
    class Approximate:
        dimension = DIMENSION

        def search(self, *_: Any, exact: bool) -> Any:
            raise DataError("a Milvus cluster searches by its own index alone")

    with pytest.raises(ConfigError, match=r"recall_share.*Milvus cluster.*set it to 0"):
        require_exact(Approximate())  # type: ignore[arg-type]


# ---- in the deployment ----


class Partition:
    """A handle of a partition in this process."""

    def __init__(self, share: IndexShare | None) -> None:
        self._share = share
        self.scan = self

    async def remote(self, version: str, *asked: Any) -> Any:
        return None if self._share is None else self._share.scan(*asked)


async def searched(recipe: Recipe, index: VectorIndex, *partitions: Any) -> tuple[Found, Any]:
    pinned = Pinned(index.fingerprint, index.version)
    service = IndexSearch(recipe.model_dump(mode="json"), pinned, None, *partitions)  # type: ignore[arg-type]
    found = await service.search(unit_vectors(1, seed=5)[0], TOP_K)
    await asyncio.to_thread(service._recall.close)
    return found, service._recall.mean


@pytest.mark.parametrize("count", [1, 2])
def test_the_deployment_compares_what_it_answers_with_partitions_too(
    count: int, tmp_path: Path, gauges: Gauges
) -> None:
    recipe = changed(
        Recipe(),
        storage={"dir": tmp_path},
        serve={"telemetry": {"recall_share": 1.0, "recall_k": TOP_K}},
    )
    config = FEW_PROBES.model_copy(update={"partition_bytes": 100 * (4 * DIMENSION + 8)})
    index = published(recipe.storage.index, config)
    shares = [IndexShare(recipe.storage.index, index.version, n, count) for n in range(count)]
    handles = [Partition(share) for share in shares] if count > 1 else []
    found, mean = asyncio.run(searched(recipe, index, *handles))
    expected = by_hand(index, unit_vectors(1, seed=5))
    assert mean == pytest.approx(expected)
    assert found.version == index.version


def test_an_answer_of_a_part_of_the_index_says_nothing_of_its_recall(
    tmp_path: Path, gauges: Gauges
) -> None:
    recipe = changed(
        Recipe(), storage={"dir": tmp_path}, serve={"telemetry": {"recall_share": 1.0}}
    )
    index = published(recipe.storage.index, FEW_PROBES)
    share = IndexShare(recipe.storage.index, index.version, 0, 2)
    found, mean = asyncio.run(searched(recipe, index, Partition(share), Partition(None)))
    assert (found.shards_ok, found.shards_total, mean) == (1, 2, None)
    assert gauges.checks == []
