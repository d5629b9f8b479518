"""Calibration against brute force."""

import random

import numpy as np
import pytest

from slq.errors import DataError
from slq.reranking.calibration import (
    expected_calibration_error,
    fit_temperature,
    sigmoid,
    threshold_for_precision,
)


def drawn(temperature: float, count: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a model that is too sure by this factor."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=count)
    matches = rng.random(count) < 1 / (1 + np.exp(-logits))
    return temperature * logits, matches


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.5])
def test_the_temperature_has_the_largest_likelihood(temperature: float) -> None:
    margins, matches = drawn(temperature)
    found = fit_temperature(margins, matches)
    assert found == pytest.approx(temperature, rel=0.1)

    def loss(t: float) -> float:
        return float(np.logaddexp(0, np.where(matches, -margins, margins) / t).sum())

    assert loss(found) <= min(loss(found * step) for step in np.geomspace(0.5, 2, 401)) + 1e-9


def test_a_calibrated_model_errs_less_than_one_that_is_too_sure() -> None:
    margins, matches = drawn(5.0)
    fitted, held_out = slice(0, 2000), slice(2000, None)
    temperature = fit_temperature(margins[fitted], matches[fitted])
    before = expected_calibration_error(sigmoid(margins[held_out]), matches[held_out])
    after = expected_calibration_error(sigmoid(margins[held_out] / temperature), matches[held_out])
    assert before > 0.1
    assert after < 0.04


def test_the_calibration_error_is_that_of_a_loop_over_bins() -> None:
    rng = np.random.default_rng(3)
    p, matches = rng.random(257), rng.random(257) < 0.4
    p[:2] = (0.0, 1.0)
    total = 0.0
    for number in range(10):
        inside = [n for n in range(257) if min(int(p[n] * 10), 9) == number]
        if inside:
            share = sum(bool(matches[n]) for n in inside) / len(inside)
            total += len(inside) * abs(sum(p[n] for n in inside) / len(inside) - share)
    assert expected_calibration_error(p, matches, 10) == pytest.approx(total / 257, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_the_threshold_is_the_lowest_that_keeps_the_precision(seed: int) -> None:
    rng = random.Random(seed)
    made = [(rng.randint(-3, 3), rng.random() < 0.5) for _ in range(rng.randint(2, 20))]
    precision = rng.uniform(0.05, 1.0)
    margins = np.array([float(margin) for margin, _ in made])
    matches = np.array([match for _, match in made])
    if matches.all() or not matches.any():
        with pytest.raises(DataError, match="calibrate on both kinds"):
            threshold_for_precision(margins, matches, precision)
        return
    good = [t for t in set(margins) if matches[margins >= t].mean() >= precision]
    expected = min(good) if good else None
    assert threshold_for_precision(margins, matches, precision) == expected


def test_a_margin_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="must be finite"):
        fit_temperature(np.array([0.0, np.inf]), np.array([True, False]))


def test_margins_that_are_always_right_become_certain() -> None:
    margins = np.array([2.0, -1.0])
    temperature = fit_temperature(margins, np.array([True, False]))
    assert sigmoid(margins / temperature).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
