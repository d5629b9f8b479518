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
        file: Where it is stored.
        row: Its row there.
        vectors: Column -> float16 values.
        image: Its image's bytes, where they are stored too; else `uri` leads to them.
        is_canary: Whether it is one of the items that are stored with their inputs.
    """

    file: str
    row: int
    id: str
    uri: str | None
    text: str | None
    modality: str
    content_hash: str
    vectors: dict[str, NDArray[np.float16]]
    image: bytes | None = None
    is_canary: bool = False

    @property
    def place(self) -> str:
        """Where it is stored, in words."""
        return f"row {self.row} of {self.file}"


def stored_item(values: Any, file: str, row: int) -> StoredItem:
    """A table or batch of one row as an item.

    Args:
        values: With the columns of a shard, or of the canary.
        file: Where it is stored.
        row: Its row there.
    """
    own = ("id", "uri", "text", "modality", "content_hash")
    vectors = {
        name: column_values(values[name])[0]
        for name in values.schema.names
        if name.startswith("embedding")
        and pa.types.is_float16(values.schema.field(name).type.value_type)
    }
    return StoredItem(file, row, vectors=vectors, **{name: values[name][0].as_py() for name in own})


def column_values(column: Any) -> NDArray[Any]:
    """(rows, length) values of a fixed-size list column.

    Args:
        column: Chunked or not.
    """
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: NDArray[Any] = flat.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(flat), -1)
