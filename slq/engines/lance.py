"""A table of Lance: a versioned data set on a disk or in an object store, also readable by Ray Data and DuckDB."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.engines.base import Collection, Found, SearchEngine, missing
from slq.errors import ConfigError, DataError, SlqError, StorageError
from slq.index.parts import EMBEDDING, matrix

_FINGERPRINT = b"slq.fingerprint"


class Lance(SearchEngine):
    """The table `target`/`name`.lance; a folder, `s3://bucket/prefix` or another store of Lance's."""

    package = "pylance"

    @property
    def uri(self) -> str:
        """Of the table."""
        return f"{self.target.rstrip('/')}/{self.name}.lance"

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`; a table is there as a whole or not at all."""
        lance = _lance()
        schema, stream = _schema(collection), _Stream(collection)
        reader = pa.RecordBatchReader.from_batches(schema, stream.batches(schema))
        try:
            lance.write_dataset(reader, self.uri, mode="create")
        except OSError as error:
            if stream.problem is not None:
                raise stream.problem from None
            if "already exists" in str(error):
                raise ConfigError(
                    f"{self.uri} exists already; choose another --name, or remove it"
                ) from None
            raise StorageError(f"{self.uri} cannot be written: {error}") from None
        yield stream.count

    def search(
        self, vectors: NDArray[Any], top_k: int, *, where: str | None = None
    ) -> list[list[Found]]:
        """See `SearchEngine.search`; exact where the table has no index of its own."""
        table = self._table()
        found = []
        for vector in vectors:
            nearest = {
                "column": EMBEDDING,
                "q": vector.astype(np.float16),
                "k": top_k,
                "metric": "cosine",
            }
            try:
                rows = table.scanner(
                    columns=["id"], nearest=nearest, filter=where, prefilter=True
                ).to_table()
            except (OSError, ValueError) as error:
                raise DataError(f"Lance refuses the search: {error}") from None
            distances = rows["_distance"].to_pylist()
            found.append(
                [
                    Found(name, 1 - d)
                    for name, d in zip(rows["id"].to_pylist(), distances, strict=True)
                ]
            )
        return found

    @property
    def fingerprint(self) -> str:
        """See `SearchEngine.fingerprint`."""
        metadata: dict[bytes, bytes] = self._table().schema.metadata or {}
        if _FINGERPRINT not in metadata:
            raise DataError(f"{self.uri} was not written by slq: it names no fingerprint")
        return metadata[_FINGERPRINT].decode()

    def _table(self) -> Any:
        lance = _lance()
        try:
            return lance.dataset(self.uri)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.uri} cannot be opened: {error}") from None


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
    return schema.with_metadata({_FINGERPRINT: collection.fingerprint.encode()})


class _Stream:
    """Rows as Lance takes them.

    Args:
        collection: What is handed over.

    Attributes:
        count: Rows so far.
        problem: What ended the stream; Lance tells it with a traceback in a text.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self.count = 0
        self.problem: SlqError | None = None

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows."""
        try:
            for table in self._collection.tables:
                yield from self._table(table, schema).to_batches()
                self.count += table.num_rows
        except SlqError as error:
            self.problem = error
            raise

    def _table(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        flat = pa.array(matrix(table[EMBEDDING]).reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, self._collection.dimension)
        place = table.schema.get_field_index(EMBEDDING)
        whole = table.set_column(place, schema.field(EMBEDDING), vectors)
        return whole.replace_schema_metadata(schema.metadata).cast(schema)
