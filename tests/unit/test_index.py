"""What an index finds, against brute force: all kinds of codes, filters, exclusions, duplicates, neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slq.errors import ConfigError, DataError
from slq.index import (
    Content,
    IndexConfig,
    VectorIndex,
    append,
    build,
    codes,
    delete,
    segment,
    write_version,
)
from slq.index.contract import MAX_EXCLUDED
from tests.unit.index_data import (
    COUNT,
    DIMENSION,
    FLAT,
    IVF,
    Given,
    brute_force,
    published,
    small_partitions,
    stored,
    table,
    unit_vectors,
)

ALL = np.arange(COUNT)
QUERIES = unit_vectors(20, seed=1)
EXACT = [FLAT, IVF, IVF.model_copy(update={"quantizer": "hnsw", "rotation": "random"})]
CODED = [
    IVF.model_copy(update={"codes": codes, "rotation": rotation, "oversample": 40.0})
    for codes, rotation in [
        ("float16", "none"),
        ("int8", "random"),
        ("int4", "none"),
        ("rabitq", "random"),
        ("pq4", "none"),
    ]
]


def rows_of(hits: Any) -> list[list[int]]:
    return [[hit.row for hit in one] for one in hits]


@pytest.mark.parametrize("config", [*EXACT, *CODED], ids=lambda one: f"{one.kind}-{one.codes}")
@pytest.mark.parametrize("files", [1, 4])
def test_what_is_found_does_not_depend_on_what_memory_held_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: IndexConfig, files: int
) -> None:
    index = published(tmp_path, small_partitions(config, COUNT // files))
    asked: list[dict[str, Any]] = [{}, {"where": "price < 8"}]
    expected = [[index.search(QUERIES, k, **how) for how in asked] for k in (1, 10, 30)]
    empty = np.empty

    def used_before(shape: Any, dtype: Any = np.float64, **options: Any) -> Any:
        array = empty(shape, dtype, **options)
        if array.dtype == np.float32:
            array[...] = np.finfo(np.float32).max
        return array

    monkeypatch.setattr(np, "empty", used_before)
    assert [[index.search(QUERIES, k, **how) for how in asked] for k in (1, 10, 30)] == expected


def test_rescoring_gives_the_same_in_any_number_of_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = published(tmp_path, CODED[3])
    expected = index.search(QUERIES, 10)
    for at_once in (1, 300, 100_000):
        monkeypatch.setattr(segment, "_RESCORED_AT_ONCE", at_once)
        for count in (1, 2, 5):
            with codes.threads(count):
                assert index.search(QUERIES, 10) == expected


def test_a_failure_in_a_thread_is_raised() -> None:
    def fail(number: int) -> None:
        raise DataError(f"number {number}")

    for count in (1, 3):
        with codes.threads(count), pytest.raises(DataError, match="number 0"):
            codes.for_each(fail, range(4))


@pytest.mark.parametrize("config", EXACT, ids=["flat", "ivf", "hnsw"])
def test_search_equals_brute_force(tmp_path: Path, config: IndexConfig) -> None:
    index = published(tmp_path, config)
    found = index.search(QUERIES, 10)
    assert rows_of(found) == brute_force(QUERIES, 10, ALL)
    similarity = QUERIES.astype(np.float64) @ stored().T
    for hits, row in zip(found, similarity, strict=True):
        assert [hit.id for hit in hits] == [f"item-{hit.row}" for hit in hits]
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row)[:-11:-1], atol=1e-6)


@pytest.mark.parametrize("config", CODED, ids=[one.codes for one in CODED])
def test_codes_are_scored_again_from_the_vectors(tmp_path: Path, config: IndexConfig) -> None:
    """With every list visited and every row scored again, the smallest codes find what brute force finds."""
    index = published(tmp_path, config)
    found = index.search(QUERIES, 10)
    similarity = QUERIES.astype(np.float64) @ stored().T
    atol = 1e-3 if config.codes == "float16" else 1e-6  # its scores are its codes'
    for query, hits in enumerate(found):
        rows = [hit.row for hit in hits]
        np.testing.assert_allclose([hit.score for hit in hits], similarity[query, rows], atol=atol)
    if config.codes != "float16":
        assert rows_of(found) == brute_force(QUERIES, 10, ALL)
    assert rows_of(index.search(QUERIES, 10, exact=True)) == brute_force(QUERIES, 10, ALL)


def test_fewer_candidates_scored_again_find_less(tmp_path: Path) -> None:
    """So `oversample` is what decides."""
    recall = []
    for oversample in (1.0, 40.0):
        config = CODED[-1].model_copy(update={"oversample": oversample})
        found = rows_of(published(tmp_path / str(oversample), config).search(QUERIES, 10))
        truth = brute_force(QUERIES, 10, ALL)
        recall.append(np.mean([len({*a} & {*b}) for a, b in zip(found, truth, strict=True)]))
    assert recall[0] < 8 < recall[1] == 10


def test_queries_of_an_index_of_cut_vectors_are_cut_too(tmp_path: Path) -> None:
    index = published(tmp_path)
    longer = np.concatenate([QUERIES, QUERIES[:, :5]], axis=1)
    assert rows_of(index.search(longer, 5)) == rows_of(index.search(QUERIES, 5))
    np.testing.assert_allclose(
        [hit.score for hit in index.search(longer, 5)[0]],
        [hit.score for hit in index.search(QUERIES, 5)[0]],
        atol=1e-6,
    )
    with pytest.raises(DataError, match="vectors of 31 values cannot be cut to 32"):
        index.search(QUERIES[:, :31], 3)


@pytest.mark.parametrize("config", [FLAT, IVF, CODED[3], CODED[4]])
@pytest.mark.parametrize("is_narrow", [True, False])
def test_a_filter_finds_the_best_of_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: IndexConfig, is_narrow: bool
) -> None:
    """Few rows are compared one by one, many are found by their codes: with the same result."""
    monkeypatch.setattr(segment, "_FEW_ROWS", COUNT if is_narrow else 0)
    index = published(tmp_path, config)
    found = index.search(QUERIES, 10, where="price < 3 AND text <> 't0'")
    allowed = ALL[(ALL % 10 < 3) & (ALL > 0)]
    assert rows_of(found) == brute_force(QUERIES, 10, allowed)


def test_a_filter_for_which_the_visited_lists_hold_too_little_still_fills_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_FEW_ROWS", 0)
    index = published(tmp_path, IVF.model_copy(update={"num_probes": 1}))
    found = index.search(QUERIES, 10, where="price = 3")
    assert all(len(hits) == 10 for hits in found)
    assert [
        hit.row for hits in index.search(QUERIES, 1, where="id = 'item-77'") for hit in hits
    ] == ([77] * len(QUERIES))
    assert index.search(QUERIES, 10, where="price > 90") == [[]] * len(QUERIES)


def test_excluded_items_leave_their_places_to_others(tmp_path: Path) -> None:
    index = published(tmp_path)
    first = rows_of(index.search(QUERIES[:1], 3))[0]
    hidden = [f"item-{row}" for row in first]
    assert rows_of(index.search(QUERIES[:1], 10, exclude=hidden)) == brute_force(
        QUERIES[:1], 10, np.setdiff1d(ALL, first)
    )
    with pytest.raises(DataError, match=r"10001 ids are excluded; 10000 are allowed"):
        index.search(QUERIES, 3, exclude=[str(n) for n in range(MAX_EXCLUDED + 1)])


def test_of_items_with_the_same_content_only_the_best_is_found(tmp_path: Path) -> None:
    index = published(tmp_path)
    (hits,) = index.search(QUERIES[:1], 50, distinct=True)
    (ranking,) = brute_force(QUERIES[:1], COUNT, ALL)
    seen: set[int] = set()
    expected = [row for row in ranking if not (row // 2 in seen or seen.add(row // 2))]
    assert [hit.row for hit in hits] == expected[:50]
    assert len(index.search(QUERIES[:1], COUNT, distinct=True)[0]) == COUNT // 2


def test_more_like_an_item_are_its_neighbours_without_itself(tmp_path: Path) -> None:
    index = published(tmp_path)
    found = index.more_like("item-7", 5)
    query = stored()[7:8].astype(np.float32)
    assert [hit.row for hit in found] == brute_force(query, 5, np.setdiff1d(ALL, [7]))[0]
    assert [hit.row for hit in index.more_like("item-7", 5, exclude=[found[0].id])] == (
        brute_force(query, 5, np.setdiff1d(ALL, [7, found[0].row]))[0]
    )
    with pytest.raises(DataError, match="the index holds no item 'item-9999'"):
        index.more_like("item-9999", 5)


def test_items_are_found_by_id_and_by_row(tmp_path: Path) -> None:
    index = published(tmp_path)
    assert [index.find(f"item-{n}") for n in range(COUNT)] == list(range(COUNT))
    assert [index.find(name) for name in ("", "item", "item-", "item-400", "zz", "ä")] == [None] * 6
    assert index.row(17) == {"id": "item-17", "text": "t17", "price": 7, "content_hash": "8"}
    np.testing.assert_allclose(index.vectors_of(["item-3", "item-1"]), stored()[[3, 1]], atol=1e-6)
    assert index.vectors_of([]).shape == (0, DIMENSION)


def test_more_results_than_vectors_gives_every_vector_once(tmp_path: Path) -> None:
    for number, config in enumerate((FLAT, IVF, CODED[3])):
        index = published(tmp_path / str(number), config)
        (found,) = index.search(QUERIES[:1], 10**9)
        assert sorted(hit.row for hit in found) == list(range(COUNT))
        assert len(index) == COUNT


def test_the_probes_of_ivf_survive_publishing_and_can_be_set_anew(tmp_path: Path) -> None:
    few = published(tmp_path, IVF.model_copy(update={"num_probes": 1}))
    assert all(0 < len(hits) < COUNT for hits in few.search(QUERIES, COUNT))
    many = VectorIndex(tmp_path, num_probes=8)
    assert all(len(hits) == COUNT for hits in many.search(QUERIES, COUNT))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_queries_and_vectors_without_direction_are_refused(tmp_path: Path, bad: float) -> None:
    index = published(tmp_path / "index")
    queries = QUERIES.copy()
    queries[3] = bad
    with pytest.raises(DataError, match="the vector of row 3 is not finite or is zero"):
        index.search(queries, 3)
    with pytest.raises(DataError, match=r"queries have the shape \(32,\)"):
        index.search(QUERIES[0], 3)
    rows = table(10)
    vectors = unit_vectors(10).astype(np.float16)
    vectors[8] = bad
    from slq.arrow import vector_column

    damaged = rows.set_column(1, "embedding", vector_column(vectors))
    with pytest.raises(DataError, match="the vector of row 8 is not finite or is zero"):
        write_version(tmp_path / "bad", Content([Given(damaged)], DIMENSION, "3f2a"), FLAT)
    assert not list((tmp_path / "bad" / "segments").iterdir())


def test_a_build_in_memory_has_explicit_ids_and_is_the_same_bytes_twice() -> None:
    import faiss

    vectors = unit_vectors(COUNT)
    for config in (FLAT, IVF, CODED[3]):
        blobs = [faiss.serialize_index(build(config, vectors)).tobytes() for _ in range(2)]
        assert blobs[0] == blobs[1]
    _, ids = build(IVF, vectors).search(vectors, 1)
    assert ids[:, 0].tolist() == list(range(COUNT))


def test_more_lists_than_vectors_is_a_config_error(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf")
    with pytest.raises(ConfigError, match="num_lists is 64, but there are only 10 vectors"):
        build(config, unit_vectors(10))
    with pytest.raises(ConfigError, match="num_lists is 64, but there are only 10 vectors"):
        published(tmp_path, config, count=10)


def test_hits_of_several_segments_are_one_ranking(tmp_path: Path) -> None:
    published(tmp_path, IVF)
    append(tmp_path, Content([Given(table(100, seed=5, first=COUNT))], DIMENSION, "3f2a"))
    delete(tmp_path, ["item-3", f"item-{COUNT + 3}"])
    index = VectorIndex(tmp_path)
    everything = np.concatenate([stored(), stored(100, seed=5)])
    alive = np.setdiff1d(np.arange(COUNT + 100), [3, COUNT + 3])
    similarity = QUERIES.astype(np.float64) @ everything[alive].T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    assert rows_of(index.search(QUERIES, 10)) == [alive[one].tolist() for one in order]
    assert (index.find(f"item-{COUNT + 7}"), index.find("item-3")) == (COUNT + 7, None)
    assert index.row(COUNT + 7)["id"] == f"item-{COUNT + 7}"
    assert len(index) == COUNT + 98


def test_widening_is_what_numpy_does() -> None:
    from slq.index.codes import widened

    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = values[np.isfinite(values)][: 63 * 1024].reshape(-1, 32)
    np.testing.assert_array_equal(widened(finite), finite.astype(np.float32))
