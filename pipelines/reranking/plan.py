"""The plan: which pairs are scored, and which of them together.

Pairs are scored one by one, so any of them may share a shard. Those that show the same image stand together, whichever
side it is on: its open turn is then computed once for all of them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.storage import Store
from slq.errors import ArtifactError
from slq.reranking.depth import AdaptiveDepth, depth_of

PLAN, POOL = "plan.parquet", "candidates.parquet"
PAIRS = pa.schema(
    [
        ("pair", pa.int64()),
        ("query_id", pa.string()),
        ("query_uri", pa.string()),
        ("query_text", pa.string()),
        ("item_id", pa.string()),
        ("item_uri", pa.string()),
        ("item_text", pa.string()),
        ("problem", pa.string()),
    ]
)
"""Pairs to score. `pair` is the row of the candidate in `candidates.parquet`; a uri is null without an image."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a plan amounts to.

    Attributes:
        queries: Of the run.
        candidates: Of the run.
        pairs: To be scored.
        images: Different ones that open a turn.
        shards: Units of work.
    """

    queries: int
    candidates: int
    pairs: int
    images: int
    shards: int


def chosen(run: pa.Table, depth: int, rule: AdaptiveDepth | None) -> pa.Array:
    """Rows of a run that are scored, int64 ascending.

    Args:
        run: As `read_run` gives it.
        depth: Candidates of a query at most.
        rule: How many fewer.
    """
    ids = run["query_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    scores = run["coarse_score"].to_numpy()
    rows = [
        np.arange(start, start + depth_of(scores[start:stop], depth, rule))
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    return pa.array(np.concatenate(rows), pa.int64())


def pairs_of(run: pa.Table, rows: pa.Array, queries: pa.Table, items: pa.Table) -> pa.Table:
    """The pairs of some rows of a run, as `PAIRS`, those of one image together.

    Args:
        run: As `read_run` gives it.
        rows: Which ones.
        queries: Places of queries.
        items: Places of items.
    """
    picked = run.take(rows)
    query, item = (
        places.take(pc.index_in(picked[f"{side}_id"], places["id"]).combine_chunks())
        for side, places in (("query", queries), ("item", items))
    )
    unknown = [
        pc.if_else(pc.is_null(side["id"]), pa.scalar(f"the {name} is not there"), side["problem"])
        for name, side in (("query", query), ("item", item))
    ]
    found = pa.Table.from_arrays(
        [
            rows,
            picked["query_id"],
            query["uri"],
            query["text"],
            picked["item_id"],
            item["uri"],
            item["text"],
            pc.coalesce(*unknown),
        ],
        schema=PAIRS,
    )
    keyed = found.append_column("shared", shared_image(found))
    order = pc.sort_indices(keyed, [("shared", "ascending"), ("pair", "ascending")])
    return found.take(order)


def shared_image(pairs: pa.Table) -> pa.ChunkedArray:
    """Uri of the image that opens each pair's turn; null without one."""
    return pc.coalesce(pairs["query_uri"], pairs["item_uri"])


def summarise(run: pa.Table, pairs: pa.Table, shard_pairs: int) -> Summary:
    """A plan in numbers."""
    return Summary(
        queries=len(pc.unique(run["query_id"])),
        candidates=run.num_rows,
        pairs=pairs.num_rows,
        images=len(pc.unique(shared_image(pairs).drop_null())),
        shards=-(-pairs.num_rows // shard_pairs),
    )


def write_plan(store: Store, run: pa.Table, pairs: pa.Table, shard_pairs: int) -> None:
    """Store the run, then the pairs; a row group is a shard. Where two drivers do, the first one's stay."""
    store.create(POOL, parquet_bytes(run, 2**20))
    store.create(PLAN, parquet_bytes(pairs, shard_pairs))


def parquet_bytes(table: pa.Table, group_rows: int) -> bytes:
    """A table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=group_rows)
    return sink.getvalue()


def planned_rows(store: Store) -> list[int]:
    """Pairs of each planned shard.

    Raises:
        ArtifactError: There is no plan, or it is damaged.
    """
    try:
        with store.open(PLAN) as file:
            plan = pq.ParquetFile(file).metadata
            return [plan.row_group(group).num_rows for group in range(plan.num_row_groups)]
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(store, error) from None


def read_pairs(store: Store, shard_id: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The pairs of one shard; errors as `planned_rows`."""
    try:
        with store.open(PLAN) as file:
            return pq.ParquetFile(file).read_row_group(shard_id, columns=columns)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(store, error) from None


def read_pool(store: Store) -> pa.Table:
    """The run as it was planned; errors as `planned_rows`."""
    try:
        with store.open(POOL) as file:
            return pq.read_table(file)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(store, error) from None


def _damaged(store: Store, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"the plan in {store.location} cannot be read: {error}; remove the folder and run `slq rerank` again"
    )
