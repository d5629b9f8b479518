"""Smaller vectors: cut to their leading values, int8, or one bit a value.

int8 and bits need ranges that hold for the whole corpus: measured shard by shard, the same value would get another code
in each of them. So a calibration is made once, from a sample, and stored with the data set.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError

Vectors = NDArray[np.float32]
_LARGEST_CODE = 127
_RANGE_QUANTILE = (
    0.9999  # of all magnitudes; the few beyond are clipped, and all others get a finer step
)


@dataclass(frozen=True)
class Calibration:
    """The ranges of one data set.

    Attributes:
        scale: What one int8 step is worth, the same for every value, so that the inner product of two code vectors
            times `scale` squared is that of the vectors.
        thresholds: (dimension,) float32 medians: a bit tells whether a value is above its own.
    """

    scale: float
    thresholds: Vectors

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"scale": self.scale, "thresholds": [float(value) for value in self.thresholds]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Calibration":
        """What `to_json` gave, to the last bit."""
        return cls(float(values["scale"]), np.asarray(values["thresholds"], dtype=np.float32))


def calibrate(sample: Vectors) -> Calibration:
    """Measure ranges.

    Args:
        sample: (n, dimension) float32 vectors from all over the corpus.

    Raises:
        DataError: There are none, or all are zero.
    """
    if not sample.size or not np.abs(sample).max() > 0:
        raise DataError("ranges cannot be measured without vectors; is every item quarantined?")
    reach = float(np.quantile(np.abs(sample), _RANGE_QUANTILE))
    thresholds = np.median(sample, axis=0).astype(np.float32)
    return Calibration(reach / _LARGEST_CODE, thresholds)


def to_int8(vectors: Vectors, calibration: Calibration) -> NDArray[np.int8]:
    """(n, dimension) codes from -127 to 127; values beyond the range are clipped to its ends."""
    codes = np.rint(vectors / calibration.scale)
    clipped: NDArray[np.int8] = np.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8)
    return clipped


def from_int8(codes: NDArray[np.int8], calibration: Calibration) -> Vectors:
    """(n, dimension) float32 values in the middle of each code's step."""
    values: Vectors = codes.astype(np.float32) * np.float32(calibration.scale)
    return values


def to_bits(vectors: Vectors, calibration: Calibration) -> NDArray[np.uint8]:
    """(n, ceil(dimension / 8)) bytes, first value in the highest bit; 1 where a value is above its threshold."""
    bits: NDArray[np.uint8] = np.packbits(vectors > calibration.thresholds, axis=1)
    return bits


def cut(vectors: Vectors, dimension: int) -> Vectors:
    """The leading `dimension` values, as unit vectors again; for adapters trained with nested lengths.

    Raises:
        DataError: The vectors are shorter.
    """
    if dimension > vectors.shape[1]:
        raise DataError(f"vectors of {vectors.shape[1]} values cannot be cut to {dimension}")
    kept = vectors[:, :dimension]
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    result: Vectors = kept / np.maximum(norms, np.finfo(np.float32).tiny)
    return result
