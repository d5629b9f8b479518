"""Second stage, on actors that hold the model: decode, score, write the shard's files, and tell the driver of them."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import torch

from pipelines.commits import Commit, attempt_name, errors_name, new_attempt, shard_name
from pipelines.failpoints import reach
from pipelines.failures import FAILURE, failure_text
from pipelines.journal import KILLED_WORKER, Announcer, message
from pipelines.leaving import leave_without_destructors
from pipelines.loading import use_processors
from pipelines.reranking.flow import Flow
from pipelines.reranking.gather import Gathered
from pipelines.shard_files import write_shard
from slq.arrow import ERRORS
from slq.errors import DataError, HardwareError, SlqError
from slq.media import decode_image
from slq.reranking.planning import Images, windows
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
_DECODERS = 4
Row = dict[str, Any]


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
        use_processors(1 if section.deterministic else flow.recipe.embed.num_threads)
        torch.use_deterministic_algorithms(section.deterministic)
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

        Returns:
            One row: the commit record and the work as JSON, or the error that ends the run.
        """
        failure = block[FAILURE][0].as_py()
        if failure is not None:
            return _told(failure=failure)
        if self._refusal is not None:
            return _told(failure=failure_text(self._refusal))
        try:
            shard = Gathered.from_block(block)
            rows, work = self.scored(shard)
            commit = written(self._flow, shard.shard_id, rows)
            return _told(commit=commit.to_json(), work=json.dumps(asdict(work)))
        except SlqError as error:
            return _told(failure=failure_text(error))

    def scored(self, shard: Gathered) -> tuple[list[Row], Work]:
        """Every pair with its reading or its problem, in the order of the plan.

        Raises:
            HardwareError: Memory ran out.
        """
        rows: list[Row] = [dict(row) for row in shard.pairs.to_pylist()]
        for row in rows:
            for side in ("query_uri", "item_uri"):
                row["problem"] = row["problem"] or shard.problems.get(row[side])
        work, before = Work(), self._reranker.counts
        with self._announcer.announced(f"rerank {shard.shard_id}") as careful:
            for number, chunk in enumerate(self._chunks(rows)):
                name = f"{shard.shard_id} {number}"
                self._score_chunk(name, [rows[n] for n in chunk], shard, work, careful=careful)
        after = asdict(self._reranker.counts)
        for name, value in asdict(before).items():
            setattr(work, name, after[name] - value)
        bad = [row for row in rows if row["problem"] is not None]
        work.scored, work.unscored = len(rows) - len(bad), len(bad)
        if bad:
            work.problem = f"{bad[0]['query_id']}, {bad[0]['item_id']}: {bad[0]['problem']}"
        return rows, work

    def _chunks(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Numbers of rows of few enough images to be decoded at once; they depend on the shard alone."""
        good = [n for n, row in enumerate(rows) if row["problem"] is None]
        shown = [_images(rows[n]) for n in good]
        for window in windows(shown, self._most_images):
            yield [good[place] for place in window]

    def _score_chunk(
        self, name: str, rows: list[Row], shard: Gathered, work: Work, *, careful: bool
    ) -> None:
        """Score rows in place; of what has killed workers before, each on its own."""
        if not careful:
            self._score(rows, shard, work)
            return
        with self._announcer.announced(f"rerank {name}") as deadly:
            if not deadly:
                self._score(rows, shard, work)
                return
            for row in rows:
                with self._announcer.announced(f"rerank {name} {row['pair']}") as killer:
                    if killer:
                        row["problem"], row["error"] = message("scored"), KILLED_WORKER
                    else:
                        self._score([row], shard, work)

    def _score(self, rows: list[Row], shard: Gathered, work: Work) -> None:
        pictures = _decoded(rows, shard)
        pairs: dict[int, tuple[Item, Item]] = {}
        for number, row in enumerate(rows):
            try:
                pairs[number] = (
                    _item(row["query_uri"], row["query_text"], pictures),
                    _item(row["item_uri"], row["item_text"], pictures),
                )
            except DataError as error:
                row["problem"] = str(error)
        started = time.perf_counter()
        with self._turn:
            readings = self._read(list(pairs.values()))
        work.busy_s += time.perf_counter() - started
        for number, reading in zip(pairs, readings, strict=True):
            if isinstance(reading, str):
                rows[number]["problem"] = reading
            else:
                rows[number] |= asdict(reading)

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


def _images(row: Row) -> Images:
    """What a row shows, by uri; without an image all rows share one open turn."""
    shown = [uri for uri in (row["query_uri"], row["item_uri"]) if uri is not None]
    return Images(shown[0] if shown else None, tuple(shown[1:]))


def _decoded(rows: Sequence[Row], shard: Gathered) -> dict[str, Any]:
    """Pictures of some rows, or what is wrong with one, by uri."""
    uris = list(dict.fromkeys(uri for row in rows for uri in (row["query_uri"], row["item_uri"])))

    def decoded(uri: str) -> Any:
        try:
            return decode_image(shard.images[uri])
        except DataError as error:
            return error

    wanted = [uri for uri in uris if uri is not None]
    with ThreadPoolExecutor(_DECODERS) as pool:
        return dict(zip(wanted, pool.map(decoded, wanted), strict=True))


def _item(uri: str | None, text: str | None, pictures: dict[str, Any]) -> Item:
    """One side of a pair.

    Raises:
        DataError: Its image is none, or there is nothing in it.
    """
    picture = None if uri is None else pictures[uri]
    if isinstance(picture, DataError):
        raise picture
    return Item(text=text, image=picture)


def written(flow: Flow, shard_id: int, rows: Sequence[Row]) -> Commit:
    """Write the files of a scored shard and leave them to the driver.

    Raises:
        StorageError: They cannot be written.
    """
    store, attempt = flow.ledger().store, new_attempt()
    good = [row for row in rows if row["problem"] is None]
    bad = [_error(row, place, shard_id) for place, row in enumerate(rows) if row["problem"]]
    reach("shard_before_write")
    table = pa.Table.from_pylist(good, schema=SCORED)
    sha256, size, _ = write_shard(
        store, attempt_name(shard_name(shard_id), attempt), iter([table]), SCORED
    )
    errors_sha256 = None
    if bad:
        errors = pa.Table.from_pylist(bad, schema=ERRORS)
        name = attempt_name(errors_name(shard_id), attempt)
        errors_sha256, _, _ = write_shard(store, name, iter([errors]), ERRORS)
    reach("shard_after_write")
    return Commit(
        shard_id=shard_id,
        rows=len(good),
        quarantined=len(bad),
        sha256=sha256,
        bytes=size,
        attempt=attempt,
        errors_sha256=errors_sha256,
    )


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
