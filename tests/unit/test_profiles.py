"""The order of candidates, on constructed readings: one test for each branch of the rules."""

import itertools
import math
import random

import pytest

from slq.errors import ConfigError
from slq.reranking.profiles import (
    PROFILES,
    Reading,
    coarse_order,
    fusible,
    ordered,
    profile_by_name,
)


@pytest.mark.parametrize(
    ("mass", "doubtful"), [(0.0, True), (0.499, True), (0.5, False), (1.0, False), (None, None)]
)
def test_a_reading_is_doubtful_if_any_label_is_less_likely_than_none(
    mass: float | None, doubtful: bool | None
) -> None:
    assert Reading(3.0, label_mass=mass).is_doubtful is doubtful


DEFAULT, COMPAT = PROFILES["default"], PROFILES["compat"]


def reading(margin: float = 0.0, hundredths: int = 0, entropy: float = 1.0) -> Reading:
    return Reading(margin=margin, label_mass=1.0, entropy=entropy, hundredths=hundredths)


def test_the_larger_margin_wins() -> None:
    readings = dict(enumerate([reading(0.1), reading(3.0), reading(-2.0)]))
    assert ordered(readings, [0.9, 0.1, 0.8], DEFAULT) == [1, 0, 2]
    assert DEFAULT.score(readings[1]) == 3.0


def test_equal_margins_fall_to_the_coarse_score_and_then_to_the_first() -> None:
    readings = {n: reading(1.0) for n in range(4)}
    assert ordered(readings, [0.1, 0.7, 0.7, 0.9], DEFAULT) == [3, 1, 2, 0]


def test_compat_takes_the_larger_truncated_probability_whatever_the_margin() -> None:
    readings = {0: reading(9.0, hundredths=56), 1: reading(0.0, hundredths=57)}
    assert ordered(readings, [0.9, 0.1], COMPAT) == [1, 0]
    assert COMPAT.score(readings[1]) == 0.57


def test_compat_takes_the_surer_of_two_with_the_same_hundredths() -> None:
    readings = {
        0: reading(9.0, hundredths=57, entropy=0.8),
        1: reading(0.0, hundredths=57, entropy=0.7),
        2: reading(0.0, hundredths=58, entropy=5.0),
    }
    assert ordered(readings, [0.9, 0.1, 0.0], COMPAT) == [2, 1, 0]


def test_compat_takes_the_coarse_score_and_then_the_first_of_two_as_sure() -> None:
    readings = {n: reading(n, hundredths=57, entropy=0.7) for n in range(3)}
    assert ordered(readings, [0.3, 0.9, 0.3], COMPAT) == [1, 0, 2]


def test_what_has_no_reading_keeps_its_coarse_place() -> None:
    coarse = [0.9, 0.8, 0.7, 0.6, 0.5]
    readings = {0: reading(1.0), 2: reading(3.0), 3: reading(2.0)}
    assert ordered(readings, coarse, DEFAULT) == [2, 1, 3, 0, 4]
    assert ordered({}, coarse, DEFAULT) == [0, 1, 2, 3, 4]
    assert ordered({}, [], DEFAULT) == []


@pytest.mark.parametrize("seed", range(60))
def test_an_order_holds_everybody_once_and_is_total(seed: int) -> None:
    rng = random.Random(seed)
    made = [(rng.choice([0.1, 0.2]), rng.choice([None, 0, 1, 2, 3])) for _ in range(seed % 7)]
    coarse = [score for score, _ in made]
    readings = {
        n: reading(float(margin)) for n, (_, margin) in enumerate(made) if margin is not None
    }
    found = ordered(readings, coarse, DEFAULT)
    assert sorted(found) == list(range(len(made)))
    scored = [n for n in found if n in readings]
    for a, b in itertools.combinations(scored, 2):  # by the definition, pair by pair
        first, second = readings[a].margin, readings[b].margin
        better = first > second or (first == second and (coarse[a], -a) > (coarse[b], -b))
        assert better
    for place, number in enumerate(coarse_order(coarse)):
        if number not in readings:
            assert found[place] == number


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'x' is unknown; choose one of default, compat"):
        profile_by_name("x")


@pytest.mark.parametrize("weight", [0.5, 20.0])
def test_fused_candidates_stand_by_their_sums(weight: float) -> None:
    margins, coarse = [1.0, 3.0, -2.0, 2.9], [0.9, 0.1, 0.8, 0.11]
    readings = {n: reading(margin) for n, margin in enumerate(margins)}
    sums = [margin + weight * score for margin, score in zip(margins, coarse, strict=True)]
    by_hand = sorted(range(4), key=lambda n: -sums[n])
    assert ordered(readings, coarse, DEFAULT, coarse_weight=weight) == by_hand
    assert by_hand != ordered(readings, coarse, DEFAULT) or weight == 0.5


def test_equal_sums_fall_to_the_coarse_score() -> None:
    readings = {0: reading(1.0), 1: reading(0.0)}
    assert ordered(readings, [0.0, 0.5], DEFAULT, coarse_weight=2.0) == [1, 0]


def test_coarse_scores_are_fused_only_with_margins() -> None:
    assert fusible(DEFAULT, 2.0) == 2.0
    assert fusible(COMPAT, 0.0) == 0.0
    with pytest.raises(ConfigError, match=r"compat.*does not rank by margins"):
        fusible(COMPAT, 0.1)
    with pytest.raises(ConfigError, match="0 or more"):
        fusible(DEFAULT, -1.0)


@pytest.mark.parametrize("margin", [-800.0, -30.0, -1.5, 0.0, 0.3, 20.0, 800.0])
def test_the_probability_is_the_sigmoid_of_the_margin_however_large(margin: float) -> None:
    found = Reading(margin).probability
    if abs(margin) < 100:
        assert found == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-12)
    assert 0 <= found <= 1
    assert found + Reading(-margin).probability == pytest.approx(1)


@pytest.mark.parametrize(
    ("mass", "doubtful"), [(None, None), (0.0, True), (0.4999, True), (0.5, False), (1.0, False)]
)
def test_a_reading_is_doubtful_where_labels_are_less_likely_than_not(
    mass: float | None, doubtful: bool | None
) -> None:
    assert Reading(9.0, mass).is_doubtful is doubtful
