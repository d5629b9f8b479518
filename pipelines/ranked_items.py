"""Which items a query of a benchmark ranks: those of its pool, its candidates, and never what is excluded."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from slq.errors import DataError
from slq.schema import Item

log = logging.getLogger(__name__)


def allowed_items(
    path: Path,
    queries: Sequence[Item],
    items: Sequence[Item],
    *,
    lost_queries: Collection[str] = (),
    lost_items: Collection[str] = (),
) -> NDArray[np.bool_] | None:
    """What each query ranks, by pools and by a table of candidates.

    Args:
        path: The table, with the columns of CANDIDATES; it need not exist.
        queries: With their `pool` among `columns`, if they have one.
        items: The same.
        lost_queries: Ids of queries that could not be read; the table may name them.
        lost_items: The same of items. A query may have the id of an item, and one is not the other.

    Returns:
        (queries, items) bool, or None where every query ranks everything.

    Raises:
        DataError: The table is malformed, or names a query or an item that is not there.
    """
    allowed = _of_pools(queries, items)
    entries = _entries(path) if path.is_file() else []
    if entries and allowed is None:
        allowed = np.ones((len(queries), len(items)), dtype=bool)
    row = {query.id: n for n, query in enumerate(queries)}
    column = {item.id: n for n, item in enumerate(items)}
    for query, only, never in entries:
        if query in lost_queries:
            continue
        named_items = (*(only or ()), *never)
        unknown = [one for one in named_items if one not in column and one not in lost_items]
        if query not in row or unknown:
            raise DataError(
                f"{path}: {query} -> {next(iter(unknown), None)} names a query or item that is not in the files"
            )
        assert allowed is not None
        of_query = allowed[row[query]]
        if only is not None:
            named = np.zeros(len(items), dtype=bool)
            named[[column[one] for one in only if one in column]] = True
            of_query &= named
        of_query[[column[one] for one in never if one in column]] = False
    if allowed is not None:  # never silently: a column of one's own may happen to be called `pool`
        mean = float(allowed.sum(axis=1).mean())
        log.info(
            "a query ranks %.1f of %d items on average, as columns `pool` and %s say",
            mean,
            len(items),
            path.name,
        )
    return allowed


def _entries(path: Path) -> list[tuple[str, list[str] | None, list[str]]]:
    """Query, the only items that it ranks or None, and those that it never does."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return [(row["query_id"], row["item_ids"], row.get("excluded_ids") or []) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as candidates (query_id, item_ids, excluded_ids): {error!r}"
        ) from None


def _of_pools(queries: Sequence[Item], items: Sequence[Item]) -> NDArray[np.bool_] | None:
    """Which items are of each query's pool; a query without one ranks every item."""
    wanted = [query.columns.get("pool") for query in queries]
    if all(pool is None for pool in wanted):
        return None
    pools = np.array([item.columns.get("pool") for item in items], dtype=object)
    masks = {pool: pools == pool for pool in set(wanted) if pool is not None}
    everything = np.ones(len(items), dtype=bool)
    return np.stack([masks.get(pool, everything) for pool in wanted])
