"""Agreement against computations written out over pairs and coincidences, and the funnel as a property."""

from itertools import combinations, permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from slq.errors import DataError
from slq.karr.agreement import (
    MISSING,
    agreement,
    fleiss_kappa,
    krippendorff_alpha,
    percent_agreement,
)
from slq.karr.reasons import ERRORS, STAGE_OF, STAGES, Funnel, RejectedError, funnel_markdown

Votes = NDArray[np.int64]


def random_votes(seed: int, missing: float = 0.0) -> Votes:
    """Judges who follow a truth more or less, so that they neither agree nor are independent."""
    rng = np.random.default_rng(seed)
    rows, judges, categories = (
        int(rng.integers(3, 30)),
        int(rng.integers(2, 6)),
        int(rng.integers(2, 4)),
    )
    truth = rng.integers(categories, size=(rows, 1))
    noise = rng.integers(categories, size=(rows, judges))
    votes = np.where(rng.random((rows, judges)) < 0.6, truth, noise)
    votes[0, :2] = (0, 1)  # never all of one category
    votes[rng.random((rows, judges)) < missing] = MISSING
    return votes.astype(np.int64)


def pairs_that_agree(votes: Votes) -> float:
    shares = []
    for row in votes.tolist():
        given = [vote for vote in row if vote != MISSING]
        pairs = list(combinations(given, 2))
        if pairs:
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    return sum(shares) / len(shares)


def kappa_by_hand(votes: Votes) -> float:
    everything = votes.reshape(-1).tolist()
    chance = sum((everything.count(one) / len(everything)) ** 2 for one in set(everything))
    return (pairs_that_agree(votes) - chance) / (1 - chance)


def alpha_by_hand(votes: Votes) -> float:
    """From the matrix of coincidences, each ordered pair of a row's values weighing 1 / (values - 1)."""
    matrix: dict[tuple[int, int], float] = {}
    for row in votes.tolist():
        given = [vote for vote in row if vote != MISSING]
        for a, b in permutations(range(len(given)), 2):
            key = (given[a], given[b])
            matrix[key] = matrix.get(key, 0.0) + 1 / (len(given) - 1)
    total = sum(matrix.values())
    of = {one: sum(v for (a, _), v in matrix.items() if a == one) for one, _ in matrix}
    observed = sum(v for (a, b), v in matrix.items() if a != b)
    expected = sum(of[a] * of[b] for a in of for b in of if a != b) / (total - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(25))
def test_all_three_equal_computations_over_pairs(seed: int) -> None:
    whole, torn = random_votes(seed), random_votes(seed, missing=0.25)
    assert percent_agreement(whole) == pytest.approx(pairs_that_agree(whole))
    assert percent_agreement(torn) == pytest.approx(pairs_that_agree(torn))
    assert fleiss_kappa(whole) == pytest.approx(kappa_by_hand(whole))
    assert krippendorff_alpha(whole) == pytest.approx(alpha_by_hand(whole))
    assert krippendorff_alpha(torn) == pytest.approx(alpha_by_hand(torn))


def test_the_published_example_of_krippendorff() -> None:
    """Nominal data of "Computing Krippendorff's alpha-reliability" (2011), section C: alpha = 0.743."""
    published = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    votes = np.array(
        [[MISSING if one == "." else int(one) - 1 for one in judge.split()] for judge in published]
    ).T
    assert krippendorff_alpha(votes) == pytest.approx(0.743, abs=5e-4)


def test_the_published_example_of_fleiss() -> None:
    """Fleiss (1971) as it is often printed: ten subjects, fourteen raters, five categories, kappa = 0.210."""
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    votes = np.array([np.repeat(np.arange(5), row) for row in counts])
    assert fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)


def test_what_cannot_be_computed_is_none() -> None:
    same = np.ones((5, 3), dtype=np.int64)
    alone = np.array([[0], [1]])
    nobody = np.full((3, 2), MISSING)
    empty = np.zeros((0, 2), dtype=np.int64)
    for votes in (same, alone, nobody, empty):
        assert fleiss_kappa(votes) is None
        assert krippendorff_alpha(votes) is None
    assert percent_agreement(same) == 1.0
    assert percent_agreement(nobody) is None
    assert agreement(np.zeros((4, 0), dtype=np.int64))["percent_agreement"] is None
    perfect = np.array([[0, 0], [1, 1], [0, 0]])
    assert fleiss_kappa(perfect) == pytest.approx(1.0)
    assert krippendorff_alpha(perfect) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_funnel_accounts_for_every_caption(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [None, *STAGE_OF]
    outcomes = [names[int(n)] for n in rng.integers(len(names), size=int(rng.integers(0, 400)))]
    funnel = Funnel.of(iter(outcomes))
    assert funnel.num_in == len(outcomes) == funnel.num_out + sum(funnel.rejected.values())
    assert funnel.num_out == outcomes.count(None)
    left = funnel.num_in
    for stage in funnel.stages():
        assert stage["num_in"] == left
        left = stage["num_out"]
    assert left == funnel.num_out
    text = funnel_markdown(funnel, {"identify": "switched off"})
    assert "**identify** (switched off)" in text
    assert text.count("| - ") == len({one for one in outcomes if one})


def test_a_funnel_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(
        DataError, match="5 captions in, 2 rows out, 1 rejected, so 2 are unaccounted"
    ):
        Funnel(5, 2, {"judges": 1}).require_balanced()
    with pytest.raises(DataError, match="reason 'weather' is unknown"):
        Funnel.of([None, "weather"])


def test_reasons_are_unique_and_survive_a_process() -> None:
    assert sum(len(reasons) for reasons in STAGES.values()) == len(STAGE_OF)
    assert STAGE_OF.keys() >= ERRORS
    error = RejectedError("judges", "1 of 3 accept")
    kind, arguments = error.__reduce__()
    again = kind(*arguments)
    assert (again.reason, str(again)) == ("judges", "1 of 3 accept")
