"""How far judges agree: percent agreement, Fleiss' kappa and Krippendorff's alpha for nominal votes.

Fleiss (1971), "Measuring nominal scale agreement among many raters"; Krippendorff (2011), "Computing Krippendorff's
alpha-reliability". Votes are an array (rows, judges) of category numbers from 0; -1 is a vote that is missing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Votes = NDArray[np.int64]
Counts = NDArray[np.int64]
MISSING = -1


def counts_of(votes: Votes) -> Counts:
    """(rows, categories) int64: how many judges gave each row each category."""
    if votes.size == 0:
        return np.zeros((len(votes), 1), dtype=np.int64)
    num_categories = max(int(votes.max()) + 1, 1)
    return np.stack([(votes == number).sum(axis=1) for number in range(num_categories)], axis=1)


def percent_agreement(votes: Votes) -> float | None:
    """Mean over rows of the share of pairs of judges who agree; None where no row has two votes."""
    counts = counts_of(votes)
    given = counts.sum(axis=1)
    counts, given = counts[given >= 2], given[given >= 2]
    if not len(given):
        return None
    agreeing = (counts * (counts - 1)).sum(axis=1) / (given * (given - 1))
    return float(agreeing.mean())


def fleiss_kappa(votes: Votes) -> float | None:
    """Fleiss' kappa over the rows that every judge has voted on.

    Returns:
        1 for full agreement, 0 for as much as chance gives; None with fewer than two judges, without such rows, or
        where all votes are of one category, so that chance explains everything.
    """
    whole = votes[(votes != MISSING).all(axis=1)] if votes.size else votes
    if whole.size == 0 or whole.shape[1] < 2:
        return None
    counts = counts_of(whole)
    observed = percent_agreement(whole)
    shares = counts.sum(axis=0) / counts.sum()
    expected = float((shares**2).sum())
    if observed is None or np.isclose(expected, 1.0):
        return None
    return (observed - expected) / (1 - expected)


def krippendorff_alpha(votes: Votes) -> float | None:
    """Krippendorff's alpha for nominal categories, from the coincidences of votes; missing ones are allowed.

    Returns:
        1 for full agreement, 0 for as much as chance gives; None where no row has two votes, or where all votes that
        can be paired are of one category.
    """
    counts = counts_of(votes)
    given = counts.sum(axis=1)
    counts, given = counts[given >= 2], given[given >= 2]
    total = int(given.sum())
    if not total:
        return None
    agreeing = ((counts * (counts - 1)).sum(axis=1) / (given - 1)).sum()
    by_category = counts.sum(axis=0)
    by_chance = (by_category * (by_category - 1)).sum() / (total - 1)
    if np.isclose(by_chance, total):
        return None
    return float(1 - (total - agreeing) / (total - by_chance))


def agreement(votes: Votes) -> dict[str, Any]:
    """All three, with how much they rest on.

    Args:
        votes: (rows, judges), -1 where a judge gave none.
    """
    paired = int(((votes != MISSING).sum(axis=1) >= 2).sum()) if votes.size else 0
    return {
        "rows": len(votes),
        "judges": votes.shape[1],
        "rows_with_two_votes": paired,
        "percent_agreement": percent_agreement(votes),
        "fleiss_kappa": fleiss_kappa(votes),
        "krippendorff_alpha": krippendorff_alpha(votes),
    }
