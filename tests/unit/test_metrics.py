"""Retrieval metrics against ir_measures, ties against us, intervals and tests against known answers."""

import itertools

import numpy as np
import pytest

from slq.metrics import (
    bootstrap_interval,
    hits,
    ndcg,
    paired_permutation,
    pessimistic_order,
    recalls,
    reciprocal_ranks,
)

QUERIES, ITEMS = 40, 30


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores without ties, relevance with one to four relevant items, and its ranked form."""
    rng = np.random.default_rng(3)
    scores = rng.permutation(QUERIES * ITEMS).reshape(QUERIES, ITEMS).astype(np.float32)
    relevant = np.zeros((QUERIES, ITEMS), dtype=bool)
    for query in range(QUERIES):
        relevant[query, rng.choice(ITEMS, size=1 + query % 4, replace=False)] = True
    order = pessimistic_order(scores, relevant)
    return scores, relevant, np.take_along_axis(relevant, order, axis=1)


def test_metrics_equal_those_of_ir_measures(case: tuple[np.ndarray, ...]) -> None:
    import ir_measures as ir

    scores, relevant, ranked = case
    qrels = [ir.Qrel(f"q{q:03d}", f"i{i}", 1) for q, i in np.argwhere(relevant)]
    run = [
        ir.ScoredDoc(f"q{q:03d}", f"i{i}", float(scores[q, i]))
        for q, i in np.ndindex(QUERIES, ITEMS)
    ]
    counts = relevant.sum(axis=1)
    ours = {ir.RR: reciprocal_ranks(ranked)}
    for k in (1, 3, 5, 10):
        ours[ir.Success @ k] = hits(ranked, k)
        ours[ir.R @ k] = recalls(ranked, counts, k)
        ours[ir.nDCG @ k] = ndcg(ranked, counts, k)
    for entry in ir.iter_calc(list(ours), qrels, run):
        value = ours[entry.measure][int(entry.query_id[1:])]
        assert value == pytest.approx(entry.value, abs=1e-6), (entry.measure, entry.query_id)


def test_metrics_equal_written_out_formulas(case: tuple[np.ndarray, ...]) -> None:
    _, relevant, ranked = case
    for query in range(QUERIES):
        places = [rank for rank in range(1, ITEMS + 1) if ranked[query, rank - 1]]
        total = int(relevant[query].sum())
        assert reciprocal_ranks(ranked)[query] == 1 / places[0]
        for k in (1, 5, ITEMS):
            inside = [rank for rank in places if rank <= k]
            ideal = sum(1 / np.log2(rank + 1) for rank in range(1, min(total, k) + 1))
            gained = sum(1 / np.log2(rank + 1) for rank in inside)
            assert hits(ranked, k)[query] == (1.0 if inside else 0.0)
            assert recalls(ranked, relevant.sum(1), k)[query] == len(inside) / total
            assert ndcg(ranked, relevant.sum(1), k)[query] == pytest.approx(gained / ideal)


def test_a_query_without_relevant_items_gives_zero_everywhere() -> None:
    ranked, none = np.zeros((1, 5), dtype=bool), np.zeros(1, dtype=np.int64)
    assert hits(ranked, 3)[0] == recalls(ranked, none, 3)[0] == ndcg(ranked, none, 3)[0] == 0.0
    assert reciprocal_ranks(ranked)[0] == 0.0


def test_a_ranking_shorter_than_k_counts_what_it_holds() -> None:
    ranked = np.array([[False, True]])
    assert hits(ranked, 10)[0] == 1.0
    assert ndcg(ranked, np.array([1]), 10)[0] == pytest.approx(1 / np.log2(3))


def test_among_equal_scores_irrelevant_items_come_first() -> None:
    scores = np.array([[1.0, 1.0, 1.0, 2.0]], dtype=np.float32)
    relevant = np.array([[True, False, False, False]])
    assert pessimistic_order(scores, relevant).tolist() == [[3, 1, 2, 0]]
    constant = pessimistic_order(np.zeros((1, 4), np.float32), relevant)
    assert constant[0, -1] == 0


def test_nan_is_the_worst_score_and_never_lifts_a_relevant_item() -> None:
    scores = np.array([[np.nan, -9.0, np.nan]], dtype=np.float32)
    relevant = np.array([[True, False, False]])
    assert pessimistic_order(scores, relevant).tolist() == [[1, 2, 0]]


def test_the_pessimistic_order_is_the_worst_of_all_orders_that_the_scores_allow() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 3, size=(1, 5)).astype(np.float32)
        relevant = rng.random((1, 5)) < 0.4
        ours = relevant[0, pessimistic_order(scores, relevant)[0]]
        allowed = [
            relevant[0, list(order)]
            for order in itertools.permutations(range(5))
            if all(scores[0, a] >= scores[0, b] for a, b in itertools.pairwise(order))
        ]
        worst = min(reciprocal_ranks(ranked[None])[0] for ranked in allowed)
        assert reciprocal_ranks(ours[None])[0] == worst


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_promises() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(200):
        sample = (rng.random(120) < 0.3).astype(float)
        low, high = bootstrap_interval(sample, resamples=400, seed=seed)
        assert low <= sample.mean() <= high
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_bootstrap_interval_is_reproducible_and_narrows() -> None:
    values = np.random.default_rng(0).random(400)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    widths = [np.diff(bootstrap_interval(values[:n]))[0] for n in (25, 400)]
    assert widths[1] < widths[0] / 2
    inner = bootstrap_interval(values, confidence=0.5)
    outer = bootstrap_interval(values, confidence=0.99)
    assert outer[0] < inner[0] < inner[1] < outer[1]
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)


def test_the_permutation_test_is_small_for_a_real_difference_and_large_for_none() -> None:
    rng = np.random.default_rng(5)
    base = (rng.random(200) < 0.5).astype(float)
    better = np.maximum(base, rng.random(200) < 0.3)
    assert paired_permutation(better, base) < 0.001
    assert paired_permutation(base, base) == 1.0
    assert paired_permutation(base, rng.permutation(base)) > 0.05


def test_the_permutation_test_is_near_the_exact_p_value() -> None:
    differences = np.array([1.0, 1.0, 1.0, -1.0, 1.0, 0.0, 1.0])
    means = [
        abs((np.array(signs) * differences).mean())
        for signs in itertools.product([-1, 1], repeat=len(differences))
    ]
    exact = np.mean(np.array(means) >= abs(differences.mean()) - 1e-12)
    assert paired_permutation(differences, np.zeros(7)) == pytest.approx(exact, abs=0.02)
    assert paired_permutation(np.zeros(7), differences) == pytest.approx(exact, abs=0.02)
