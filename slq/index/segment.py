"""A segment: rows that were indexed together. Its files are written once and never change.

parts/00000/        what is stored of the rows of one source, their vectors and ids
partitions/0000/    codes of a range of lists, of all parts
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.arrow import vector_column
from slq.errors import DataError
from slq.index import codes
from slq.index.building import INDEX, PARTITIONS, PARTS
from slq.index.config import CPU, IndexConfig
from slq.index.exact import NO_ROW, Rows, Scores, best, exact_search, padded
from slq.index.filters import Filters, Selection
from slq.index.items import Items
from slq.index.partitions import Partitions
from slq.index.parts import EMBEDDING
from slq.index.vectors import VECTORS, StoredVectors
from slq.index.words import WORDS, Words

log = logging.getLogger(__name__)
_RESCORED_AT_ONCE = 2048  # vectors, so that they stay in a processor's cache
_FEW_ROWS = 20_000  # selected ones are compared one by one: lists would mostly hold others


class Segment:
    """A segment's files, which stay on disk.

    Args:
        folder: Where they are.
        config: How it is searched; `num_probes` and `oversample` may differ from those it was built with.
        deleted: (deleted,) int64 rows that are found no more.
        held: Numbers of the partitions whose codes are searched here; all by default.

    Raises:
        ConfigError: It cannot be searched on `config.search_device`.
        HardwareError: That is not here, or has too little memory.
    """

    def __init__(
        self,
        folder: Path,
        config: IndexConfig,
        deleted: NDArray[np.int64],
        *,
        held: Collection[int] | None = None,
    ) -> None:
        self._config = config
        parts, partitions = (
            sorted((folder / name).glob("[0-9]*"), key=lambda path: int(path.name))
            for name in (PARTS, PARTITIONS)
        )
        self.items = Items(parts)
        self.vectors = StoredVectors([part / VECTORS for part in parts])
        self.deleted = deleted
        self._words = Words(folder / WORDS) if config.words else None
        self._filters = Filters(self.items.table, deleted)
        paths, device = [one / INDEX for one in partitions], self._search_device(folder)
        self._partitions = Partitions(paths, config, held, device=device)

    def __len__(self) -> int:
        return len(self.items) - len(self.deleted)

    def _search_device(self, folder: Path) -> str:
        """The one that is asked for; the CPU where each search must leave out rows, which a GPU cannot."""
        self._config.require_searchable()
        device = self._config.search_device
        if device == CPU or not len(self.deleted):
            return device
        log.warning(
            "segment %s has %d deleted items, so it is searched on the CPU and not on %s; `slq index --compact` "
            "removes them",
            *(folder.name, len(self.deleted), device),
        )
        return CPU

    @property
    def num_held(self) -> int:
        """Vectors in the partitions that are held, with deleted ones."""
        return self._partitions.num_vectors

    def alive(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows from `start` to `stop` that are not deleted, as a source gives them."""
        for first, table in self.items.batches(start, stop):
            end = first + table.num_rows
            vectors = vector_column(self.vectors.stored(first, end))
            whole = table.append_column(EMBEDDING, vectors)
            kept = whole.filter(pa.array(~np.isin(np.arange(first, end), self.deleted)))
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
        depth = self.depth(top_k, where=where, exact=exact)
        found = self.scan(queries, depth, where) if depth else None
        return self.ranked(queries, top_k, found, where=where)

    def depth(self, top_k: int, *, where: str | None = None, exact: bool = False) -> int:
        """Candidates per query that the codes are asked for; 0 where rows are compared one by one, without them.

        Raises:
            DataError: `where` cannot be used.
        """
        selected = self._filters.select(where)
        if exact or (selected is not None and len(selected) <= _FEW_ROWS):
            return 0
        wanted = self._wanted(top_k, selected)
        if not self._config.is_rescored:
            return wanted
        return min(round(wanted * self._config.oversample), len(self.items))

    def _wanted(self, top_k: int, selected: Selection | None) -> int:
        return min(len(self) if selected is None else len(selected), top_k)

    def scan(
        self, queries: NDArray[np.float32], depth: int, where: str | None = None
    ) -> tuple[Scores, Rows]:
        """Candidates: the best rows of the partitions that are held, by their codes, best first.

        Args:
            queries: (queries, dimension) float32 unit vectors.
            depth: Candidates per query.
            where: As of `search`.

        Returns:
            (queries, depth) scores and rows, or fewer columns; `NO_ROW` fills up.

        Raises:
            DataError: `where` cannot be used.
        """
        selected = self._filters.select(where)
        return self._partitions.search(queries, depth, None if selected is None else selected.bits)

    def ranked(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        candidates: tuple[Scores, Rows] | None,
        *,
        where: str | None = None,
    ) -> tuple[Scores, Rows]:
        """The best rows among candidates, as `search` gives them.

        Args:
            queries: As of `search`.
            top_k: As of `search`.
            candidates: What `scan` found of as many as `depth` says; None where it says 0.
            where: As of `search`.

        Raises:
            DataError: `where` cannot be used.
        """
        selected = self._filters.select(where)
        rows = None if selected is None else selected.rows
        if candidates is None:
            return exact_search(queries, self.vectors.blocks(rows), top_k)
        scores, found = candidates
        if self._config.is_rescored:
            scores = self._rescored(queries, found)
        scores, found = best(scores, found, top_k)
        wanted = self._wanted(top_k, selected)
        short = np.flatnonzero((found[:, :wanted] == NO_ROW).any(axis=1))
        scores, found = padded(scores, found, top_k)
        if len(short) and rows is not None:  # the lists visited hold too few of those selected
            scores[short], found[short] = exact_search(
                queries[short], self.vectors.blocks(rows), top_k
            )
        return scores, found

    def words(self, where: str | None) -> tuple[Words, NDArray[np.bool_] | None]:
        """Words of the texts, and (rows,) which rows may be found; None for all.

        Args:
            where: A predicate over the stored columns that they must meet.

        Raises:
            DataError: The segment was built without words, or `where` cannot be used.
        """
        if self._words is None:
            raise DataError(
                "the index keeps no words of texts; build it with --set index.words=true"
            )
        selected = self._filters.select(where)
        if selected is None:
            return self._words, None
        mask = np.zeros(len(self.items), np.bool_)
        mask[selected.rows] = True
        return self._words, mask

    def _rescored(self, queries: NDArray[np.float32], found: Rows) -> Scores:
        """(queries, candidates) scores from the stored vectors, of some queries at a time in each thread."""
        scores = np.full(found.shape, -np.inf, np.float32)
        if not scores.size:  # whoever has the codes is lost
            return scores
        step = max(1, _RESCORED_AT_ONCE // found.shape[1])

        def rescore(start: int) -> None:
            rows = found[start : start + step]
            known = np.maximum(rows, 0)  # what fills up is scored too, and left out
            wide = codes.widened(self.vectors.taken(known.reshape(-1)))
            norms = np.sqrt(np.einsum("rd,rd->r", wide, wide)).reshape(rows.shape)
            some = queries[start : start + step, :, None]
            exact = np.matmul(wide.reshape(*rows.shape, -1), some)[:, :, 0] / norms
            scores[start : start + step] = np.where(rows == NO_ROW, -np.inf, exact)

        codes.for_each(rescore, range(0, len(queries), step))
        return scores


def row_of(segments: Sequence[Segment], item_id: str) -> tuple[int, int] | None:
    """Number of the segment and row of an item that is not deleted, or None."""
    for number, segment in enumerate(segments):
        row = int(segment.items.find([item_id])[0])
        if row != NO_ROW and row not in segment.deleted:
            return number, row
    return None
