"""A segment: rows that were indexed together. Its files are written once and never change."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.arrow import vector_column
from slq.index import codes
from slq.index.config import IndexConfig
from slq.index.exact import NO_ROW, Rows, Scores, best, exact_search, padded
from slq.index.filters import Filters
from slq.index.items import Items, ItemsWriter, write_order
from slq.index.vectors import StoredVectors, VectorsWriter

INDEX = "index.faiss"
VECTORS = "vectors.npy"
ITEMS = "items.arrow"
ORDER = "ids.npy"
FILES = (INDEX, VECTORS, ITEMS, ORDER)
EMBEDDING = "embedding"
_POINTS_PER_LIST = 256  # that training looks at; more change nothing that one could measure
_FEW_ROWS = 20_000  # selected ones are compared one by one: lists would mostly hold others


def write_segment(
    folder: Path, tables: Iterable[pa.Table], shape: tuple[int, int], config: IndexConfig
) -> None:
    """Write all files of a segment; memory does not grow with the rows, but for float32 lists that are in memory.

    Args:
        folder: Is there, and empty.
        tables: Rows with `id`, `embedding` (float16 lists) and what else is stored of them.
        shape: (rows, dimension) of all tables together.
        config: How it is built.

    Raises:
        ConfigError: There are more lists than vectors.
        DataError: A vector is not finite or zero, an id comes twice, or there are no rows.
        OSError: A file cannot be written.
    """
    config.require_room(shape[0])
    with (
        (folder / VECTORS).open("wb") as vectors_file,
        pa.OSFile(str(folder / ITEMS), "wb") as items_file,
    ):
        vectors, items = VectorsWriter(vectors_file, shape), ItemsWriter(items_file)
        for table in tables:
            vectors.add(matrix(table[EMBEDDING]))
            items.add(table.drop_columns([EMBEDDING]))
        items.finish()
        vectors.finish()
    write_order(folder / ORDER, folder / ITEMS)
    stored = StoredVectors(folder / VECTORS)
    index = codes.untrained(config, shape[1])
    if config.kind != "flat":
        index.train(training_rows(stored, config))
    codes.fill(index, stored.blocks())
    codes.write(index, folder / INDEX)


def matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """(rows, dimension) float16 of a column of fixed-size lists."""
    joined = column.combine_chunks()
    values: NDArray[np.float16] = joined.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(joined), joined.type.list_size)


def training_rows(vectors: StoredVectors, config: IndexConfig) -> NDArray[np.float32]:
    """Unit vectors that an index is trained on: from all over, the same ones each time."""
    wanted = min(len(vectors), _POINTS_PER_LIST * config.num_lists)
    chosen = np.random.default_rng(config.seed).choice(len(vectors), wanted, replace=False)
    return vectors.rows(np.sort(chosen))


class Segment:
    """A segment's files, which stay on disk.

    Args:
        folder: Where they are.
        config: How it is searched; `num_probes` and `oversample` may differ from those it was built with.
        deleted: (deleted,) int64 rows that are found no more.
    """

    def __init__(self, folder: Path, config: IndexConfig, deleted: NDArray[np.int64]) -> None:
        self._config = config
        self.items = Items(folder / ITEMS, folder / ORDER)
        self.vectors = StoredVectors(folder / VECTORS)
        self.deleted = deleted
        self._filters = Filters(self.items.table, deleted)
        self._codes = codes.read(folder / INDEX)
        if config.kind != "flat":
            codes.set_probes(self._codes, config.num_probes)

    def __len__(self) -> int:
        return len(self.items) - len(self.deleted)

    def alive(self) -> Iterator[pa.Table]:
        """Rows that are not deleted, as `write_segment` takes them."""
        for start, table in self.items.batches():
            rows = np.arange(start, start + table.num_rows)
            whole = table.append_column(
                EMBEDDING, vector_column(self.vectors.stored(start, start + table.num_rows))
            )
            kept = whole.filter(pa.array(~np.isin(rows, self.deleted)))
            if kept.num_rows:
                yield kept

    def search(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        *,
        where: str | None = None,
        exact: bool = False,
    ) -> tuple[Scores, Rows]:
        """The best rows, best first.

        Args:
            queries: (queries, dimension) float32 unit vectors.
            top_k: Results per query.
            where: A predicate over the stored columns that they must meet.
            exact: Compare with every row, whatever the index is.

        Returns:
            (queries, top_k) scores and rows; `NO_ROW` fills up.

        Raises:
            DataError: `where` cannot be used.
        """
        selected = self._filters.select(where)
        rows = None if selected is None else selected.rows
        if exact or (rows is not None and len(rows) <= _FEW_ROWS):
            return exact_search(queries, self.vectors.blocks(rows), top_k)
        wanted = min(len(self) if rows is None else len(rows), top_k)
        depth = min(round(wanted * self._config.oversample), len(self.items))
        is_rescored = self._config.is_rescored
        scores, found = codes.search(
            self._codes,
            queries,
            depth if is_rescored else wanted,
            None if selected is None else selected.bits,
        )
        if is_rescored:
            scores = self._rescored(queries, found)
        scores, found = best(scores, found, top_k)
        short = np.flatnonzero((found[:, :wanted] == NO_ROW).any(axis=1))
        scores, found = padded(scores, found, top_k)
        if len(short) and rows is not None:  # the lists visited hold too few of those selected
            scores[short], found[short] = exact_search(
                queries[short], self.vectors.blocks(rows), top_k
            )
        return scores, found

    def _rescored(self, queries: NDArray[np.float32], found: Rows) -> Scores:
        """(queries, candidates) scores from the stored vectors."""
        scores = np.full(found.shape, -np.inf, np.float32)
        for query, rows, row_scores in zip(queries, found, scores, strict=True):
            known = rows != NO_ROW
            row_scores[known] = self.vectors.rows(rows[known]) @ query
        return scores


def row_of(segments: Sequence[Segment], item_id: str) -> tuple[int, int] | None:
    """Number of the segment and row of an item that is not deleted, or None."""
    for number, segment in enumerate(segments):
        row = segment.items.find(item_id)
        if row != NO_ROW and row not in segment.deleted:
            return number, row
    return None
