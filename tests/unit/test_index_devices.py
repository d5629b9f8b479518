"""Learning, filling and searching on a GPU: bit for bit what the CPU does, which also does what a GPU cannot.

GPUs stand in for real ones here, see `tests.gpus`; `test_index_gpu.py` has the tests that need one.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import slq.index.segment
from slq.errors import HardwareError, StorageError
from slq.index import (
    Content,
    IndexConfig,
    VectorIndex,
    append,
    build,
    codes,
    compact,
    delete,
    devices,
    write_version,
)
from slq.index.building import here
from slq.index.config import GPU_CODES, PLACES, GoalConfig
from slq.index.devices import device_of
from slq.index.trials import run_trials, verified
from slq.index.versions import SEGMENTS
from tests.gpus import FakeGpus
from tests.unit.index_data import COUNT, DIMENSION, FLAT, IVF, Given, table, unit_vectors

QUERIES = unit_vectors(20, seed=1)
BUILT = [
    IVF.model_copy(update={"codes": kind, "rotation": rotation, "quantizer": quantizer})
    for kind, rotation, quantizer in [
        ("float32", "none", "flat"),
        ("float16", "random", "hnsw"),
        ("int8", "none", "flat"),
        ("int4", "opq", "flat"),
        ("rabitq", "random", "flat"),
        ("rabitq", "none", "hnsw"),
        ("pq4", "opq", "flat"),
        ("pq4", "none", "hnsw"),
    ]
]
SEARCHED = [FLAT, *(one for one in BUILT if one.codes in GPU_CODES)]


def named(config: IndexConfig) -> str:
    return "-".join((config.kind, config.codes, config.rotation, config.quantizer))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many threads learn decides how the last bit is rounded, and which graph is found."""
    monkeypatch.setattr(codes, "num_cores", lambda: 1)


@pytest.fixture
def lists_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter searches lists, however few rows it leaves."""
    monkeypatch.setattr(slq.index.segment, "_FEW_ROWS", 0)


def content(origin: dict[str, Any] | None = None) -> Content:
    rows, edges = table(), (0, 7, 157, 300, COUNT)
    parts = [Given(rows.slice(a, b - a)) for a, b in itertools.pairwise(edges)]
    return Content(parts, DIMENSION, "3f2a", origin)


def on(config: IndexConfig, device: str = "cuda") -> IndexConfig:
    return config.model_copy(update={"device": device})


def files(folder: Path) -> dict[str, bytes]:
    (home,) = (folder / SEGMENTS).iterdir()
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name != "checked.json"
    }


def rows_of(hits: Any) -> list[list[int]]:
    return [[hit.row for hit in one] for one in hits]


# Learning and filling --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("config", [FLAT, *BUILT], ids=named)
def test_a_gpu_builds_bit_for_bit_what_the_cpu_builds(
    tmp_path: Path, gpus: FakeGpus, config: IndexConfig
) -> None:
    config = config.model_copy(update={"partition_bytes": 3000})
    manifest = write_version(tmp_path / "cpu", content(), config)
    assert not gpus.moved
    moved_there = write_version(tmp_path / "gpu", content(), on(config))
    assert files(tmp_path / "gpu") == files(tmp_path / "cpu")
    assert sum(name.endswith("index.faiss") for name in files(tmp_path / "gpu")) > 1
    assert moved_there.config == manifest.config
    assert not manifest.config.keys() & set(PLACES)
    learnt = [copy.ntotal for _, copy in gpus.moved]
    expected = [] if config.kind == "flat" else [8]  # centroids of lists, of which k-means asked
    expected += [256] * (config.rotation == "opq") + [16] * (config.codes == "pq4")
    expected += [8] * (config.kind == "ivf")  # centroids that vectors were compared with
    assert learnt == expected
    assert len(gpus.searched) == 4 * (config.kind == "ivf")  # a block of each part
    assert sum(count for count, _ in gpus.searched) == COUNT * (config.kind == "ivf")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("config", BUILT, ids=named)
def test_what_was_lent_to_learn_is_given_back(gpus: FakeGpus, config: IndexConfig) -> None:
    vectors = unit_vectors(COUNT)
    expected = faiss.serialize_index(build(config, vectors)).tobytes()
    index = codes.untrained(config, DIMENSION)
    device_of("cuda").train(index, vectors)
    lists = faiss.extract_index_ivf(index)
    assert lists.clustering_index is None
    plain = codes.untrained(config, DIMENSION)
    assert lists.by_residual == faiss.extract_index_ivf(plain).by_residual
    if config.codes == "pq4":
        assert faiss.downcast_index(lists).pq.assign_index is None
    assert all(turn.pq is None for turn in codes.turns(index) if hasattr(turn, "pq"))
    gpus.moved.clear()  # and faiss never looks at it again
    codes.fill(index, [(np.arange(COUNT), vectors)])
    assert faiss.serialize_index(index).tobytes() == expected
    assert faiss.serialize_index(build(on(config), vectors)).tobytes() == expected


@pytest.mark.parametrize("config", BUILT, ids=named)
def test_lists_are_learnt_by_the_measure_that_faiss_takes_itself(config: IndexConfig) -> None:
    index = codes.untrained(config, DIMENSION)
    lists: Any = faiss.extract_index_ivf(index)
    with devices._lent(index, faiss.clone_index):
        is_graph = config.quantizer == "hnsw"
        expected = faiss.METRIC_L2 if is_graph else faiss.METRIC_INNER_PRODUCT
        assert lists.clustering_index.metric_type == expected
        if (
            config.codes == "rabitq"
        ):  # or the CPU would look for the list of every vector, for nothing
            assert not lists.by_residual


def test_vectors_are_compared_with_every_centroid_though_the_quantizer_is_a_graph(
    gpus: FakeGpus,
) -> None:
    config = IVF.model_copy(update={"num_lists": 100, "quantizer": "hnsw"})
    vectors = unit_vectors(2000)
    index = build(config, vectors)
    lists = faiss.extract_index_ivf(index)
    centroids = lists.quantizer.reconstruct_n(0, 100)
    found = device_of("cuda").nearest(index)(vectors)
    np.testing.assert_array_equal(found, np.argmax(vectors @ centroids.T, axis=1))
    assert found.dtype == np.int64
    assert len(gpus.searched) == 1


def test_threads_take_turns(gpus: FakeGpus) -> None:
    index = build(IVF, unit_vectors(COUNT))
    nearest = device_of("cuda").nearest(index)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(nearest, [QUERIES] * 200))
    expected = device_of("cpu").nearest(index)(QUERIES)
    assert all(np.array_equal(one, expected) for one in found)
    assert len(gpus.searched) == 200
    assert gpus.scratch == [2**29]  # one set of resources for a process
    assert device_of("cuda") is device_of("cuda:0")


@pytest.mark.usefixtures("gpus", "one_thread")
def test_a_build_that_a_gpu_began_goes_on_with_the_cpu(tmp_path: Path) -> None:
    lost = "put vectors into lists"

    def failing(
        what: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        *,
        device: str = "cpu",
    ) -> list[Any]:
        used[what] = device
        here(what, function, arguments[:2] if what == lost else arguments, device=device)
        if what == lost:
            raise OSError("the node is gone")
        return here(what, function, arguments, device=device)

    used: dict[str, str] = {}
    origin = {"embeddings": [{"sha256": "1"}]}
    with pytest.raises(StorageError, match="the node is gone"):
        write_version(tmp_path / "both", content(origin), on(BUILT[2]), each=failing)
    assert {what for what, device in used.items() if device == "cuda"} == {
        "look for the GPU",
        "learn lists and codes",
        lost,
    }
    (begun,) = (tmp_path / "both" / SEGMENTS).iterdir()
    learnt = (begun / "work" / "trained").stat().st_ino
    seen = []

    def watching(what: str, *arguments: Any, **options: Any) -> list[Any]:
        seen.append((begun / "work" / "trained").stat().st_ino)
        return here(what, *arguments, **options)

    write_version(tmp_path / "both", content(origin), BUILT[2], each=watching)
    write_version(tmp_path / "cpu", content(origin), BUILT[2])
    assert files(tmp_path / "both") == files(tmp_path / "cpu")
    assert set(seen) == {learnt}  # not learnt again


def test_later_changes_learn_where_they_are_told_to(
    tmp_path: Path, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slq.index.writing._FEW_ROWS", 0)
    write_version(tmp_path, content(), IVF)
    further = Content([Given(table(100, first=COUNT, seed=4))], DIMENSION, "3f2a")
    manifest = append(tmp_path, further, device="cuda")
    assert all(not one.config.keys() & set(PLACES) for one in manifest.segments)
    assert [copy.ntotal for _, copy in gpus.moved] == [8, 8]
    compact(tmp_path, device="cuda")
    assert len(gpus.moved) == 4
    compact(tmp_path, on(IVF))
    assert len(gpus.moved) == 6
    manifest = compact(tmp_path)
    assert len(gpus.moved) == 6
    assert manifest.config == IVF.recorded()


# Searching -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lists_only")
@pytest.mark.parametrize("partition_bytes", [3000, 2**30])
@pytest.mark.parametrize("config", SEARCHED, ids=named)
def test_a_gpu_finds_what_the_cpu_finds(
    tmp_path: Path, gpus: FakeGpus, config: IndexConfig, partition_bytes: int
) -> None:
    asked = {"partition_bytes": partition_bytes, "num_probes": 3, "oversample": 2.0}
    if config.quantizer == "hnsw":
        asked["num_probes"] = 8  # a graph may miss one of the nearest lists
    write_version(tmp_path, content(), config.model_copy(update=asked))
    expected = VectorIndex(tmp_path)
    index = VectorIndex(tmp_path, device="cuda")
    partitions = sum(name.endswith("index.faiss") for name in files(tmp_path))
    assert (partitions > 1) == (partition_bytes == 3000)
    assert len(gpus.moved) == (partitions if config.kind == "flat" else 1)
    assert sum(copy.ntotal for _, copy in gpus.moved) == COUNT
    found, right = index.search(QUERIES, 12), expected.search(QUERIES, 12)
    assert rows_of(found) == rows_of(right)
    np.testing.assert_allclose(
        [[hit.score for hit in one] for one in found],
        [[hit.score for hit in one] for one in right],
        atol=1e-6,
    )
    depth = 24 if config.is_rescored else 12
    assert gpus.searched == [(20, depth)] * len(gpus.moved)
    # The CPU does the rest, with the lists it had before.
    where = "price < 4"
    assert rows_of(index.search(QUERIES, 12, where=where)) == rows_of(
        expected.search(QUERIES, 12, where=where)
    )
    assert rows_of(index.search(QUERIES, 12, exact=True)) == rows_of(
        expected.search(QUERIES, 12, exact=True)
    )
    assert rows_of(index.search(QUERIES, COUNT)) == rows_of(expected.search(QUERIES, COUNT))
    assert len(gpus.searched) == 2 * len(gpus.moved)


def state(index: Any) -> tuple[Any, ...]:
    """What of a partition is changed while it is moved."""
    lists: Any = faiss.extract_index_ivf(index)
    quantizer = faiss.downcast_index(lists.quantizer)
    sizes = [lists.invlists.list_size(number) for number in range(lists.nlist)]
    return type(quantizer), quantizer.ntotal, sizes, lists.ntotal, index.ntotal


@pytest.mark.parametrize("config", SEARCHED[1:], ids=named)
def test_partitions_are_as_before_whether_or_not_they_could_be_moved(
    tmp_path: Path, gpus: FakeGpus, config: IndexConfig
) -> None:
    write_version(tmp_path, content(), config.model_copy(update={"partition_bytes": 3000}))
    paths = sorted(tmp_path.glob(f"{SEGMENTS}/*/partitions/*/index.faiss"))
    indexes = [codes.read(path) for path in paths]
    codes.share_centroids(indexes)
    before = [state(one) for one in indexes]
    assert len(before) > 1
    device_of("cuda").search(indexes)
    assert [state(one) for one in indexes] == before
    gpus.full = True
    with pytest.raises(HardwareError, match="cannot hold the index"):
        device_of("cuda").search(indexes)
    assert [state(one) for one in indexes] == before


@pytest.mark.usefixtures("lists_only")
def test_more_results_than_a_gpu_can_sort_are_the_cpus(
    tmp_path: Path, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "GPU_DEPTH", 50)
    write_version(tmp_path, content(), BUILT[2])  # int8, four candidates for a result
    index = VectorIndex(tmp_path, device="cuda")
    right = VectorIndex(tmp_path)
    for top_k, searches in ((12, 1), (13, 1)):
        assert rows_of(index.search(QUERIES, top_k)) == rows_of(right.search(QUERIES, top_k))
        assert len(gpus.searched) == searches


@pytest.mark.usefixtures("lists_only")
def test_a_segment_with_deleted_items_stays_on_the_cpu_and_says_so(
    tmp_path: Path, gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(tmp_path, content(), IVF)
    delete(tmp_path, ["item-3", "item-5"])
    with caplog.at_level(logging.WARNING):
        index = VectorIndex(tmp_path, device="cuda")
    (record,) = caplog.records
    assert "has 2 deleted items, so it is searched on the CPU and not on cuda" in record.message
    assert "`slq index --compact` removes them" in record.message
    assert rows_of(index.search(QUERIES, 5)) == rows_of(VectorIndex(tmp_path).search(QUERIES, 5))
    assert not gpus.moved
    compact(tmp_path)
    index = VectorIndex(tmp_path, device="cuda")
    assert rows_of(index.search(QUERIES, 5)) == rows_of(VectorIndex(tmp_path).search(QUERIES, 5))
    assert len(gpus.searched) == 1


@pytest.mark.usefixtures("lists_only")
def test_many_threads_may_ask_an_index_on_a_gpu(tmp_path: Path, gpus: FakeGpus) -> None:
    write_version(tmp_path, content(), BUILT[0])
    index = VectorIndex(tmp_path, device="cuda")
    expected = rows_of(index.search(QUERIES, 5))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: rows_of(index.search(QUERIES, 5)), range(100)))
    assert all(one == expected for one in found)
    assert len(gpus.searched) == 101


def test_what_a_gpu_holds_is_told(
    tmp_path: Path, gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.count = 3
    write_version(tmp_path, content(), IVF)
    with caplog.at_level(logging.INFO):
        VectorIndex(tmp_path, device="cuda:2")
    assert "cuda:2 holds 400 vectors; searches with a filter or for more than 2048" in caplog.text
    assert [number for number, _ in gpus.moved] == [2]


# Goals -----------------------------------------------------------------------------------------------------------


def test_settings_are_tried_where_they_will_be_searched(
    gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slq.index.trials

    monkeypatch.setattr(slq.index.trials, "_FEW_ROWS", 100)
    monkeypatch.setattr(slq.index.trials, "_PROBES", (1, 4))
    monkeypatch.setattr(slq.index.trials, "_TIMED_QUERIES", 2)
    vectors = unit_vectors(3000).astype(np.float16)
    config = IndexConfig(goal=GoalConfig(recall=0.5), device="cuda", search_device="cuda")
    trials = run_trials(vectors, QUERIES, config, 3000)
    assert {one.config.codes for one in trials} == {"float16", "int8"}
    assert all(one.config.search_device == one.config.device == "cuda" for one in trials)
    assert {k for _, k in gpus.searched} >= {10, 320}
    on_cpu = run_trials(vectors, QUERIES, IndexConfig(goal=config.goal), 3000)
    assert {one.config.codes for one in on_cpu} == {"float16", "int8", "rabitq", "pq4"}
    of_gpu, of_cpu = (
        {
            (one.config.codes, one.config.num_probes, one.config.oversample): one.recall
            for one in found
        }
        for found in (trials, on_cpu)
    )
    assert of_gpu.items() <= of_cpu.items()


@pytest.mark.usefixtures("gpus")
def test_a_goal_asks_for_no_more_lists_than_a_gpu_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slq.index.config.GPU_DEPTH", 32)
    tried = []

    class Nothing:
        """A segment that never finds enough."""

        def search(self, queries: Any, top_k: int) -> Any:
            return np.zeros((len(queries), top_k)), np.full((len(queries), top_k), -1)

    def segment_of(config: IndexConfig) -> Any:
        config.require_searchable()
        tried.append(config.num_probes)
        return Nothing()

    goal = GoalConfig(recall=1.0)
    config = IndexConfig(kind="ivf", codes="int8", num_lists=500, num_probes=5, goal=goal)
    truth = np.zeros((len(QUERIES), 10), np.int64)
    on_gpu = config.model_copy(update={"search_device": "cuda"})
    settled, _ = verified(segment_of, on_gpu, QUERIES, truth)
    assert settled.num_probes == 32
    settled, _ = verified(segment_of, config, QUERIES, truth)
    assert settled.num_probes == 500
