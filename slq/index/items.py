"""What is stored of a segment's items, by row and by id, in memory-mapped Arrow files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.exact import NO_ROW

ROW = "row"
"""Column of the row numbers, for predicates."""
_BATCH_ROWS = 16_384  # of every record batch but the last, so that a row is found without a search


class ItemsWriter:
    """Writes an Arrow file of all columns and `row`.

    Args:
        file: Open for writing.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._writer: Any = None
        self._held: list[pa.Table] = []
        self._num_held = self._count = 0

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
    """Write a `.npy` file of row numbers in the order of ids.

    Args:
        path: The file.
        items_path: Of an `ItemsWriter`.

    Raises:
        DataError: An id comes twice.
    """
    ids = _open(items_path)["id"]
    order = pa.compute.sort_indices(ids)
    ranked = ids.take(order)
    same = pa.compute.equal(ranked.slice(1), ranked.slice(0, len(ranked) - 1))
    twice = np.flatnonzero(same.to_numpy(zero_copy_only=False))
    if len(twice):
        raise DataError(
            f"{len(twice)} ids come twice, first {ranked[int(twice[0])].as_py()!r}; an index needs unique ids"
        )
    np.save(path, np.asarray(order.to_numpy(), dtype=np.int64), allow_pickle=False)


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class Items:
    """The files of `write_items`, which stay on disk.

    Args:
        path: The Arrow file.
        order_path: The order of ids.
    """

    def __init__(self, path: Path, order_path: Path) -> None:
        self.table = _open(path)
        self._order: NDArray[np.int64] = np.load(order_path, mmap_mode="r", allow_pickle=False)
        self._batches = self.table.to_batches()
        self._columns = [name for name in self.table.column_names if name != ROW]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def ids(self) -> Iterator[str]:
        """Every id, in the order of rows."""
        for batch in self._batches:
            yield from batch["id"].to_pylist()

    def batches(self) -> Iterator[tuple[int, pa.Table]]:
        """First row and stored columns, some thousand rows at a time."""
        start = 0
        for batch in self._batches:
            yield start, pa.table(batch).select(self._columns)
            start += batch.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """The stored columns of one item."""
        batch, offset = self._place(number)
        return {name: batch[name][offset].as_py() for name in self._columns}

    def value(self, number: int, column: str) -> Any:
        """One column of one item."""
        batch, offset = self._place(number)
        return batch[column][offset].as_py()

    def _place(self, number: int) -> tuple[pa.RecordBatch, int]:
        return self._batches[number // _BATCH_ROWS], number % _BATCH_ROWS

    def find(self, item_id: str) -> int:
        """The row of an id; `NO_ROW` where there is none."""
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            if self._id_at(middle) < item_id.encode():
                low = middle + 1
            else:
                high = middle
        found = low < len(self._order) and self._id_at(low) == item_id.encode()
        return int(self._order[low]) if found else NO_ROW

    def _id_at(self, place: int) -> bytes:
        """Arrow sorts strings by their bytes."""
        name: str = self.value(int(self._order[place]), "id")
        return name.encode()
