"""Second stage, on encoder actors: forward passes, and nothing else.

On a GPU two threads take turns at the model, so that while one waits for it the other unpacks and pads the next batch,
and a piece's end is no pause.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.embedding.batches import padded, unpack_prompts
from pipelines.embedding.flow import Flow
from pipelines.embedding.metrics import count_work
from pipelines.embedding.pieces import (
    Piece,
    Work,
    failure_block,
    is_failure,
)
from pipelines.journal import KILLED_WORKER, Announcer, message
from pipelines.leaving import leave_without_destructors
from pipelines.loading import use_deterministic_passes, use_processors
from pipelines.recipe import ResourcesConfig
from slq.backbones.prompting import Prompt, Prompts
from slq.errors import DataError, HardwareError, MediaError, SlqError

Row = tuple[int, Prompt]
Refusals = dict[int, tuple[str, str]]
Found = list[tuple[list[int], Tensor]]


def encoding_threads(resources: ResourcesConfig) -> int:
    """How many threads of an encoder take turns at the model.

    One without a GPU: its thread is the one that computes, unpacking and padding are 1% of that, and two that take
    turns on two processors lose each other's caches, which costs 6%.
    """
    return 2 if resources.gpus_per_worker else 1


class EncodePieces:
    """An encoder actor: loads its models once, then turns token sequences into vectors.

    Args:
        flow: What the run knows.
    """

    def __init__(self, flow: Flow) -> None:
        leave_without_destructors()
        section = flow.recipe.embed
        if section.deterministic:
            use_deterministic_passes()
        else:
            use_processors(section.num_threads)
        self._turn, self._care = threading.Lock(), threading.Lock()
        self._announcer = Announcer(flow.journal)
        self._refusal: SlqError | None = None
        try:
            self._encoders = flow.encoders()
            self._backbone = self._encoders[0].backbone
            self._timer = _Timer(self._backbone.device)
        except SlqError as error:
            self._refusal = error  # a constructor that raises only kills its actor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Replace the batches of a piece by vectors."""
        if is_failure(block):
            return block
        if self._refusal is not None:
            return failure_block(self._refusal)
        try:
            return self.encoded(Piece.from_block(block)).to_block()
        except SlqError as error:
            return failure_block(error)

    def encoded(self, piece: Piece) -> Piece:
        """The piece with vectors; rows that the model refuses are set aside.

        Raises:
            HardwareError: Memory ran out.
            RuntimeError: No row is to blame: the model fails on a plain word too.
        """
        found: Found = []
        refused: Refusals = {}
        work = piece.work
        work.began = time.time()
        with self._announcer.announced(f"encode {piece.name}") as careful:
            for number, data in enumerate(piece.batches):
                prompts, rows = unpack_prompts(data)
                batch = list(zip(rows, prompts, strict=True))
                if careful:
                    found += self._with_care(f"{piece.name} {number}", batch, refused, work)
                else:
                    found += self._encode(batch, refused, work)
        piece.rows = with_refusals(piece.rows, refused)
        piece.vectors = _in_order(found)
        work.busy_s = self._timer.total_s()
        piece.batches = []
        count_work(work)
        return piece

    def _with_care(self, name: str, batch: Sequence[Row], refused: Refusals, work: Work) -> Found:
        """As `_encode`, of a piece that has killed workers: a batch that killed some is encoded item by item.

        One thread at a time, or a death would be laid at the door of what the other one does.
        """
        with self._care, self._announcer.announced(f"encode {name}") as careful:
            if not careful:
                return self._encode(batch, refused, work)
            found: Found = []
            for one in batch:
                with self._announcer.announced(f"encode {name} {one[0]}") as deadly:
                    if deadly:
                        refused[one[0]] = (KILLED_WORKER, message("encoded"))
                    else:
                        found += self._encode([one], refused, work)
            return found

    def _encode(self, batch: Sequence[Row], refused: Refusals, work: Work) -> Found:
        """Vectors of a batch; a row that the model refuses is found by halving, and noted."""
        try:
            vectors = self._pass([prompt for _, prompt in batch])
        except (ValueError, RuntimeError, DataError) as error:
            self._require_health(error, batch)
            if len(batch) > 1:
                half = len(batch) // 2
                return [
                    *self._encode(batch[:half], refused, work),
                    *self._encode(batch[half:], refused, work),
                ]
            reason = error.reason if isinstance(error, MediaError) else "model_refused"
            refused[batch[0][0]] = (reason, str(error))
            return []
        lengths = [len(prompt) for _, prompt in batch]
        work.add(Work(items=len(batch), tokens=sum(lengths), padded_tokens=padded(lengths)))
        return [([row for row, _ in batch], vectors)]

    @torch.no_grad()
    def _pass(self, prompts: Sequence[Prompt]) -> Tensor:
        """(adapters, batch, hidden) float32 on the model's device: one prefix for all adapters."""
        batch = self._timer.collated(self._backbone.collate, prompts)
        with self._turn, self._timer:
            prefix = self._backbone.prefix(batch)
            return torch.stack([encoder.encode_prefix(prefix) for encoder in self._encoders])

    def _require_health(self, error: Exception, batch: Sequence[Row]) -> None:
        """Raise where no row is to blame: memory ran out, or the model fails on a plain word too."""
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            tokens = padded(len(prompt) for _, prompt in batch)
            raise HardwareError(
                f"memory ran out over a batch of {len(batch)} items and {tokens} tokens: {error}; "
                "lower embed.batch_tokens and run the same command with another storage.dir"
            ) from None
        try:
            with self._turn:
                self._encoders[0].encode(["probe"])
        except Exception:  # noqa: BLE001 - whatever it is now, the first error is the one to tell
            raise error from None


def with_refusals(rows: pa.Table, refused: Refusals) -> pa.Table:
    """Rows with the reason of those that the model refused."""
    if not refused:
        return rows
    records = rows.to_pylist()
    for number, (reason, text) in refused.items():
        records[number].update(error=reason, message=text, stage="encode")
    return pa.Table.from_pylist(records, schema=rows.schema)


def _in_order(found: Found) -> "np.ndarray[Any, np.dtype[np.float32]] | None":
    """(adapters, good rows, hidden) in the order of the rows; None without any."""
    if not found:
        return None
    rows = np.array([row for numbers, _ in found for row in numbers])
    vectors = torch.cat([block for _, block in found], dim=1).float().cpu().numpy()
    return np.ascontiguousarray(vectors[:, np.argsort(rows)])


class _Timer:
    """Time in the model, on its device; and copies to a GPU beside the passes of the other thread.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._local = threading.local()  # each thread works on a piece of its own

    def collated(self, collate: Any, prompts: Sequence[Prompt]) -> Prompts:
        """A batch on the device. A copy in the stream of the passes would wait for the one that runs."""
        if self._copies is None:
            return collate(prompts)  # type: ignore[no-any-return]
        with torch.cuda.stream(self._copies):
            batch: Prompts = collate(prompts)
        self._copies.synchronize()
        for tensor in (batch.input_ids, batch.mask, *batch.vision.values()):
            tensor.record_stream(torch.cuda.current_stream())
        return batch

    def __enter__(self) -> "_Timer":
        if self._cuda:
            started: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            started.record()
            self._local.started = started
        else:
            self._local.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        spans = self._spans()
        if self._cuda:
            ended: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            ended.record()
            spans.append((self._local.started, ended))
        else:
            spans.append(time.perf_counter() - self._local.started)

    def _spans(self) -> list[Any]:
        if not hasattr(self._local, "spans"):
            self._local.spans = []
        spans: list[Any] = self._local.spans
        return spans

    def total_s(self) -> float:
        """Seconds of this thread's passes since the last call; those of a GPU must have ended."""
        spans, self._local.spans = self._spans(), []
        if self._cuda:
            return float(sum(first.elapsed_time(last) for first, last in spans)) / 1000.0
        return float(sum(spans))
