"""Actors that hold the model: read a shard's images, score its pairs, write its files, and tell the driver of them."""

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import pyarrow as pa
import torch

from pipelines.commits import Commit
from pipelines.failures import FAILURE, failure_text
from pipelines.journal import KILLED_WORKER, Announcer, message
from pipelines.leaving import leave_without_destructors
from pipelines.loading import use_deterministic_passes, use_processors
from pipelines.reranking.flow import Flow
from pipelines.reranking.plan import read_pairs
from pipelines.reranking.windows import Row, Window, windows_of
from pipelines.shard_files import write_attempt
from slq.errors import HardwareError, SlqError
from slq.reranking.profiles import Reading
from slq.schema import Item

SCORED = pa.schema(
    [
        ("pair", pa.int64()),
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("margin", pa.float32()),
        ("label_mass", pa.float32()),
        ("entropy", pa.float32()),
        ("hundredths", pa.int8()),
    ]
)
"""Columns of a shard: what was read of each pair that could be scored."""


@dataclass(slots=True)
class Work:
    """What a shard cost.

    Attributes:
        scored: Pairs.
        unscored: Pairs that could not be.
        vision_passes: Images that went through the vision tower.
        prefix_tokens: Tokens of open images.
        suffix_tokens: Tokens of what follows them.
        padded_tokens: Places of passes that held nothing.
        busy_s: Time in the model, decoding left out.
        problem: Of one pair that could not be scored.
    """

    scored: int = 0
    unscored: int = 0
    vision_passes: int = 0
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    padded_tokens: int = 0
    busy_s: float = 0.0
    problem: str = ""

    def add(self, other: "Work") -> None:
        """Add another's numbers to these."""
        for one in fields(self):
            if one.name != "problem":
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.problem = other.problem or self.problem


def scoring_threads(gpus: float) -> int:
    """How many shards an actor has in hand: with a GPU a second one is decoded and written while it computes."""
    return 2 if gpus else 1


class ScorePairs:
    """A scoring actor: loads its model once.

    Args:
        flow: What the run knows.
    """

    def __init__(self, flow: Flow) -> None:
        leave_without_destructors()
        section = flow.recipe.rerank
        if section.deterministic:
            use_deterministic_passes()
        else:
            use_processors(flow.recipe.embed.num_threads)
        self._flow, self._most_images = flow, section.batch_size
        self._turn = threading.Lock()
        self._announcer = Announcer(flow.journal)
        self._refusal: SlqError | None = None
        try:
            self._reranker = flow.reranker()
        except SlqError as error:
            self._refusal = error  # a constructor that raises only kills its actor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a shard and write its files.

        Args:
            block: One row with `shard_id`, and `generation` of the commit that it follows; null without one.

        Returns:
            One row: the commit record and the work as JSON, or the error that ends the run.
        """
        if self._refusal is not None:
            return _told(failure=failure_text(self._refusal))
        try:
            shard_id, before = (block[name][0].as_py() for name in ("shard_id", "generation"))
            rows, work = self.scored(shard_id)
            commit = written(self._flow, shard_id, rows, 0 if before is None else before + 1)
            return _told(commit=commit.to_json(), work=json.dumps(asdict(work)))
        except SlqError as error:
            return _told(failure=failure_text(error))

    def scored(self, shard_id: int) -> tuple[list[Row], Work]:
        """Every pair of a shard with its reading or its problem, in the order of the plan.

        Raises:
            ArtifactError: The plan is damaged.
            HardwareError: Memory ran out.
            StorageError: Images cannot be read, by no fault of theirs.
        """
        retry_s = self._flow.recipe.storage.retry_s
        pairs = read_pairs(self._flow.ledger().store, shard_id)
        rows: list[Row] = [dict(row) for row in pairs.to_pylist()]
        work = Work()
        with self._announcer.announced(f"rerank {shard_id}") as careful:
            for window in windows_of(rows, self._most_images, retry_s):
                self._score_window(f"{shard_id} {window.number}", window, work, careful=careful)
        bad = [row for row in rows if row["problem"] is not None]
        work.scored, work.unscored = len(rows) - len(bad), len(bad)
        if bad:
            work.problem = f"{bad[0]['query_id']}, {bad[0]['item_id']}: {bad[0]['problem']}"
        return rows, work

    def _score_window(self, name: str, window: Window, work: Work, *, careful: bool) -> None:
        """Note what is read of each row; of what has killed workers before, each row on its own."""
        pairs = window.pairs()
        if not careful:
            self._score(window, pairs, work)
            return
        with self._announcer.announced(f"rerank {name}") as deadly:
            if not deadly:
                self._score(window, pairs, work)
                return
            for place, pair in pairs.items():
                row = window.rows[place]
                with self._announcer.announced(f"rerank {name} {row['pair']}") as killer:
                    if killer:
                        row["problem"], row["error"] = message("scored"), KILLED_WORKER
                    else:
                        self._score(window, {place: pair}, work)

    def _score(self, window: Window, pairs: dict[int, tuple[Item, Item]], work: Work) -> None:
        with (
            self._turn
        ):  # another shard's images may be read meanwhile, but its passes are not counted here
            started, before = time.perf_counter(), self._reranker.counts
            readings = self._read(list(pairs.values()))
            work.busy_s += time.perf_counter() - started
            after = asdict(self._reranker.counts)
        for name, value in asdict(before).items():
            setattr(work, name, getattr(work, name) + after[name] - value)
        for place, reading in zip(pairs, readings, strict=True):
            if isinstance(reading, str):
                window.rows[place]["problem"] = reading
            else:
                window.rows[place] |= asdict(reading)

    def _read(self, pairs: list[tuple[Item, Item]]) -> list[Reading | str]:
        try:
            return self._reranker.read_each(pairs)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise HardwareError(
                    f"memory ran out over {len(pairs)} pairs: {error}; lower rerank.batch_size and run the same "
                    "command with another storage.rerank_dir"
                ) from None
            raise


def written(flow: Flow, shard_id: int, rows: Sequence[Row], generation: int = 0) -> Commit:
    """Write the files of a scored shard and leave them to the driver.

    Args:
        flow: What the run knows.
        shard_id: The shard.
        rows: All of its pairs.
        generation: How many times it was committed before.

    Raises:
        StorageError: They cannot be written.
    """
    good = [row for row in rows if row["problem"] is None]
    bad = [_error(row, n, shard_id) for n, row in enumerate(rows) if row["problem"] is not None]
    store = flow.ledger().store
    return write_attempt(store, shard_id, generation, rows=good, schema=SCORED, errors=bad)


def _error(row: Row, place: int, shard_id: int) -> Row:
    return {
        "id": row["item_id"],
        "uri": row["item_uri"],
        "stage": "rerank",
        "error": row.get("error", "unscored"),
        "message": f"query {row['query_id']!r}: {row['problem']}",
        "shard_id": shard_id,
        "row_in_shard": place,
    }


def _told(
    *, commit: str | None = None, work: str | None = None, failure: str | None = None
) -> pa.Table:
    return pa.table(
        {
            name: pa.array([value], pa.string())
            for name, value in (("commit", commit), ("work", work), (FAILURE, failure))
        }
    )
