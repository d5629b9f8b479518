"""The rows of `index_data` in every engine, for the tests of what all of them answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from slq.engines import SEARCH_ENGINES, Collection, IndexPlace, engine
from slq.index import SearchIndex
from tests.unit.index_data import COUNT, DIMENSION, published, table

ALL_KINDS = ["faiss", *SEARCH_ENGINES]


def collection(
    rows: pa.Table | None = None,
    *,
    fingerprint: str = "3f2a",
    source: str = "state-1",
    num_rows: int | None = None,
    dimension: int = DIMENSION,
) -> Collection:
    """Rows in two tables, the ones of `index_data.table` by default."""
    whole = table() if rows is None else rows

    def tables() -> Iterator[pa.Table]:
        yield from (whole.slice(0, 150), whole.slice(150))

    said = whole.num_rows if num_rows is None else num_rows
    return Collection(tables(), whole.schema, said, dimension, fingerprint, source)


def place(kind: str, folder: Path, name: str = "corpus") -> Any:
    target = folder / ("milvus.db" if kind == "milvus" else kind)
    return engine(kind, str(target), name)


def written(kind: str, folder: Path, rows: pa.Table | None = None, **said: Any) -> Any:
    """A place in an engine that holds rows."""
    there = place(kind, folder)
    *_, last = there.write(collection(rows, **said))
    assert last == (COUNT if rows is None else rows.num_rows)
    return there


def opened(kind: str, folder: Path) -> SearchIndex:
    """The rows of `index_data.table`, whichever holds them."""
    if kind == "faiss":
        published(folder)
        return IndexPlace.of_folder(folder).open()
    index: SearchIndex = written(kind, folder).open()
    return index
