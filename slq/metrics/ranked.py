"""Metrics of rankings that are there as arrays of which rank holds a relevant item, and the order that makes them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def hits(ranked_relevance: Bools, k: int) -> Floats:
    """hit@k of each query.

    Args:
        ranked_relevance: (queries, depth), whether the item at each rank is relevant.
        k: Depth; at most the array's.

    Returns:
        (queries,) of 0 or 1.
    """
    return np.asarray(ranked_relevance[:, :k].any(axis=1), dtype=np.float64)


def recalls(ranked_relevance: Bools, num_relevant: NDArray[np.int64], k: int) -> Floats:
    """recall@k of each query: (queries,) in 0..1; queries without any relevant item give 0."""
    found: Floats = ranked_relevance[:, :k].sum(axis=1) / np.maximum(num_relevant, 1)
    return found


def reciprocal_ranks(ranked_relevance: Bools) -> Floats:
    """1 / rank of the first relevant item of each query, 0 where there is none."""
    first = ranked_relevance.argmax(axis=1)
    return np.where(ranked_relevance.any(axis=1), 1.0 / (first + 1), 0.0)


def ndcg(ranked_relevance: Bools, num_relevant: NDArray[np.int64], k: int) -> Floats:
    """nDCG@k of each query with binary grades."""
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    gained = (ranked_relevance[:, :k] * discounts[: ranked_relevance.shape[1]]).sum(axis=1)
    ideal = np.cumsum(discounts)[np.clip(num_relevant, 1, k) - 1]
    return np.where(num_relevant > 0, gained / ideal, 0.0)


def pessimistic_order(
    scores: NDArray[np.floating[Any]], relevant: Bools | NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    """Item order of each query, best first; among equal scores the irrelevant ones come first.

    Args:
        scores: (queries, items), higher is better; NaN counts as the worst score.
        relevant: (queries, items), or grades from 0 on: among equal scores the lower grade comes first.
    """
    clean = np.where(np.isnan(scores), -np.inf, scores)
    keys = (np.broadcast_to(np.arange(scores.shape[1]), scores.shape), relevant, -clean)
    return np.lexsort(keys, axis=1)
