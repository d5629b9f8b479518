"""Every index answers alike: files of ours, Lance, Milvus Lite and Qdrant, all against brute force."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index import Hit, SearchIndex
from slq.index.contract import MAX_EXCLUDED
from tests.unit.engine_data import ALL_KINDS, opened
from tests.unit.index_data import COUNT, DIMENSION, brute_force, stored, table, unit_vectors

QUERIES = unit_vectors(20, seed=1)
ALL = np.arange(COUNT)
ROUNDING = {"lance": 1e-3}  # it compares in float16
SIMILARITY = QUERIES.astype(np.float64) @ stored().T


@pytest.fixture(scope="module", params=ALL_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def index(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchIndex]:
    with opened(kind, tmp_path_factory.mktemp(kind)) as found:
        yield found


def numbers(hits: list[Hit]) -> list[int]:
    return [int(hit.id.removeprefix("item-")) for hit in hits]


def require_best(
    found: list[list[Hit]], rows: NDArray[np.int64], kind: str, top_k: int = 10
) -> None:
    """The best of these rows, but for neighbours that are as near as an engine can tell."""
    atol = ROUNDING.get(kind, 1e-5)
    for query, expected in enumerate(brute_force(QUERIES[: len(found)], top_k, rows)):
        given = numbers(found[query])
        assert len(given) == len(set(given)) == len(expected)
        assert set(given) <= set(rows.tolist())
        scores = [hit.score for hit in found[query]]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, SIMILARITY[query, given], atol=atol)
        np.testing.assert_allclose(scores, SIMILARITY[query, expected], atol=atol)
        if kind not in ROUNDING:
            assert given == expected


def test_it_says_what_it_holds(index: SearchIndex) -> None:
    assert (index.fingerprint, index.dimension, len(index)) == ("3f2a", DIMENSION, COUNT)
    assert index.version


def test_the_best_are_found_with_their_columns(index: SearchIndex, kind: str) -> None:
    found = index.search(QUERIES, 10)
    require_best(found, ALL, kind)
    rows = table().drop_columns(["embedding"]).to_pylist()
    for hits in found:
        assert index.columns_of(hits) == [rows[number] for number in numbers(hits)]
    assert index.columns_of([]) == []


def test_a_batch_finds_what_its_queries_find_alone(index: SearchIndex) -> None:
    for query, together in zip(QUERIES, index.search(QUERIES, 5), strict=True):
        (alone,) = index.search(query[None], 5)
        assert [hit.id for hit in alone] == [hit.id for hit in together]
        np.testing.assert_allclose([h.score for h in alone], [h.score for h in together], atol=1e-6)
    assert index.search(QUERIES[:0], 5) == []


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("price < 3 AND text <> 't0'", (ALL % 10 < 3) & (ALL > 0)),
        ("not (price between 2 and 8 or id in ('item-0', 'item-1'))", (ALL % 10 > 8) | (ALL % 10 < 2)),
        ("price = 3 or Price = 4.0", (ALL % 10 == 3) | (ALL % 10 == 4)),
        ("id = 'item-77'", ALL == 77),
        ("text is not null and content_hash not in ('0', '1')", ALL > 3),
    ],
)  # fmt: skip
def test_a_filter_finds_the_best_of_what_it_leaves(
    index: SearchIndex, kind: str, where: str, allowed: NDArray[np.bool_]
) -> None:
    rows = ALL[allowed & ~((ALL < 2) & where.startswith("not"))]
    require_best(index.search(QUERIES, 10, where=where), rows, kind)


def test_a_filter_that_leaves_nothing_finds_nothing(index: SearchIndex) -> None:
    assert index.search(QUERIES[:2], 10, where="price > 90") == [[], []]
    assert index.search(QUERIES[:2], 10, where="text is null", exclude=["item-1"]) == [[], []]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("prize < 3", "prize"),
        ("price <", "cannot be used"),
        ("", "cannot be used"),
    ],
)
def test_a_filter_that_is_none_is_refused_with_the_columns(
    index: SearchIndex, where: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        index.search(QUERIES[:1], 3, where=where)
    assert "columns are id, text, price, content_hash" in str(caught.value)


def test_excluded_items_leave_their_places_to_others(index: SearchIndex, kind: str) -> None:
    first = brute_force(QUERIES[:1], 3, ALL)[0]
    hidden = [f"item-{row}" for row in first]
    rest = np.setdiff1d(ALL, first)
    require_best(index.search(QUERIES[:1], 10, exclude=hidden), rest, kind)
    both = index.search(QUERIES[:1], 10, exclude=[*hidden, 'it\'s "no" item'], where="price < 5")
    require_best(both, rest[rest % 10 < 5], kind)
    many = [f"item-{n}" for n in range(10, 10 + MAX_EXCLUDED)]
    require_best(index.search(QUERIES[:1], 20, exclude=many), ALL[:10], kind, 20)
    with pytest.raises(DataError, match=r"10001 ids are excluded; 10000 are allowed"):
        index.search(QUERIES, 3, exclude=[*many, "x"])


def test_of_items_with_the_same_content_only_the_best_is_found(index: SearchIndex) -> None:
    (hits,) = index.search(QUERIES[:1], 50, distinct=True)
    (ranking,) = brute_force(QUERIES[:1], COUNT, ALL)
    seen: set[int] = set()
    expected = [row for row in ranking if not (row // 2 in seen or seen.add(row // 2))][:50]
    np.testing.assert_allclose(SIMILARITY[0, numbers(hits)], SIMILARITY[0, expected], atol=1e-3)
    assert len({row // 2 for row in numbers(hits)}) == 50
    assert len(index.search(QUERIES[:1], COUNT, distinct=True)[0]) == COUNT // 2
    some = index.search(QUERIES[:1], 30, distinct=True, where="price < 4")[0]
    assert len({row // 2 for row in numbers(some)}) == 30


def test_more_like_an_item_are_its_neighbours_without_itself(index: SearchIndex) -> None:
    query = stored()[7:8].astype(np.float32)
    found = numbers(index.more_like("item-7", 5))
    assert found == brute_force(query, 5, np.setdiff1d(ALL, [7]))[0]
    without = index.more_like("item-7", 5, exclude=[f"item-{found[0]}"], where="price > 1")
    allowed = np.setdiff1d(ALL[ALL % 10 > 1], [7, found[0]])
    assert numbers(without) == brute_force(query, 5, allowed)[0]
    with pytest.raises(DataError, match="the index holds no item 'item-9999'"):
        index.more_like("item-9999", 5)


def test_items_and_vectors_are_found_by_id(index: SearchIndex) -> None:
    assert index.item("item-17") == {
        "id": "item-17", "text": "t17", "price": 7, "content_hash": "8",
    }  # fmt: skip
    for name in ("", "item", "item-400", "ä", "it's", 'a"b'):
        assert index.item(name) is None
    given = index.vectors_of(["item-3", "item-1", "item-3"])
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, stored()[[3, 1, 3]], atol=1e-6)
    assert index.vectors_of([]).shape == (0, DIMENSION)
    everything = index.vectors_of([f"item-{n}" for n in ALL])
    np.testing.assert_allclose(everything, stored(), atol=1e-6)


def test_more_results_than_items_gives_every_item_once(index: SearchIndex, kind: str) -> None:
    require_best(index.search(QUERIES[:3], 10**9), ALL, kind, COUNT)


def test_queries_are_cut_or_refused_by_length_and_direction(index: SearchIndex) -> None:
    longer = np.concatenate([QUERIES, QUERIES[:, :5]], axis=1)
    for cut, whole in zip(index.search(longer, 5), index.search(QUERIES, 5), strict=True):
        assert [hit.id for hit in cut] == [hit.id for hit in whole]
    with pytest.raises(DataError, match="vectors of 31 values cannot be cut to 32"):
        index.search(QUERIES[:, :31], 3)
    with pytest.raises(DataError, match=r"queries have the shape \(32,\)"):
        index.search(QUERIES[0], 3)
    for bad in (np.nan, np.inf, 0.0):
        queries = QUERIES.copy()
        queries[3] = bad
        with pytest.raises(DataError, match="the vector of row 3 is not finite or is zero"):
            index.search(queries, 3)


def test_what_an_engine_cannot_do_names_what_can(index: SearchIndex, kind: str) -> None:
    require_best(index.search(QUERIES, 10, exact=True), ALL, kind)
    message = "index keeps no words" if kind == "faiss" else "index.engine=faiss with index.words"
    with pytest.raises(DataError, match=message):
        index.search(QUERIES[:1], 3, words=["a fox"])
    if kind == "qdrant":
        with pytest.raises(DataError, match=r"Qdrant has no patterns; index.engine faiss, lance"):
            index.search(QUERIES[:1], 3, where="text like 't1%'")
        with pytest.raises(DataError, match="Qdrant orders numbers, dates and times alone"):
            index.search(QUERIES[:1], 3, where="text < 't1'")
    else:
        found = index.search(QUERIES[:1], COUNT, where="text like 't1%' and text < 't11'")[0]
        assert {hit.id for hit in found} == {
            "item-1",
            "item-10",
            *(f"item-{n}" for n in range(100, 110)),
        }
