"""Cut, int8 and binary vectors against sums written out by hand."""

import json

import numpy as np
import pytest

from slq.errors import DataError
from slq.quantization import Calibration, calibrate, cut, from_int8, to_bits, to_int8

RNG = np.random.default_rng(5)


def unit(count: int, dimension: int) -> np.ndarray:
    vectors = RNG.normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_int8_values_are_within_half_a_step_and_ends_are_clipped() -> None:
    vectors = unit(400, 96)
    calibration = calibrate(vectors)
    codes = to_int8(vectors, calibration)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-127, 127)
    back = from_int8(codes, calibration)
    inside = np.abs(vectors) <= 127 * calibration.scale
    assert inside.mean() > 0.9998
    assert np.abs(back - vectors)[inside].max() <= calibration.scale * 0.5001
    far = np.full((1, 96), 5.0, np.float32)
    assert set(to_int8(far, calibration).ravel()) == {127}
    assert set(to_int8(-far, calibration).ravel()) == {-127}


def test_integer_products_of_codes_rank_as_the_vectors_do() -> None:
    documents, queries = unit(300, 192), unit(20, 192)
    calibration = calibrate(documents)
    exact = queries @ documents.T
    codes = to_int8(queries, calibration).astype(np.int64) @ to_int8(
        documents, calibration
    ).T.astype(np.int64)
    np.testing.assert_allclose(codes * calibration.scale**2, exact, atol=0.01)
    assert (codes.argmax(1) == exact.argmax(1)).mean() >= 0.95


def test_a_bit_tells_the_side_of_the_median_first_value_highest() -> None:
    calibration = Calibration(0.01, np.array([0.0, 0.5, -0.5] + [0.0] * 7, np.float32))
    vector = np.array([[0.1, 0.4, -0.4, 0, 0, 0, 0, 1, 1, -1]], np.float32)
    assert to_bits(vector, calibration).tolist() == [[0b10100001, 0b10000000]]


def test_bits_of_the_sample_are_balanced() -> None:
    vectors = unit(1000, 64) + np.linspace(-1, 1, 64, dtype=np.float32)
    bits = np.unpackbits(to_bits(vectors, calibrate(vectors)), axis=1)
    np.testing.assert_allclose(bits.mean(0), 0.5, atol=0.001)


def test_a_calibration_survives_a_json_file_to_the_last_bit() -> None:
    calibration = calibrate(unit(100, 33))
    found = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert found.scale == calibration.scale
    np.testing.assert_array_equal(found.thresholds, calibration.thresholds)


def test_cut_vectors_are_the_leading_values_at_unit_length() -> None:
    vectors = unit(10, 64)
    short = cut(vectors, 16)
    np.testing.assert_allclose((short**2).sum(1), 1, atol=1e-6)
    ratios = vectors[:, :16] / short
    np.testing.assert_allclose(ratios, ratios[:, :1].repeat(16, 1), rtol=1e-5)
    assert np.isfinite(cut(np.zeros((1, 8), np.float32), 4)).all()
    with pytest.raises(DataError, match="vectors of 64 values cannot be cut to 65"):
        cut(vectors, 65)


@pytest.mark.parametrize("sample", [np.zeros((0, 4)), np.zeros((3, 4))])
def test_ranges_need_vectors(sample: np.ndarray) -> None:
    with pytest.raises(DataError, match="cannot be measured without vectors"):
        calibrate(sample.astype(np.float32))
