"""First stage, on CPU workers: read a shard, guard and decode its items, build token sequences, form batches.

A bad item keeps its row and carries its reason; it never stops a shard, and never reaches the model. What the model
needs is complete here, so that an encoder has nothing to do but forward passes.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import errors_name
from pipelines.corpus import Record, Shard, rows_changed
from pipelines.embedding.batches import batches_by_tokens, pack_prompts
from pipelines.embedding.flow import Flow
from pipelines.embedding.pieces import Piece, Work, failure_block, rows_schema
from pipelines.journal import KILLED_WORKER, Announcer, message
from pipelines.leaving import leave_without_destructors
from slq.backbones.prompting import Prompt, PromptBuilder
from slq.errors import ArtifactError, DataError, MediaError, SlqError
from slq.media import decode_image
from slq.schema import Item

Row = dict[str, Any]
_TOKEN_BYTES = 8
_LOWEST_PRIORITY = 19


def prepare(block: pa.Table, flow: Flow) -> Iterator[pa.Table]:
    """Read one shard, piece by piece.

    Args:
        block: One row: `shard_id`, and `generation`, whose quarantined rows are read again, or null for all rows.
        flow: What the run knows.

    Yields:
        Pieces as blocks; or the error that ends the run.
    """
    leave_without_destructors()
    # An encoder that shares its core with decoding waits, though its next pieces lie ready.
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
    (wanted,) = block.to_pylist()
    shard_id, generation = wanted["shard_id"], wanted["generation"]
    try:
        only = None if generation is None else quarantined_rows(flow, shard_id, generation)
        for piece in prepared_pieces(flow, shard_id, only):
            yield piece.to_block()
    except SlqError as error:
        yield failure_block(error)


def quarantined_rows(flow: Flow, shard_id: int, generation: int) -> list[int]:
    """Numbers of the rows of a shard that a generation of it set aside.

    Raises:
        ArtifactError: Another driver has read them again and removed the list.
        DataError: They cannot be read again.
        StorageError: The store cannot be read.
    """
    flow.corpus().require_mendable(flow.plan().shard(shard_id))
    store, name = flow.ledger().store, errors_name(shard_id, generation)
    try:
        with store.open(name) as file:
            rows = pq.read_table(file, columns=["row_in_shard"])["row_in_shard"]
    except FileNotFoundError:
        raise ArtifactError(
            f"{store.url(name)} is gone: another run has read these rows again; run the same command again"
        ) from None
    return sorted(rows.to_pylist())


def prepared_pieces(flow: Flow, shard_id: int, only: list[int] | None = None) -> Iterator[Piece]:
    """The pieces of a shard, which depend on nothing but the corpus and the recipe.

    Args:
        flow: What the run knows.
        shard_id: Which shard.
        only: Row numbers, where not all are asked for.

    Raises:
        DataError: The corpus changed after it was planned.
        StorageError: It cannot be reached.
    """
    shard, draft, count = flow.plan().shard(shard_id), _Draft(flow, shard_id), 0
    for row, record in _chosen(flow.corpus().records(shard), only):
        count += 1
        if draft.is_full:
            yield draft.finished(last=False)
        draft.add(row, record)
    if only is None:
        _require_unchanged(flow, shard, count)  # who reads rows again may have mended their files
    yield draft.finished(last=True)


def _chosen(records: Iterable[Record], only: list[int] | None) -> Iterator[tuple[int, Record]]:
    """Records with their row numbers: all, or those that are asked for."""
    if only is None:
        yield from enumerate(records)
        return
    wanted = frozenset(only)
    yield from (
        (n, record) for n, record in enumerate(islice(records, max(only) + 1)) if n in wanted
    )


def _require_unchanged(flow: Flow, shard: Shard, count: int) -> None:
    """A shard's last piece, and so its commit, comes only if the corpus is what was planned."""
    if shard.num_rows is not None and count != shard.num_rows:
        raise rows_changed(shard, count)
    flow.corpus().require_unchanged(shard)


class _Draft:
    """The piece that is being filled.

    Args:
        flow: What the run knows.
        shard_id: The shard that is read.
    """

    def __init__(self, flow: Flow, shard_id: int) -> None:
        self._builder = flow.builder()
        self._section = flow.recipe.embed
        self._dtype = _dtype_of(flow)
        self._schema = rows_schema(flow.user_fields)
        self._user = [field.name for field in flow.user_fields]
        self._shard_id, self._number = shard_id, 0
        self._announcer = Announcer(flow.journal)
        self._start()

    def _start(self) -> None:
        self._open = ExitStack()
        self._name = f"prepare {self._shard_id} {self._number}"
        self._careful = self._open.enter_context(self._announcer.announced(self._name))
        self._rows: list[Row] = []
        self._prompts: dict[int, Prompt] = {}  # by position in `_rows`
        self._num_bytes = 0
        self._work = Work()

    @property
    def is_full(self) -> bool:
        """Whether the piece must leave before another row comes."""
        return (
            len(self._rows) >= self._section.piece_rows
            or self._num_bytes >= self._section.piece_bytes
        )

    def add(self, row: int, record: Record) -> None:
        """Take one record of the corpus."""
        values, prompt = self._prepared(row, record)
        values["row"] = row
        text_bytes = size_of(record.text)
        self._work.input_bytes += len(record.image or b"") + text_bytes
        values |= {f"user.{name}": record.columns.get(name) for name in self._user}
        self._num_bytes += text_bytes + size_of(record.columns)
        if prompt is not None:
            self._prompts[len(self._rows)] = prompt
            self._num_bytes += _TOKEN_BYTES * len(prompt)
            self._num_bytes += sum(tensor.nbytes for tensor in prompt.vision.values())
        self._rows.append(values)

    def _prepared(self, row: int, record: Record) -> tuple[Row, Prompt | None]:
        """The row; of a piece that has killed workers, each is announced."""
        if not self._careful:
            return prepared_row(self._builder, record)
        with self._announcer.announced(f"{self._name} {row}") as deadly:
            if not deadly:
                return prepared_row(self._builder, record)
        refusal = {"error": KILLED_WORKER, "message": message("prepared")}
        return stored_row(record) | refusal, None

    def finished(self, *, last: bool) -> Piece:
        """The piece as it is; what comes after goes into the next one."""
        numbers, prompts = list(self._prompts), list(self._prompts.values())
        section = self._section
        batches = batches_by_tokens(
            [len(prompt) for prompt in prompts],
            [bool(prompt.vision) for prompt in prompts],
            batch_size=1 if section.deterministic else section.batch_size,
            batch_tokens=section.batch_tokens,
        )
        packed = [
            pack_prompts([prompts[n] for n in batch], [numbers[n] for n in batch], self._dtype)
            for batch in batches
        ]
        rows = pa.Table.from_pylist(self._rows, schema=self._schema)
        piece = Piece(self._shard_id, self._number, last, rows, packed, work=self._work)
        self._number += 1
        self._open.close()
        if not last:
            self._start()
        return piece


def _dtype_of(flow: Flow) -> Any:
    import torch

    return getattr(torch, flow.recipe.backbone.dtype)


def prepared_row(builder: PromptBuilder, record: Record) -> tuple[Row, Prompt | None]:
    """What is stored of a record, and its token sequence; a refused one has a reason instead."""
    row = stored_row(record)
    if record.problem is not None:
        return row | {"error": record.reason, "message": record.problem}, None
    try:
        item = _item(record)
        row |= {"modality": item.modality}
        if item.image is not None:
            row |= {"width": item.image.width, "height": item.image.height}
        (prompt,) = builder.tokenised([item])
    except MediaError as error:
        return row | {"error": error.reason, "message": str(error)}, None
    except (ValueError, RuntimeError, DataError) as error:  # of processors and tokenizers
        return row | {"error": "model_refused", "message": str(error), "stage": "prepare"}, None
    return row, prompt


def stored_row(record: Record) -> Row:
    """What is stored of a record whatever becomes of it."""
    return {
        "id": record.id,
        "uri": record.uri,
        "text": record.text,
        "content_hash": content_hash(record),
        "stage": "decode",
    }


def _item(record: Record) -> Item:
    """The record with its image decoded.

    Raises:
        MediaError: Of the image, or there is nothing in the record.
    """
    text = record.text if has_text(record.text) else None
    if record.image is not None:
        return Item(id=record.id, text=text, image=decode_image(record.image))
    if text is None:
        raise MediaError("empty", "the item has neither an image nor a text")
    return Item(id=record.id, text=text)


def has_text(text: str | None) -> bool:
    """Whether anything is left of a text without blanks and NULs."""
    return bool((text or "").replace("\x00", " ").strip())


def content_hash(record: Record) -> str:
    """sha256 of an item's encoded image and text."""
    digest = hashlib.sha256(record.image or b"")
    digest.update(b"\x00" + (record.text or "").encode("utf-8", "replace"))
    return digest.hexdigest()


def size_of(value: Any) -> int:
    """Bytes that a value of a record takes in a piece, about."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(size_of(one) for one in value.values())
    if isinstance(value, list | tuple):
        return sum(size_of(one) for one in value)
    return 0 if value is None else _TOKEN_BYTES
