"""What a query ranks: pools, candidates, excluded items and wordings, against loops written out."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark, load_benchmark
from pipelines.ranking import (
    Scores,
    group_means,
    num_depending_on_order,
    placed,
    run_table,
    shared_best,
    summarise,
)
from pipelines.recipe import Recipe
from slq.arrow import CANDIDATES, RELEVANCE
from slq.benchmarks.contract import Facts
from slq.errors import DataError
from slq.index import Hit
from slq.reranking.profiles import Reading, averaged
from slq.schema import Item
from tests.integration.runs import changed

Row = dict[str, Any]


def data(
    folder: Path,
    *,
    items: list[Row],
    queries: list[Row],
    relevance: list[tuple[str, str]],
    grades: Mapping[tuple[str, str], float] | None = None,
    candidates: list[Row] | None = None,
    **eval_keys: Any,
) -> Recipe:
    """A recipe whose tables hold these rows."""
    pq.write_table(pa.Table.from_pylist(items), folder / "gallery.parquet")
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    given = grades or dict.fromkeys(relevance, 1)
    answers = [{"query_id": q, "item_id": i, "grade": given[q, i]} for q, i in relevance]
    table = pa.Table.from_pylist(answers, schema=None if grades else RELEVANCE)
    pq.write_table(table, folder / "relevance.parquet")
    if candidates is not None:
        table = pa.Table.from_pylist(candidates, schema=CANDIDATES)
        pq.write_table(table, folder / "candidates.parquet")
    return changed(Recipe(), data={"dir": folder}, eval=eval_keys)


def texts(*names: str, **columns: Any) -> list[Row]:
    return [{"id": name, "text": f"text of {name}", **columns} for name in names]


ABCD = texts("a", "b", "c", "d")


def test_without_a_table_every_query_ranks_everything(tmp_path: Path) -> None:
    found = load_benchmark(data(tmp_path, items=ABCD, queries=texts("q"), relevance=[("q", "b")]))
    assert found.allowed is None
    assert found.wordings is None
    scores = np.ones((1, 4), np.float32)
    assert found.masked(scores) is scores


def test_candidates_excluded_items_and_pools_are_one_mask(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    caplog.set_level(logging.INFO)
    items = [row | {"pool": "x" if row["id"] in "abc" else "y"} for row in ABCD]
    queries = [*texts("q", "r", "s", pool="x"), *texts("t", pool="y"), *texts("u", pool=None)]
    candidates = [
        {"query_id": "q", "item_ids": ["a", "b"], "excluded_ids": ["b"]},
        {"query_id": "r", "item_ids": None, "excluded_ids": ["a"]},
        {"query_id": "u", "item_ids": ["a", "d"], "excluded_ids": None},
    ]
    relevance = [("q", "a"), ("r", "b"), ("r", "d"), ("s", "c"), ("t", "d"), ("u", "d")]
    found = load_benchmark(
        data(tmp_path, items=items, queries=queries, relevance=relevance, candidates=candidates)
    )
    assert found.allowed is not None
    named = ["".join("abcd"[n] for n in np.flatnonzero(row)) for row in found.allowed]
    assert named == ["a", "bc", "abc", "d", "ad"]
    assert "a query ranks 1.8 of 4 items on average, as columns `pool` and cand" in caplog.text
    assert not found.relevant[1, 3]  # what may not be ranked is no right answer either


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query_id": "x", "item_ids": ["a"]}, "x -> None names a query or item that is not in"),
        ({"query_id": "q", "item_ids": ["a", "z"]}, "q -> z names a query or item"),
        ({"query_id": "q", "excluded_ids": ["z"]}, "q -> z names a query or item"),
        ({"query_id": "q", "item_ids": ["a"]}, "1 queries have no relevant item among the items t"),
        ({"query_id": "q", "excluded_ids": ["b"]}, "1 queries have no relevant item among the"),
    ],
)
def test_candidates_that_fit_no_file_or_leave_no_answer_are_refused(
    tmp_path: Path, row: Row, message: str
) -> None:
    recipe = data(
        tmp_path,
        items=ABCD,
        queries=texts("q"),
        relevance=[("q", "b")],
        candidates=[{"item_ids": None, "excluded_ids": None} | row],
    )
    with pytest.raises(DataError, match=message):
        load_benchmark(recipe)


def test_a_table_that_holds_no_candidates_is_refused(tmp_path: Path) -> None:
    recipe = data(tmp_path, items=ABCD, queries=texts("q"), relevance=[("q", "b")])
    path = tmp_path / "candidates.parquet"
    pq.write_table(pa.table({"query_id": ["q"]}), path)
    with pytest.raises(DataError, match=r"cannot be read as candidates.*KeyError\('item_ids'\)"):
        load_benchmark(recipe)
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read as candidates"):
        load_benchmark(recipe)
    pq.write_table(pa.table({"query_id": ["q"], "item_ids": [["b", "c"]]}), path)
    found = load_benchmark(recipe)
    assert found.allowed is not None
    assert found.allowed.tolist() == [[False, True, True, False]]


def test_what_a_query_ranks_does_not_hang_on_an_item_that_is_lost_and_has_its_name(
    tmp_path: Path,
) -> None:
    broken = {"id": "q", "text": " "}
    restricted = [{"query_id": "q", "item_ids": ["a", "b"], "excluded_ids": ["q"]}]
    of_item = data(
        tmp_path,
        items=[*ABCD, broken],
        queries=texts("q"),
        relevance=[("q", "b")],
        candidates=restricted,
    )
    found = load_benchmark(of_item)
    assert found.allowed is not None
    assert found.allowed.tolist() == [[True, True, False, False]]
    of_query = data(
        tmp_path,
        items=texts("a", "b", "q"),
        queries=[*texts("r"), broken],
        relevance=[("r", "b")],
        candidates=[
            *restricted,
            {"query_id": "r", "item_ids": ["b", "q"], "excluded_ids": None},
        ],
    )
    found = load_benchmark(of_query)
    assert found.allowed is not None
    assert found.allowed.tolist() == [[False, True, True]]  # the item q is there
    of_query = data(
        tmp_path,
        items=ABCD,
        queries=[*texts("r"), broken],
        relevance=[("r", "b")],
        candidates=[{"query_id": "r", "item_ids": ["b", "q"], "excluded_ids": None}],
    )
    with pytest.raises(DataError, match="r -> q names a query or item that is not in the files"):
        load_benchmark(of_query)


def test_wordings_become_one_query_under_the_name_of_their_group(tmp_path: Path) -> None:
    queries = [
        *texts("q-0", "q-1", query_group="q"),
        *texts("r", query_group=None),
        *texts("s-0", "s-1", "s-2", query_group="s"),
    ]
    relevance = [("q", "a"), ("r", "b"), ("s", "c")]
    found = load_benchmark(data(tmp_path, items=ABCD, queries=queries, relevance=relevance))
    assert [query.id for query in found.queries] == ["q", "r", "s"]
    assert found.wordings is not None
    assert [[item.id for item in further] for further in found.wordings] == [
        ["q-1"], [], ["s-1", "s-2"],
    ]  # fmt: skip
    some = found.of_queries([2, 0])
    assert [item.text for item in some.worded] == [
        f"text of {name}" for name in ("s-0", "q-0", "s-1", "s-2", "q-1")
    ]
    assert some.query_of_wording.tolist() == [0, 1, 0, 0, 1]


def test_a_group_that_has_lost_a_wording_is_left_out(tmp_path: Path) -> None:
    queries = [*texts("q-0", query_group="q"), *texts("r", query_group="r")]
    queries.append({"id": "q-1", "text": " ", "query_group": "q"})
    found = load_benchmark(
        data(tmp_path, items=ABCD, queries=queries, relevance=[("q", "a"), ("r", "b")])
    )
    assert [query.id for query in found.queries] == ["r"]
    assert found.num_unreadable > 0


def test_averaged_vectors_rank_as_the_sum_of_the_scores_of_all_wordings() -> None:
    rng = np.random.default_rng(3)
    queries, wordings = [Item("x", id=f"q{n}") for n in range(3)], [2, 0, 1]
    benchmark = Benchmark(
        [Item("x", id=f"i{n}") for n in range(5)],
        queries,
        np.eye(3, 5, dtype=bool),
        wordings=[[Item("y")] * count for count in wordings],
    )
    vectors = rng.normal(size=(6, 8)).astype(np.float32)
    items = rng.normal(size=(5, 8)).astype(np.float32)
    scores = benchmark.averaged(vectors) @ items.T
    of_query = [[0, 3, 4], [1], [2, 5]]  # first wordings, then the further ones of each query
    for n, rows in enumerate(of_query):
        total = np.sum([items @ vectors[row] for row in rows], axis=0)
        assert np.argsort(-total).tolist() == np.argsort(-scores[n]).tolist()
        assert scores[n] == pytest.approx(total / len(rows), abs=1e-5)


def test_readings_of_wordings_are_averaged_field_by_field() -> None:
    one, other = Reading(1.0, 0.5, 2.0, 70, None), Reading(-2.0, 0.25, 1.0, 71, None)
    assert averaged([one]) is one
    assert averaged([one, other]) == Reading(-0.5, 0.375, 1.5, 70, None)
    assert averaged([Reading(1.0), Reading(3.0)]) == Reading(2.0)


def random_benchmark(seed: int) -> tuple[Benchmark, NDArray[np.float32]]:
    """Eight queries over nine items with few different scores, most of what is there ranked."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((8, 9)) < 0.7
    relevant = (rng.random((8, 9)) < 0.3) & allowed
    for n in range(8):  # each has an answer that it ranks
        column = int(rng.integers(9))
        allowed[n, column] = relevant[n, column] = True
    benchmark = Benchmark(
        [Item("x", id=f"i{n}") for n in range(9)],
        [Item("x", id=f"q{n}", columns={"kind": "ab"[n % 2]}) for n in range(8)],
        relevant,
        allowed=allowed,
        facts=Facts("X", "all", "https://x", groups={"both": ("a", "b")}, overall="all"),
    )
    return benchmark, rng.choice([0.1, 0.2, 0.3, 0.4], (8, 9)).astype(np.float32)


def position_of_first_answer(scores: NDArray[np.float32], n: int, benchmark: Benchmark) -> int:
    """By a loop: items that beat or equal the best answer, wrong ones first."""
    assert benchmark.allowed is not None
    ranked = [i for i in range(scores.shape[1]) if benchmark.allowed[n, i]]
    best = max(scores[n, i] for i in ranked if benchmark.relevant[n, i])
    return 1 + sum(scores[n, i] >= best for i in ranked if not benchmark.relevant[n, i])


@pytest.mark.parametrize("seed", range(12))
def test_metrics_are_those_of_a_loop_over_what_each_query_ranks(seed: int) -> None:
    benchmark, coarse = random_benchmark(seed)
    recipe = changed(Recipe(), eval={"ks": (1, 3)})
    scores = Scores(benchmark.masked(coarse))
    results = summarise(recipe, benchmark, {"slq": scores})
    system = results["systems"]["slq"]
    report = system["text_to_image"]
    assert list(report) == ["all", "a", "b"]
    places = [position_of_first_answer(coarse, n, benchmark) for n in range(8)]
    for name, chosen in (("all", range(8)), ("a", range(0, 8, 2)), ("b", range(1, 8, 2))):
        for k in (1, 3, 5, 10):  # 5 and 10 are of the facts
            hit = np.mean([places[n] <= k for n in chosen])
            assert report[name][f"hit@{k}"] == pytest.approx(hit)
        assert report[name]["mrr"] == pytest.approx(np.mean([1 / places[n] for n in chosen]))
        assert report[name]["recall@10"] == 1.0  # whatever is right is ranked
    mean = (report["a"]["hit@1"] + report["b"]["hit@1"]) / 2
    assert system["groups"]["both"]["hit@1"] == pytest.approx(mean)
    assert "image_to_text" not in system  # of a benchmark that has one direction
    assert results["benchmark"]["name"] == "X"


@pytest.mark.parametrize("seed", range(4))
def test_the_reverse_direction_ranks_only_pairs_that_are_ranked(seed: int) -> None:
    benchmark, coarse = random_benchmark(seed)
    benchmark = Benchmark(
        benchmark.items, [Item("x", id=q.id) for q in benchmark.queries], benchmark.relevant,
        allowed=benchmark.allowed,
    )  # fmt: skip
    recipe = changed(Recipe(), eval={"ks": (1, 2)})
    results = summarise(recipe, benchmark, {"slq": Scores(benchmark.masked(coarse))})
    entry = results["systems"]["slq"]["image_to_text"]["all"]
    assert benchmark.allowed is not None
    turned = Benchmark(
        benchmark.queries, benchmark.items, benchmark.relevant.T, allowed=benchmark.allowed.T
    )
    asked = [n for n in range(9) if benchmark.relevant[:, n].any()]
    places = [position_of_first_answer(coarse.T, n, turned) for n in asked]
    assert entry["num_queries"] == len(asked)
    assert entry["hit@2"] == pytest.approx(np.mean([place <= 2 for place in places]))


def test_run_files_hold_only_what_is_ranked_with_and_without_the_fine_stage() -> None:
    benchmark, coarse = random_benchmark(1)
    assert benchmark.allowed is not None
    scores = Scores(benchmark.masked(coarse))
    best = [np.argsort(-row, kind="stable")[:2] for row in scores.coarse]
    readings = [[Reading(float(n)) for n in range(len(row))] for row in best]
    fine = Scores(scores.coarse).scored(best, readings, scores.profile)
    for system in (scores, fine):
        rows = run_table(benchmark, system, depth=9).to_pylist()
        for n in range(8):
            found = [row["item_id"] for row in rows if row["query_id"] == f"q{n}"]
            assert len(found) == len(set(found))
            assert set(found) == {f"i{i}" for i in np.flatnonzero(benchmark.allowed[n])}
    fine_rows = run_table(benchmark, fine, depth=1).to_pylist()
    assert [row["item_id"] for row in fine_rows] == [f"i{row[-1]}" for row in best]


def test_what_an_index_gives_of_items_that_are_not_ranked_is_dropped() -> None:
    benchmark, _ = random_benchmark(2)
    assert benchmark.allowed is not None
    found = [[Hit(f"i{n}", 1.0 - n / 10) for n in range(9)] for _ in range(8)]
    scores = Scores.of_hits(benchmark, found)
    assert (np.isfinite(scores.coarse) == benchmark.allowed).all()
    exact = Scores(benchmark.masked(np.tile(1.0 - np.arange(9, dtype=np.float32) / 10, (8, 1))))
    assert shared_best(exact, scores, 9) == 1.0  # of what is ranked, not of nine


def test_answers_that_depend_on_the_order_of_candidates_are_those_of_ties() -> None:
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.4, 0.4], [-np.inf, 0.3, 0.3]], np.float32)
    assert num_depending_on_order(Scores(scores)) == 2
    # The fine stage decides the first tie, and says the same of both in the last one.
    best = [np.array([0, 1]), np.array([0, 1]), np.array([1, 2])]
    readings = [[Reading(1.0), Reading(2.0)], [Reading(0.0), Reading(0.0)]]
    readings.append([Reading(1.0), Reading(1.0)])
    assert (
        num_depending_on_order(Scores(scores).scored(best, readings, Scores(scores).profile)) == 1
    )


def first_by_order(scores: Scores, order: list[int]) -> int:
    """Column of the first item where the items stand in this order, by sorting all of it."""
    assert scores.readings is not None
    turned = Scores(
        scores.coarse[:1, order],
        [{order.index(i): one for i, one in scores.readings[0].items()}],
        scores.profile,
        coarse_weight=scores.coarse_weight,
    )
    ranking = placed(turned, np.argsort(-turned.coarse, axis=1, kind="stable"))
    return order[int(ranking[0, 0])]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_dependence_on_the_order_is_that_of_ranking_the_items_in_both_orders(
    seed: int, weight: float
) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.choice([-np.inf, 0.1, 0.2], (1, 5), p=[0.2, 0.4, 0.4]).astype(np.float32)
    coarse[0, rng.integers(5)] = 0.2
    chosen = [i for i in np.flatnonzero(np.isfinite(coarse[0])).tolist() if rng.random() < 0.6]
    readings = {i: Reading(float(rng.choice([0.0, 1.0]))) for i in chosen}
    scores = Scores(coarse, [readings], coarse_weight=weight)
    forward, backward = [*range(5)], [*range(5)][::-1]
    differs = first_by_order(scores, forward) != first_by_order(scores, backward)
    assert num_depending_on_order(scores) == differs
    unread = Scores(coarse)
    best = np.flatnonzero(coarse[0] == coarse[0].max())
    assert num_depending_on_order(unread) == (len(best) > 1)


def test_a_query_that_has_no_item_depends_on_no_order() -> None:
    assert num_depending_on_order(Scores(np.full((1, 3), -np.inf, np.float32))) == 0


def test_a_group_mean_counts_each_kind_once_and_needs_all_of_them() -> None:
    report = {"a": {"num_queries": 90, "hit@1": 1.0}, "b": {"num_queries": 10, "hit@1": 0.0}}
    assert group_means({"both": ("a", "b"), "more": ("a", "c")}, report) == {"both": {"hit@1": 0.5}}


def test_equal_items_count_together_only_where_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    items = [*texts("a", "b"), {"id": "twin of a", "text": "text of a"}]
    given: dict[str, Any] = {"items": items, "queries": texts("q", "r")}
    given["relevance"] = [("q", "twin of a"), ("r", "b")]
    with caplog.at_level(logging.INFO):
        apart = load_benchmark(data(tmp_path, **given))
    assert "1 items have the content of another one; eval.same_images: apart" in caplog.text
    assert apart.relevant.tolist() == [[False, False, True], [False, True, False]]
    together = load_benchmark(data(tmp_path, **given, same_images="together"))
    assert together.relevant.tolist() == [[True, False, True], [False, True, False]]


def test_grades_are_kept_as_they_are_and_equal_items_have_the_highest(tmp_path: Path) -> None:
    twins = [{"id": name, "text": "text of a"} for name in ("a", "copy", "copy2")]
    grades = {("q", "copy"): 3.0, ("q", "a"): 0.5, ("q", "b"): 0.25, ("r", "b"): 1.0}
    given: dict[str, Any] = {
        "items": [*twins, *texts("b", "c")],
        "queries": texts("q", "r"),
        "relevance": [*grades],
        "grades": grades,
    }
    apart = load_benchmark(data(tmp_path, **given))
    assert apart.graded.tolist() == [[0.5, 3, 0, 0.25, 0], [0, 0, 0, 1, 0]]
    together = load_benchmark(data(tmp_path, **given, same_images="together"))
    assert together.graded.tolist() == [[3, 3, 3, 0.25, 0], [0, 0, 0, 1, 0]]
    assert together.relevant.tolist() == (together.graded > 0).tolist()


def test_a_grade_of_nothing_is_irrelevant_and_its_copies_are(tmp_path: Path) -> None:
    grades = {("q", "a"): 0.0, ("q", "b"): 1.0}
    items = [*texts("a", "b"), {"id": "copy", "text": "text of a"}]
    found = load_benchmark(
        data(
            tmp_path,
            items=items,
            queries=texts("q"),
            relevance=[*grades],
            grades=grades,
            same_images="together",
        )
    )
    assert found.relevant.tolist() == [[False, True, False]]
    assert not found.grades
