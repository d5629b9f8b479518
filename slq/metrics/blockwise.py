"""Ranks of relevant items without the matrix of scores: blocks of it, on the device of the vectors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slq.errors import DataError
from slq.metrics.ranks import Integers, Ranks, Relevance, within

Scored = Callable[[slice, slice], Tensor]
"""Given rows of queries and of items, gives the scores of one with the other: a block that may not be overwritten."""
Allowed = Callable[[slice, slice], Tensor | NDArray[np.bool_]]
"""Given rows of queries and of items, says which of those items are candidates for which query: a bool block."""


@dataclass(frozen=True)
class _Pairs:
    """The relevant pairs of a block of queries: row in the block, item, and number within the query.

    All are (pairs,) and, like what is found for them, on the CPU.
    """

    row: Tensor
    item: Tensor
    layer: Tensor

    def inside(self, columns: slice) -> Tensor:
        """(pairs,) whether the item is among these."""
        is_inside: Tensor = (self.item >= columns.start) & (self.item < columns.stop)
        return is_inside


def blockwise_ranks(
    queries: Tensor,
    items: Tensor,
    relevance: Relevance,
    *,
    allowed: Allowed | None = None,
    query_block: int = 1024,
    item_block: int = 8192,
    kept_bytes: int = 2**28,
) -> Ranks:
    """The ranks that `ranks_of_scores(queries @ items.T, ...)` would give, from blocks of that matrix.

    An item's own score comes from the same product as those that it is compared with, as two products may round
    differently, and then equal items would not be equal.

    Args:
        queries: (queries, dimension), on any device.
        items: (items, dimension), on the same device; scores are inner products in their type.
        relevance: Which items answer which query.
        allowed: Which items are candidates; all by default. Others have no rank, and take up none.
        query_block: Queries at once.
        item_block: Items at once.
        kept_bytes: Scores that may be kept beyond a block.

    Raises:
        DataError: The shapes do not fit, or a block is empty.
    """
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise DataError(
            f"queries {tuple(queries.shape)} and items {tuple(items.shape)} must be rows of vectors of one length"
        )
    if (relevance.num_queries, relevance.num_items) != (len(queries), len(items)):
        raise DataError(
            f"relevance speaks of {relevance.num_queries} queries and {relevance.num_items} items, and there are "
            f"vectors of {len(queries)} and {len(items)}"
        )
    return ranks_of_blocks(
        lambda rows, columns: queries[rows] @ items[columns].T,
        relevance,
        allowed=allowed,
        query_block=query_block,
        item_block=item_block,
        kept_bytes=kept_bytes,
    )


@torch.no_grad()
def ranks_of_blocks(
    scored: Scored,
    relevance: Relevance,
    *,
    allowed: Allowed | None = None,
    query_block: int = 1024,
    item_block: int = 8192,
    kept_bytes: int = 2**28,
) -> Ranks:
    """The ranks that `ranks_of_scores` would give, from anything that gives blocks of scores.

    Of each relevant item the irrelevant ones with at least its score are counted, block by block; nothing is sorted but
    the relevant items of a query. The work is one look at every block, in which it is compared once for every relevant
    item that the query with most of them has. Where a row of blocks does not fit `kept_bytes`, those that hold relevant
    items are asked for twice.

    Args:
        scored: Gives blocks.
        relevance: Which items answer which query.
        allowed: As of `blockwise_ranks`.
        query_block: Queries at once.
        item_block: Items at once.
        kept_bytes: Scores that may be kept beyond a block.

    Raises:
        DataError: A block is empty, or `allowed` gives something else than bools for one.
    """
    if min(query_block, item_block) < 1:
        raise DataError(
            f"blocks of {query_block} queries and {item_block} items: both must be 1 or above"
        )
    num_queries = relevance.num_queries
    rank = np.zeros(len(relevance.query), np.int64)
    layers = within(relevance.query) - 1
    edges = np.searchsorted(relevance.query, np.arange(0, num_queries + query_block, query_block))
    for start, first, last in zip(
        range(0, num_queries, query_block), edges[:-1], edges[1:], strict=True
    ):
        if first == last:
            continue
        chosen = slice(first, last)
        numbers = (relevance.query[chosen] - start, relevance.item[chosen], layers[chosen])
        pairs = _Pairs(*map(torch.tensor, numbers))
        rows = slice(start, min(start + query_block, num_queries))
        blocks = _Blocks(scored, rows, relevance.num_items, item_block, kept_bytes)
        own, is_allowed = _own(blocks, pairs, allowed)
        better = _better(blocks, pairs, own, allowed)
        rank[chosen] = _ranked(relevance, chosen, own.numpy(), better.numpy(), is_allowed.numpy())
    return Ranks.sorted(relevance.num_queries, relevance.query, rank, relevance.grade)


class _Blocks:
    """Scores of one block of queries with the items, (rows, columns) at a time; kept if they are few."""

    def __init__(
        self, scored: Scored, rows: slice, num_items: int, item_block: int, kept_bytes: int
    ) -> None:
        self.rows = rows
        self._scored, self._num_items, self._size = scored, num_items, item_block
        is_small = 4 * (rows.stop - rows.start) * num_items <= kept_bytes
        self._kept: dict[int, Tensor] | None = {} if is_small else None

    def columns(self) -> Iterator[slice]:
        """Of each block."""
        for start in range(0, self._num_items, self._size):
            yield slice(start, min(start + self._size, self._num_items))

    def scores(self, columns: slice) -> Tensor:
        """Of a block; NaN is made -inf."""
        if self._kept is not None and columns.start in self._kept:
            return self._kept[columns.start]
        scores = self._scored(self.rows, columns)
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self._kept is not None:
            self._kept[columns.start] = scores
        return scores


def _own(blocks: _Blocks, pairs: _Pairs, allowed: Allowed | None) -> tuple[Tensor, Tensor]:
    """(pairs,) scores of the relevant items, and whether they are candidates."""
    is_allowed = torch.ones(len(pairs.row), dtype=torch.bool)
    own = torch.empty(len(pairs.row), dtype=torch.float64)
    for columns in blocks.columns():
        inside = pairs.inside(columns)
        if not inside.any():
            continue
        scores = blocks.scores(columns)
        row, column = pairs.row[inside], pairs.item[inside] - columns.start
        own[inside] = scores[row, column].double().cpu()
        if allowed is not None:
            mask = _mask(allowed, blocks.rows, columns, scores)
            is_allowed[inside] = mask[row, column].cpu()
    return own, is_allowed


def _better(blocks: _Blocks, pairs: _Pairs, own: Tensor, allowed: Allowed | None) -> Tensor:
    """(pairs,) how many irrelevant candidates have at least the score of the relevant item."""
    num_rows, num_layers = blocks.rows.stop - blocks.rows.start, int(pairs.layer.max()) + 1
    bars = own.new_full((num_layers, num_rows), torch.nan)  # of rows with fewer relevant items
    bars[pairs.layer, pairs.row] = own
    counts = torch.zeros((num_layers, num_rows), dtype=torch.int64)
    for columns in blocks.columns():
        scores, inside = blocks.scores(columns), pairs.inside(columns)
        # looked at for the last time, so it may be overwritten: NaN is never as good as anything
        scores[pairs.row[inside], pairs.item[inside] - columns.start] = torch.nan
        if allowed is not None:
            scores[~_mask(allowed, blocks.rows, columns, scores)] = torch.nan
        for layer, bar in enumerate(bars.to(scores.device, scores.dtype)):
            counts[layer] += (scores >= bar[:, None]).sum(dim=1).cpu()
    return counts[pairs.layer, pairs.row]


def _mask(allowed: Allowed, rows: slice, columns: slice, scores: Tensor) -> Tensor:
    mask = torch.as_tensor(allowed(rows, columns), device=scores.device)
    if mask.shape != scores.shape or mask.dtype != torch.bool:
        raise DataError(
            f"allowed gave {tuple(mask.shape)} of {mask.dtype} for a block of {tuple(scores.shape)}; it must be a "
            "bool for each query and item of the block"
        )
    return mask


def _ranked(
    relevance: Relevance,
    chosen: slice,
    own: NDArray[np.floating[Any]],
    better: Integers,
    is_allowed: NDArray[np.bool_],
) -> Integers:
    """(pairs,) ranks: irrelevant items at least as good, and the relevant ones that come first."""
    query = relevance.query[chosen]
    order = np.lexsort((relevance.item[chosen], relevance.grade[chosen], -own, ~is_allowed, query))
    before = np.empty(len(order), np.int64)
    before[order] = within(query)  # the order leaves each query's pairs where they are
    return np.where(is_allowed, better + before, 0)
