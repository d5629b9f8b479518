"""The files of a segment's codes, or a share of them that one of several processes holds."""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.index import codes
from slq.index.config import CPU, IndexConfig
from slq.index.devices import SEARCHING, Search, device_of
from slq.index.exact import NO_ROW, Rows, Scores


class Partitions:
    """Files that stay on disk, but for blocks for fast scanning.

    Every search visits the lists that are nearest in all files, whichever of them are held: what the shares of several
    processes find, put together, is what one process finds that holds all.

    Args:
        paths: All files of the segment, in the order of their lists.
        config: How they are searched.
        held: Places of those that are searched here; all by default.
        device: Where they are searched; a GPU only where all are held.

    Raises:
        ArtifactError: faiss cannot read one.
        HardwareError: The device is not here, or has too little memory.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        config: IndexConfig,
        held: Collection[int] | None = None,
        *,
        device: str = CPU,
    ) -> None:
        places = range(len(paths)) if held is None else sorted(held)
        self._indexes = [codes.read(paths[place]) for place in places]
        self._centroids: Any = None  # where another file than those searched may have them
        if config.kind != "flat" and self._indexes:
            self._share_centroids(paths, places, config)
        self._search: Search = (
            device_of(device, SEARCHING).search(self._indexes)
            if held is None
            else partial(codes.search_partitions, self._indexes, centroids=self._centroids)
        )

    def _share_centroids(
        self, paths: Sequence[Path], places: Sequence[int], config: IndexConfig
    ) -> None:
        first = self._indexes[0] if places[0] == 0 else codes.read_centroids(paths[0])
        if len(paths) > 1:
            self._centroids = first
            others = [one for one in self._indexes if one is not first]
            codes.share_centroids([first, *others])
        for index in (first, *self._indexes):
            codes.set_probes(index, config.num_probes)

    @property
    def num_vectors(self) -> int:
        """In the files that are held, with deleted ones."""
        return sum(int(index.ntotal) for index in self._indexes)

    def search(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        selected: NDArray[np.uint8] | None = None,
    ) -> tuple[Scores, Rows]:
        """The best rows of the files that are held, by their codes.

        Args:
            queries: (queries, dimension) float32.
            top_k: Results per query.
            selected: Bits of the rows that may be found, lowest first; None for all.

        Returns:
            (queries, top_k) scores and rows, or fewer columns; -1 fills up.
        """
        if not self._indexes:
            nothing = (len(queries), 0)
            return np.full(nothing, -np.inf, np.float32), np.full(nothing, NO_ROW, np.int64)
        return self._search(queries, top_k, selected)
