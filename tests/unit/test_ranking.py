"""Rankings and run files: what an index gives, and how the fine stage orders, by brute force over all orders."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark
from pipelines.ranking import Scores, placed, rank_table, run_table, shared_best, summarise
from pipelines.recipe import Recipe
from slq.arrow import RANKS
from slq.errors import DataError
from slq.index import Hit
from slq.metrics import pessimistic_order
from slq.reranking.profiles import PROFILES, Reading
from slq.schema import Item
from tests.integration.runs import changed

ITEMS = [Item(text="x", id=f"i{n}") for n in range(4)]
QUERIES = [Item(text="x", id=f"q{n}") for n in range(2)]
BENCHMARK = Benchmark(ITEMS, QUERIES, np.array([[1, 0, 0, 0], [0, 0, 1, 1]], dtype=bool))


def hits(*given: tuple[str, float]) -> list[Hit]:
    return [Hit(name, score) for name, score in given]


FOUND = [hits(("i2", 0.9), ("i0", 0.5)), hits(("i3", 0.8))]


def test_items_that_an_index_did_not_give_are_never_hit() -> None:
    scores = Scores.of_hits(BENCHMARK, FOUND)
    recipe = changed(Recipe(), eval={"ks": (1, 2, 4)})
    report = summarise(recipe, BENCHMARK, {"slq_index": scores})["systems"]["slq_index"]
    assert list(report) == ["text_to_image"]  # an index looks for items, not for queries
    entry = report["text_to_image"]["all"]
    assert [entry[f"hit@{k}"] for k in (1, 2, 4)] == [0.5, 1.0, 1.0]
    assert [entry[f"recall@{k}"] for k in (1, 2)] == [0.25, 0.75]
    rows = run_table(BENCHMARK, scores, depth=3).to_pylist()
    assert [(row["query_id"], row["item_id"], row["rank"]) for row in rows] == [
        ("q0", "i2", 1), ("q0", "i0", 2), ("q1", "i3", 1),
    ]  # fmt: skip
    assert rows[2]["coarse_score"] == pytest.approx(0.8)
    assert all(row["fine_score"] is None for row in rows)


def test_an_item_that_is_not_in_the_gallery_is_named() -> None:
    with pytest.raises(DataError, match="the index holds item 'i9', and the gallery does not"):
        Scores.of_hits(BENCHMARK, [hits(("i9", 0.9)), []])


def test_what_is_kept_of_the_exact_ranking_is_counted() -> None:
    coarse = np.array([[0.5, 0.1, 0.9, 0.2], [0.1, 0.2, 0.7, 0.8]], np.float32)
    exact, found = Scores(coarse), Scores.of_hits(BENCHMARK, FOUND)
    assert shared_best(exact, found, 1) == 1.0
    assert shared_best(exact, found, 2) == 0.75  # i2 of the second query is missing
    assert shared_best(exact, exact, 9) == 1.0
    assert shared_best(exact, Scores.of_hits(BENCHMARK, [[], []]), 2) == 0.0


DEFAULT, COMPAT = PROFILES["default"], PROFILES["compat"]


def said(margin: float, hundredths: int = 0, entropy: float = 0.0) -> Reading:
    return Reading(margin, 1.0, entropy, hundredths)


def only_order(
    coarse: NDArray[np.float32], readings: dict[int, Reading], profile: str, first: list[int]
) -> list[int]:
    """The one order, of all there are, in which whoever is not scored has its coarse place and no two others stand
    the wrong way round; `first` says who comes first of equals."""

    def is_before(a: int, b: int) -> bool:
        x, y = readings[a], readings[b]
        mine, other = (
            (x.margin, y.margin)
            if profile == "default"
            else ((x.hundredths, -float(x.entropy or 0)), (y.hundredths, -float(y.entropy or 0)))
        )
        if mine != other:
            return mine > other
        if coarse[a] != coarse[b]:
            return bool(coarse[a] > coarse[b])
        return first.index(a) < first.index(b)

    by_coarse = sorted(first, key=lambda i: -coarse[i])  # stable
    fitting = [
        order
        for order in itertools.permutations(range(len(coarse)))
        if all(order[n] == i for n, i in enumerate(by_coarse) if i not in readings)
        and all(
            is_before(a, b)
            for a, b in itertools.combinations([i for i in order if i in readings], 2)
        )
    ]
    assert len(fitting) == 1
    return list(fitting[0])


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_places_are_those_of_the_only_order_that_fits(seed: int, profile: str) -> None:
    """Few different values, so that each rule has to break ties."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0.1, 0.2, 0.3], (2, 5)).astype(np.float32)
    relevant = rng.random((2, 5)) < 0.5
    readings = [
        {
            i: said(*rng.choice([-1.0, 2.0], 1), int(rng.choice([7, 8])), rng.choice([0.1, 0.2]))
            for i in range(5)
            if rng.random() < 0.6
        }
        for _ in range(2)
    ]
    scores = Scores(coarse, readings, PROFILES[profile])
    plain = placed(scores, np.argsort(-coarse, axis=1, kind="stable"))
    wary = placed(scores, pessimistic_order(coarse, relevant))
    for q in range(2):
        assert plain[q].tolist() == only_order(coarse[q], readings[q], profile, [*range(5)])
        wrong_first = sorted(range(5), key=lambda i: bool(relevant[q, i]))
        assert wary[q].tolist() == only_order(coarse[q], readings[q], profile, wrong_first)


def test_where_the_best_are_scored_they_stand_by_margin_above_the_rest() -> None:
    """The former rule, written out: margins, and below the lowest of them the similarities of the others."""
    rng = np.random.default_rng(3)
    coarse = rng.random((20, 30)).astype(np.float32)
    best = np.argsort(-coarse, axis=1)[:, :6]
    margins = rng.normal(size=best.shape).astype(np.float32)
    fine = np.full_like(coarse, np.nan)
    np.put_along_axis(fine, best, margins, axis=1)
    former = np.where(np.isnan(fine), margins.min(axis=1, keepdims=True) - 3 + coarse, fine)
    readings = [[Reading(float(margin)) for margin in row] for row in margins]
    found = Scores(coarse).scored(best, readings, DEFAULT)
    order = placed(found, np.argsort(-coarse, axis=1))
    np.testing.assert_array_equal(order, np.argsort(-former, axis=1))


def test_a_margin_that_is_not_finite_leaves_an_item_at_its_coarse_place() -> None:
    coarse = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    best = np.array([[0, 1, 2]])
    found = Scores(coarse).scored(best, [[said(1.0), said(float("nan")), said(2.0)]], DEFAULT)
    assert placed(found, np.array([[0, 1, 2, 3]])).tolist() == [[2, 1, 0, 3]]


@pytest.mark.parametrize(("profile", "first"), [("default", "i3"), ("compat", "i1")])
def test_run_files_tell_the_profiles_order_in_scores_that_sort_into_it(
    profile: str, first: str
) -> None:
    coarse = np.array([[0.5, 0.5, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]], np.float32)
    readings: list[dict[int, Reading]] = [
        {0: said(1.0, 9, 0.7), 1: said(0.0, 9, 0.2), 3: said(2.0, 8, 0.1)},
        {},
    ]
    table = run_table(BENCHMARK, Scores(coarse, readings, PROFILES[profile]), depth=4)
    rows = table.to_pylist()
    ours, others = rows[:4], rows[4:]
    # i2 keeps its place: among equals the wrong ones come first, and i0 is right
    assert (ours[0]["item_id"], ours[1]["item_id"]) == (first, "i2")
    by_score = sorted(ours, key=lambda row: (-row["score"], row["item_id"]))
    assert by_score == ours  # whatever a reader does with equal scores
    assert len({row["score"] for row in ours}) == 4
    assert ours[0]["score"] == 0.5
    assert ours[3]["score"] == pytest.approx(0.5, abs=1e-6)
    assert [row["coarse_score"] for row in ours] == [0.5] * 4
    wanted = {
        "default": {"i0": 1.0, "i1": 0.0, "i3": 2.0},
        "compat": {"i0": 0.09, "i1": 0.09, "i3": 0.08},
    }
    for row in ours:
        fine = wanted[profile].get(row["item_id"])
        assert row["fine_score"] == (None if fine is None else pytest.approx(fine))
    assert [row["score"] for row in others] == coarse[1].tolist()


def test_ties_of_all_rules_count_against_the_fine_stage_too() -> None:
    coarse = np.array([[0.5, 0.5, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]], np.float32)
    readings = [{0: said(1.0), 1: said(1.0)}, {0: said(1.0)}]
    recipe = changed(Recipe(), eval={"ks": (1, 2)})
    found = {"slq_fine": Scores(coarse, readings, DEFAULT)}
    report = summarise(recipe, BENCHMARK, found)["systems"]["slq_fine"]
    assert list(report) == ["text_to_image"]
    assert report["text_to_image"]["all"]["hit@1"] == 0.0  # i0 is right, and i1 as good
    assert report["text_to_image"]["all"]["hit@2"] == 0.5


def test_queries_may_be_scored_to_different_depths_and_fused_with_their_similarities() -> None:
    coarse = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.4, 0.3, 0.2]], np.float32)
    best = [np.array([], dtype=np.int64), np.array([1, 2, 3])]
    readings = [[], [said(0.0), said(0.4), said(1.0)]]
    by_coarse = np.argsort(-coarse, axis=1, kind="stable")
    plain = Scores(coarse).scored(best, readings, DEFAULT)
    assert placed(plain, by_coarse).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert plain.scored_per_query == 1.5
    fused = Scores(coarse).scored(best, readings, DEFAULT, coarse_weight=7.0)
    # 0.0 + 2.8, 0.4 + 2.1, 1.0 + 1.4
    assert placed(fused, by_coarse).tolist() == [[0, 1, 2, 3], [1, 2, 3, 0]]
    heavier = Scores(coarse).scored(best, readings, DEFAULT, coarse_weight=3.0)
    # 1.2, 1.3, 1.6
    assert placed(heavier, by_coarse).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_ranks_of_first_relevant_items_are_told_by_query_and_subset() -> None:
    rng = np.random.default_rng(3)
    queries = [
        Item(text="x", id=f"q{n}", columns={"kind": "ab"[n % 2], "split": "test", "hard": n > 6})
        for n in range(9)
    ]
    relevant = rng.random((9, 4)) < 0.5
    relevant[:, 1] = True
    coarse = rng.choice([0.1, 0.2, 0.3], (9, 4)).astype(np.float32)
    benchmark = Benchmark(ITEMS, queries, relevant)
    table = rank_table(benchmark, {"slq": Scores(coarse), "other": Scores(-coarse)})
    assert table.schema.equals(RANKS)
    for row in table.to_pylist():
        n = int(row["query_id"][1:])
        values = coarse[n] if row["system"] == "slq" else -coarse[n]
        best = max(values[i] for i in range(4) if relevant[n, i])
        before = sum(values[i] > best for i in range(4))
        equal_but_wrong = sum(values[i] == best and not relevant[n, i] for i in range(4))
        assert row["rank"] == 1 + before + equal_but_wrong
        kind = "ab"[n % 2]
        assert row["subsets"] == [kind, *([f"{kind}, hard subset"] if n > 6 else [])]
    assert table.num_rows == 18


def test_categories_are_measured_apart_on_objects_that_were_seen() -> None:
    kinds = [("tool_use", "test"), ("tool_use", "unseen"), (None, "test"), ("logic", "test")]
    queries = [
        Item(text="x", id=f"q{n}", columns={"kind": "a", "category": name, "split": split})
        for n, (name, split) in enumerate(kinds)
    ]
    coarse = np.eye(4, dtype=np.float32)
    relevant = np.eye(4, dtype=bool)
    relevant[3] = [True, False, False, False]
    recipe = changed(Recipe(), eval={"ks": (1, 4)})
    found = summarise(recipe, Benchmark(ITEMS, queries, relevant), {"slq": Scores(coarse)})
    by_category = found["systems"]["slq"]["categories"]
    assert {name: one["num_queries"] for name, one in by_category.items()} == {
        "logic": 1, "tool_use": 1,
    }  # fmt: skip
    assert by_category["tool_use"]["hit@1"] == 1
    assert by_category["logic"]["hit@1"] == 0
