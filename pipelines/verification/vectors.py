"""Vectors held against what they must be: finite, of unit norm, and the same in every form."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.quantization import Calibration, Vectors, to_bits, to_int8

NORM_TOLERANCE = 2e-3
"""float16 rounds each value by up to one part in 2,048, so a norm may leave one by a quarter of this."""
Columns = Mapping[str, NDArray[Any]]
_FORMS = ("embedding_int8", "embedding_bits")
_INT8_STEPS = 1  # a value that float16 rounds over the border of two codes


def wrong_vectors(columns: Columns, ranges: Calibration | None) -> dict[str, NDArray[np.bool_]]:
    """Which rows have vectors that cannot be right.

    Args:
        columns: Column -> (rows, length) values: float16 ones, and `embedding_int8` and `embedding_bits` where the
            data set has them.
        ranges: Of the latter; without them these are not looked at.

    Returns:
        Problem, in words -> (rows,) bool. A row whose `embedding` is wrong is not blamed for its other forms too.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    plain = {
        name: values.astype(np.float32) for name, values in columns.items() if name not in _FORMS
    }
    for name, vectors in plain.items():
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        norms = np.linalg.norm(np.where(finite[:, None], vectors, 0), axis=1)
        found[f"{name} holds values that are not finite"] = ~finite
        found[f"{name} has no unit norm"] = finite & (np.abs(norms - 1) > NORM_TOLERANCE)
    if ranges is None:
        return found
    good = np.ones(len(plain["embedding"]), dtype=bool)
    for problem, mask in found.items():
        if problem.startswith("embedding "):
            good &= ~mask
    for name, differs in (("embedding_int8", _int8_differs), ("embedding_bits", _bits_differ)):
        if name in columns:
            differing = np.zeros(len(good), dtype=bool)
            differing[good] = differs(plain["embedding"][good], columns[name][good], ranges)
            found[f"{name} is not what embedding gives"] = differing
    return found


def _int8_differs(
    vectors: Vectors, codes: NDArray[np.int8], ranges: Calibration
) -> NDArray[np.bool_]:
    """(rows,) whether codes are further from those of the stored vectors than float16 rounding explains."""
    steps = np.abs(to_int8(vectors, ranges).astype(np.int16) - codes)
    found: NDArray[np.bool_] = (steps > _INT8_STEPS).any(axis=1)
    return found


def _bits_differ(
    vectors: Vectors, packed: NDArray[np.uint8], ranges: Calibration
) -> NDArray[np.bool_]:
    """(rows,) whether a bit differs though its value is not within float16 rounding of the threshold."""
    dimension = vectors.shape[1]
    wanted = np.unpackbits(to_bits(vectors, ranges), axis=1, count=dimension)
    stored = np.unpackbits(packed, axis=1, count=dimension)
    rounding = np.spacing(np.abs(vectors).astype(np.float16)).astype(np.float32)
    clear = np.abs(vectors - ranges.thresholds) > rounding
    found: NDArray[np.bool_] = ((wanted != stored) & clear).any(axis=1)
    return found
