"""Vectors, rows and small indexes for the tests of `slq.index`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.arrow import vector_column
from slq.index import IndexConfig, VectorIndex, write_version

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


def stored(count: int = COUNT, seed: int = 0) -> NDArray[np.float64]:
    """The vectors of `table` as an index must see them: rounded, then of norm one."""
    vectors = unit_vectors(count, seed).astype(np.float16).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def published(
    folder: Path, config: IndexConfig = FLAT, *, count: int = COUNT, seed: int = 0
) -> VectorIndex:
    rows = table(count, seed=seed)
    parts = [rows.slice(0, 7), rows.slice(7)]  # a build sees tables, not rows
    write_version(folder, parts, (count, DIMENSION), fingerprint="3f2a", config=config)
    return VectorIndex(folder)


def brute_force(
    queries: NDArray[np.float32], top_k: int, rows: NDArray[np.int64]
) -> list[list[int]]:
    """The best of these rows of `table` in float64."""
    similarity = queries.astype(np.float64) @ stored()[rows].T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :top_k]
    return [rows[one].tolist() for one in order]
