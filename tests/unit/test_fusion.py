"""The weight of coarse scores, against a search over all weights and against the data's own making."""

import numpy as np
import pytest

from slq.errors import DataError
from slq.reranking.fusion import Judged, fit_coarse_weight


def queries_of(weight: float, seed: int, count: int = 400) -> list[Judged]:
    """Queries whose one relevant candidate is drawn from softmax(margin + weight * coarse)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        margins, coarse = rng.normal(0, 2, 6), rng.uniform(0, 1, 6)
        logits = margins + weight * coarse
        shares = np.exp(logits) / np.exp(logits).sum()
        relevant = np.zeros(6, dtype=bool)
        relevant[rng.choice(6, p=shares)] = True
        found.append(Judged(margins, coarse, relevant))
    return found


def likelihood(queries: list[Judged], a: float, b: float) -> float:
    total = 0.0
    for one in queries:
        logits = a * one.margins + b * one.coarse
        total += float((logits - np.log(np.exp(logits).sum()))[one.relevant].mean())
    return total / len(queries)


@pytest.mark.parametrize(("weight", "seed"), [(0.0, 1), (3.0, 2), (10.0, 3)])
def test_it_finds_the_weight_that_the_data_was_made_with(weight: float, seed: int) -> None:
    assert fit_coarse_weight(queries_of(weight, seed, 3000)) == pytest.approx(weight, abs=0.6)


def test_no_other_pair_of_weights_is_likelier() -> None:
    queries = queries_of(4.0, 5, 120)
    weight = fit_coarse_weight(queries)
    grid = [(a, b) for a in np.linspace(0.2, 2, 25) for b in np.linspace(0, 12, 25)]
    best = max(grid, key=lambda ab: likelihood(queries, *ab))
    assert weight == pytest.approx(best[1] / best[0], abs=0.8)
    ours = max(likelihood(queries, a, weight * a) for a in np.linspace(0.2, 2, 181))
    assert ours >= likelihood(queries, *best) - 1e-4


def test_a_coarse_score_that_misleads_gets_no_weight() -> None:
    assert fit_coarse_weight(queries_of(-5.0, 6)) == 0.0


def test_relevant_candidates_that_always_win_still_give_a_finite_weight() -> None:
    margins, coarse = np.array([5.0, 0.0]), np.array([0.9, 0.1])
    weight = fit_coarse_weight([Judged(margins, coarse, np.array([True, False]))] * 10)
    assert np.isfinite(weight)
    assert weight >= 0


def test_queries_that_tell_nothing_are_refused() -> None:
    one = np.array([1.0, 2.0])
    with pytest.raises(DataError, match="none of 2 held-out queries has both"):
        fit_coarse_weight([Judged(one, one, np.array([True, True]))] * 2)
    useless = [
        Judged(-one.margins, one.coarse * 0, one.relevant) for one in queries_of(0.0, 7, 200)
    ]
    with pytest.raises(DataError, match="do not tell relevant candidates from others"):
        fit_coarse_weight(useless)
