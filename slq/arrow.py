"""Arrow schemas of the files that stages exchange; apart from `slq.schema`, which needs no pyarrow."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from slq.errors import DataError

PAIRS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("text", pa.string())])
"""Training pairs: a caption of an image, both positive for each other; other columns are ignored."""

ITEMS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("text", pa.string())])
"""Items and queries; `image` (encoded bytes) or `text` may be null, other columns are carried."""

RELEVANCE = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.int32())])
"""Which items answer a query; grade > 0 means relevant."""

CANDIDATES = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("excluded_ids", pa.list_(pa.string())),
    ]
)
"""What a query ranks, of queries that do not rank everything: only `item_ids` if they are given, and never
`excluded_ids`; either may be null."""

RUN = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("coarse_score", pa.float32()),
        ("fine_score", pa.float32()),
    ]
)
"""A ranking; `rank` starts at 1, `fine_score` is null where only the coarse stage ran. `score` sorts into the ranking:
it is the coarse score that belongs to the place, which after a fine stage need not be the item's own."""

RANKS = pa.schema(
    [
        ("query_id", pa.string()),
        ("system", pa.string()),
        ("rank", pa.int32()),
        ("subsets", pa.list_(pa.string())),
    ]
)
"""Where each query's first relevant item stands (from 1; ties count against it), so that runs can be compared query by
query; `subsets` are those that are reported and that the query belongs to."""

NEGATIVES = pa.schema(
    [
        ("id", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("similarities", pa.list_(pa.float32())),
        ("margins", pa.list_(pa.float32())),
    ]
)
"""Mined hard negatives of training pairs. `negatives` are ids of pairs whose query is a wrong answer to the positive of
pair `id`, most similar first, and `similarities` their cosines with it; both may be empty. `margins` are the fine
stage's, in nats: first that of the pair's own query, then each negative's; null where they were not asked for."""

ERRORS = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("shard_id", pa.int32()),
        ("row_in_shard", pa.int32()),
    ]
)
"""Quarantined rows: `error` is the stable short reason."""


def embedding_schema(
    dimension: int,
    user_fields: Sequence[pa.Field],
    *,
    outputs: Sequence[str] = ("float16",),
    adapters: Sequence[str] = (),
) -> pa.Schema:
    """Columns of an embedding shard.

    Args:
        dimension: Length of a vector.
        user_fields: The user's own columns, appended at the end.
        outputs: `int8` and `binary` ask for `embedding_int8`, and for `embedding_bits`, the bytes of `to_bits`.
        adapters: Names of further adapters, each with a column `embedding_NAME`.
    """
    vectors = [pa.field("embedding", pa.list_(pa.float16(), dimension), nullable=False)]
    if "int8" in outputs:
        vectors.append(pa.field("embedding_int8", pa.list_(pa.int8(), dimension), nullable=False))
    if "binary" in outputs:
        num_bytes = -(-dimension // 8)
        vectors.append(pa.field("embedding_bits", pa.list_(pa.uint8(), num_bytes), nullable=False))
    vectors += [
        pa.field(f"embedding_{name}", pa.list_(pa.float16(), dimension), nullable=False)
        for name in adapters
    ]
    own = [
        pa.field("id", pa.string(), nullable=False),
        *vectors,
        pa.field("modality", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("text", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("shard_id", pa.int32(), nullable=False),
        pa.field("row_in_shard", pa.int32(), nullable=False),
    ]
    names = [field.name for field in own]
    clash = sorted({name for name in names if names.count(name) > 1})
    clash += sorted(set(names) & {field.name for field in user_fields})
    if clash:
        raise DataError(
            f"columns {', '.join(clash)} of the user or of an adapter clash with slq's own; rename them"
        )
    return pa.schema([*own, *user_fields])


def vector_column(vectors: Any) -> pa.Array:
    """A fixed-size list column of an (n, length) array, without copying."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
