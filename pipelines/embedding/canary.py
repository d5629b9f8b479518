"""A few items with inputs and vectors, stored with a data set: any encoder can be checked against it later."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit, shard_name
from pipelines.corpus import fetch_image
from pipelines.ledger import Ledger
from slq.errors import DataError

CANARY = "canary.parquet"
_ROWS = 16
_COLUMNS = (
    "id",
    "modality",
    "uri",
    "text",
    "content_hash",
    "embedding",
    "shard_id",
    "row_in_shard",
)


def write_canary(ledger: Ledger, commits: Mapping[int, Commit]) -> None:
    """Store up to 16 items from all over the data set, the first good ones of evenly spread shards.

    An item whose image is gone or is another's is left out: the vectors are complete all the same.

    Raises:
        StorageError: A store cannot be read or written.
    """
    filled = [n for n, commit in sorted(commits.items()) if commit.rows]
    chosen = sorted({int(n) for n in np.linspace(0, len(filled) - 1, _ROWS)}) if filled else []
    each = -(-_ROWS // len(chosen)) if chosen else 0
    rows = [row for position in chosen for row in _rows(ledger, commits[filled[position]], each)]
    if not rows:
        return
    table = pa.concat_tables(rows)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    ledger.store.write(CANARY, sink.getvalue().to_pybytes())


def _rows(ledger: Ledger, commit: Commit, count: int) -> Iterator[pa.Table]:
    name = shard_name(commit.shard_id, commit.generation)
    with ledger.store.open(name) as file:
        first = next(pq.ParquetFile(file).iter_batches(count, columns=list(_COLUMNS)))
    for row in range(first.num_rows):
        one = pa.Table.from_batches([first.slice(row, 1)])
        try:
            image = _image(one, ledger.retry_s)
        except DataError:
            continue
        yield one.append_column("image", pa.array([image], pa.binary()))


def _image(row: pa.Table, retry_s: float) -> Any:
    if row["modality"][0].as_py() == "text":
        return None
    return fetch_image(row["uri"][0].as_py(), retry_s)
