"""Pieces: what the stages of embedding hand to one another, a bounded part of one shard at a time.

A piece travels as a table of one row, so that Ray Data can neither split nor join pieces. An error of ours travels as
data too: raised in a worker, it would reach the driver as text of Ray's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.failures import FAILURE, failure_text
from slq.errors import SlqError

_BLOCK = pa.schema(
    [
        ("shard_id", pa.int64()),
        ("number", pa.int64()),
        ("last", pa.bool_()),
        ("rows", pa.large_binary()),
        ("batches", pa.list_(pa.large_binary())),
        ("vectors", pa.large_binary()),
        ("shape", pa.list_(pa.int64())),
        ("work", pa.string()),
        (FAILURE, pa.string()),
    ]
)


def rows_schema(user_fields: Sequence[pa.Field]) -> pa.Schema:
    """Columns of a piece's rows: where an item stands, what is stored of it, and why it was set aside, if it was.

    Args:
        user_fields: The user's own columns.
    """
    own = [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("text", pa.string()),
        ("modality", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("content_hash", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("stage", pa.string()),
    ]
    return pa.schema([*own, *(field.with_name(f"user.{field.name}") for field in user_fields)])


@dataclass(slots=True)
class Work:
    """What a piece cost; sums of pieces are those of the run.

    Attributes:
        input_bytes: Of images and texts that were read.
        items: That were encoded.
        tokens: Of their sequences.
        padded_tokens: Of the batches, padding included.
        busy_s: Time in the model.
        began: When the encoder took the first of them, as `time.time`; 0 where none did.
    """

    input_bytes: int = 0
    items: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    began: float = 0.0

    def add(self, other: "Work") -> None:
        """Add another's numbers to these."""
        began = min((one for one in (self.began, other.began) if one), default=0.0)
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.began = began


@dataclass(slots=True)
class Piece:
    """A run of rows of one shard.

    Attributes:
        number: Which one of its shard, from 0.
        last: Whether it ends its shard.
        rows: As `rows_schema`, in the order of the corpus; refused items too.
        batches: Token sequences of the good rows, packed, in the order in which `order` has them.
        vectors: (adapters, good rows, hidden) float32, in the order of the rows; None before encoding.
    """

    shard_id: int
    number: int
    last: bool
    rows: pa.Table
    batches: list[bytes] = field(default_factory=list)
    vectors: NDArray[np.float32] | None = None
    work: Work = field(default_factory=Work)

    @property
    def name(self) -> str:
        """Where it stands, for file names and messages."""
        return f"{self.shard_id:06d}-{self.number:06d}"

    def to_block(self) -> pa.Table:
        """The piece as a table of one row."""
        vectors = None if self.vectors is None else self.vectors.tobytes()
        values = {
            "shard_id": self.shard_id,
            "number": self.number,
            "last": self.last,
            "rows": table_to_bytes(self.rows),
            "batches": self.batches,
            "vectors": vectors,
            "shape": None if self.vectors is None else list(self.vectors.shape),
            "work": json.dumps({one.name: getattr(self.work, one.name) for one in fields(Work)}),
            FAILURE: None,
        }
        return pa.table(
            {name: pa.array([value], _BLOCK.field(name).type) for name, value in values.items()},
            schema=_BLOCK,
        )

    @classmethod
    def from_block(cls, block: pa.Table) -> "Piece":
        """What `to_block` gave."""
        (row,) = range(block.num_rows)
        one = {name: block[name][row] for name in _BLOCK.names}
        rows = table_from_bytes(one["rows"].as_buffer())
        found = one["vectors"]
        vectors = None
        if found.is_valid:
            vectors = np.frombuffer(found.as_buffer(), dtype=np.float32)
            vectors = vectors.reshape(one["shape"].as_py())
        return cls(
            shard_id=one["shard_id"].as_py(),
            number=one["number"].as_py(),
            last=one["last"].as_py(),
            rows=rows,
            batches=one["batches"].as_py() or [],
            vectors=vectors,
            work=Work(**json.loads(one["work"].as_py())),
        )


def table_to_bytes(table: pa.Table) -> bytes:
    """A table in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def table_from_bytes(data: Any) -> pa.Table:
    """What `table_to_bytes` gave, from bytes or a buffer."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def failure_block(error: SlqError) -> pa.Table:
    """An error of ours as a block."""
    values: dict[str, Any] = dict.fromkeys(_BLOCK.names)
    values[FAILURE] = failure_text(error)
    return pa.Table.from_pylist([values], schema=_BLOCK)


def is_failure(block: pa.Table) -> bool:
    """Whether a block is an error that only travels through."""
    return bool(block[FAILURE][0].is_valid)
