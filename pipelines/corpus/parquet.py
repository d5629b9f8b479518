"""Parquet files as a corpus: rows are known from the footers, and a shard reads only the row groups that hold it."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.base import Record, Shard, file_state, rows_changed
from pipelines.corpus.columns import needs_columns
from pipelines.corpus.reading import ahead
from pipelines.corpus.tables import Row, TableCorpus
from pipelines.images import image_value, row_uri
from pipelines.storage import StoredFile
from slq.errors import DataError

_BATCH_ROWS = 64  # images of a megabyte stay below 100 MB
_BUFFER_BYTES = 2**20  # of each column: column chunks are not read whole


class ParquetCorpus(TableCorpus):
    """One Parquet file, or all below a folder: `id`, and `image` (bytes), `uri` and/or `text`."""

    def _cut(self, files: Iterator[StoredFile], shard_rows: int) -> Iterator[Shard]:
        for file, (rows, schema) in ahead(lambda file: self._footer(file.name), files):
            self._require_same_columns(file.name, schema)
            state = file_state(file.name, file)
            for start in range(0, rows, shard_rows):
                yield Shard(-1, file.name, start, min(start + shard_rows, rows), state=state)

    def records(self, shard: Shard) -> Iterator[Record]:
        """See `Corpus.records`."""
        with self._opened(shard.source) as opened:
            file = pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES)
            ours = self._ours(shard.source, file.schema_arrow)
            yield from self._followed(self._rows(file, shard, ours), shard.source)

    def user_schema(self) -> pa.Schema:
        """See `Corpus.user_schema`; all files must have the first one's."""
        return self._user_schema

    @cached_property
    def _user_schema(self) -> pa.Schema:
        for file in self.files():
            return self._own_columns(file.name, self._footer(file.name)[1])
        return pa.schema([])

    def _footer(self, name: str) -> tuple[int, pa.Schema]:
        with self._opened(name) as opened:
            file = pq.ParquetFile(opened)
            return int(file.metadata.num_rows), file.schema_arrow

    def _ours(self, name: str, schema: pa.Schema) -> dict[str, str]:
        """Our columns of a file: our name -> the file's."""
        where = f"corpus {self.store.url(name)}"
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{where} has a column twice: {schema.names}; rename one of them")
        ours = self._columns.find(schema.names, where)
        if "id" not in ours:
            raise needs_columns(where, "a column `id`", schema.names)
        for own, column in ours.items():
            kind = schema.field(column).type
            if not _MAY_BE[own](kind.value_type if pa.types.is_dictionary(kind) else kind):
                raise DataError(f"{where}: column {column} is read as {own}, and cannot be {kind}")
        return ours

    def _own_columns(self, name: str, schema: pa.Schema) -> pa.Schema:
        ours = set(self._ours(name, schema).values())
        return pa.schema([field.remove_metadata() for field in schema if field.name not in ours])

    def _require_same_columns(self, name: str, schema: pa.Schema) -> None:
        found, first = self._own_columns(name, schema), self._user_schema
        if {field.name: field.type for field in found} == {f.name: f.type for f in first}:
            return
        odd = next(iter(sorted(set(found) ^ set(first), key=lambda field: field.name)))
        raise DataError(
            f"corpus {self.store.url(name)}: column {odd.name} is not the same as in the corpus' first file; "
            "write all files with one schema"
        )

    def _rows(self, file: pq.ParquetFile, shard: Shard, ours: dict[str, str]) -> Iterator[Row]:
        number = shard.start
        for batch in _batches(file, shard.start, shard.stop):
            for values, problem in _values(batch):
                yield self._row(values, problem, ours, shard.source, number)
                number += 1
        if number != shard.stop:
            raise rows_changed(shard, number - shard.start)

    def _row(
        self,
        values: dict[str, Any],
        problem: str | None,
        ours: dict[str, str],
        name: str,
        number: int,
    ) -> Row:
        own = {own: values.pop(column) for own, column in ours.items()}
        uri = row_uri(self.store.url(name), number, ours.get("image", "image"))
        if own["id"] is None:
            problem = problem or "it has no id"
        if problem is not None:
            item_id = f"{name}:{number}" if own["id"] is None else str(own["id"])
            problem = f"row {number} of {name}: {problem}"
            return Record(item_id, uri, None, None, values, problem, "bad_row"), None
        image, link = image_value(own.get("image")), own.get("uri") or None
        return Record(str(own["id"]), uri, image, own.get("text"), values), link


def _values(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each row, and what is wrong with it: writers do not check that strings are UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            yield _readable(batch.slice(number, 1))
    else:
        yield from ((row, None) for row in rows)


def _readable(row: pa.RecordBatch) -> tuple[dict[str, Any], str | None]:
    values: dict[str, Any] = {}
    problem = None
    for name in row.schema.names:
        try:
            values[name] = row[name][0].as_py()
        except UnicodeDecodeError as error:
            values[name], problem = None, f"column {name} is no UTF-8: {error}"
    return values, problem


def _batches(file: pq.ParquetFile, start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Rows `start` to `stop` - 1, as far as there are so many."""
    groups, position, skip = [], 0, start
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if position + rows <= start:
            skip -= rows
        elif position < stop:
            groups.append(group)
        position += rows
    wanted = stop - start
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups) if groups else ():
        kept = batch.slice(skip, wanted)
        skip, wanted = max(0, skip - batch.num_rows), wanted - kept.num_rows
        if kept.num_rows:
            yield kept
        if not wanted:
            return


def _is_string(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_id(kind: pa.DataType) -> bool:
    return _is_string(kind) or bool(pa.types.is_integer(kind))


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(kind) or bool(pa.types.is_null(kind))


def _is_image(kind: pa.DataType) -> bool:
    """Bytes, a struct with them as `datasets` writes images, or nothing in any row."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_null(kind)
    )


_MAY_BE = {"id": _is_id, "image": _is_image, "text": _is_text, "uri": _is_text}
