"""Stored rows that are to be embedded anew."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(slots=True)
class StoredItem:
    """A stored row, to be embedded anew.

    Attributes:
        place: Its file, and its row there.
        vectors: Column -> float16 values.
        image: Its image's bytes, where they are stored too; else `uri` leads to them.
        is_canary: Whether it is one of the items that are stored with their inputs.
    """

    place: str
    id: str
    uri: str | None
    text: str | None
    modality: str
    content_hash: str
    vectors: dict[str, NDArray[np.float16]]
    image: bytes | None = None
    is_canary: bool = False


def stored_item(row: Any, place: str) -> StoredItem:
    """A table or batch of one row as an item."""
    own = ("id", "uri", "text", "modality", "content_hash")
    vectors = {
        name: column_values(row[name])[0]
        for name in row.schema.names
        if name.startswith("embedding")
        and pa.types.is_float16(row.schema.field(name).type.value_type)
    }
    return StoredItem(place, vectors=vectors, **{name: row[name][0].as_py() for name in own})


def column_values(column: Any) -> NDArray[Any]:
    """(rows, length) values of a fixed-size list column.

    Args:
        column: Chunked or not.
    """
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: NDArray[Any] = flat.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(flat), -1)
