"""Every vector of a segment as float16 in one memory-mapped file: to score candidates again, exactly, and by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.exact import Block, Rows

_BLOCK_ROWS = 16_384


class VectorsWriter:
    """Writes a file of vectors block by block; not through a mapping, where a full disk would kill the process.

    Args:
        file: Open for writing; a `.npy` file afterwards.
        shape: (rows, dimension) of all blocks together.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, int]) -> None:
        self._file, self._shape = file, shape
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
        require_directions(block, self._count)
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
    """A file of `write_vectors`, which stays on disk.

    Args:
        path: The `.npy` file.
    """

    def __init__(self, path: Path) -> None:
        self._file: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._file)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._file.shape[1])

    def stored(self, start: int, stop: int) -> NDArray[np.float16]:
        """(rows, dimension) float16 vectors as they were written."""
        return self._file[start:stop]

    def rows(self, numbers: Rows) -> NDArray[np.float32]:
        """(rows, dimension) float32 unit vectors of these rows."""
        return unit(self._file[numbers])

    def blocks(self, numbers: Rows | None = None) -> Iterator[Block]:
        """Rows and their unit vectors, some megabytes at a time: these, or all."""
        count = len(self) if numbers is None else len(numbers)
        for start in range(0, count, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, count)
            if numbers is None:
                yield np.arange(start, stop, dtype=np.int64), unit(self._file[start:stop])
            else:
                yield numbers[start:stop], self.rows(numbers[start:stop])


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """The same directions in float32 with norm one: rounding to float16 moves norms off it."""
    wide = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    result: NDArray[np.float32] = wide / norms
    return result
