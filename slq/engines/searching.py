"""Collections of other engines that answer as `slq.index.SearchIndex` says."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.engines.base import Mark
from slq.engines.predicates import Predicate, parsed
from slq.errors import DataError
from slq.index import Hit, SearchIndex
from slq.index.contract import checked_ids, checked_queries
from slq.index.vectors import unit

_HITS_AT_ONCE = 16_384  # that one request asks for; with their columns some megabytes
_IDS_AT_ONCE = 1000
CONTENT = "content_hash"


@dataclass(frozen=True)
class Wanted:
    """Which items may be found, and how.

    Attributes:
        where: What their columns must meet, if anything.
        exclude: Ids that are left out, in order.
        exact: Compare with every vector, whatever the engine's own index is.
    """

    where: Predicate | None
    exclude: tuple[str, ...]
    exact: bool


@dataclass(frozen=True)
class Stored:
    """What is stored of an item; the vector where it was asked for."""

    columns: dict[str, Any]
    vector: Sequence[float] | None


class EngineIndex(SearchIndex):
    """A collection that is kept open.

    Args:
        mark: What it says of itself.
        count: Items that are there.
        version: Its name.
        connection: What is let go of in the end.
    """

    engine = ""
    """Its name, for people."""

    def __init__(self, mark: Mark, count: int, version: str, connection: ExitStack) -> None:
        self.version = version
        self._mark, self._count = mark, count
        self._columns = list(mark.columns)
        self._connection = connection

    @property
    def fingerprint(self) -> str:
        """See `SearchIndex.fingerprint`."""
        return self._mark.fingerprint

    @property
    def dimension(self) -> int:
        """See `SearchIndex.dimension`."""
        return self._mark.dimension

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """See `SearchIndex.close`."""
        self._connection.close()

    @abstractmethod
    def _nearest(
        self, queries: NDArray[np.float32], depth: int, wanted: Wanted
    ) -> Iterable[list[Hit]]:
        """The best items for each query vector with their columns, best first, in one request.

        Raises:
            DataError: The engine has no such search.
            StorageError: It cannot be reached.
        """

    @abstractmethod
    def _stored(self, item_ids: Sequence[str], *, with_vectors: bool) -> Iterable[Stored]:
        """What is stored of those items that are there, in one request and any order.

        Raises:
            StorageError: The engine cannot be reached.
        """

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
        """See `SearchIndex.search`; predicates are those of `slq.engines.predicates`."""
        if words is not None:
            raise DataError(
                f"{self.engine} ranks by vectors alone; index.engine=faiss with index.words=true joins them with words"
            )
        if distinct and CONTENT not in self._columns:
            raise DataError(f"the items have no column {CONTENT} to tell equal ones by")
        hidden = tuple(sorted(checked_ids(exclude)))
        queries = checked_queries(vectors, self.dimension)
        read = None if where is None else parsed(where, self._mark.columns)
        wanted = Wanted(read, hidden, exact)
        depth = top_k = min(top_k, len(self))
        while True:
            found = list(self._in_requests(queries, depth, wanted))
            kept = [list(_distinct(hits))[:top_k] if distinct else hits for hits in found]
            # Where duplicates took places, there may be more behind them.
            missing = any(
                len(some) < top_k and len(hits) == depth
                for some, hits in zip(kept, found, strict=True)
            )
            if not missing or depth >= len(self):
                return kept
            depth = min(2 * depth, len(self))

    def _in_requests(
        self, queries: NDArray[np.float32], depth: int, wanted: Wanted
    ) -> Iterator[list[Hit]]:
        """The best items for each query vector, some queries at a time."""
        if depth < 1:
            yield from ([] for _ in queries)
            return
        step = max(1, _HITS_AT_ONCE // depth)
        for start in range(0, len(queries), step):
            yield from self._nearest(queries[start : start + step], depth, wanted)

    def _hit(self, score: float, columns: dict[str, Any]) -> Hit:
        """A hit with what is stored of it; what an engine does not keep of it is null."""
        known = {name: columns.get(name) for name in self._columns}
        return Hit(columns["id"], score, columns=known)

    def columns_of(self, hits: Iterable[Hit]) -> list[dict[str, Any]]:
        """See `SearchIndex.columns_of`."""
        return [dict(hit.columns or {}) for hit in hits]

    def item(self, item_id: str) -> dict[str, Any] | None:
        """See `SearchIndex.item`."""
        for one in self._stored([item_id], with_vectors=False):
            return {name: one.columns.get(name) for name in self._columns}
        return None

    def vectors_of(self, item_ids: Sequence[str]) -> NDArray[np.float32]:
        """See `SearchIndex.vectors_of`."""
        names = list(dict.fromkeys(item_ids))
        found: dict[str, Any] = {}
        for start in range(0, len(names), _IDS_AT_ONCE):
            some = self._stored(names[start : start + _IDS_AT_ONCE], with_vectors=True)
            found |= {one.columns["id"]: one.vector for one in some}
        for name in names:
            if name not in found:
                raise DataError(f"the index holds no item {name!r}")
        if not names:
            return np.zeros((0, self.dimension), np.float32)
        return unit(np.array([found[name] for name in item_ids], np.float32))


def _distinct(hits: Iterable[Hit]) -> Iterator[Hit]:
    """Of items with the same content the first."""
    seen: set[Any] = set()
    for hit in hits:
        content = (hit.columns or {}).get(CONTENT)
        if content not in seen:
            seen.add(content)
            yield hit
