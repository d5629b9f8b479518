"""Learning, filling and searching on a real GPU, against the CPU; skipped where there is none."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from slq.arrow import vector_column
from slq.index import Content, IndexConfig, VectorIndex, build, codes, devices, write_version
from slq.index.config import GPU_CODES
from slq.index.devices import device_of
from slq.index.trials import exact_truth, recall_of
from tests.gpus import CLONED, real_gpus
from tests.unit.index_data import DIMENSION, Given
from tests.unit.test_index_devices import BUILT, SEARCHED, named, on, rows_of

needs_gpu = pytest.mark.skipif(not real_gpus(), reason="needs a CUDA GPU and faiss-gpu")
needs_gpu_build = pytest.mark.skipif(
    not devices.faiss_build().is_for_gpus, reason="needs faiss-gpu, but no GPU"
)
ROWS, WIDTH, LISTS = 20_000, 64, 64


@needs_gpu_build
def test_faiss_says_of_itself_what_it_copies_to_a_gpu() -> None:
    for config in BUILT:
        index = codes.untrained(config, DIMENSION)
        lists = faiss.downcast_index(faiss.extract_index_ivf(index))
        implemented = faiss.isGpuIndexImplemented(lists)
        assert implemented == (config.codes in GPU_CODES) == isinstance(lists, CLONED)
        quantizer = faiss.downcast_index(lists.quantizer)
        assert faiss.isGpuIndexImplemented(quantizer) == (config.quantizer == "flat")


def shifted() -> np.ndarray[Any, np.dtype[np.float32]]:
    """(rows, width) unit vectors in clusters, as embeddings are."""
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((200, WIDTH))
    vectors = centres[rng.integers(0, 200, ROWS)] + 0.5 * rng.standard_normal((ROWS, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def large(config: IndexConfig) -> IndexConfig:
    chosen = {"num_lists": LISTS, "num_probes": 16, "oversample": 4.0}
    return config.model_copy(update=chosen) if config.kind == "ivf" else config


def large_content() -> Content:
    column = vector_column(shifted().astype(np.float16))
    rows = pa.table({"id": [f"i{n}" for n in range(ROWS)], "embedding": column})
    parts = [Given(rows.slice(start, 7000)) for start in range(0, ROWS, 7000)]
    return Content(parts, WIDTH, "3f2a")


def agreement(found: list[list[int]], right: list[list[int]]) -> float:
    return recall_of(np.array(found), np.array(right))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", BUILT, ids=named)
def test_a_real_gpu_puts_vectors_into_the_lists_that_the_cpu_does(config: IndexConfig) -> None:
    vectors = shifted()
    index = codes.untrained(large(config), WIDTH)
    index.train(vectors)
    turned = codes.turned(index, vectors)
    found, right = (device_of(name).nearest(index)(turned) for name in ("cuda", "cpu"))
    assert np.mean(found == right) > 0.999
    centroids = faiss.extract_index_ivf(index).quantizer.reconstruct_n(0, LISTS)
    scores = turned @ centroids.T
    best = scores.max(axis=1)
    np.testing.assert_allclose(
        scores[np.arange(ROWS), found], best, atol=1e-5
    )  # the nearest, or a tie


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("config", BUILT, ids=named)
def test_an_index_that_a_real_gpu_built_finds_as_much_on_the_cpu(
    tmp_path: Path, config: IndexConfig
) -> None:
    queries = shifted()[:200]
    shares = {}
    for device in ("cpu", "cuda"):
        write_version(tmp_path / device, large_content(), on(large(config), device))
        index = VectorIndex(tmp_path / device)
        truth = exact_truth(index._segments[0], queries, 10)
        shares[device] = agreement(rows_of(index.search(queries, 10)), truth.tolist())
    assert abs(shares["cuda"] - shares["cpu"]) < 0.03, shares


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("partition_bytes", [2**18, 2**30])
@pytest.mark.parametrize("config", SEARCHED, ids=named)
def test_a_real_gpu_finds_what_the_cpu_finds(
    tmp_path: Path, config: IndexConfig, partition_bytes: int
) -> None:
    sized = large(config).model_copy(update={"partition_bytes": partition_bytes})
    write_version(tmp_path, large_content(), sized)
    queries = shifted()[:200]
    found, right = (
        VectorIndex(tmp_path, device=name).search(queries, 10) for name in ("cuda", "cpu")
    )
    assert agreement(rows_of(found), rows_of(right)) > 0.995
    np.testing.assert_allclose(
        [hit.score for one in found for hit in one],
        [hit.score for one in right for hit in one],
        atol=2e-3,  # where a code's score is what is told
    )


@pytest.mark.gpu
@needs_gpu
def test_a_real_gpu_serves_threads_in_turn() -> None:
    vectors = shifted()
    index = build(large(BUILT[0]), vectors)
    nearest = device_of("cuda").nearest(index)
    expected = nearest(vectors)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(one, expected) for one in pool.map(nearest, [vectors] * 40))
