"""Parts of a segment: the rows of one source with what is stored of them, their vectors, and the order of their ids.

A part is written once, by whoever gets to it, and is there as a whole or not at all.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.files import sync
from slq.index.checks import digested, stamp
from slq.index.items import IDS, ITEMS, ItemsWriter, write_order
from slq.index.vectors import VECTORS, VectorsWriter

EMBEDDING = "embedding"
PARTIAL = ".partial"


class Source(Protocol):
    """Rows that become one part. Whoever reads them may be another process: a source is small and can be pickled."""

    @property
    def num_rows(self) -> int:
        """Of all tables together."""

    def tables(self) -> Iterator[pa.Table]:
        """Rows with `id`, `embedding` (float16 lists) and what else is stored of them, some thousand at a time."""


@dataclass(frozen=True)
class Draft:
    """A part that is to be written.

    Attributes:
        home: Its folder.
        first_row: Its place among the rows of the segment.
        dimension: Length of a vector.
        source: Its rows.
    """

    home: Path
    first_row: int
    dimension: int
    source: Source


def write_part(draft: Draft) -> None:
    """Write a part, unless it is there; memory does not grow with its rows but for their ids.

    Raises:
        DataError: A vector is not finite or zero, or there are more or fewer rows than the source says.
        OSError: A file cannot be written.
    """
    once(draft.home, lambda folder: _write(folder, draft))


def _write(folder: Path, draft: Draft) -> None:
    shape = (draft.source.num_rows, draft.dimension)
    with (
        (folder / VECTORS).open("wb") as vectors_file,
        pa.OSFile(str(folder / ITEMS), "wb") as items_file,
    ):
        vectors = VectorsWriter(vectors_file, shape, draft.first_row)
        items = ItemsWriter(items_file, draft.first_row)
        for table in draft.source.tables():
            vectors.add(matrix(table[EMBEDDING]))
            items.add(table.drop_columns([EMBEDDING]))
        items.finish()
        vectors.finish()
    write_order(folder / IDS, folder / ITEMS)


def matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """(rows, dimension) float16 vectors of a column."""
    joined = column.combine_chunks()
    flat: NDArray[np.float16] = joined.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, joined.type.list_size)


def once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder of files and their digests as a whole, unless it is there.

    Args:
        folder: Which; two writers may race, and the first one wins.
        write: Writes files into the empty folder that it is given.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        write(partial)
        for path in partial.iterdir():
            sync(path)
        stamp(partial, digested(partial, sorted(path.name for path in partial.iterdir())))
        sync(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
