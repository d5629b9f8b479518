"""Metrics by name against a written-out loop and ir-measures; Holm's correction and shared resampling by hand."""

import math

import ir_measures as ir
import numpy as np
import pytest
from numpy.typing import NDArray

from slq.errors import ConfigError, DataError
from slq.metrics import (
    KNOWN,
    Ranks,
    Relevance,
    bootstrap_interval,
    bootstrap_intervals,
    compared,
    figures,
    holm,
    paired_permutation,
    parse_metric,
    parse_metrics,
    ranks_of_order,
    ranks_of_scores,
    values_of,
    with_equal_items,
)

NAMES = (
    "hit@1", "hit@5", "recall@1", "recall@5", "precision@5", "precision@40",
    "ndcg", "ndcg@1", "ndcg@5", "map", "map@5", "mrr", "mrr@5",
)  # fmt: skip
MEASURES = {
    "hit@1": ir.Success @ 1, "hit@5": ir.Success @ 5, "recall@1": ir.R @ 1, "recall@5": ir.R @ 5,
    "precision@5": ir.P @ 5, "precision@40": ir.P @ 40, "ndcg": ir.nDCG, "ndcg@1": ir.nDCG @ 1,
    "ndcg@5": ir.nDCG @ 5, "map": ir.AP, "map@5": ir.AP @ 5, "mrr": ir.RR, "mrr@5": ir.RR @ 5,
}  # fmt: skip
QUERIES, ITEMS = 30, 20


def graded(rng: np.random.Generator) -> NDArray[np.int64]:
    """Grades 0 to 3; the first query has no relevant item."""
    grades = rng.choice([0, 0, 0, 0, 1, 2, 3], (QUERIES, ITEMS))
    grades[0] = 0
    return grades


def by_loop(name: str, ranking: list[int], relevant: list[int]) -> float:
    """A metric of one query, written out.

    Args:
        name: Of the metric.
        ranking: Grade at each rank.
        relevant: Grades of all relevant items, ranked or not.
    """
    kind, _, depth = name.partition("@")
    k = int(depth) if depth else len(ranking)
    if not relevant:
        return 0.0
    top = ranking[:k]
    found = [n for n, grade in enumerate(top, start=1) if grade > 0]
    if kind == "hit":
        return float(bool(found))
    if kind == "recall":
        return len(found) / len(relevant)
    if kind == "precision":
        return len(found) / k
    if kind == "mrr":
        return 1 / found[0] if found else 0.0
    if kind == "map":
        return sum(sum(f <= n for f in found) / n for n in found) / len(relevant)
    gained = sum(grade / math.log2(n + 1) for n, grade in enumerate(top, start=1))
    best = sorted(relevant, reverse=True)[: k if depth else len(relevant)]
    return gained / sum(grade / math.log2(n + 1) for n, grade in enumerate(best, start=1))


def worst_order(scores: NDArray[np.float32], grades: NDArray[np.int64]) -> list[int]:
    """Items by score, the lowest grade first among equals."""
    clean = [-math.inf if math.isnan(score) else float(score) for score in scores]
    return sorted(range(len(scores)), key=lambda i: (-clean[i], grades[i]))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_equals_a_written_out_loop_with_ties_against_us(name: str) -> None:
    rng = np.random.default_rng(1)
    grades = graded(rng)
    scores = rng.choice([0.1, 0.2, 0.3, np.nan], (QUERIES, ITEMS)).astype(np.float32)
    found = parse_metric(name)(ranks_of_scores(scores, grades))
    for q in range(QUERIES):
        ranking = [int(grades[q, i]) for i in worst_order(scores[q], grades[q])]
        wanted = by_loop(name, ranking, [grade for grade in ranking if grade])
        assert found[q] == pytest.approx(wanted, abs=1e-12), q


@pytest.mark.parametrize("has_ties", [False, True])
def test_every_metric_equals_that_of_ir_measures(has_ties: bool) -> None:
    """It breaks ties its own way, so tied scores are handed to it as strictly falling ones in our order."""
    rng = np.random.default_rng(2)
    grades = graded(rng)
    scores = rng.permutation(QUERIES * ITEMS).reshape(QUERIES, ITEMS).astype(np.float32)
    told = scores.copy()
    if has_ties:
        scores = np.floor(scores / 150).astype(np.float32)
        for q in range(QUERIES):
            told[q, worst_order(scores[q], grades[q])] = np.arange(ITEMS, 0, -1)
    qrels = [ir.Qrel(f"q{q}", f"i{i}", int(grades[q, i])) for q, i in np.ndindex(grades.shape)]
    run = [ir.ScoredDoc(f"q{q}", f"i{i}", float(told[q, i])) for q, i in np.ndindex(told.shape)]
    ranks = ranks_of_scores(scores, grades)
    ours = {MEASURES[name]: parse_metric(name)(ranks) for name in NAMES}
    count = 0
    for entry in ir.iter_calc(list(ours), qrels, run):
        value = ours[entry.measure][int(entry.query_id[1:])]
        assert value == pytest.approx(entry.value, abs=1e-6), (entry.measure, entry.query_id)
        count += 1
    assert count >= len(NAMES) * (QUERIES - 1)


@pytest.mark.parametrize("name", NAMES)
def test_items_that_are_no_candidates_have_no_rank_and_take_up_none(name: str) -> None:
    rng = np.random.default_rng(3)
    grades = graded(rng)
    scores = rng.choice([0.1, 0.2, 0.3], (QUERIES, ITEMS)).astype(np.float32)
    allowed = rng.random(scores.shape) < 0.6
    found = parse_metric(name)(ranks_of_scores(scores, grades, allowed))
    for q in range(QUERIES):
        ranking = [int(grades[q, i]) for i in worst_order(scores[q], grades[q]) if allowed[q, i]]
        relevant = [int(grade) for grade in grades[q] if grade]
        assert found[q] == pytest.approx(by_loop(name, ranking, relevant), abs=1e-12), q


def test_a_negative_grade_is_as_irrelevant_as_none() -> None:
    scores = np.array([[0.5, 0.5, 0.5]], np.float32)
    ranks = ranks_of_scores(scores, np.array([[-2, 0, 1]]))
    assert (ranks.rank.tolist(), ranks.grade.tolist()) == ([3], [1.0])


def test_nothing_relevant_anywhere_gives_zeros() -> None:
    ranks = ranks_of_scores(np.ones((3, 4), np.float32), np.zeros((3, 4)))
    for name, values in values_of(ranks, parse_metrics(NAMES)).items():
        assert values.tolist() == [0.0, 0.0, 0.0], name


def test_relevant_items_that_were_never_found_lower_what_divides_by_all() -> None:
    order = np.array([[2, 0, 1, 3]])
    allowed = np.array([[True, False, True, True]])
    ranks = ranks_of_order(order, np.array([[0, 1, 0, 1]]), allowed)
    assert (ranks.rank.tolist(), ranks.num_relevant.tolist()) == ([3, 0], [2])
    found = {name: values[0] for name, values in values_of(ranks, parse_metrics(NAMES)).items()}
    assert (found["mrr"], found["recall@5"]) == (1 / 3, 0.5)
    assert found["map"] == pytest.approx((1 / 3) / 2)
    assert found["ndcg"] == pytest.approx((1 / math.log2(4)) / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndgc@10", r"'ndgc@10' is unknown; did you mean ndcg@10\?"),
        ("nDCG@10", r"did you mean ndcg@10\?"),
        ("precison@3", r"did you mean precision@3\?"),
        ("hits@1", r"did you mean hit@1\?"),
        ("MRR", r"did you mean mrr\?"),
        ("accuracy", r"'accuracy' is unknown; .*there are hit@k, recall@k"),
        ("", "is unknown; there are"),
        ("hit", "needs a depth, as in hit@10"),
        ("recall", "needs a depth, as in recall@10"),
        ("precision", "needs a depth, as in precision@10"),
        ("hit@0", "the depth '0' is no whole number from 1 on"),
        ("hit@-1", "the depth '-1' is no whole number"),
        ("ndcg@", "the depth '' is no whole number"),
        ("ndcg@ten", "the depth 'ten' is no whole number"),
        ("ndcg@05", "the depth '05' is no whole number"),
        ("ndcg@10 ", "the depth '10' is no whole number"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_metric(name)


def test_names_are_what_they_are_parsed_from_and_come_once() -> None:
    names = [name.replace("k", "7") for name in KNOWN if "@" in name] + ["mrr", "ndcg", "map"]
    assert [metric.name for metric in parse_metrics(names)] == names
    assert [metric.name for metric in parse_metrics(["mrr", "hit@1", "mrr"])] == ["mrr", "hit@1"]
    with pytest.raises(ConfigError, match="no metric is named"):
        parse_metrics([])


def test_equal_items_answer_alike_with_the_highest_grade() -> None:
    grades = np.array([[0, 2, 0, 1, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]])
    keys = ["a", None, "b", "a", "b"]
    merged = with_equal_items(Relevance.of_matrix(grades), keys)
    wanted = [[1, 2, 0, 1, 0], [0, 0, 3, 0, 3], [0, 0, 0, 0, 0]]
    assert merged.matrix().tolist() == wanted
    both = with_equal_items(Relevance.of_matrix(np.array([[1, 2]])), ["same", "same"])
    assert both.matrix().tolist() == [[2, 2]]
    with pytest.raises(DataError, match="there are 2 keys for 5 items"):
        with_equal_items(Relevance.of_matrix(grades), keys[:2])


def test_relevance_from_pairs_is_that_of_the_matrix_and_refuses_what_is_none() -> None:
    grades = np.array([[0, 2, 1], [0, 0, 0], [1, 0, 0]])
    pairs = [(2, 0, 1.0), (0, 2, 1.0), (1, 1, 0.0), (0, 1, 2.0)]
    query, item, grade = (np.array(values) for values in zip(*pairs, strict=True))
    found = Relevance.of_pairs((3, 3), query, item, grade)
    assert found.matrix().tolist() == grades.tolist()
    with pytest.raises(DataError, match="names item 5, and there are 3, counted from 0"):
        Relevance.of_pairs((3, 3), query, np.array([5, 2, 1, 1]), grade)
    with pytest.raises(DataError, match="names query -1"):
        Relevance.of_pairs((3, 3), np.array([-1, 0, 1, 0]), item, grade)
    with pytest.raises(DataError, match="has item 1 for query 0 twice"):
        Relevance.of_pairs((3, 3), np.array([2, 0, 1, 0]), np.array([0, 1, 1, 1]), grade)


def test_figures_hold_means_and_the_intervals_of_each_alone() -> None:
    ranks = Ranks.sorted(4, np.arange(4), np.array([1, 2, 3, 9]), np.ones(4))
    values = values_of(ranks, parse_metrics(["hit@1", "mrr"]))
    report = figures(values)
    assert (report["num_queries"], report["hit@1"]) == (4, 0.25)
    assert report["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 9) / 4)
    assert report["mrr_interval"] == bootstrap_interval(values["mrr"])


def test_blocks_of_resamples_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas as they stood before blocks, with all random numbers at once."""
    from slq.metrics import significance

    rng = np.random.default_rng(4)
    first, second = rng.random(301), rng.random(301)
    picks = np.random.default_rng(7).integers(301, size=(500, 301))
    low, high = np.quantile(first[picks].mean(axis=1), [0.05, 0.95])
    signs = np.random.default_rng(7).choice([-1.0, 1.0], size=(999, 301))
    extreme = np.abs((signs * (first - second)).mean(axis=1)) >= abs((first - second).mean())
    for at_once in (2**22, 1000, 1):
        monkeypatch.setattr(significance, "_AT_ONCE", at_once)
        found = bootstrap_intervals(
            np.stack([second, first]), confidence=0.9, resamples=500, seed=7
        )
        assert found[1] == (float(low), float(high))
        p = paired_permutation(first, second, resamples=999, seed=7)
        assert p == (extreme.sum() + 1) / 1000


def test_holms_correction_equals_the_step_down_rule() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    p = np.random.default_rng(5).random(9) ** 3
    corrected = holm(p)
    for level in (0.01, 0.05, 0.2, 0.6):
        rejected: set[int] = set()
        for step, n in enumerate(np.argsort(p)):
            if p[n] > level / (len(p) - step):
                break
            rejected.add(int(n))
        assert {n for n in range(len(p)) if corrected[n] <= level} == rejected


def test_a_comparison_tells_difference_interval_and_both_p_values() -> None:
    rng = np.random.default_rng(6)
    base = rng.random(80)
    values = {
        "a": {"mrr": base, "hit@1": (base > 0.5).astype(float)},
        "b": {"mrr": base + 0.1, "hit@1": (base > 0.4).astype(float)},
        "c": {"mrr": rng.permutation(base), "hit@1": rng.integers(0, 2, 80).astype(float)},
    }
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    found = compared(values, pairs)
    assert list(found) == ["mrr", "hit@1"]
    for metric, entries in found.items():
        raw = [paired_permutation(values[a][metric], values[b][metric]) for a, b in pairs]
        assert [entry["p"] for entry in entries] == raw
        assert [entry["p_holm"] for entry in entries] == holm(raw)
        for (a, b), entry in zip(pairs, entries, strict=True):
            difference = values[a][metric] - values[b][metric]
            assert entry["systems"] == (a, b)
            assert entry["difference"] == pytest.approx(difference.mean(), abs=1e-15)
            assert entry["interval"] == pytest.approx(bootstrap_interval(difference), abs=1e-12)
    assert compared(values, []) == {}
