"""Pieces: what the stages of embedding hand to one another, a bounded part of one shard at a time.

A piece travels as a table of one row, so that Ray Data can neither split nor join pieces. An error of ours travels as
data too: raised in a worker, it would reach the driver as text of Ray's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

import slq.errors
from slq.backbones.prompting import Prompt
from slq.errors import SlqError

FAILURE = "failure"
_MOST_PADDING = 0.05
_LEAST_FILL = 0.25
_BLOCK = pa.schema(
    [
        ("shard_id", pa.int64()),
        ("number", pa.int64()),
        ("last", pa.bool_()),
        ("rows", pa.large_binary()),
        ("batches", pa.list_(pa.large_binary())),
        ("vectors", pa.large_binary()),
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
    """

    input_bytes: int = 0
    items: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0

    def add(self, other: "Work") -> None:
        """Add another's numbers to these."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


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


def failure_text(error: SlqError) -> str:
    """An error of ours as text, which `raise_failure` reads."""
    return json.dumps([type(error).__name__, str(error)])


def is_failure(block: pa.Table) -> bool:
    """Whether a block is an error that only travels through."""
    return bool(block[FAILURE][0].is_valid)


def raise_failure(record: dict[str, Any]) -> None:
    """Raise the error that a record carries, if it does.

    Raises:
        SlqError: Of the class and with the message that it had in the worker.
    """
    if record.get(FAILURE):
        name, message = json.loads(record[FAILURE])
        kind: type[SlqError] = getattr(slq.errors, name)
        if not issubclass(kind, slq.errors.MediaError | slq.errors.UnusablePairError):
            raise kind(message)
        raise slq.errors.DataError(message)


def pack_prompts(prompts: Sequence[Prompt], numbers: Sequence[int], dtype: torch.dtype) -> bytes:
    """Token sequences of one batch as safetensors.

    Args:
        prompts: At least one.
        numbers: Which row of the piece each is.
        dtype: Of the weights, to which a model casts its pixels in any case; in half precision they are half as large.
    """
    tensors = {
        "ids": torch.tensor([token for prompt in prompts for token in prompt.ids]),
        "lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "numbers": torch.tensor(list(numbers)),
    }
    seen = [prompt.vision for prompt in prompts if prompt.vision]
    tensors["shown"] = torch.tensor([bool(prompt.vision) for prompt in prompts])
    for name in seen[0] if seen else ():
        parts = [vision[name] for vision in seen]
        joined = torch.cat(parts)
        tensors[f"vision.{name}"] = joined.to(dtype) if joined.is_floating_point() else joined
        tensors[f"sizes.{name}"] = torch.tensor([len(part) for part in parts])
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def unpack_prompts(data: bytes) -> tuple[list[Prompt], list[int]]:
    """The token sequences of one batch, and which rows of the piece they are."""
    tensors = load(data)
    ids = torch.split(tensors["ids"], tensors["lengths"].tolist())
    vision = {
        name.removeprefix("vision."): iter(
            torch.split(tensor, tensors[f"sizes.{name[7:]}"].tolist())
        )
        for name, tensor in tensors.items()
        if name.startswith("vision.")
    }
    prompts = [
        Prompt(one.tolist(), {name: next(parts) for name, parts in vision.items()} if shown else {})
        for one, shown in zip(ids, tensors["shown"].tolist(), strict=True)
    ]
    return prompts, tensors["numbers"].tolist()


def batches_by_tokens(
    lengths: Sequence[int], shown: Sequence[bool], *, batch_size: int, batch_tokens: int
) -> list[list[int]]:
    """Positions of sequences in batches of similar length, so that little is padded.

    Args:
        lengths: Tokens of each sequence.
        shown: Whether it holds an image; images and texts do not share batches.
        batch_size: Sequences per batch at most.
        batch_tokens: Tokens per batch at most, padding included; a longer sequence has a batch of its own.

    Lengths thin out towards the longest, and there full batches would be padding for the most part: one that is a
    quarter full is closed where another sequence would make more than 5% of it padding.
    """
    order = sorted(range(len(lengths)), key=lambda n: (shown[n], lengths[n]))
    batches: list[list[int]] = []
    tokens = 0  # of the last batch
    for position in order:
        batch, longest = batches[-1] if batches else [], lengths[position]
        size = (len(batch) + 1) * longest
        fits = (
            batch
            and len(batch) < batch_size
            and shown[batch[0]] == shown[position]
            and size <= batch_tokens
            and (
                size - tokens - longest <= _MOST_PADDING * size
                or len(batch) < _LEAST_FILL * batch_size
            )
        )
        if fits:
            batch.append(position)
            tokens += longest
        else:
            batches.append([position])
            tokens = longest
    return batches


def padded(lengths: Iterable[int]) -> int:
    """Tokens of a batch with padding."""
    known = list(lengths)
    return len(known) * max(known)
