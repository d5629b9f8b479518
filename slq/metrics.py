"""Retrieval metrics by name, with intervals.

`hit@k` is 1 when at least one relevant item stands in the first k (what papers on COCO and Flickr30K call R@k);
`recall@k` is the share of the relevant items found in the first k. Ties count against us.
"""

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


def pessimistic_order(scores: NDArray[np.float32], relevant: Bools) -> NDArray[np.int64]:
    """Item order of each query, best first; among equal scores the irrelevant ones come first.

    Args:
        scores: (queries, items), higher is better; NaN counts as the worst score.
        relevant: (queries, items).
    """
    clean = np.where(np.isnan(scores), -np.inf, scores)
    keys = (np.broadcast_to(np.arange(scores.shape[1]), scores.shape), relevant, -clean)
    return np.lexsort(keys, axis=1)


def bootstrap_interval(
    values: Floats, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries.

    Args:
        values: (queries,) per-query metric.
        confidence: Probability mass inside.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(resamples, len(values)))
    means = values[picks].mean(axis=1)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_permutation(
    first: Floats, second: Floats, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of a paired randomisation test on the mean difference.

    Args:
        first: (queries,) per-query metric of one system.
        second: The same queries in the same order for the other.
        resamples: Random sign assignments.
        seed: Of the assignments.
    """
    differences = first - second
    observed = abs(differences.mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(differences)))
    extreme = (np.abs((signs * differences).mean(axis=1)) >= observed - 1e-12).sum()
    return float((extreme + 1) / (resamples + 1))
