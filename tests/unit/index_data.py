"""Vectors, rows and small indexes for the tests of `slq.index`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.arrow import vector_column
from slq.index import Content, IndexConfig, VectorIndex, write_version

COUNT, DIMENSION = 400, 32
FLAT = IndexConfig()
IVF = IndexConfig(kind="ivf", num_lists=8, num_probes=8)


def unit_vectors(count: int, seed: int = 0, dimension: int = DIMENSION) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def table(count: int = COUNT, *, seed: int = 0, first: int = 0) -> pa.Table:
    """Rows `item-FIRST`, ... of random vectors; two neighbours have the same content."""
    numbers = range(first, first + count)
    return pa.table(
        {
            "id": [f"item-{n}" for n in numbers],
            "embedding": vector_column(unit_vectors(count, seed).astype(np.float16)),
            "text": [f"t{n}" for n in numbers],
            "price": [n % 10 for n in numbers],
            "content_hash": [f"{n // 2}" for n in numbers],
        }
    )


@dataclass(frozen=True)
class Given:
    """A table as a source that says how many rows it has."""

    table: pa.Table
    said: int | None = None

    @property
    def num_rows(self) -> int:
        return self.table.num_rows if self.said is None else self.said

    def tables(self) -> Iterator[pa.Table]:
        half = self.table.num_rows // 2
        yield from (self.table.slice(0, half), self.table.slice(half))


def stored(count: int = COUNT, seed: int = 0) -> NDArray[np.float64]:
    """The vectors of `table` as an index must see them: rounded, then of norm one."""
    vectors = unit_vectors(count, seed).astype(np.float16).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def published(
    folder: Path, config: IndexConfig = FLAT, *, count: int = COUNT, seed: int = 0
) -> VectorIndex:
    rows = table(count, seed=seed)
    parts = [Given(rows.slice(0, 7)), Given(rows.slice(7))]
    write_version(folder, Content(parts, DIMENSION, "3f2a"), config)
    return VectorIndex(folder)


def brute_force(
    queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64]
) -> list[list[int]]:
    """The best of these rows of `table` in float64."""
    similarity = queries.astype(np.float64) @ stored()[rows].T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :top_k]
    return [rows[one].tolist() for one in order]


def small_partitions(config: IndexConfig, rows: int) -> IndexConfig:
    """So that about this many rows are in one."""
    sized = config.model_copy(update={"partition_bytes": 1})
    while sized.partition_rows(DIMENSION) < rows:
        sized = sized.model_copy(update={"partition_bytes": sized.partition_bytes + 1})
    return sized
