"""Every vector of a segment as float16 in memory-mapped files: to score candidates again, exactly, and by row."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.arrays import read_array
from slq.index.exact import Block, Rows

VECTORS = "vectors.npy"
_BLOCK_ROWS = 16_384


class VectorsWriter:
    """Writes a file of vectors block by block; not through a mapping, where a full disk would kill the process.

    Args:
        file: Open for writing; a `.npy` file afterwards.
        shape: (rows, dimension) of all blocks together.
        first_row: What errors call the first one.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, int], first_row: int = 0) -> None:
        self._file, self._shape, self._first_row = file, shape, first_row
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._count = 0

    def add(self, block: NDArray[np.float16]) -> None:
        """Write the next (rows, dimension) vectors.

        Raises:
            DataError: One is not finite or zero, has another length, or there are too many.
        """
        rows, dimension = self._shape
        if block.shape[1] != dimension:
            raise DataError(f"vectors of {block.shape[1]} values do not fit to {dimension}")
        if self._count + len(block) > rows:
            raise DataError(f"there are more than {rows} vectors")
        require_directions(block, self._first_row + self._count)
        self._file.write(np.ascontiguousarray(block, dtype="<f2").data)
        self._count += len(block)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            DataError: Vectors are.
        """
        if self._count != self._shape[0]:
            raise DataError(f"{self._count} vectors came instead of {self._shape[0]}")


def require_directions(vectors: NDArray[np.floating], first_row: int = 0) -> None:
    """Check that every vector has a direction.

    Raises:
        DataError: One is not finite or zero; its row is named.
    """
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(wrong):
        raise DataError(
            f"the vector of row {first_row + int(wrong[0])} is not finite or is zero ({len(wrong)} are); "
            "`slq verify` tells which shard is damaged"
        )


class StoredVectors:
    """Files of `VectorsWriter`, one after the other, which stay on disk.

    Args:
        paths: The `.npy` files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[NDArray[np.float16]] = [read_array(path) for path in paths]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._files[0].shape[1])

    def stored(self, start: int, stop: int) -> NDArray[np.float16]:
        """(rows, dimension) float16 vectors as they were written."""
        return self.taken(np.arange(start, stop, dtype=np.int64))

    def taken(self, numbers: Rows) -> NDArray[np.float16]:
        """(rows, dimension) float16 vectors of these rows, as they were written."""
        if len(self._files) == 1:
            return self._files[0][numbers]
        taken = np.empty((len(numbers), self.dimension), np.float16)
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        for place in np.unique(places):
            chosen = places == place
            taken[chosen] = self._files[place][numbers[chosen] - self._starts[place]]
        return taken

    def rows(self, numbers: Rows) -> NDArray[np.float32]:
        """(rows, dimension) float32 unit vectors of these rows."""
        return unit(self.taken(numbers))

    def blocks(self, numbers: Rows | None = None) -> Iterator[Block]:
        """Rows and their unit vectors, some megabytes at a time: these, or all."""
        if numbers is None:
            for file, first in zip(self._files, self._starts, strict=False):
                for start in range(0, len(file), _BLOCK_ROWS):
                    vectors = file[start : start + _BLOCK_ROWS]
                    rows = np.arange(len(vectors), dtype=np.int64) + first + start
                    yield rows, unit(vectors)
            return
        for start in range(0, len(numbers), _BLOCK_ROWS):
            some = numbers[start : start + _BLOCK_ROWS]
            yield some, self.rows(some)


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """The same directions in float32 with norm one: rounding to float16 moves norms off it."""
    wide = np.array(vectors, dtype=np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide
