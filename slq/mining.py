"""Which of the nearest candidates are hard negatives, and which are rather right answers that nobody labelled."""

import numpy as np
from numpy.typing import NDArray


def hard_negatives(
    similarities: NDArray[np.float32],
    positives: NDArray[np.float32],
    right: NDArray[np.bool_],
    *,
    per_pair: int,
    max_share_of_positive: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Choose negatives by positive-aware mining.

    Source: NV-Retriever (arXiv 2407.15831), TopK-PercPos: a candidate above a share of the positive's similarity is
    taken for an unlabelled right answer. Where the positive's cosine is below zero, the bar lies above it.

    Args:
        similarities: (pairs, depth) cosines, best first.
        positives: (pairs,) cosines of the pairs' own positives.
        right: (pairs, depth) bool, candidates known to be right, or that are none; never chosen.
        per_pair: Negatives of a pair at most; the most similar are chosen.
        max_share_of_positive: Candidates above this share of the positive's cosine are left out; at it they are not.

    Returns:
        Both (pairs, depth) bool: what is chosen, and what was left out as a possible right answer.
    """
    bar = np.float32(max_share_of_positive) * positives[:, None]
    doubtful = ~right & (similarities > bar)
    allowed = ~right & ~doubtful
    return allowed & (np.cumsum(allowed, axis=1) <= per_pair), doubtful
