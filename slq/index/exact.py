"""Exact search over blocks of vectors: what every index is measured by, and the way to search few rows.

Scores are sums in float32, and equal ones are ordered by row: the answer does not depend on how the rows are cut.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Rows = NDArray[np.int64]
Block = tuple[Rows, NDArray[np.float32]]
"""(rows,) row numbers and their (rows, dimension) unit vectors."""
NO_ROW = -1
"""Fills the places of a query that has fewer results than were asked for; their score is -inf."""


def exact_search(
    queries: NDArray[np.float32], blocks: Iterable[Block], top_k: int
) -> tuple[Scores, Rows]:
    """The best rows for each query, best first.

    Args:
        queries: (queries, dimension) float32 unit vectors.
        blocks: Rows and their vectors; every row once.
        top_k: Results per query.

    Returns:
        (queries, top_k) float32 scores and int64 rows.
    """
    scores = np.full((len(queries), 0), -np.inf, np.float32)
    rows = np.full((len(queries), 0), NO_ROW, np.int64)
    for numbers, vectors in blocks:
        found = queries @ vectors.T  # (queries, rows of the block)
        scores, rows = best(
            np.concatenate([scores, found], axis=1),
            np.concatenate([rows, np.broadcast_to(numbers, found.shape)], axis=1),
            top_k,
        )
    return padded(scores, rows, top_k)


def best(scores: Scores, rows: Rows, top_k: int) -> tuple[Scores, Rows]:
    """The `top_k` columns with the highest score, of equal ones those of the lowest row; best first.

    Args:
        scores: (queries, n) float32.
        rows: (queries, n) int64.
        top_k: Columns to keep; all where there are fewer.
    """
    if scores.shape[1] > top_k:
        edge = np.partition(scores, -top_k, axis=1)[:, -top_k, None]
        width = int((scores >= edge).sum(axis=1).max())  # ties may reach beyond top_k
        kept = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        scores = np.take_along_axis(scores, kept, axis=1)
        rows = np.take_along_axis(rows, kept, axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :top_k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def padded(scores: Scores, rows: Rows, top_k: int) -> tuple[Scores, Rows]:
    """The same with exactly `top_k` columns."""
    missing = ((0, 0), (0, max(0, top_k - scores.shape[1])))
    return (
        np.pad(scores, missing, constant_values=-np.inf)[:, :top_k],
        np.pad(rows, missing, constant_values=NO_ROW)[:, :top_k],
    )
