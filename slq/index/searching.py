"""A loaded version of an index, and everything that it can be asked."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.config import CPU
from slq.index.contract import Hit, SearchIndex, checked_ids, checked_queries
from slq.index.exact import NO_ROW, Rows, Scores, best
from slq.index.segment import row_of
from slq.index.shares import Candidates, Scan, scanned
from slq.index.versions import (
    current_version,
    open_segments,
    read_manifest,
    require_whole,
)
from slq.index.words import best_words, fused

_FUSED_DEPTH = 100  # of each ranking that is joined with another


class VectorIndex(SearchIndex):
    """A loaded version of an index. Its files stay on disk; what is asked for often stays in memory by itself.

    Args:
        folder: The index folder.
        version: A version's name; the current one by default.
        num_probes: Lists that a search visits, instead of as many as the index was built for.
        device: Where it is searched, as of `IndexConfig.search_device`; a GPU holds all codes in its memory.
        has_codes: Whether the codes are held here; if not, each search is told who scans them.

    Raises:
        ArtifactError: There is no index, or a file does not match its recorded sha256.
        ConfigError: The index cannot be searched on `device`.
        HardwareError: `device` is not here, or has too little memory.
    """

    def __init__(
        self,
        folder: Path,
        version: str | None = None,
        *,
        num_probes: int | None = None,
        device: str = CPU,
        has_codes: bool = True,
    ) -> None:
        self.version = version or current_version(folder)
        self.manifest = read_manifest(folder, self.version)
        require_whole(folder, self.manifest)
        held: Collection[int] | None = None if has_codes else ()
        self._segments = open_segments(
            folder,
            self.manifest,
            num_probes=num_probes,
            held=[held] * len(self.manifest.segments),
            device=device if has_codes else CPU,
        )
        self._has_codes = has_codes
        sizes = [one.num_rows for one in self.manifest.segments]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Of the embedding space that the vectors live in."""
        return self.manifest.fingerprint

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.manifest.dimension

    def __len__(self) -> int:
        return self.manifest.num_vectors

    def search(
        self,
        vectors: NDArray[np.float32],
        top_k: int,
        *,
        where: str | None = None,
        exclude: Collection[str] = (),
        distinct: bool = False,
        exact: bool = False,
        words: Sequence[str] | None = None,
        scan: Scan | None = None,
    ) -> list[list[Hit]]:
        """See `SearchIndex.search`; predicates are DuckDB's.

        `scan` says who looks through the codes, where they are not held here.
        """
        hidden = checked_ids(exclude)
        queries = checked_queries(vectors, self.dimension)
        top_k = min(top_k, len(self))
        depth = min(top_k + len(hidden), len(self))
        while True:
            wide = depth if words is None else max(depth, _FUSED_DEPTH)
            scores, rows = self._search(queries, wide, where, exact=exact, scan=scan)
            if words is not None:
                scores, rows = self._with_words(rows, words, depth, where)
            found = [
                list(self._hits(row_scores, numbers, hidden, distinct=distinct))[:top_k]
                for row_scores, numbers in zip(scores, rows, strict=True)
            ]
            # Where duplicates took places, there may be more behind them.
            is_cut = (rows[:, -1:] != NO_ROW).any(axis=1)
            missing = any(
                len(one) < top_k and more for one, more in zip(found, is_cut, strict=True)
            )
            if not (distinct and missing) or depth >= len(self):
                return found
            depth = min(2 * depth, len(self))

    def _search(
        self,
        queries: NDArray[np.float32],
        depth: int,
        where: str | None,
        *,
        exact: bool,
        scan: Scan | None,
    ) -> tuple[Scores, Rows]:
        """The best of all segments, rows counted over all."""
        depths = [segment.depth(depth, where=where, exact=exact) for segment in self._segments]
        candidates: Sequence[Candidates | None] = [None] * len(depths)
        if any(depths):
            candidates = (scan or self._own_scan)(queries, depths, where)
        found = [
            segment.ranked(queries, depth, of_segment, where=where)
            for segment, of_segment in zip(self._segments, candidates, strict=True)
        ]
        rows = [
            np.where(numbers == NO_ROW, NO_ROW, numbers + start)
            for (_, numbers), start in zip(found, self._starts, strict=False)
        ]
        return best(
            np.concatenate([scores for scores, _ in found], axis=1),
            np.concatenate(rows, axis=1),
            depth,
        )

    def _own_scan(
        self, queries: NDArray[np.float32], depths: Sequence[int], where: str | None
    ) -> list[Candidates | None]:
        if not self._has_codes:
            raise ValueError("this index holds no codes; tell each search who scans them")
        return scanned(self._segments, queries, depths, where)

    def _with_words(
        self, rows: Rows, words: Sequence[str], depth: int, where: str | None
    ) -> tuple[Scores, Rows]:
        """Rankings by vector joined with those by words: (queries, depth) sums of reciprocal ranks, and rows."""
        if len(words) != len(rows):
            raise DataError(f"there are {len(words)} texts for {len(rows)} queries")
        sums = np.full((len(rows), depth), -np.inf, np.float32)
        joined = np.full((len(rows), depth), NO_ROW, np.int64)
        segments = [
            (*segment.words(where), int(start))
            for segment, start in zip(self._segments, self._starts, strict=False)
        ]
        for number, text in enumerate(words):
            by_vector = rows[number][rows[number] != NO_ROW].tolist()
            by_words = best_words(segments, text, max(depth, _FUSED_DEPTH)).tolist()
            found = fused([by_vector, by_words], depth)
            joined[number, : len(found)] = [row for row, _ in found]
            sums[number, : len(found)] = [value for _, value in found]
        return sums, joined

    def _hits(
        self, scores: Scores, rows: Rows, hidden: frozenset[str], *, distinct: bool
    ) -> Iterator[Hit]:
        seen: set[Any] = set()
        for score, number in zip(scores, rows, strict=True):
            if number == NO_ROW:
                return
            segment, row = self._place(int(number))
            items = self._segments[segment].items
            name = items.value(row, "id")
            if name in hidden:
                continue
            if distinct:
                content = items.value(row, "content_hash")
                if content in seen:
                    continue
                seen.add(content)
            yield Hit(name, float(score), int(number))

    def _place(self, number: int) -> tuple[int, int]:
        """Segment and row in it."""
        segment = int(np.searchsorted(self._starts, number, side="right")) - 1
        return segment, number - int(self._starts[segment])

    def find(self, item_id: str) -> int | None:
        """The row of an item, or None when there is no such item."""
        found = row_of(self._segments, item_id)
        return None if found is None else int(self._starts[found[0]]) + found[1]

    def row(self, number: int) -> dict[str, Any]:
        """The stored columns of one item."""
        segment, row = self._place(number)
        return self._segments[segment].items.row(row)

    def columns_of(self, hits: Iterable[Hit]) -> list[dict[str, Any]]:
        """See `SearchIndex.columns_of`."""
        return [self.row(hit.row) for hit in hits]

    def item(self, item_id: str) -> dict[str, Any] | None:
        """See `SearchIndex.item`."""
        number = self.find(item_id)
        return None if number is None else self.row(number)

    def vectors_of(self, item_ids: Sequence[str]) -> NDArray[np.float32]:
        """See `SearchIndex.vectors_of`."""
        found = []
        for name in item_ids:
            number = self.find(name)
            if number is None:
                raise DataError(f"the index holds no item {name!r}")
            segment, row = self._place(number)
            found.append(self._segments[segment].vectors.rows(np.array([row])))
        return np.concatenate(found) if found else np.zeros((0, self.dimension), np.float32)

    def close(self) -> None:
        """Nothing is to be closed: the mapped files go with the index."""
