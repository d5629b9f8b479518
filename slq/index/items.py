"""What is stored of a segment's items, by row and by id, in memory-mapped files."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.arrays import read_array
from slq.index.exact import NO_ROW, Rows

ITEMS = "items.arrow"
IDS = "ids.npy"
ROW = "row"
"""Column of the row numbers, for predicates."""
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_BATCH_ROWS = 16_384  # of every record batch but the last, so that a row is found without a search


class ItemsWriter:
    """Writes an Arrow file of all columns and `row`.

    Args:
        file: Open for writing.
        first_row: Number of the first row.
    """

    def __init__(self, file: pa.NativeFile, first_row: int = 0) -> None:
        self._file = file
        self._writer: Any = None
        self._held: list[pa.Table] = []
        self._num_held, self._count = 0, first_row

    def add(self, table: pa.Table) -> None:
        """Write the next rows, which have an `id` and the columns of all others."""
        self._held.append(table)
        self._num_held += table.num_rows
        if self._num_held >= _BATCH_ROWS:
            self._write(self._num_held - self._num_held % _BATCH_ROWS)

    def _write(self, count: int) -> None:
        joined = pa.concat_tables(self._held)
        rows = pa.array(np.arange(self._count, self._count + count, dtype=np.int64))
        numbered = joined.slice(0, count).append_column(ROW, rows).combine_chunks()
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, numbered.schema)
        self._writer.write_table(numbered, max_chunksize=_BATCH_ROWS)
        self._held = [joined.slice(count)]
        self._num_held -= count
        self._count += count

    def finish(self) -> None:
        """Write what is left, and the end of the file.

        Raises:
            DataError: There are no rows.
        """
        if self._num_held:
            self._write(self._num_held)
        if self._writer is None:
            raise DataError("there are no items to index")
        self._writer.close()


def write_order(path: Path, items_path: Path) -> None:
    """Write a `.npy` file of (2, rows) uint64: digests of ids in order, and the place of each in the file of items.

    Args:
        path: The file.
        items_path: Of an `ItemsWriter`.
    """
    digests = id_digests(name for batch in _open(items_path).to_batches() for name in _ids(batch))
    order = np.argsort(digests, kind="stable").astype(np.uint64)
    np.save(path, np.stack([digests[order], order]), allow_pickle=False)


def id_digests(ids: Iterable[str]) -> NDArray[np.uint64]:
    """(ids,) 64 bits of the BLAKE2 of each."""
    whole = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(whole, dtype="<u8").astype(np.uint64)


def _ids(batch: pa.RecordBatch) -> list[str]:
    names: list[str] = batch["id"].to_pylist()
    return names


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Items:
    """Files of `ItemsWriter` and `write_order`, one after the other, which stay on disk.

    Args:
        folders: Where they are.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        tables = [_open(folder / ITEMS) for folder in folders]
        self.table = pa.concat_tables(tables)
        self._order: list[NDArray[np.uint64]] = [read_array(folder / IDS) for folder in folders]
        self._batches = [table.to_batches() for table in tables]
        self._starts = np.cumsum([0, *(table.num_rows for table in tables)])
        self._columns = [name for name in self.table.column_names if name != ROW]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def ids(self) -> Iterator[str]:
        """Every id, in the order of rows."""
        for batches in self._batches:
            for batch in batches:
                yield from _ids(batch)

    def require_texts(self) -> None:
        """Check that there is a column of texts.

        Raises:
            DataError: There is none.
        """
        if "text" not in self._columns:
            raise DataError("the items have no column `text`; set index.words=false")

    def texts(self) -> Iterator[list[str | None]]:
        """The texts of all rows, some thousand at a time."""
        for batches in self._batches:
            for batch in batches:
                yield batch["text"].to_pylist()

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, pa.Table]]:
        """First row and stored columns from `start` to `stop`, some thousand rows at a time."""
        first = 0
        for batch in (batch for batches in self._batches for batch in batches):
            low, high = max(start, first), min(stop, first + batch.num_rows)
            if low < high:
                yield low, pa.table(batch.slice(low - first, high - low)).select(self._columns)
            first += batch.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """The stored columns of one item."""
        batch, offset = self._place(number)
        return {name: batch[name][offset].as_py() for name in self._columns}

    def value(self, number: int, column: str) -> Any:
        """One column of one item."""
        batch, offset = self._place(number)
        return batch[column][offset].as_py()

    def _place(self, number: int) -> tuple[pa.RecordBatch, int]:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        offset = number - int(self._starts[file])
        return self._batches[file][offset // _BATCH_ROWS], offset % _BATCH_ROWS

    def find(self, names: Sequence[str]) -> Rows:
        """(names,) int64 rows of ids; `NO_ROW` where there is none."""
        wanted = id_digests(names)
        found = np.full(len(names), NO_ROW, np.int64)
        for first, (digests, places) in zip(self._starts, self._order, strict=False):
            start, stop = (np.searchsorted(digests, wanted, side=side) for side in _SIDES)
            for number in np.flatnonzero(start < stop).tolist():
                for place in places[start[number] : stop[number]]:
                    row = int(first) + int(place)
                    if self.value(row, "id") == names[number]:
                        found[number] = row
        return found

    def twice(self, start: int, stop: int) -> list[str]:
        """Ids that several rows have.

        Args:
            start: Of the digests of ids that are looked at, which have 64 bits.
            stop: The first one that is not.
        """
        digests, rows = [], []
        for first, (known, places) in zip(self._starts, self._order, strict=False):
            low, high = np.searchsorted(known, np.array([start, stop - 1], np.uint64), "left")
            high = int(high) + int(np.searchsorted(known[high:], np.uint64(stop - 1), "right"))
            digests.append(known[low:high])
            rows.append(places[low:high].astype(np.int64) + int(first))
        together, numbers = np.concatenate(digests), np.concatenate(rows)
        order = np.argsort(together, kind="stable")
        together, numbers = together[order], numbers[order]
        same = np.flatnonzero(together[1:] == together[:-1])
        suspects = np.unique(numbers[np.concatenate([same, same + 1])])
        seen: set[str] = set()
        several: dict[str, None] = {}
        for number in suspects.tolist():
            name: str = self.value(number, "id")
            if name in seen:
                several[name] = None
            seen.add(name)
        return list(several)
