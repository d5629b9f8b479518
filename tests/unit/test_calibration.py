"""Calibration against brute force."""

import random
from pathlib import Path

import numpy as np
import pytest

from slq.errors import ArtifactError, ConfigError, DataError
from slq.reranking.calibration import (
    Calibration,
    expected_calibration_error,
    fit,
    fit_temperature,
    reliability,
    sigmoid,
    threshold_for_precision,
)
from slq.reranking.fusion import Judged, fit_coarse_weight


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


def test_a_reliability_diagram_holds_every_pair_and_its_gaps_make_the_error() -> None:
    rng = np.random.default_rng(4)
    p, matches = rng.random(300) ** 2, rng.random(300) < 0.3
    bins = reliability(p, matches, 7)
    assert sum(one["pairs"] for one in bins) == 300
    gaps = sum(one["pairs"] * abs(one["probability"] - one["matches"]) for one in bins) / 300
    assert gaps == pytest.approx(expected_calibration_error(p, matches, 7), abs=1e-12)
    inside = (p >= 1 / 7) & (p < 2 / 7)
    assert bins[1]["probability"] == pytest.approx(p[inside].mean())
    assert bins[1]["matches"] == pytest.approx(matches[inside].mean())


def held_out(count: int = 200) -> list[Judged]:
    rng = np.random.default_rng(9)
    found = []
    for _ in range(count):
        relevant = np.zeros(4, dtype=bool)
        relevant[rng.integers(4)] = True
        found.append(
            Judged(3 * (relevant + rng.normal(0, 1, 4)), relevant * 0.2 + rng.random(4), relevant)
        )
    return found


def test_what_is_fitted_together_is_what_is_fitted_alone_and_survives_a_file(
    tmp_path: Path,
) -> None:
    queries = held_out()
    found = fit(queries, scorer="ab" * 32, precision=0.8)
    margins = np.concatenate([one.margins for one in queries])
    matches = np.concatenate([one.relevant for one in queries])
    assert found.temperature == fit_temperature(margins, matches)
    assert found.coarse_weight == fit_coarse_weight(queries) > 0
    assert found.threshold == threshold_for_precision(margins, matches, 0.8)
    assert (found.num_queries, found.num_pairs) == (200, 800)
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    np.testing.assert_allclose(
        found.probability(margins), 1 / (1 + np.exp(-margins / found.temperature)), rtol=1e-9
    )


def test_a_calibration_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing; `slq rerank` writes one"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        Calibration.load(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"temperature": 1.0, "scorrer": "x"}')
    with pytest.raises(ConfigError, match=r"scorrer.*scorer"):
        Calibration.load(tmp_path / "other.json")
    with pytest.raises(DataError, match="no held-out queries"):
        fit([], scorer="x")
