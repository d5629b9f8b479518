"""What an index gives as scores: ranks, run files, and how much of the exact ranking is kept."""

import numpy as np
import pytest

from pipelines.benchmark import Benchmark
from pipelines.ranking import Scores, run_table, shared_best, summarise
from pipelines.recipe import Recipe
from slq.errors import DataError
from slq.index import Hit
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
    exact, found = Scores.of_similarities(coarse), Scores.of_hits(BENCHMARK, FOUND)
    assert shared_best(exact, found, 1) == 1.0
    assert shared_best(exact, found, 2) == 0.75  # i2 of the second query is missing
    assert shared_best(exact, exact, 9) == 1.0
    assert shared_best(exact, Scores.of_hits(BENCHMARK, [[], []]), 2) == 0.0
