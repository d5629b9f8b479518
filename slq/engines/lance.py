"""A table of Lance: a versioned data set on a disk or in an object store, also readable by Ray Data and DuckDB."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.engines.base import Collection, Mark, SearchEngine, missing, told
from slq.engines.predicates import Among, Comparison, Group, Kind, Like, Null, Predicate, Value
from slq.engines.rows import SeenIds, checked_vectors, kinds, require_all
from slq.engines.searching import EngineIndex, Stored, Wanted
from slq.errors import ArtifactError, ConfigError, SlqError, StorageError
from slq.index import Hit
from slq.index.parts import EMBEDDING

_MARK = b"slq.mark"
_DISTANCE, _QUERY = "_distance", "query_index"  # columns that Lance adds to results
_ERRORS = (OSError, ValueError)


class Lance(SearchEngine):
    """The table `target`/`name`.lance; a folder, `s3://bucket/prefix` or another store of Lance's.

    A new state of the data set becomes a new version of the table, at once; who reads the old one goes on reading it.
    """

    package = "pylance"
    credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of another store"

    @property
    def uri(self) -> str:
        """Of the table."""
        return f"{self.target.rstrip('/')}/{self.name}.lance"

    def __str__(self) -> str:
        return f"table {self.uri}"

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`; a table is there as a whole or not at all."""
        lance = _lance()
        found = self.mark()
        if found is not None:
            self.require_same_space(found, collection.fingerprint, collection.dimension)
        for name in (_DISTANCE, _QUERY):
            if name in collection.schema.names:
                raise ConfigError(f"Lance gives results a column {name}; call yours otherwise")
        schema, stream = _schema(collection), _Stream(collection, self)
        reader = pa.RecordBatchReader.from_batches(schema, stream.batches(schema))
        mode = "create" if found is None else "overwrite"
        try:
            table = lance.write_dataset(reader, self.uri, mode=mode)
            table.create_scalar_index("id", "BTREE")  # or each look for an id would read them all
        except _ERRORS as error:
            if stream.problem is not None:
                raise stream.problem from None
            raise StorageError(f"{self.uri} cannot be written: {error}") from None
        yield stream.count

    def mark(self) -> Mark | None:
        """See `SearchEngine.mark`."""
        table = self._table(None)
        return None if table is None else self._mark_of(table)

    def _table(self, version: int | None) -> Any:
        """The table at a version, or its latest; None where there is none."""
        lance = _lance()
        try:
            return lance.dataset(self.uri, version=version)
        except _ERRORS as error:
            if "was not found" in str(error):
                return None
            raise StorageError(f"{self.uri} cannot be opened: {error}") from None

    def _mark_of(self, table: Any) -> Mark:
        metadata: dict[bytes, bytes] = table.schema.metadata or {}
        if _MARK not in metadata:
            raise self.not_ours()
        return Mark(**json.loads(metadata[_MARK]))

    def open(self, version: str | None = None) -> "LanceIndex":
        """See `SearchEngine.open`; a version is a number of the table's, and older ones can be opened."""
        number = int(version) if version is not None and version.isdecimal() else None
        table = self._table(number)
        if table is None and number is not None and self._table(None) is not None:
            raise ArtifactError(
                f"{self} has no version {version} any more; start again with its latest"
            )
        found = None if table is None else self._mark_of(table)
        mark = self.require_ready(found, version, "" if table is None else str(table.version))
        return LanceIndex(self.uri, table, mark)


class LanceIndex(EngineIndex):
    """A version of a table; exact where the table has no vector index of its own.

    Args:
        uri: Of the table.
        table: It, at that version.
        mark: What it says of itself.
    """

    engine = "Lance"

    def __init__(self, uri: str, table: Any, mark: Mark) -> None:
        with told(uri, _ERRORS):
            count = table.count_rows()
        super().__init__(mark, count, str(table.version), ExitStack())
        self._uri, self._table = uri, table

    def _nearest(
        self, queries: NDArray[np.float32], depth: int, wanted: Wanted
    ) -> Iterable[list[Hit]]:
        nearest = {
            "column": EMBEDDING,
            "q": queries.astype(np.float16),
            "k": depth,
            "metric": "cosine",
            "use_index": not wanted.exact,
        }
        parts = [] if wanted.where is None else [f"({_sql(wanted.where)})"]
        if wanted.exclude:
            parts.append(f"id NOT IN ({_listed(wanted.exclude)})")
        with told(self._uri, _ERRORS):
            found = self._table.scanner(
                columns=[*self._columns, _DISTANCE],
                nearest=nearest,
                filter=" AND ".join(parts) or None,
                prefilter=True,
            ).to_table()
        distances, numbers = (found[name].to_numpy() for name in (_DISTANCE, _QUERY))
        rows = found.select(self._columns).to_pylist()
        hits: list[list[Hit]] = [[] for _ in queries]
        for place in np.lexsort((distances, numbers)).tolist():
            hits[numbers[place]].append(self._hit(1 - float(distances[place]), rows[place]))
        return hits

    def _stored(self, item_ids: Sequence[str], *, with_vectors: bool) -> Iterable[Stored]:
        columns = [*self._columns, EMBEDDING] if with_vectors else self._columns
        with told(self._uri, _ERRORS):
            found = self._table.to_table(columns=columns, filter=f"id IN ({_listed(item_ids)})")
        for row in found.to_pylist():
            vector = row.pop(EMBEDDING, None)
            yield Stored(row, vector)


def _sql(one: Predicate) -> str:
    """A predicate as Lance reads it."""
    match one:
        case Group():
            return f" {one.joined_by.upper()} ".join(f"({_sql(part)})" for part in one.parts)
        case Comparison():
            return f"{_beside(one, [one.value])} {one.operator} {_literal(one.value, one.kind)}"
        case Among():
            values = ", ".join(_literal(value, one.kind) for value in one.values)
            return f"{_beside(one, one.values)} {_not(one)}IN ({values})"
        case Like():
            return f"{_named(one.column)} {_not(one)}LIKE {_literal(one.pattern)}"
        case Null():
            return f"{_named(one.column)} IS {_not(one)}NULL"


def _not(one: Among | Like | Null) -> str:
    return "NOT " if one.is_negated else ""


def _beside(one: Comparison | Among, values: Iterable[Value]) -> str:
    """The column as it stands beside values: Lance compares integers with integers alone."""
    name = _named(one.column)
    return f"CAST({name} AS double)" if any(isinstance(v, float) for v in values) else name


def _named(column: str) -> str:
    return f"`{column.replace('`', '``')}`"


def _literal(value: Value, kind: Kind = "text") -> str:
    if isinstance(value, str):
        quoted = "'" + value.replace("'", "''") + "'"
        return {"date": f"date {quoted}", "time": f"timestamp {quoted}"}.get(kind, quoted)
    return repr(value).lower()  # numbers, true and false


def _listed(item_ids: Iterable[str]) -> str:
    return ", ".join(_literal(name) for name in item_ids)


def _lance() -> Any:
    try:
        import lance
    except ModuleNotFoundError:
        raise missing("pylance", "lance") from None
    return lance


def _schema(collection: Collection) -> pa.Schema:
    vector = pa.list_(pa.float16(), collection.dimension)
    place = collection.schema.get_field_index(EMBEDDING)
    schema = collection.schema.set(place, pa.field(EMBEDDING, vector, nullable=False))
    mark = Mark(
        collection.fingerprint,
        collection.source,
        collection.num_rows,
        collection.dimension,
        kinds(collection.schema),
        is_complete=True,
    )
    return schema.with_metadata({_MARK: json.dumps(mark.to_json()).encode()})


class _Stream:
    """Rows as Lance takes them.

    Args:
        collection: What is handed over.
        place: Where they go, for messages.

    Attributes:
        count: Rows so far.
        problem: What ended the stream; Lance tells it with a traceback in a text.
    """

    def __init__(self, collection: Collection, place: object) -> None:
        self._collection = collection
        self._place = place
        self._ids = SeenIds()
        self.count = 0
        self.problem: SlqError | None = None

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows."""
        try:
            for table in self._collection.tables:
                yield from self._table(table, schema).to_batches()
                self._ids.add(table["id"].to_pylist())
                self.count += table.num_rows
            require_all(self.count, self._collection)
            self._ids.require_unique(self._place)  # before anything is there for others
        except SlqError as error:
            self.problem = error
            raise

    def _table(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        vectors = checked_vectors(table, self._collection, self.count)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), self._collection.dimension
        )
        place = table.schema.get_field_index(EMBEDDING)
        whole = table.set_column(place, schema.field(EMBEDDING), column)
        return whole.replace_schema_metadata(schema.metadata).cast(schema)
