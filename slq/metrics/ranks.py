"""Where the relevant items of each query stand: all that a retrieval metric needs to know."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.metrics.ranked import Bools, Floats, pessimistic_order

Integers = NDArray[np.int64]
Grades = NDArray[Any]
"""(queries, items): whether an item is relevant, or its grade; 0 and below is irrelevant."""


@dataclass(frozen=True)
class Relevance:
    """Relevant pairs, sorted by query and then by item.

    Attributes:
        num_queries: Queries, those without relevant items included.
        num_items: Items.
        query: (pairs,) row of the query.
        item: (pairs,) column of the item.
        grade: (pairs,) above 0.
    """

    num_queries: int
    num_items: int
    query: Integers
    item: Integers
    grade: Floats

    @classmethod
    def of_pairs(
        cls, shape: tuple[int, int], query: Integers, item: Integers, grade: Floats
    ) -> "Relevance":
        """From pairs in any order; those with a grade of 0 or less are irrelevant and left out.

        Raises:
            DataError: A number is outside of `shape`, or a pair stands there twice.
        """
        kept = np.asarray(grade) > 0
        query, item, grade = query[kept], item[kept], grade[kept]
        for name, numbers, size in (("query", query, shape[0]), ("item", item, shape[1])):
            wrong = numbers[(numbers < 0) | (numbers >= size)]
            if len(wrong):
                raise DataError(
                    f"relevance names {name} {wrong[0]}, and there are {size}, counted from 0"
                )
        order = np.lexsort((item, query))
        query, item = query[order], item[order]
        twice = np.flatnonzero((np.diff(query) == 0) & (np.diff(item) == 0))
        if len(twice):
            n = twice[0]
            raise DataError(f"relevance has item {item[n]} for query {query[n]} twice; keep one")
        return cls(*shape, query, item, grade[order].astype(np.float64))

    @classmethod
    def of_matrix(cls, grades: Grades) -> "Relevance":
        """From (queries, items) grades or truth values."""
        query, item = np.nonzero(grades > 0)
        num_queries, num_items = grades.shape
        return cls(num_queries, num_items, query, item, grades[query, item].astype(np.float64))

    def matrix(self) -> NDArray[np.float32]:
        """(queries, items) float32 grades, 0 where an item is irrelevant."""
        grades = np.zeros((self.num_queries, self.num_items), np.float32)
        grades[self.query, self.item] = self.grade
        return grades


def with_equal_items(relevance: Relevance, keys: Sequence[Hashable | None]) -> Relevance:
    """Relevance in which items that are the same answer a query alike, as a gallery may hold an image twice.

    Args:
        relevance: As judged.
        keys: Of each item what equal ones share, such as a digest of the content or the item that it is a copy of;
            None for an item that has no equal.

    Returns:
        Each item has the highest grade that any item of its key has for the query.

    Raises:
        DataError: There is not one key for each item.
    """
    if len(keys) != relevance.num_items:
        raise DataError(
            f"there are {len(keys)} keys for {relevance.num_items} items; give each one"
        )
    of_key: dict[Hashable, list[int]] = {}
    for n, key in enumerate(keys):
        if key is not None:
            of_key.setdefault(key, []).append(n)
    best: dict[tuple[int, int], float] = {}
    pairs = zip(relevance.query, relevance.item, relevance.grade, strict=True)
    for query, item, grade in pairs:
        key = keys[item]
        for equal in (int(item),) if key is None else of_key[key]:
            place = int(query), equal
            best[place] = max(best.get(place, 0.0), float(grade))
    query, item = np.array(sorted(best), dtype=np.int64).reshape(-1, 2).T
    grades = np.array([best[place] for place in sorted(best)], dtype=np.float64)
    return Relevance(relevance.num_queries, relevance.num_items, query, item, grades)


@dataclass(frozen=True)
class Ranks:
    """Ranks of the relevant items of each query, by query, the best rank first.

    Attributes:
        num_queries: Queries, those without relevant items included.
        query: (pairs,) row of the query, ascending.
        rank: (pairs,) from 1; 0 where the item is not in the ranking, and those come last.
        grade: (pairs,) above 0.
    """

    num_queries: int
    query: Integers
    rank: Integers
    grade: Floats

    @classmethod
    def sorted(cls, num_queries: int, query: Integers, rank: Integers, grade: Floats) -> "Ranks":
        """From pairs in any order."""
        order = np.lexsort((grade, rank, rank == 0, query))
        return cls(num_queries, query[order], rank[order], grade[order])

    @property
    def num_relevant(self) -> Integers:
        """(queries,) relevant items of each query, found or not."""
        return np.bincount(self.query, minlength=self.num_queries)

    @property
    def place(self) -> Integers:
        """(pairs,) number of each pair within its query, from 1."""
        return within(self.query)


def within(query: Integers) -> Integers:
    """(pairs,) number of each pair within its query, from 1.

    Args:
        query: (pairs,) row of the query, ascending.
    """
    counts = np.bincount(query)
    starts = np.cumsum(counts) - counts
    return np.arange(1, len(query) + 1) - starts[query]


def ranks_of_order(order: Integers, grades: Grades, allowed: Bools | None = None) -> Ranks:
    """Ranks from a whole ranking.

    Args:
        order: (queries, items) columns of the items, best first.
        grades: (queries, items).
        allowed: (queries, items) whether an item is a candidate for the query; others have no rank, and take up none.
    """
    graded = np.take_along_axis(grades, order, axis=1)
    query, column = np.nonzero(graded > 0)
    if allowed is None:
        rank = column + 1
    else:
        counted = np.take_along_axis(allowed, order, axis=1)
        rank = np.where(counted, counted.cumsum(axis=1), 0)[query, column]
    return Ranks.sorted(len(order), query, rank, graded[query, column].astype(np.float64))


def ranks_of_scores(
    scores: NDArray[np.floating[Any]], grades: Grades, allowed: Bools | None = None
) -> Ranks:
    """Ranks from a whole matrix of scores, by sorting every row of it; ties count against us.

    Args:
        scores: (queries, items), higher is better; NaN is the worst.
        grades: (queries, items).
        allowed: As of `ranks_of_order`.
    """
    return ranks_of_order(pessimistic_order(scores, np.maximum(grades, 0)), grades, allowed)
