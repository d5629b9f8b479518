"""Ranks from blocks of scores equal those from the whole matrix, whatever the blocks, ties and candidates."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slq.errors import DataError
from slq.metrics import Ranks, Relevance, blockwise_ranks, ranks_of_scores

QUERIES, ITEMS, DIMENSION = 37, 53, 8


def whole_numbers(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Vectors whose products are exact in float32, so that ties are ties in any order of summing."""
    return rng.integers(-1, 2, (rows, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module")
def case() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Vectors with many equal products, and up to seven relevant items of grades 1 to 3; two queries have none."""
    rng = np.random.default_rng(8)
    grades = np.zeros((QUERIES, ITEMS), np.int64)
    for q in range(2, QUERIES):
        grades[q, rng.choice(ITEMS, 1 + q % 7, replace=False)] = rng.integers(1, 4, 1 + q % 7)
    return whole_numbers(rng, QUERIES), whole_numbers(rng, ITEMS), grades


def require_same(found: Ranks, wanted: Ranks) -> None:
    assert found.num_queries == wanted.num_queries
    for name in ("query", "rank", "grade"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def counted(scores: NDArray[np.float32], grades: NDArray[np.int64], q: int, i: int) -> int:
    """The rank of a relevant item, by its definition."""
    rank = 1
    for j in range(len(scores[q])):
        if j == i:
            continue
        is_better = scores[q, j] > scores[q, i]
        is_equal = scores[q, j] == scores[q, i]
        comes_first = (grades[q, j], j) < (grades[q, i], i)
        rank += bool(is_better or (is_equal and comes_first))
    return rank


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
@pytest.mark.parametrize(
    ("query_block", "item_block"), [(1, 1), (5, 7), (37, 53), (100, 100), (16, 9)]
)
def test_blocks_give_the_ranks_of_the_whole_matrix(
    case: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]],
    query_block: int,
    item_block: int,
    kept_bytes: int,
) -> None:
    queries, items, grades = case
    found = blockwise_ranks(
        torch.from_numpy(queries),
        torch.from_numpy(items),
        Relevance.of_matrix(grades),
        query_block=query_block,
        item_block=item_block,
        kept_bytes=kept_bytes,
    )
    scores = queries @ items.T
    require_same(found, ranks_of_scores(scores, grades))
    wanted = [
        sorted(counted(scores, grades, q, i) for i in np.flatnonzero(grades[q]))
        for q in range(QUERIES)
    ]
    assert found.rank.tolist() == [rank for ranks in wanted for rank in ranks]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_only_candidates_are_counted(
    case: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], as_tensor: bool
) -> None:
    queries, items, grades = case
    mask = np.random.default_rng(9).random((QUERIES, ITEMS)) < 0.5
    mask[5] = False  # a query without any
    given = torch.from_numpy(mask) if as_tensor else mask
    for kept_bytes in (0, 2**20):
        found = blockwise_ranks(
            torch.from_numpy(queries),
            torch.from_numpy(items),
            Relevance.of_matrix(grades),
            allowed=lambda rows, columns: given[rows, columns],
            query_block=10,
            item_block=11,
            kept_bytes=kept_bytes,
        )
        require_same(found, ranks_of_scores(queries @ items.T, grades, mask))
    assert (found.rank == 0).any()


def test_scores_that_are_no_numbers_are_the_worst_and_equal() -> None:
    rng = np.random.default_rng(10)
    queries, items = whole_numbers(rng, 6), whole_numbers(rng, 20)
    items[::3] = np.nan
    items[1, :] = np.where(np.arange(DIMENSION) == 0, -np.inf, 0.0)
    grades = (rng.random((6, 20)) < 0.3).astype(np.int64)
    found = blockwise_ranks(
        torch.from_numpy(queries),
        torch.from_numpy(items),
        Relevance.of_matrix(grades),
        item_block=7,
    )
    with np.errstate(invalid="ignore"):
        require_same(found, ranks_of_scores(queries @ items.T, grades))


def test_copies_of_a_relevant_item_stand_before_it_in_any_float_type() -> None:
    """Rounded products of equal vectors are equal, as own scores come from the product that they are compared in."""
    generator = torch.Generator().manual_seed(11)
    queries = torch.randn(9, 64, generator=generator)
    items = torch.randn(30, 64, generator=generator)
    items[10:20] = items[:10]  # each of the first ten has a copy
    grades = torch.eye(9, 30).numpy()
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        found = blockwise_ranks(
            queries.to(kind), items.to(kind), Relevance.of_matrix(grades), item_block=30
        )
        scores = (queries.to(kind) @ items.to(kind).T).double()
        wanted = [
            1 + int((scores[q] > scores[q, q]).sum() + (scores[q] == scores[q, q]).sum() - 1)
            for q in range(9)
        ]
        assert found.rank.tolist() == wanted
        assert min(wanted) >= 2


def test_what_does_not_fit_is_refused_in_words() -> None:
    vectors, none = torch.zeros(2, 3), Relevance.of_matrix(np.ones((2, 2)))
    with pytest.raises(DataError, match=r"queries \(2, 3\) and items \(2, 4\) must be rows"):
        blockwise_ranks(vectors, torch.zeros(2, 4), none)
    with pytest.raises(DataError, match="relevance speaks of 2 queries and 2 items, and there are"):
        blockwise_ranks(vectors, torch.zeros(5, 3), none)
    with pytest.raises(DataError, match="blocks of 0 queries and 8192 items: both must be 1"):
        blockwise_ranks(vectors, vectors, none, query_block=0)
    with pytest.raises(DataError, match=r"allowed gave \(2, 1\) of torch.bool for a block of"):
        blockwise_ranks(vectors, vectors, none, allowed=lambda q, i: torch.ones(2, 1) > 0)
    with pytest.raises(DataError, match=r"allowed gave .* of torch\.int64"):
        blockwise_ranks(
            vectors, vectors, none, allowed=lambda q, i: torch.ones(2, 2, dtype=torch.int64)
        )
