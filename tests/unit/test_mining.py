"""Hard negatives: plain loops choose the same, the filter is exact at its boundary, known answers are never chosen."""

import numpy as np
import pytest
from numpy.typing import NDArray

from slq.mining import hard_negatives

Case = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]


def case(seed: int, pairs: int = 40, depth: int = 12) -> Case:
    """Cosines on a coarse grid, so that ties and values at the bar occur."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(-8, 17, size=(pairs, depth)).astype(np.float32) / 16
    positives = rng.integers(-8, 17, size=pairs).astype(np.float32) / 16
    return -np.sort(-grid, axis=1), positives, rng.random((pairs, depth)) < 0.15


def by_loops(case: Case, per_pair: int, share: float) -> tuple[list[list[int]], int]:
    """(chosen places of each pair, candidates that were doubtful)."""
    similarities, positives, right = case
    chosen: list[list[int]] = []
    doubtful = 0
    for row, positive, known in zip(similarities, positives, right, strict=True):
        kept: list[int] = []
        for place, value in enumerate(row):
            if known[place]:
                continue
            if float(value) > share * float(positive):
                doubtful += 1
            elif len(kept) < per_pair:
                kept.append(place)
        chosen.append(kept)
    return chosen, doubtful


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("per_pair", "share"), [(1, 1.0), (4, 0.75), (12, 0.5), (20, 0.25)])
def test_the_choice_is_that_of_plain_loops(seed: int, per_pair: int, share: float) -> None:
    given = case(seed)
    kept, doubtful = hard_negatives(*given, per_pair=per_pair, max_share_of_positive=share)
    chosen, num_doubtful = by_loops(given, per_pair, share)
    assert [np.flatnonzero(row).tolist() for row in kept] == chosen
    assert doubtful.sum() == num_doubtful


@pytest.mark.parametrize("seed", range(6))
def test_what_is_chosen_is_wrong_not_too_similar_and_the_best_of_its_kind(seed: int) -> None:
    similarities, positives, right = given = case(seed)
    kept, doubtful = hard_negatives(*given, per_pair=3, max_share_of_positive=0.75)
    assert not (kept & (right | doubtful)).any()
    assert (kept.sum(axis=1) <= 3).all()
    assert (similarities[kept] <= np.repeat(0.75 * positives, kept.sum(axis=1))).all()
    for row, values, left_out in zip(kept, similarities, right | doubtful, strict=True):
        passed_over = ~row & ~left_out
        if passed_over.any():
            assert row.sum() == 3
            assert values[row].min() >= values[passed_over].max()


def test_at_the_bar_a_candidate_is_kept_and_just_above_it_is_not() -> None:
    at = np.float32(0.25)
    above = np.nextafter(at, np.float32(1))
    similarities = np.array([[above, at], [above, at]], dtype=np.float32)
    positives = np.array([0.5, 1.0], dtype=np.float32)
    none = np.zeros((2, 2), dtype=bool)
    kept, doubtful = hard_negatives(
        similarities, positives, none, per_pair=2, max_share_of_positive=0.5
    )
    assert kept.tolist() == [[False, True], [True, True]]
    assert doubtful.tolist() == [[True, False], [False, False]]


def test_below_zero_the_bar_lies_above_the_positive() -> None:
    similarities = np.array([[-0.25, -0.5, -0.75]], dtype=np.float32)
    kept, doubtful = hard_negatives(
        similarities,
        np.array([-1.0], dtype=np.float32),
        np.zeros((1, 3), dtype=bool),
        per_pair=3,
        max_share_of_positive=0.5,
    )
    assert kept.tolist() == [[False, True, True]]
    assert doubtful.tolist() == [[True, False, False]]
