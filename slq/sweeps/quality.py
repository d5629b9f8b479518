"""How good the rankings of a cell are: hit@k of each depth, and how much of the exact ranking is in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.index.exact import NO_ROW, Rows, Scores
from slq.metrics import Bools, Floats, bootstrap_interval, hits, pessimistic_order, recalls
from slq.reranking.profiles import PROFILES, Reading, ordered
from slq.sweeps.config import KS, RECALL_AT

Readings = Sequence[Mapping[int, Reading]]
"""Of each query, by row of the item, what the fine stage has read."""


@dataclass(frozen=True)
class Found:
    """What a cell found, one place more than anything asks for.

    Attributes:
        scores: (queries, places) float32, falling.
        rows: (queries, places) int64 rows of the gallery; `NO_ROW` fills up.
        num_items: Of the gallery.
    """

    scores: Scores
    rows: Rows
    num_items: int

    def pessimistic(self, relevant: Bools) -> tuple["Found", Bools]:
        """The same with relevant items behind others of the same score, and which places hold relevant items.

        One that has the score of the last place counts as not found, unless all items are there: those of the same
        score that were not given would come before it.

        Args:
            relevant: (queries, items).
        """
        right = np.take_along_axis(relevant, np.maximum(self.rows, 0), axis=1)
        right &= self.rows != NO_ROW
        if self.rows.shape[1] < self.num_items:
            right &= self.scores > self.scores[:, -1:]
        order = pessimistic_order(self.scores, right)
        scores = np.take_along_axis(self.scores, order, axis=1)
        rows = np.take_along_axis(self.rows, order, axis=1)
        return Found(scores, rows, self.num_items), np.take_along_axis(right, order, axis=1)


def ranked_again(found: Found, right: Bools, readings: Readings, depth: int) -> Bools:
    """Which places hold relevant items once the fine stage has ordered the first `depth` of them.

    Args:
        found: The coarse ranking.
        right: (queries, places) of it.
        readings: Of the candidates; one without keeps its coarse place.
        depth: Candidates that are scored.
    """
    again = right.copy()
    for query, (scores, rows) in enumerate(zip(found.scores, found.rows, strict=True)):
        head = [row for row in rows[:depth].tolist() if row != NO_ROW]
        known = {n: readings[query][row] for n, row in enumerate(head) if row in readings[query]}
        order = ordered(known, scores[: len(head)].tolist(), PROFILES["default"])
        again[query, : len(head)] = right[query, order]
    return again


def quality_of(right: Bools, kept: Floats, mask: Bools | None = None) -> dict[str, Any]:
    """Means with 95% bootstrap intervals over queries.

    Args:
        right: (queries, places), whether each holds a relevant item.
        kept: (queries,) of `kept_of`.
        mask: (queries,) which of them; all by default.
    """
    chosen = slice(None) if mask is None else mask
    values = {f"hit@{k}": hits(right[chosen], k) for k in KS}
    values[f"recall@{RECALL_AT}"] = kept[chosen]
    report: dict[str, Any] = {"num_queries": len(right[chosen])}
    for name, one in values.items():
        report[name] = float(one.mean())
        report[f"{name}_interval"] = list(bootstrap_interval(one))
    return report


def kept_of(found: Found, exact: Rows) -> Floats:
    """Share of the exact ranking's first ten items that are among a ranking's own.

    Args:
        found: As it was given, without an eye to relevance.
        exact: (queries, ten) rows of exact search.
    """
    best: NDArray[np.int64] = found.rows[:, :RECALL_AT]
    there = (best[:, :, None] == exact[:, None, :]).any(axis=2) & (best != NO_ROW)
    return recalls(there, (exact != NO_ROW).sum(axis=1), RECALL_AT)
