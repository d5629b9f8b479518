"""The index of a cell, in memory: it takes whole queries, as they come from an encoder."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.index import IndexConfig, codes
from slq.index import build as build_lists
from slq.index.exact import NO_ROW, Rows, Scores, best, padded
from slq.quantization import Vectors, calibrate, cut, to_bits, to_int8
from slq.sweeps.config import FLAT, Cell
from slq.sweeps.precision import stored_bytes, stored_values

_ROW_BYTES = 8  # of a row number beside its code in a list


class CellIndex:
    """Gallery vectors, cut, stored and indexed as a cell says.

    Args:
        cell: Which.
        vectors: (items, dimension) float32 unit vectors, uncut.
        base: The section `index` of a recipe.

    Attributes:
        bytes_per_vector: That a search reads from memory: what is stored for `flat`; else the code and its row number.
        index_bytes: Of all vectors, with centroids and whatever else the index needs; without row numbers for `flat`.
        rescored_bytes: Of stored vectors from which candidates are scored again, where codes are too coarse to rank by;
            0 elsewhere.

    Raises:
        ConfigError: The vectors are too few, or cannot be coded so.
    """

    def __init__(self, cell: Cell, vectors: Vectors, base: IndexConfig) -> None:
        self.cell = cell
        self._config = cell.config(base)
        short = cut(vectors, cell.dimension)
        self._calibration = calibrate(short)
        self._stored = stored_values(short, cell.precision, self._calibration)
        self._num_items = len(vectors)
        own = stored_bytes(cell.precision, cell.dimension)
        self.rescored_bytes = 0
        if cell.index == FLAT:
            self._index = self._flat(short)
            self.bytes_per_vector, self.index_bytes = own, own * len(vectors)
            return
        self._index = build_lists(self._config, self._stored)
        codes.set_probes(self._index, self._config.num_probes)
        self.bytes_per_vector = codes.code_bytes(self._config, cell.dimension) + _ROW_BYTES
        self.index_bytes = _written_bytes(self._index)
        if self._config.is_rescored:
            self.rescored_bytes = own * len(vectors)

    def search(self, queries: Vectors, top_k: int) -> tuple[Scores, Rows]:
        """The best items, best first.

        Args:
            queries: (queries, dimension) float32 unit vectors, uncut.
            top_k: Results per query.

        Returns:
            (queries, top_k) float32 scores, of stored query with stored vector, and int64 rows; -1 fills up.
        """
        short = cut(queries, self.cell.dimension)
        if self.cell.index == FLAT:
            return self._compared(short, top_k)
        asked = stored_values(short, self.cell.precision, self._calibration)
        if not self._config.is_rescored:
            return codes.search(self._index, asked, top_k)
        depth = min(round(top_k * self._config.oversample), self._num_items)
        _, rows = codes.search(self._index, asked, depth)
        known = self._stored[np.maximum(rows, 0)]  # (queries, depth, dimension)
        scores = np.matmul(known, asked[:, :, None])[:, :, 0]
        return padded(*best(np.where(rows == NO_ROW, -np.inf, scores), rows, top_k), top_k)

    def _flat(self, short: Vectors) -> Any:
        """Faiss's comparison with everything that is stored, in the type in which it is stored."""
        import faiss

        dimension, precision = self.cell.dimension, self.cell.precision
        index: Any
        if precision == "binary":
            index = faiss.IndexBinaryFlat(8 * stored_bytes("binary", dimension))
        elif precision == "float32":
            index = faiss.IndexFlatIP(dimension)
        else:
            types = {
                "float16": faiss.ScalarQuantizer.QT_fp16,
                "int8": faiss.ScalarQuantizer.QT_8bit_direct_signed,
            }
            metric = faiss.METRIC_INNER_PRODUCT
            index = faiss.IndexScalarQuantizer(dimension, types[precision], metric)
        index.add(self._coded(short))
        return index

    def _coded(self, short: Vectors) -> NDArray[Any]:
        """Vectors as `_flat` takes them: bytes, codes as numbers, or values."""
        if self.cell.precision == "binary":
            return to_bits(short, self._calibration)
        if self.cell.precision == "int8":
            return to_int8(short, self._calibration).astype(np.float32)
        return np.ascontiguousarray(
            stored_values(short, self.cell.precision, self._calibration), dtype=np.float32
        )

    def _compared(self, short: Vectors, top_k: int) -> tuple[Scores, Rows]:
        top_k = min(top_k, self._num_items)
        found, rows = self._index.search(self._coded(short), top_k)
        scores: Scores
        if self.cell.precision == "binary":
            scores = (1 - 2 * found / self.cell.dimension).astype(np.float32)
        elif self.cell.precision == "int8":
            scores = found * np.float32(self._calibration.scale**2)
        else:
            scores = found
        return scores, rows.astype(np.int64)


def _written_bytes(index: Any) -> int:
    """Of an index with lists, as faiss writes it."""
    import faiss

    return int(faiss.serialize_index(index).nbytes)
