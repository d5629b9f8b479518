"""A sample of a run's work, with a clock beside each stage; a task for one worker with the recipe's encoder."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipelines.corpus import Shard, write_plan
from pipelines.embedding.costs import Sample
from pipelines.embedding.encode import EncodePieces
from pipelines.embedding.flow import PLAN, Flow
from pipelines.embedding.pieces import Piece, Work
from pipelines.embedding.prepare import prepared_pieces
from pipelines.embedding.seal import seal
from pipelines.embedding.write import WritePieces, Written, written_pieces
from pipelines.failures import FAILURE, failure_text, raise_failure
from slq.errors import DataError, SlqError
from slq.quantization import calibrate, cut

_COUNTING_S = 10.0


def sampled(flow: Flow, shards: list[Shard], seconds: float) -> Sample | str:
    """What some first rows of these shards cost; or as text the error that prevents it.

    The stages are the run's own, one after the other. What they write goes into a folder of this worker that is removed
    at the end, so nobody else needs to reach it.

    Args:
        flow: The run; where it would write is not touched.
        shards: Of its plan.
        seconds: How long to measure, about.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="slq-sample-") as folder:
            write_plan(
                (replace(one, shard_id=n) for n, one in enumerate(shards)), Path(folder) / PLAN
            )
            storage = flow.recipe.storage.model_copy(update={"embedding_dir": folder})
            recipe = flow.recipe.model_copy(update={"storage": storage})
            return _Measurement(replace(flow, recipe=recipe), shards).run(seconds)
    except SlqError as error:
        return failure_text(error)


@dataclass(slots=True)
class _Clock:
    """Rows and seconds so far."""

    rows: int = 0
    prepare_s: float = 0.0
    encode_s: float = 0.0
    pieces: list[Piece] = field(default_factory=list)

    @property
    def rows_per_s(self) -> float:
        return self.rows / (self.prepare_s + self.encode_s)


class _Measurement:
    def __init__(self, flow: Flow, shards: list[Shard]) -> None:
        self._flow, self._shards = flow, shards
        self._encoder = EncodePieces(flow)

    def run(self, seconds: float) -> Sample:
        clock = self._rows_of_all_shards(seconds)
        work = Work()
        for piece in clock.pieces:
            work.add(piece.work)
        if not work.items:
            raise DataError(
                f"nothing can be told from {clock.rows} rows: none of them can be embedded; read "
                f"{self._flow.recipe.data.corpus_location} with `slq embed` to see why"
            )
        write_s, written_bytes, good = self._write(clock.pieces)
        known_rows, known_bytes = self._count_rows()
        return Sample(
            rows=clock.rows,
            quarantined=clock.rows - good,
            input_bytes=work.input_bytes,
            tokens=work.tokens,
            padded_tokens=work.padded_tokens,
            prepare_s=clock.prepare_s,
            encode_s=clock.encode_s,
            write_s=write_s,
            written_bytes=written_bytes,
            known_rows=known_rows,
            known_bytes=known_bytes,
        )

    def _rows_of_all_shards(self, seconds: float) -> _Clock:
        """Each shard gets an equal part of the time that is left, judged by the pace so far."""
        section = self._flow.recipe.embed
        warm_up = _Clock()
        self._go_through(0, section.batch_size, warm_up)  # loads tokenizer and kernels
        clock, pace, ends = _Clock(), warm_up.rows_per_s, time.monotonic() + seconds
        for shard_id in range(len(self._shards)):
            left = ends - time.monotonic()
            if left <= 0 and clock.rows:
                break
            rows = int(pace * left / (len(self._shards) - shard_id))
            self._go_through(
                shard_id, min(max(rows, section.batch_size), section.piece_rows), clock
            )
            pace = clock.rows_per_s
        return clock

    def _go_through(self, shard_id: int, rows: int, clock: _Clock) -> None:
        """Prepare and encode the first rows of a shard."""
        started = time.perf_counter()
        for piece in prepared_pieces(self._flow, shard_id, list(range(rows))):
            block = piece.to_block()
            prepared = time.perf_counter()
            found = self._encoder(block)
            raise_failure({FAILURE: found[FAILURE][0].as_py()})
            encoded = time.perf_counter()
            clock.pieces.append(Piece.from_block(found))
            clock.rows += piece.rows.num_rows
            clock.prepare_s += prepared - started
            clock.encode_s += encoded - prepared
            started = time.perf_counter()

    def _write(self, pieces: list[Piece]) -> tuple[float, int, int]:
        """Seconds, bytes and rows of one shard that is written of all pieces as the run writes its own."""
        flow = self._with_ranges(pieces)
        write = WritePieces(flow)
        started = time.perf_counter()
        written: list[Written] = []
        for number, piece in enumerate(pieces):
            one = replace(piece, shard_id=0, number=number)
            written += written_pieces(write(one.to_block()).to_pylist())
        commit = seal(flow, written, None)
        return time.perf_counter() - started, commit.bytes, commit.rows

    def _with_ranges(self, pieces: list[Piece]) -> Flow:
        """The flow with ranges of this sample, where int8 or binary vectors are asked for."""
        flow = self._flow
        if not {"int8", "binary"} & set(flow.recipe.embed.outputs):
            return flow
        vectors = [one.vectors[0] for one in pieces if one.vectors is not None]
        return replace(
            flow, calibration=calibrate(cut(np.concatenate(vectors), flow.dimension)).to_json()
        )

    def _count_rows(self) -> tuple[int, int]:
        """Rows and bytes of whole shards whose rows only reading them tells; at least one, if there are such."""
        corpus, ends = self._flow.corpus(), time.monotonic() + _COUNTING_S
        rows = size = 0
        for shard in self._uncounted():
            rows += sum(1 for _ in corpus.records(shard))
            size += sum(corpus.store.size(name) or 0 for name in shard.files)
            if time.monotonic() > ends:
                break
        return rows, size

    def _uncounted(self) -> Iterator[Shard]:
        return (shard for shard in self._shards if shard.num_rows is None)
