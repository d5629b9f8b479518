"""Exact search in blocks, and the files that it reads, against plain numpy."""

import io
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index import items as items_module
from slq.index.arrays import read_array
from slq.index.exact import NO_ROW, best, exact_search
from slq.index.items import IDS, ITEMS, Items, ItemsWriter, id_digests, write_order
from slq.index.vectors import StoredVectors, VectorsWriter, unit
from tests.traced import with_peaks
from tests.unit.index_data import unit_vectors

QUERIES = unit_vectors(7, seed=1)


@pytest.mark.parametrize("size", [1, 3, 50, 1000])
@pytest.mark.parametrize("top_k", [1, 10, 200])
def test_the_answer_does_not_depend_on_blocks(size: int, top_k: int) -> None:
    vectors = unit_vectors(150)
    vectors[40:60] = vectors[20:40]  # ties
    numbers = np.arange(150, dtype=np.int64)
    blocks = [(numbers[n : n + size], vectors[n : n + size]) for n in range(0, 150, size)]
    scores, rows = exact_search(QUERIES, blocks, top_k)
    similarity = QUERIES @ vectors.T
    order = np.lexsort((np.broadcast_to(numbers, similarity.shape), -similarity), axis=1)[:, :top_k]
    assert rows[:, :150].tolist() == order.tolist()
    np.testing.assert_allclose(
        scores[:, :150], np.take_along_axis(similarity, order, axis=1), atol=1e-6
    )
    assert (rows[:, 150:] == NO_ROW).all()
    assert np.isneginf(scores[:, 150:]).all()
    assert rows.shape == scores.shape == (7, top_k)


def test_many_equal_scores_are_ordered_by_row_whatever_their_place() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(40) for _ in range(5)])
    scores = np.where(rows % 4 == 0, 0.5, 0.25).astype(np.float32)
    _, found = best(scores, rows, 14)
    assert found.tolist() == [[*range(0, 40, 4), 1, 2, 3, 5]] * 5


def test_no_blocks_give_no_rows() -> None:
    scores, rows = exact_search(QUERIES, [], 3)
    assert (rows == NO_ROW).all()
    assert scores.shape == (7, 3)


def test_vectors_come_back_by_row_and_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slq.index.vectors

    monkeypatch.setattr(slq.index.vectors, "_BLOCK_ROWS", 16)
    vectors = (3 * unit_vectors(50)).astype(np.float16)
    with (tmp_path / "v.npy").open("wb") as file:
        writer = VectorsWriter(file, vectors.shape)
        for start in range(0, 50, 20):
            writer.add(vectors[start : start + 20])
        writer.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)
    with (tmp_path / "w.npy").open("wb") as file:
        writer = VectorsWriter(file, (10, 32))
        writer.add(vectors[40:])
    np.save(tmp_path / "u.npy", vectors[:40])
    stored = StoredVectors([tmp_path / name for name in ("u.npy", "w.npy")])
    assert (len(stored), stored.dimension) == (50, 32)
    chosen = np.array([49, 3, 3])
    np.testing.assert_array_equal(stored.rows(chosen), unit(vectors[chosen]))
    np.testing.assert_allclose(np.linalg.norm(stored.rows(chosen), axis=1), 1, atol=1e-6)
    for rows in (None, np.arange(1, 50, 2)):
        numbers, found = zip(*stored.blocks(rows), strict=True)
        wanted = np.arange(50) if rows is None else rows
        assert np.concatenate(numbers).tolist() == wanted.tolist()
        assert max(len(one) for one in found) == 16
        np.testing.assert_array_equal(np.concatenate(found), unit(vectors[wanted]))


def test_vectors_of_another_length_are_refused() -> None:
    writer = VectorsWriter(io.BytesIO(), (4, 16))
    with pytest.raises(DataError, match="vectors of 32 values do not fit to 16"):
        writer.add(unit_vectors(4).astype(np.float16))


@pytest.mark.parametrize("sizes", [[5, 0, 7, 1], [64], [3] * 20, [1]])
def test_items_come_back_by_row_and_id_however_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(items_module, "_BATCH_ROWS", 8)
    count = sum(sizes) + 2
    names = [f"{'äz'[n % 2]}{(n * 37) % count}" for n in range(count)]
    rows = pa.table({"id": names, "text": [None if n % 3 else f"t{n}" for n in range(count)]})
    start = 0
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, some in zip(folders, (sizes, [2]), strict=True):
        folder.mkdir()
        with pa.OSFile(str(folder / ITEMS), "wb") as file:
            writer = ItemsWriter(file, start)
            for size in some:
                writer.add(rows.slice(start, size))
                start += size
            writer.finish()
        write_order(folder / IDS, folder / ITEMS)
    found = Items(folders)
    assert len(found) == count
    assert [found.row(n) for n in range(count)] == rows.to_pylist()
    assert found.table["row"].to_pylist() == list(range(count))
    assert found.find(names).tolist() == list(range(count))
    assert found.find(["b", "", names[1], "ä", "zz"]).tolist() == [*[NO_ROW] * 2, 1, *[NO_ROW] * 2]
    assert found.twice(0, 2**64) == []
    assert list(found.ids()) == names
    for low, high in ((0, count), (1, count - 1), (count - 2, count)):
        batches = list(found.batches(low, high))
        assert pa.concat_tables(table for _, table in batches).equals(rows.slice(low, high - low))
        assert [first for first, _ in batches] == [
            low + sum(table.num_rows for _, table in batches[:n]) for n in range(len(batches))
        ]


def write_items(folder: Path, ids: list[str], first_row: int = 0) -> Path:
    folder.mkdir()
    with pa.OSFile(str(folder / ITEMS), "wb") as file:
        writer = ItemsWriter(file, first_row)
        writer.add(pa.table({"id": ids}))
        writer.finish()
    write_order(folder / IDS, folder / ITEMS)
    return folder


def test_ids_that_come_twice_are_found_in_whatever_range_their_digests_lie(tmp_path: Path) -> None:
    names = [f"item-{n}" for n in range(300)]
    several = ["item-3", "item-3", "item-7", "item-299"]
    folders = [write_items(tmp_path / "0", names), write_items(tmp_path / "1", several, 300)]
    found = Items(folders)
    edges = [n * 2**64 // 7 for n in range(8)]
    by_range = [found.twice(*ends) for ends in pairwise(edges)]
    assert sorted(name for one in by_range for name in one) == sorted(set(several))
    assert sorted(found.twice(0, 2**64)) == sorted(set(several))
    (digest,) = id_digests(["item-7"]).tolist()
    assert found.twice(digest, digest + 1) == ["item-7"]
    assert found.twice(0, digest) + found.twice(digest + 1, 2**64) == [
        name for name in found.twice(0, 2**64) if name != "item-7"
    ]


def test_ids_of_one_digest_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(ids: Iterable[str]) -> NDArray[np.uint64]:
        return np.array([len(name) for name in ids], np.uint64)

    monkeypatch.setattr(items_module, "id_digests", poor)
    found = Items([write_items(tmp_path / "0", ["a", "b", "cc", "d"])])
    assert found.find(["d", "b", "cc", "e", "ee"]).tolist() == [3, 1, 2, NO_ROW, NO_ROW]
    assert found.twice(0, 2**64) == []


def _looked_up(folder: str, count: int) -> int:
    found = Items([Path(folder) / str(count)])
    return int(found.find([f"item number {n}" for n in range(0, count, count // 100)]).sum())


def test_memory_of_a_lookup_does_not_grow_with_items(tmp_path: Path) -> None:
    counts = (5_000, 200_000)
    for count in counts:
        write_items(tmp_path / str(count), [f"item number {n}" for n in range(count)])
    _, small, large = with_peaks(_looked_up, *[(str(tmp_path), n) for n in (5_000, *counts)])
    assert small[0] == sum(range(0, counts[0], counts[0] // 100))
    assert large[0] == sum(range(0, counts[1], counts[1] // 100))
    assert large[1] < small[1] + 200_000  # a list of all ids would take some 15 MB


def test_only_one_thread_at_a_time_parses_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy parses it as Python, and two parsers of Python 3.11 at once fail: once in some thousand times."""
    np.save(tmp_path / "a.npy", np.arange(10))
    original, inside, most = np.load, [0], [0]

    def watching(path: Path, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return original(path, **options)

    monkeypatch.setattr(np, "load", watching)
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda _: int(read_array(tmp_path / "a.npy").sum()), range(40)))
    assert set(sums) == {45}
    assert most == [1]
