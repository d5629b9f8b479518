"""Cells of a sweep against straight computations: cut, store, compare with everything, sort, count."""

import math

import numpy as np
import pytest

from slq.errors import ConfigError
from slq.index import IndexConfig
from slq.metrics import bootstrap_interval
from slq.quantization import calibrate, to_bits, to_int8
from slq.reranking.profiles import Reading
from slq.sweeps import (
    Cell,
    CellIndex,
    Found,
    SweepConfig,
    cells_of,
    front,
    quality_of,
    ranked_again,
    require_buildable,
)
from slq.sweeps.precision import Precision, stored_bytes, stored_values
from slq.sweeps.quality import kept_of

RNG = np.random.default_rng(11)
ITEMS, QUERIES, DIMENSION, PLACES = 300, 40, 24, 21
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "binary")
EVERY_LIST = IndexConfig(kind="ivf", num_lists=5, num_probes=5)


def unit(count: int, dimension: int = DIMENSION) -> np.ndarray:
    vectors = RNG.normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near(precision: Precision) -> float:
    """What scores may differ by: a value that lies between two of float16 may be rounded to either."""
    return 2e-4 if precision == "float16" else 2e-5


GALLERY = unit(ITEMS)
ASKED = GALLERY[:QUERIES] + 0.8 * unit(QUERIES)
ASKED /= np.linalg.norm(ASKED, axis=1, keepdims=True)


def straight(dimension: int, precision: Precision) -> np.ndarray:
    """(queries, items) scores, written out: no index, no function of the sweep."""
    gallery, queries = (values[:, :dimension].astype(np.float64) for values in (GALLERY, ASKED))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    if precision == "float32":
        return queries @ gallery.T
    if precision == "float16":
        return queries.astype(np.float16).astype(float) @ gallery.astype(np.float16).astype(float).T
    if precision == "int8":
        step = np.quantile(np.abs(gallery), 0.9999) / 127
        codes = [np.clip(np.rint(values / step), -127, 127) for values in (queries, gallery)]
        return codes[0] @ codes[1].T * step**2
    medians = np.median(gallery, axis=0)
    scores = np.zeros((QUERIES, ITEMS))
    for q, query in enumerate(queries):
        for i, item in enumerate(gallery):
            same = sum((a > m) == (b > m) for a, b, m in zip(query, item, medians, strict=True))
            scores[q, i] = (2 * same - dimension) / dimension
    return scores


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dimension", [24, 12, 10])
def test_a_flat_cell_scores_as_a_straight_computation(dimension: int, precision: Precision) -> None:
    index = CellIndex(Cell(dimension, precision, "flat"), GALLERY, IndexConfig())
    scores, rows = index.search(ASKED, PLACES)
    expected = straight(dimension, precision)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(
        scores, -np.sort(-expected, axis=1)[:, :PLACES], atol=near(precision)
    )
    np.testing.assert_allclose(
        scores, np.take_along_axis(expected, rows, axis=1), atol=near(precision)
    )
    sizes = {
        "float32": 4 * dimension,
        "float16": 2 * dimension,
        "int8": dimension,
        "binary": math.ceil(dimension / 8),
    }
    assert index.bytes_per_vector == sizes[precision] == stored_bytes(precision, dimension)
    assert index.index_bytes == ITEMS * sizes[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lists_of_which_all_are_visited_find_what_a_flat_cell_finds(precision: Precision) -> None:
    lists = CellIndex(Cell(12, precision, "float32"), GALLERY, EVERY_LIST)
    scores, rows = lists.search(ASKED, PLACES)
    expected = straight(12, precision)
    np.testing.assert_allclose(
        scores, -np.sort(-expected, axis=1)[:, :PLACES], atol=near(precision)
    )
    np.testing.assert_allclose(
        scores, np.take_along_axis(expected, rows, axis=1), atol=near(precision)
    )
    assert lists.bytes_per_vector == 4 * 12 + 8
    assert lists.index_bytes > ITEMS * lists.bytes_per_vector
    assert lists.rescored_bytes == 0


@pytest.mark.parametrize("index", ["int8", "int4", "rabitq", "pq4"])
def test_coarse_codes_are_scored_again_from_what_the_precision_stores(index: str) -> None:
    cell = Cell(24, "int8", index)  # type: ignore[arg-type]
    base = EVERY_LIST.model_copy(update={"oversample": 10.0, "rotation": "random"})
    found = CellIndex(cell, GALLERY, base)
    scores, rows = found.search(ASKED, 10)
    expected = straight(24, "int8")
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), atol=2e-5)
    truth = np.argsort(-expected, axis=1)[:, :10]
    share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), truth, strict=True)])
    assert share > 0.8
    assert found.rescored_bytes == ITEMS * 24


def test_candidates_beyond_the_items_of_the_visited_lists_fill_up_with_nothing() -> None:
    base = IndexConfig(kind="ivf", num_lists=60, num_probes=1, oversample=4.0)
    scores, rows = CellIndex(Cell(24, "float32", "int8"), GALLERY, base).search(ASKED, 50)
    assert (rows == -1).any()
    assert np.isneginf(scores[rows == -1]).all()
    assert np.isfinite(scores[rows != -1]).all()


def test_a_search_for_more_than_there_is_gives_all() -> None:
    few = GALLERY[:4]
    scores, rows = CellIndex(Cell(24, "binary", "flat"), few, IndexConfig()).search(ASKED, 10)
    assert scores.shape == rows.shape == (QUERIES, 4)
    assert (np.sort(rows, axis=1) == np.arange(4)).all()


def test_what_is_stored_is_within_half_a_step() -> None:
    calibration = calibrate(GALLERY)
    assert stored_values(GALLERY, "float32", calibration) is GALLERY
    half = stored_values(GALLERY, "float16", calibration)
    assert np.abs(half - GALLERY).max() <= 2**-12
    codes = to_int8(GALLERY, calibration)
    np.testing.assert_allclose(
        stored_values(GALLERY, "int8", calibration), codes * calibration.scale, rtol=1e-6
    )
    above = calibration.thresholds < GALLERY
    stored = stored_values(GALLERY, "binary", calibration)
    assert ((stored > 0) == above).all()
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, rtol=1e-6)
    assert to_bits(GALLERY, calibration).shape[1] == stored_bytes("binary", DIMENSION)


def pessimistic_rank(scores: np.ndarray, right: int) -> int:
    """Of one item, from 1; whatever has the same score comes first."""
    return int((scores >= scores[right]).sum())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quality_equals_counting_pessimistic_ranks(precision: Precision) -> None:
    relevant = np.zeros((QUERIES, ITEMS), bool)
    relevant[np.arange(QUERIES), np.arange(QUERIES)] = True
    index = CellIndex(Cell(12, precision, "flat"), GALLERY, IndexConfig())
    found = Found(*index.search(ASKED, PLACES), ITEMS)
    _, right = found.pessimistic(relevant)
    full = straight(12, precision).round(5)  # binary scores tie exactly
    ranks = [pessimistic_rank(full[q], q) for q in range(QUERIES)]
    exact = np.argsort(-straight(24, "float32"), axis=1)[:, :10]
    report = quality_of(right, kept_of(found, exact))
    for k in (1, 5, 10):
        values = np.array([rank <= k for rank in ranks], float)
        assert report[f"hit@{k}"] == pytest.approx(values.mean())
        assert report[f"hit@{k}_interval"] == pytest.approx(bootstrap_interval(values))
    kept = [len({*a[:10]} & {*b}) / 10 for a, b in zip(found.rows.tolist(), exact, strict=True)]
    assert report["recall@10"] == pytest.approx(np.mean(kept))
    some = np.arange(QUERIES) < 7
    assert quality_of(right, kept_of(found, exact), some)["num_queries"] == 7
    assert quality_of(right, kept_of(found, exact), some)["hit@5"] == pytest.approx(
        np.mean([rank <= 5 for rank in ranks[:7]])
    )


def test_a_right_item_that_ties_with_the_last_place_counts_as_missed() -> None:
    scores, rows = np.array([[0.9, 0.5, 0.5]], np.float32), np.array([[0, 1, 2]])
    relevant = np.array([[False, True, False, False]])
    assert not Found(scores, rows, 4).pessimistic(relevant)[1].any()
    found, right = Found(scores, rows, 3).pessimistic(relevant[:, :3])  # here all are known
    assert right.tolist() == [[False, False, True]]
    assert found.rows.tolist() == [[0, 2, 1]]


def test_the_fine_stage_orders_the_first_candidates_by_margin_and_leaves_the_rest() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
    found = Found(scores, np.array([[3, 1, 4, 0, 2]]), 9)
    right = np.array([[False, False, True, False, True]])
    readings = [{3: Reading(-2.0), 1: Reading(0.5), 4: Reading(3.0), 0: Reading(9.0)}]
    assert ranked_again(found, right, readings, 0).tolist() == right.tolist()
    assert ranked_again(found, right, readings, 2).tolist() == right.tolist()
    assert ranked_again(found, right, readings, 3)[0].tolist() == [True, False, False, False, True]
    assert ranked_again(found, right, readings, 4)[0].tolist() == [False, True, False, False, True]
    unread = [{3: Reading(-2.0), 4: Reading(3.0)}]  # of item 1 the model gave no number: it stays
    assert ranked_again(found, right, unread, 3)[0].tolist() == [True, False, False, False, True]


def test_a_front_is_what_no_other_choice_beats() -> None:
    costs, values = [1.0, 2.0, 3.0, 3.0, 0.5], [0.3, 0.9, 0.8, 0.9, 0.3]
    assert front(costs, values) == [False, True, False, False, True]
    many = RNG.integers(0, 6, size=(60, 2)).astype(float)
    expected = [
        all(c > a or v < b or (c, v) == (a, b) for c, v in many.tolist()) for a, b in many.tolist()
    ]
    assert front(many[:, 0].tolist(), many[:, 1].tolist()) == expected


def test_cells_are_every_combination_in_order() -> None:
    config = SweepConfig(dimensions=(12, 24), precisions=("int8", "binary"), indexes=("flat",))
    names = [cell.name for cell in cells_of(config, 24)]
    assert names == ["12 int8 flat", "12 binary flat", "24 int8 flat", "24 binary flat"]
    whole = cells_of(SweepConfig(precisions=("float32",)), 24)
    assert [cell.name for cell in whole] == ["24 float32 flat", "24 float32 rabitq"]


@pytest.mark.parametrize(
    ("sweep", "base", "message"),
    [
        ({"dimensions": (12, 25)}, {}, r"cell '25 float32 flat' cannot be built: .* 24 values"),
        (
            {"indexes": ("flat", "int8")},
            {"num_lists": 301},
            r"cell '24 float32 int8' cannot be built: index.num_lists is 301, .* only 300 vectors",
        ),
        ({"dimensions": (9,), "indexes": ("pq4",)}, {}, "'9 float32 pq4' cannot be built: .* cut"),
        ({"depths": (0, 301)}, {}, "depth 301 cannot be re-ranked: there are 300 items"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    sweep: dict[str, object], base: dict[str, object], message: str
) -> None:
    config = SweepConfig.model_validate(sweep)
    with pytest.raises(ConfigError, match=message):
        require_buildable(
            cells_of(config, DIMENSION),
            config,
            IndexConfig.model_validate({"num_lists": 5, **base}),
            dimension=DIMENSION,
            count=ITEMS,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precisions": ["float8"]}, "precisions"),
        ({"indexes": ["hnsw"]}, "indexes"),
        ({"dimensions": [12, 12]}, r"\[12, 12\] must be different"),
        ({"depths": [-1]}, "depths"),
        ({"depths": []}, "depths"),
        ({"depth": [5]}, "did you mean depths"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepConfig.parse(values, source="a.yaml")
