"""Collections that are written row by row and that others may change meanwhile: those of Milvus and Qdrant.

There is one version at a time, named by the state of the data set that it came from. A mark in the collection says
which, and whether all of it is there; every row names its state too, so that those of an older one can go.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from slq.engines.base import Collection, Mark, SearchEngine
from slq.engines.rows import checked_vectors, json_kinds, json_rows, require_all, twice
from slq.engines.searching import EngineIndex
from slq.index.vectors import unit

SOURCE = "slq_source"
"""Beside the columns of a row: which state it came with."""
Row = tuple[dict[str, Any], list[float]]
"""Columns and unit vector of an item."""


class LiveEngine(SearchEngine):
    """A place for such collections."""

    label = ""
    """The engine's name, for people."""
    batch_rows = 1000
    """That one request writes."""

    @property
    def is_exclusive(self) -> bool:
        """See `SearchEngine.is_exclusive`: what is no address is a place on disk, which a client locks."""
        return "://" not in self.target

    @abstractmethod
    def connection(self) -> AbstractContextManager[Any]:
        """A client; its errors as ours.

        Raises:
            ConfigError: The package is not installed.
            StorageError: The place cannot be reached, or refuses.
        """

    @abstractmethod
    def _exists(self, client: Any) -> bool:
        """Whether there is a collection of this name."""

    @abstractmethod
    def _marked(self, client: Any) -> dict[str, Any] | None:
        """The mark of the collection, or None where it has none."""

    @abstractmethod
    def _make(self, client: Any, mark: Mark) -> None:
        """Create the collection."""

    @abstractmethod
    def _set(self, client: Any, mark: Mark) -> None:
        """Put a mark in place of the one that is there."""

    @abstractmethod
    def _put(self, client: Any, rows: list[Row], version: str) -> None:
        """Write rows; those with the ids of others replace them."""

    @abstractmethod
    def _drop_others(self, client: Any, version: str) -> None:
        """Remove the rows that another state left; what others have written stays."""

    @abstractmethod
    def _count(self, client: Any, version: str | None) -> int:
        """Rows of a state, or all."""

    @abstractmethod
    def _index(self, client: Any, mark: Mark, count: int, connection: ExitStack) -> EngineIndex:
        """The collection as it is searched."""

    def require_names(self, columns: list[str]) -> None:
        """Refuse names of columns that the engine cannot have.

        Raises:
            ConfigError: There are some.
        """

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`; a row that is there already is replaced, and those of an older state go."""
        columns = json_kinds(collection.schema, self.label)
        self.require_names(list(columns))
        mark = Mark(
            collection.fingerprint,
            collection.source,
            collection.num_rows,
            collection.dimension,
            columns,
        )
        with self.connection() as client:
            self._begin(client, mark)
            count = 0
            for table in collection.tables:
                vectors = unit(checked_vectors(table, collection, count)).tolist()
                rows = list(zip(json_rows(table, columns), vectors, strict=True))
                for start in range(0, len(rows), self.batch_rows):
                    some = rows[start : start + self.batch_rows]
                    self._put(client, some, mark.version)
                    count += len(some)
                    yield count
            require_all(count, collection)
            self._drop_others(client, mark.version)
            found = self._count(client, mark.version)
            if found != count:
                raise twice(self, found, count)
            self._set(client, mark.completed())

    def _begin(self, client: Any, mark: Mark) -> None:
        """A collection that says that it is being written."""
        if not self._exists(client):
            self._make(client, mark)
        else:
            found = self._mark_of(client)
            self.require_same_space(found, mark.fingerprint, mark.dimension)
        self._set(client, mark)

    def _mark_of(self, client: Any) -> Mark:
        told_of = self._marked(client)
        if told_of is None:
            raise self.not_ours()
        return Mark(**told_of)

    def _found(self, client: Any) -> Mark | None:
        return self._mark_of(client) if self._exists(client) else None

    def _is_absent(self) -> bool:
        """Whether nothing is at a place on disk; a client that looks there would make something."""
        return self.is_exclusive and not Path(self.target).exists()

    def mark(self) -> Mark | None:
        """See `SearchEngine.mark`."""
        if self._is_absent():
            return None
        with self.connection() as client:
            return self._found(client)

    def open(self, version: str | None = None) -> EngineIndex:
        """See `SearchEngine.open`."""
        if self._is_absent():
            self.require_ready(None, version, "")
        with ExitStack() as stack:
            client = stack.enter_context(self.connection())
            found = self._found(client)
            mark = self.require_ready(found, version, found.version if found else "")
            count = self._count(client, None)
            return self._index(client, mark, count, stack.pop_all())
