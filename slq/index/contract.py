"""What every index answers, whether faiss or another engine holds it.

Scores are cosines, but where words join the ranking. What an engine cannot do is a `DataError` that names what can.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.exact import NO_ROW
from slq.index.vectors import require_directions
from slq.quantization import cut

MAX_EXCLUDED = 10_000
"""Ids that one search may leave out."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result.

    Attributes:
        id: Of the item.
        score: Higher is better.
        row: Counts over all segments of the version; -1 where an engine numbers no rows.
        columns: What is stored of the item, where it came together with the hit; see `SearchIndex.columns_of`.
    """

    id: str
    score: float
    row: int = NO_ROW
    columns: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


class SearchIndex(ABC):
    """An index that is open: one version of one collection of vectors with what is stored of their items.

    Attributes:
        version: Its name.
    """

    version: str

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the embedding space that the vectors live in."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of a vector."""

    @abstractmethod
    def __len__(self) -> int:
        """Items that can be found."""

    @abstractmethod
    def search(
        self,
        vectors: NDArray[np.float32],
        top_k: int,
        *,
        where: str | None = None,
        exclude: Collection[str] = (),
        distinct: bool = False,
        exact: bool = False,
        words: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """The best items for each query vector, best first.

        Args:
            vectors: (queries, dimension) float32 unit vectors; longer ones are cut as the index's own were.
            top_k: Results per query; fewer come back when the index is smaller.
            where: A predicate over the stored columns, in SQL: `price < 20 and lang = 'de'`.
            exclude: Ids that are left out.
            distinct: Of items with the same content only the first.
            exact: Compare with every vector, whatever the index is.
            words: A text for each query. Items are then ranked by vector and by words (BM25), both rankings are joined
                by reciprocal rank fusion, and a score is the sum of reciprocal ranks.

        Raises:
            DataError: A vector is shorter than the index's or not finite, `where` cannot be used, too much is
                excluded, or the engine has no such search.
            StorageError: The engine cannot be reached.
        """

    @abstractmethod
    def columns_of(self, hits: Iterable[Hit]) -> list[dict[str, Any]]:
        """The stored columns of hits of this index, without a further request to an engine."""

    @abstractmethod
    def item(self, item_id: str) -> dict[str, Any] | None:
        """The stored columns of an item, or None when there is no such item.

        Raises:
            StorageError: The engine cannot be reached.
        """

    @abstractmethod
    def vectors_of(self, item_ids: Sequence[str]) -> NDArray[np.float32]:
        """(items, dimension) float32 unit vectors of items.

        Raises:
            DataError: There is no such item.
            StorageError: The engine cannot be reached.
        """

    def more_like(self, item_id: str, top_k: int, **options: Any) -> list[Hit]:
        """Items like one of the index, without itself.

        Args:
            item_id: Of the item.
            top_k: Results.
            options: Of `search`.

        Raises:
            DataError: There is no such item, or an option cannot be used.
            StorageError: The engine cannot be reached.
        """
        hidden = {*options.pop("exclude", ()), item_id}
        (hits,) = self.search(self.vectors_of([item_id]), top_k, exclude=hidden, **options)
        return hits

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held open, so that others may have it; nothing can be asked any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_queries(vectors: NDArray[np.float32], dimension: int) -> NDArray[np.float32]:
    """(queries, dimension) float32 vectors to search with; longer ones are cut.

    Raises:
        DataError: They are no rows of vectors, shorter, not finite or zero.
    """
    queries = np.ascontiguousarray(vectors, dtype=np.float32)
    if queries.ndim != 2:
        raise DataError(f"queries have the shape {queries.shape}; (queries, dimension) is asked")
    if queries.shape[1] != dimension:
        queries = cut(queries, dimension)
    require_directions(queries)
    return queries


def checked_ids(exclude: Collection[str]) -> frozenset[str]:
    """Ids that are left out.

    Raises:
        DataError: There are too many.
    """
    if len(exclude) > MAX_EXCLUDED:
        raise DataError(f"{len(exclude)} ids are excluded; {MAX_EXCLUDED} are allowed")
    return frozenset(exclude)
