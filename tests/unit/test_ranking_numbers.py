"""What an evaluation reports: figures as before metrics had names, further metrics, grades and paired tests."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from pipelines.benchmark import Benchmark
from pipelines.ranking import Scores, compared_systems, deepest, metrics_of, ranks_of, summarise
from pipelines.recipe import Recipe
from slq.errors import ConfigError
from slq.metrics import (
    bootstrap_interval,
    hits,
    holm,
    paired_permutation,
    pessimistic_order,
    ranks_of_order,
    recalls,
    reciprocal_ranks,
)
from slq.reranking.profiles import PROFILES, Reading
from slq.schema import Item
from tests.integration.runs import changed

NUM_ITEMS, NUM_QUERIES = 25, 60
RELEVANT = np.zeros((NUM_QUERIES, NUM_ITEMS), dtype=bool)
RELEVANT[np.arange(NUM_QUERIES), np.arange(NUM_QUERIES) % NUM_ITEMS] = True
RELEVANT[::7, 3] = True
BENCHMARK = Benchmark(
    [Item(text="x", id=f"i{n}") for n in range(NUM_ITEMS)],
    [
        Item(text="x", id=f"q{n}", columns={"kind": "even" if n % 2 == 0 else "odd"})
        for n in range(NUM_QUERIES)
    ],
    RELEVANT,
)


def coarse(seed: int) -> np.ndarray:
    """Similarities with many ties; right items tend to be better."""
    rng = np.random.default_rng(seed)
    found = (
        rng.integers(0, 9, RELEVANT.shape) / 8 + RELEVANT * rng.integers(0, 6, RELEVANT.shape) / 8
    )
    return found.astype(np.float32)


def fine(seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    scores = coarse(seed)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    readings = [
        [Reading(float(margin)) for margin in row] for row in rng.integers(0, 3, best.shape)
    ]
    return Scores(scores).scored(best, readings, PROFILES["default"])


def report_of(ranked: np.ndarray, ks: tuple[int, ...]) -> dict[str, Any]:
    """Figures of a subset from the ranked relevance of its queries, as they were before."""
    found: dict[str, Any] = {
        "num_queries": len(ranked),
        "mrr": float(reciprocal_ranks(ranked).mean()),
    }
    for k in ks:
        values = hits(ranked, k)
        found[f"hit@{k}"] = float(values.mean())
        found[f"hit@{k}_interval"] = bootstrap_interval(values)
        found[f"recall@{k}"] = float(recalls(ranked, ranked.sum(axis=1), k).mean())
    return found


def test_figures_that_readers_know_are_what_they_were_key_by_key() -> None:
    recipe = changed(Recipe(), eval={"ks": (1, 5)})
    results = summarise(recipe, BENCHMARK, {"slq": Scores(coarse(1))})
    system = results["systems"]["slq"]
    order = pessimistic_order(coarse(1), RELEVANT)
    ranked = np.take_along_axis(RELEVANT, order, axis=1)
    for n, kind in enumerate(("even", "odd")):
        mask = np.arange(NUM_QUERIES) % 2 == n
        relevant = RELEVANT[mask].T
        asked = relevant.any(axis=1)
        turned = pessimistic_order(coarse(1)[mask].T[asked], relevant[asked])
        wanted = {
            "text_to_image": report_of(ranked[mask], (1, 5)),
            "image_to_text": report_of(np.take_along_axis(relevant[asked], turned, axis=1), (1, 5)),
        }
        for direction, report in wanted.items():
            found = system[direction][kind]
            assert {key: found[key] for key in report} == report
            new = {"mrr_interval", "recall@1_interval", "recall@5_interval"}
            assert set(found) - set(report) == new


def test_blocks_and_sorting_rank_alike_and_what_is_not_ranked_is_not_found() -> None:
    scores = coarse(2)
    scores[np.random.default_rng(0).random(scores.shape) < 0.3] = -np.inf
    scores[4] = np.nan
    found = ranks_of(Scores(scores), RELEVANT)
    order = pessimistic_order(scores, RELEVANT)
    wanted = ranks_of_order(order, RELEVANT, ~np.isneginf(scores))
    np.testing.assert_array_equal(found.rank, wanted.rank)
    assert (found.rank == 0).any()
    sorted_too = ranks_of(Scores(scores, readings=[{}] * NUM_QUERIES), RELEVANT)
    np.testing.assert_array_equal(sorted_too.rank, wanted.rank)


def test_metrics_that_are_asked_for_come_with_intervals_in_both_directions() -> None:
    recipe = changed(Recipe(), eval={"metrics": ("ndcg@10", "map", "precision@5", "mrr")})
    results = summarise(recipe, BENCHMARK, {"slq": Scores(coarse(1))})
    for report in results["systems"]["slq"].values():
        for entry in report.values():
            for name in ("ndcg@10", "map", "precision@5", "mrr", "hit@1", "recall@10"):
                low, high = entry[f"{name}_interval"]
                assert 0 <= low <= entry[name] <= high <= 1


def test_grades_count_in_ndcg_and_in_nothing_else() -> None:
    grades = {("q0", "i3"): 4.0, ("q9", "i9"): 9.0, ("q1", "i0"): 5.0, ("gone", "i0"): 2.0}
    graded = Benchmark(BENCHMARK.items, BENCHMARK.queries, RELEVANT, grades=grades)
    assert graded.graded[0, 3] == 4
    assert (graded.graded > 0).sum() == RELEVANT.sum()  # q1 and i0 are no relevant pair
    assert BENCHMARK.graded is BENCHMARK.relevant
    recipe = changed(Recipe(), eval={"metrics": ("ndcg@10", "map")})
    before, after = (
        summarise(recipe, one, {"slq": Scores(coarse(1))})["systems"]["slq"]["text_to_image"]
        for one in (BENCHMARK, graded)
    )
    differing = {
        key for kind in before for key in before[kind] if before[kind][key] != after[kind][key]
    }
    assert differing == {"ndcg@10", "ndcg@10_interval"}
    order = pessimistic_order(coarse(1)[:1], graded.graded[:1])[0].tolist()
    gained = sum(graded.graded[0, i] / np.log2(n + 2) for n, i in enumerate(order[:10]))
    one = Benchmark(BENCHMARK.items, BENCHMARK.queries[:1], RELEVANT[:1], grades=grades)
    found = summarise(recipe, one, {"slq": Scores(coarse(1)[:1])})["systems"]["slq"]
    ideal = 4 + 1 / np.log2(3)
    assert found["text_to_image"]["even"]["ndcg@10"] == pytest.approx(gained / ideal)


def test_any_two_systems_are_compared_by_subset_and_metric() -> None:
    scores = {"untrained": Scores(coarse(5)), "slq": Scores(coarse(1)), "slq_fine": fine(1)}
    results = json.loads(json.dumps(summarise(Recipe(), BENCHMARK, scores)))
    pairs = [["slq", "untrained"], ["slq_fine", "untrained"], ["slq_fine", "slq"]]
    for subset, kind in (("even", 0), ("odd", 1)):
        mask = np.arange(NUM_QUERIES) % 2 == kind
        tests = results["paired"]["text_to_image"][subset]
        assert set(tests) == {"mrr", *(f"{m}@{k}" for m in ("hit", "recall") for k in (1, 5, 10))}
        assert [test["systems"] for test in tests["hit@5"]] == pairs
        values = {name: ranked_hits(found, 5)[mask] for name, found in scores.items()}
        p = [paired_permutation(values[a], values[b]) for a, b in pairs]
        assert [test["p"] for test in tests["hit@5"]] == pytest.approx(p)
        assert [test["p_holm"] for test in tests["hit@5"]] == pytest.approx(holm(p))
        fine_p = results["fine_against_coarse_p"][subset]
        assert fine_p == tests["hit@1"][2]["p"]
        reverse = results["paired"]["image_to_text"][subset]["hit@1"]
        assert [test["systems"] for test in reverse] == pairs[:1]  # the fine stage has no reverse


def ranked_hits(scores: Scores, k: int) -> np.ndarray:
    from pipelines.ranking import placed

    order = placed(scores, pessimistic_order(scores.coarse, RELEVANT))
    return hits(np.take_along_axis(RELEVANT, order, axis=1), k)


def test_with_a_baseline_each_system_is_compared_with_it_alone() -> None:
    scores = {name: Scores(coarse(n)) for n, name in enumerate(("last_token", "untrained", "slq"))}
    recipe = changed(Recipe(), eval={"baseline": "untrained"})
    tests = summarise(recipe, BENCHMARK, scores)["paired"]["text_to_image"]["odd"]["mrr"]
    assert [test["systems"] for test in tests] == [
        ("last_token", "untrained"),
        ("slq", "untrained"),
    ]
    one = summarise(Recipe(), BENCHMARK, {"slq": Scores(coarse(1))})
    assert one["paired"] == {"text_to_image": {}, "image_to_text": {}}
    names = ["a", "b", "c", "d"]
    every = {tuple(sorted(pair)) for pair in compared_systems(names, None)}
    assert every == set(itertools.combinations(names, 2))
    with pytest.raises(
        ConfigError, match=r"eval\.baseline 'slg' is not measured; name one of a, b"
    ):
        compared_systems(names, "slg")


def test_what_an_index_does_not_give_is_no_difference() -> None:
    """The first five items of the same ranking, at the same places: nothing tells the two systems apart."""
    whole = coarse(1)
    order = pessimistic_order(whole, RELEVANT)
    cut = np.full_like(whole, -np.inf)
    best = order[:, :5]
    np.put_along_axis(cut, best, np.take_along_axis(whole, best, axis=1), axis=1)
    systems = {
        "untrained": Scores(coarse(5)),
        "slq": Scores(whole),
        "slq_index": Scores(cut, is_whole=False),
    }
    recipe = changed(Recipe(), eval={"ks": (1, 5), "metrics": ("ndcg@5", "ndcg", "map", "mrr@5")})
    results = json.loads(json.dumps(summarise(recipe, BENCHMARK, systems)))
    tests = results["paired"]["text_to_image"]["even"]
    without = {"mrr", "ndcg", "map"}
    assert without <= set(tests)
    for metric, entries in tests.items():
        pairs = [tuple(one["systems"]) for one in entries]
        whole_pair = [("slq", "untrained")]
        others = [("slq_index", "untrained"), ("slq_index", "slq")]
        assert pairs == (whole_pair if metric in without else whole_pair + others)
        if metric not in without:
            assert entries[2]["difference"] == 0
            assert entries[2]["p"] == 1
    (alone,) = tests["mrr"]
    assert alone["p"] == alone["p_holm"]  # a family of one
    two = summarise(recipe, BENCHMARK, {n: systems[n] for n in ("untrained", "slq")})
    same = two["paired"]["text_to_image"]["even"]["mrr"][0]
    assert [same[key] for key in ("difference", "p")] == [alone[key] for key in ("difference", "p")]
    assert results["cut_at"] == {"slq_index": 5}
    assert "mrr" in results["systems"]["slq_index"]["text_to_image"]["even"]
    assert "cut_at" not in two
    only = {"slq": systems["slq"], "slq_index": systems["slq_index"]}
    left = summarise(recipe, BENCHMARK, only)["paired"]["text_to_image"]["even"]
    assert not without & set(left)


def test_unknown_metrics_are_refused_with_the_recipe() -> None:
    with pytest.raises(
        ConfigError, match=r"eval\.metrics: .*'ndgc@10' is unknown; did you mean ndcg@10"
    ):
        Recipe.parse({"eval": {"metrics": ["ndgc@10"]}}, source="mine.yaml")


def test_runs_are_as_deep_as_the_deepest_metric() -> None:
    names = [metric.name for metric in metrics_of((1, 5), ("ndcg@20", "hit@1", "map"))]
    assert names == ["mrr", "hit@1", "recall@1", "hit@5", "recall@5", "ndcg@20", "map"]
    assert deepest(metrics_of((1, 5), ("ndcg@20",))) == 20
    assert deepest(metrics_of((1, 5))) == 5
