"""Handing over to other engines: what they find is what exact search finds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from slq.engines import ENGINES, Collection, Found, SearchEngine, engine
from slq.errors import ConfigError, DataError, StorageError
from tests.unit.index_data import COUNT, DIMENSION, brute_force, stored, table, unit_vectors

QUERIES = unit_vectors(20, seed=1)
ALL = np.arange(COUNT)
ROUNDING = 1e-3  # of engines that compare in float16
SEARCHED = [name for name, kind in ENGINES.items() if issubclass(kind, SearchEngine)]


def collection(fingerprint: str = "3f2a", rows: pa.Table | None = None) -> Collection:
    whole = table() if rows is None else rows

    def tables() -> Iterator[pa.Table]:
        yield from (whole.slice(0, 150), whole.slice(150))

    return Collection(tables(), whole.schema, whole.num_rows, DIMENSION, fingerprint)


def place(kind: str, folder: Path, name: str = "corpus") -> Any:
    target = folder / ("milvus.db" if kind == "milvus" else kind)
    return engine(kind, str(target), name)


def require_exact(found: list[list[Found]], rows: NDArray[np.int64]) -> None:
    """The best of these rows, but for neighbours that are as near as an engine can tell."""
    similarity = QUERIES.astype(np.float64) @ stored().T
    for query, expected in enumerate(brute_force(QUERIES, 10, rows)):
        numbers = [int(hit.id.removeprefix("item-")) for hit in found[query]]
        assert len(set(numbers)) == 10
        assert set(numbers) <= set(rows.tolist())
        scores = [hit.score for hit in found[query]]
        np.testing.assert_allclose(scores, similarity[query, numbers], atol=ROUNDING)
        np.testing.assert_allclose(scores, similarity[query, expected], atol=ROUNDING)


@pytest.mark.parametrize("kind", SEARCHED)
def test_an_engine_finds_what_exact_search_finds(tmp_path: Path, kind: str) -> None:
    there = place(kind, tmp_path)
    assert list(there.write(collection()))[-1] == COUNT
    assert there.fingerprint == "3f2a"
    require_exact(there.search(QUERIES, 10), ALL)


@pytest.mark.parametrize(("kind", "where"), [("lance", "price < 3"), ("milvus", "price < 3")])
def test_a_filter_finds_the_best_of_what_it_leaves(tmp_path: Path, kind: str, where: str) -> None:
    there = place(kind, tmp_path)
    list(there.write(collection()))
    require_exact(there.search(QUERIES, 10, where=where), ALL[ALL % 10 < 3])


def test_a_filter_that_an_engine_cannot_evaluate_is_refused(tmp_path: Path) -> None:
    for kind in ("qdrant", "lance"):
        there = place(kind, tmp_path)
        list(there.write(collection()))
        with pytest.raises(DataError, match=r"filters are no predicates|Lance refuses"):
            there.search(QUERIES, 10, where="prize < 3")


@pytest.mark.parametrize("kind", ["npy", "lance"])
def test_what_is_there_already_is_not_written_over(tmp_path: Path, kind: str) -> None:
    there = place(kind, tmp_path)
    list(there.write(collection()))
    with pytest.raises(ConfigError, match="exists already; choose another --name"):
        list(there.write(collection()))


@pytest.mark.parametrize("kind", ["milvus", "qdrant"])
def test_writing_again_replaces_and_another_space_is_refused(tmp_path: Path, kind: str) -> None:
    there = place(kind, tmp_path)
    list(there.write(collection(rows=table(100))))
    assert list(there.write(collection()))[-1] == COUNT
    ids = [hit.id for hit in there.search(QUERIES[:1], COUNT)[0]]
    assert len(ids) == len(set(ids)) == COUNT
    with pytest.raises(ConfigError, match=r"3f2a.*choose another --name"):
        list(there.write(collection("91bc")))


def test_plain_files_hold_vectors_and_items_in_one_order(tmp_path: Path) -> None:
    list(place("npy", tmp_path).write(collection()))
    folder = tmp_path / "npy" / "corpus"
    vectors, items = np.load(folder / "vectors.npy"), pq.read_table(folder / "items.parquet")
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, unit_vectors(COUNT).astype(np.float16))
    assert items["id"].to_pylist() == [f"item-{n}" for n in range(COUNT)]
    told = json.loads((folder / "description.json").read_text())
    assert told == {"fingerprint": "3f2a", "num_rows": COUNT, "dimension": DIMENSION}
    broken = Collection(
        iter([table(5)]), table(5).schema, num_rows=6, dimension=DIMENSION, fingerprint="3f2a"
    )
    with pytest.raises(DataError, match="5 vectors came instead of 6"):
        list(place("npy", tmp_path, "broken").write(broken))
    assert [path.name for path in (tmp_path / "npy").iterdir()] == ["corpus"]


def test_a_place_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain arrays go into a folder, and s3://x is none"):
        list(engine("npy", "s3://x", "y").write(collection()))
    with pytest.raises(StorageError, match=r"Qdrant at http://127\.0\.0\.1:1"):
        list(engine("qdrant", "http://127.0.0.1:1", "y").write(collection()))
    with pytest.raises(StorageError, match=r"Milvus at http://127\.0\.0\.1:1"):
        list(engine("milvus", "http://127.0.0.1:1", "y").write(collection()))


def test_a_refused_search_leaves_the_place_to_others(tmp_path: Path) -> None:
    there = place("qdrant", tmp_path)
    list(there.write(collection()))
    with pytest.raises(StorageError, match="Qdrant at"):
        there.search(unit_vectors(1, dimension=8), 3)
    assert len(place("qdrant", tmp_path).search(QUERIES[:1], 3)[0]) == 3


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ConfigError, match="'faiss' is unknown; choose one of npy, lance, milvus"):
        engine("faiss", "x", "y")
