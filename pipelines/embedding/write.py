"""Third stage: bring a piece into the data set's form and lay it down beside the data set.

What the driver hears of it is one small record.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.embedding.flow import Flow
from pipelines.embedding.metrics import count
from pipelines.embedding.pieces import Piece, Work, failure_block, is_failure, table_to_bytes
from pipelines.failpoints import reach
from pipelines.failures import FAILURE, raise_failure
from pipelines.leaving import leave_without_destructors
from slq.arrow import ERRORS, vector_column
from slq.errors import DataError, SlqError
from slq.quantization import cut, to_bits, to_int8


@dataclass(frozen=True, slots=True)
class Written:
    """A piece that lies beside the data set.

    Attributes:
        number: Which one of its shard, from 0.
        last: Whether it ends its shard.
        good: Rows with vectors.
        bad: Quarantined rows.
        work: What it cost.
        problem: Of the first quarantined row: its id and what is wrong with it.
    """

    shard_id: int
    number: int
    last: bool
    good: int
    bad: int
    work: Work = field(default_factory=Work)
    problem: str = ""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Written":
        """What `asdict` gave, after it went through a table."""
        return cls(**{**record, "work": Work(**record["work"])})


def piece_name(run: str, shard_id: int, number: int, kind: str) -> str:
    """Where a piece's rows (`data`) or its quarantined ones (`errors`) lie in the store."""
    return f"pieces/{run}/{shard_id:06d}-{number:06d}.{kind}.arrow"


class WritePieces:
    """A writer: an actor that stays, for the sake of its connections to the store and of what a process costs to start.

    Args:
        flow: What the run knows.

    Attributes:
        threads: Pieces that one writer lays down at once; it mostly waits.
    """

    threads = 4

    def __init__(self, flow: Flow) -> None:
        leave_without_destructors()
        self._flow = flow

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write the rows of one encoded piece, and the quarantined ones apart.

        Returns:
            One row: a `Written`, or the error that ends the run.
        """
        if is_failure(block):
            return block.select([FAILURE])
        try:
            written = _written(Piece.from_block(block), self._flow)
            return pa.Table.from_pylist([{**asdict(written), FAILURE: None}])
        except SlqError as error:
            return failure_block(error).select([FAILURE])


def _written(piece: Piece, flow: Flow) -> Written:
    good, bad = data_table(piece, flow), errors_table(piece)
    store = flow.ledger().store
    reach("piece_before_write")
    for kind, table in (("data", good), ("errors", bad)):
        if table.num_rows:
            store.write(
                piece_name(flow.run, piece.shard_id, piece.number, kind), table_to_bytes(table)
            )
    reach("piece_after_write")
    for reason in bad["error"].to_pylist():
        count("quarantined", 1, reason=reason)
    return Written(
        piece.shard_id,
        piece.number,
        piece.last,
        good.num_rows,
        bad.num_rows,
        piece.work,
        f"{bad['id'][0]}: {bad['message'][0]}" if bad.num_rows else "",
    )


def data_table(piece: Piece, flow: Flow) -> pa.Table:
    """The good rows of an encoded piece as the data set stores them.

    Raises:
        DataError: The model gave a vector that is not finite, or zero.
    """
    rows = piece.rows.filter(pa.compute.is_null(piece.rows["error"]))
    found: dict[str, Any] = {}
    if rows.num_rows:
        assert piece.vectors is not None
        _require_finite(piece.vectors, rows)
        found = vector_columns(piece.vectors, flow)
    for name in ("id", "modality", "uri", "text", "width", "height", "content_hash"):
        found[name] = rows[name]
    found["shard_id"] = pa.array(np.full(rows.num_rows, piece.shard_id, np.int32))
    found["row_in_shard"] = rows["row"].cast(pa.int32())
    for column in flow.user_fields:
        found[column.name] = rows[f"user.{column.name}"]
    schema = flow.shard_schema
    if not rows.num_rows:
        return schema.empty_table()
    return pa.table({name: found[name] for name in schema.names}, schema=schema)


def _require_finite(vectors: NDArray[np.float32], rows: pa.Table) -> None:
    """A model that overflows does so for good items: that is no item's fault, and no row may be stored so."""
    norms = np.linalg.norm(vectors, axis=2)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 0.01).all(axis=0))  # NaN compares as false
    if len(wrong):
        name = rows["id"][int(wrong[0])].as_py()
        raise DataError(
            f"the model gave {len(wrong)} vectors without unit norm, first that of {name!r}: "
            "is backbone.dtype too narrow for this model?"
        )


def vector_columns(vectors: NDArray[np.float32], flow: Flow) -> dict[str, pa.Array]:
    """Columns of the vectors in every form that is asked for.

    Args:
        vectors: (adapters, rows, hidden), the recipe's own adapter first.
        flow: What the run knows.
    """
    section = flow.recipe.embed
    short = [cut(one, flow.dimension) for one in vectors] if section.dimension else list(vectors)
    columns = {"embedding": short[0].astype(np.float16)}
    if flow.ranges is not None:
        columns["embedding_int8"] = to_int8(short[0], flow.ranges)
        columns["embedding_bits"] = to_bits(short[0], flow.ranges)
    for name, one in zip(section.adapters, short[1:], strict=True):
        columns[f"embedding_{name}"] = one.astype(np.float16)
    return {name: vector_column(column) for name, column in columns.items()}


def errors_table(piece: Piece) -> pa.Table:
    """The quarantined rows of a piece."""
    rows = piece.rows.filter(pa.compute.is_valid(piece.rows["error"]))
    found = {name: rows[name] for name in ("id", "uri", "stage", "error", "message")}
    found["shard_id"] = pa.array(np.full(rows.num_rows, piece.shard_id, np.int32))
    found["row_in_shard"] = rows["row"].cast(pa.int32())
    return pa.table(found, schema=ERRORS)


def written_pieces(records: Iterable[dict[str, Any]]) -> Iterator[Written]:
    """The records of written pieces; an error of ours among them is raised."""
    for record in records:
        raise_failure(record)
        yield Written.from_record({k: value for k, value in record.items() if k != FAILURE})
