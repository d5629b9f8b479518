"""Gallery and queries as a precision stores them: both alike, so that a score is the product of two stored vectors.

`float32` and `float16` are the values. `int8` are codes of one step for all values, whose product times the step's
square is that of the vectors; `binary` are signs against each value's median, whose product is the dimension less
twice their Hamming distance (`slq.quantization`).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slq.quantization import Calibration, Vectors, from_int8, to_bits, to_int8

Precision = Literal["float32", "float16", "int8", "binary"]
_BITS: dict[Precision, int] = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}


def stored_bytes(precision: Precision, dimension: int) -> int:
    """Bytes of one vector as it is stored."""
    return -(-_BITS[precision] * dimension // 8)


def stored_values(vectors: Vectors, precision: Precision, calibration: Calibration) -> Vectors:
    """What is left of vectors when they are stored.

    Args:
        vectors: (n, dimension) float32 unit vectors.
        precision: How they are stored.
        calibration: Ranges of the gallery.

    Returns:
        (n, dimension) float32: the values, the middle of each step, or plus and minus one over the root of the
        dimension.
    """
    if precision == "float16":
        return vectors.astype(np.float16).astype(np.float32)
    if precision == "int8":
        return from_int8(to_int8(vectors, calibration), calibration)
    if precision == "binary":
        return signs(to_bits(vectors, calibration), vectors.shape[1])
    return vectors


def signs(bits: NDArray[np.uint8], dimension: int) -> Vectors:
    """(n, dimension) float32 unit vectors of signs, from the bytes of `to_bits`."""
    ones = np.unpackbits(bits, axis=1, count=dimension).astype(np.float32)
    values: Vectors = (2 * ones - 1) / np.float32(np.sqrt(dimension))
    return values
