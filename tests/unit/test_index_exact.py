"""Exact search in blocks, and the files that it reads, against plain numpy."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from slq.errors import DataError
from slq.index import items as items_module
from slq.index.exact import NO_ROW, best, exact_search
from slq.index.items import Items, ItemsWriter, write_order
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
    stored = StoredVectors(tmp_path / "v.npy")
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
    count = sum(sizes)
    names = [f"{'äz'[n % 2]}{(n * 37) % count}" for n in range(count)]
    rows = pa.table({"id": names, "text": [None if n % 3 else f"t{n}" for n in range(count)]})
    start = 0
    with pa.OSFile(str(tmp_path / "items"), "wb") as file:
        writer = ItemsWriter(file)
        for size in sizes:
            writer.add(rows.slice(start, size))
            start += size
        writer.finish()
    write_order(tmp_path / "order.npy", tmp_path / "items")
    found = Items(tmp_path / "items", tmp_path / "order.npy")
    assert len(found) == count
    assert [found.row(n) for n in range(count)] == rows.to_pylist()
    assert [found.find(name) for name in names] == list(range(count))
    assert found.find("b") == found.find("") == found.find("ä") == found.find("zz") == NO_ROW
    assert list(found.ids()) == names
    assert pa.concat_tables(table for _, table in found.batches()).equals(rows)


def _looked_up(folder: str, count: int) -> int:
    found = Items(Path(folder) / f"items-{count}", Path(folder) / f"order-{count}.npy")
    return sum(found.find(f"item number {n}") for n in range(0, count, count // 100))


def test_memory_of_a_lookup_does_not_grow_with_items(tmp_path: Path) -> None:
    counts = (5_000, 200_000)
    for count in counts:
        with pa.OSFile(str(tmp_path / f"items-{count}"), "wb") as file:
            writer = ItemsWriter(file)
            writer.add(pa.table({"id": [f"item number {n}" for n in range(count)]}))
            writer.finish()
        write_order(tmp_path / f"order-{count}.npy", tmp_path / f"items-{count}")
    _, small, large = with_peaks(_looked_up, *[(str(tmp_path), n) for n in (5_000, *counts)])
    assert small[0] == sum(range(0, counts[0], counts[0] // 100))
    assert large[0] == sum(range(0, counts[1], counts[1] // 100))
    assert large[1] < small[1] + 200_000  # a list of all ids would take some 15 MB
