"""Data files of shards: Parquet, written once, durable and hashed before anybody is told of them."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit, attempt_name, errors_name, new_attempt, shard_name
from pipelines.failpoints import reach
from pipelines.storage import LocalStore, Store
from slq.arrow import ERRORS
from slq.errors import StorageError

GROUP_ROWS = 16_384
"""Rows of a row group at most: some 30 MB of float16 vectors, enough to read fast, little enough to hold."""


def write_attempt(
    store: Store,
    shard_id: int,
    generation: int,
    *,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    errors: Sequence[Mapping[str, Any]],
) -> Commit:
    """Write the files of a small shard, and leave them to the driver, which commits one attempt.

    Args:
        store: Where.
        shard_id: Of the shard.
        generation: How many times it was committed before.
        rows: That are good.
        schema: Of those.
        errors: Of the others, as ERRORS.

    Raises:
        StorageError: They cannot be written.
    """
    attempt = new_attempt()
    reach("shard_before_write")
    name = attempt_name(shard_name(shard_id, generation), attempt)
    table = pa.Table.from_pylist(rows, schema=schema)
    sha256, size, _ = write_shard(store, name, iter([table]), schema)
    errors_sha256 = None
    if errors:
        name = attempt_name(errors_name(shard_id, generation), attempt)
        table = pa.Table.from_pylist(errors, schema=ERRORS)
        errors_sha256, _, _ = write_shard(store, name, iter([table]), ERRORS)
    reach("shard_after_write")
    return Commit(
        shard_id=shard_id,
        rows=len(rows),
        quarantined=len(errors),
        sha256=sha256,
        bytes=size,
        attempt=attempt,
        errors_sha256=errors_sha256,
        generation=generation,
    )


def write_shard(
    store: Store, name: str, tables: Iterator[pa.Table], schema: pa.Schema
) -> tuple[str, int, int]:
    """Write a Parquet file; gives its sha256, bytes and rows. On a disk it is written where it stays.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        if isinstance(store, LocalStore):
            path = store.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            return _fill(path, tables, schema)
        with tempfile.TemporaryDirectory(prefix="slq-shard-") as folder:
            path = Path(folder) / "shard.parquet"
            found = _fill(path, tables, schema)
            store.upload(path, name)
            return found
    except OSError as error:
        raise StorageError(
            f"{store.url(name)} cannot be written: {error}; free space and run the same command again"
        ) from None


def _fill(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> tuple[str, int, int]:
    # No dictionary over vectors: it would only cost. Not BYTE_STREAM_SPLIT either, though it saves a
    # tenth: DuckDB 2.0 cannot read it on float16.
    plain = [name for name in schema.names if not name.startswith("embedding")]
    rows = 0
    try:
        with path.open("w+b") as file:
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=plain) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=GROUP_ROWS)
                    rows += table.num_rows
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest(), size, rows
    except OSError:
        path.unlink(missing_ok=True)
        raise
