"""One shard held against its commit record, as a task: its files are read once, and whatever is wrong is a finding.

A file whose bytes are not those that were committed is not looked into: what it holds would say nothing more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.commits import Commit, errors_name, shard_name
from pipelines.ledger_reader import remake
from pipelines.storage import open_store
from pipelines.verification.files import committed_files, read_once
from pipelines.verification.findings import Finding, first_few
from pipelines.verification.ids import Hashes, hashes_of
from pipelines.verification.items import StoredItem, column_values, stored_item
from pipelines.verification.vectors import wrong_vectors
from slq.arrow import ERRORS, embedding_schema
from slq.quantization import Calibration

_BATCH_ROWS = 8192  # 60 MB as float32 and their magnitudes, at 896 values
Rows = NDArray[np.int64]
_NONE: Rows = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a data set says of all its shards.

    Attributes:
        location: Where it is.
        retry_s: How long failures of its store are tried again.
        dimension: Length of the vectors.
        outputs: Forms of vectors, as `embed.outputs`.
        adapters: Names of further adapters.
        calibration: Ranges of int8 and binary vectors, as JSON; None where there are none, or they are damaged.
        passes: In how many passes ids are compared.
    """

    location: str
    retry_s: float
    dimension: int
    outputs: tuple[str, ...]
    adapters: tuple[str, ...]
    calibration: dict[str, Any] | None
    passes: int


@dataclass(slots=True)
class ShardFacts:
    """What a look at one shard gave.

    Attributes:
        is_whole: Whether all its files could be looked into.
        files: That were looked for.
        rows: With vectors that were looked at.
        vectors: That were looked at, of all columns.
        ids: Rows that have one, quarantined ones included.
        user_schema: The user's own columns, as text; None where they could not be looked at.
        hashes: Of the ids of the first pass.
        items: Rows that were asked for.
    """

    commit: Commit
    findings: list[Finding] = field(default_factory=list)
    is_whole: bool = True
    files: int = 0
    rows: int = 0
    vectors: int = 0
    ids: int = 0
    user_schema: str | None = None
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    items: list[StoredItem] = field(default_factory=list)


def check_shard(promise: Promise, commit: Commit, chosen: Sequence[int]) -> ShardFacts:
    """Look at the files of one shard.

    Args:
        promise: What they must be.
        commit: The shard's record.
        chosen: Positions, among the rows with vectors, of those that are to be given back.

    Raises:
        StorageError: The store cannot be reached.
    """
    return _ShardCheck(promise, commit, chosen).run()


class _ShardCheck:
    def __init__(self, promise: Promise, commit: Commit, chosen: Sequence[int]) -> None:
        self._promise, self._commit, self._chosen = promise, commit, chosen
        self._store = open_store(promise.location, promise.retry_s)
        self._data_name = shard_name(commit.shard_id, commit.generation)
        self._errors_name = errors_name(commit.shard_id, commit.generation)
        ranges = promise.calibration
        self._ranges = None if ranges is None else Calibration.from_json(ranges)
        self._wrong: dict[tuple[str, str], list[str]] = {}
        self._rows = {name: [_NONE] for name in committed_files(commit)}
        self._hashes: list[Hashes] = []
        self._found = ShardFacts(commit)

    def run(self) -> ShardFacts:
        looks = {self._data_name: self._look_at_data, self._errors_name: self._look_at_errors}
        for name, sha256 in committed_files(self._commit).items():
            self._found.files += 1
            self._wrong.clear()
            problem = read_once(self._store, name, sha256, looks[name])
            if problem:
                self._refuse("files", name, f"{problem}; {remake(self._commit.shard_id)}")
        if self._found.is_whole:
            self._check_coverage()
            self._found.hashes = np.concatenate(self._hashes)
        return self._found

    def _tell(self, check: str, name: str, message: str) -> None:
        self._found.findings.append(Finding(check, name, message))

    def _refuse(self, check: str, name: str, message: str) -> None:
        self._tell(check, name, message)
        self._found.is_whole = False

    def _look_at_data(self, file: pq.ParquetFile) -> None:
        promise = self._promise
        self._count(self._data_name, file.metadata.num_rows, self._commit.rows)
        ours = embedding_schema(
            promise.dimension, [], outputs=promise.outputs, adapters=promise.adapters
        )
        problem = other_columns(file.schema_arrow, ours)
        if problem:
            self._refuse("schema", self._data_name, problem)
            return
        self._found.user_schema = _user_columns(file.schema_arrow, ours)
        names = [name for name in ours.names if name not in ("width", "height")]
        for batch in file.iter_batches(_BATCH_ROWS, columns=names):
            rows = self._take(batch, self._data_name)
            good = self._check_vectors(batch, rows)
            self._found.items += self._asked_for(batch, rows, good)
            self._found.rows += batch.num_rows
        self._tell_wrong(self._data_name, self._found.rows)
        self._check_order()

    def _look_at_errors(self, file: pq.ParquetFile) -> None:
        """Quarantined rows, which are few and without vectors."""
        self._count(self._errors_name, file.metadata.num_rows, self._commit.quarantined)
        problem = other_columns(file.schema_arrow, ERRORS)
        if problem:
            self._refuse("schema", self._errors_name, problem)
            return
        table = file.read()
        self._take(table, self._errors_name)
        self._tell_wrong(self._errors_name, table.num_rows)

    def _count(self, name: str, found: int, committed: int) -> None:
        if found != committed:
            self._tell("counts", name, f"it has {found} rows, but {committed} were committed")

    def _take(self, batch: Any, name: str) -> Rows:
        """Note rows and ids of a table or batch; gives the rows."""
        rows = _integers(batch["row_in_shard"])
        self._rows[name].append(rows)
        shards = _integers(batch["shard_id"])
        mine = self._commit.shard_id
        for position in np.flatnonzero(shards != mine):
            place = f"{shards[position]} (row {rows[position]})"
            self._wrong.setdefault(("rows", f"shard_id is not {mine}"), []).append(place)
        self._found.ids += batch.num_rows - batch["id"].null_count
        self._hashes.append(hashes_of(batch["id"], 0, self._promise.passes))
        return rows

    def _tell_wrong(self, name: str, num_rows: int) -> None:
        for (check, what), places in self._wrong.items():
            self._tell(
                check, name, f"{what} in {len(places)} of {num_rows} rows: {first_few(places)}"
            )

    def _check_vectors(self, batch: pa.RecordBatch, rows: Rows) -> NDArray[np.bool_]:
        """(rows,) whether nothing is wrong with a row's vectors."""
        columns = {
            name: column_values(batch[name])
            for name in batch.schema.names
            if name.startswith("embedding")
        }
        self._found.vectors += batch.num_rows * len(columns)
        good = np.ones(batch.num_rows, dtype=bool)
        for message, mask in wrong_vectors(columns, self._ranges).items():
            good &= ~mask
            for position in np.flatnonzero(mask):
                place = f"{batch['id'][int(position)].as_py()!r} (row {rows[position]})"
                self._wrong.setdefault(("vectors", message), []).append(place)
        return good

    def _asked_for(
        self, batch: pa.RecordBatch, rows: Rows, good: NDArray[np.bool_]
    ) -> Iterator[StoredItem]:
        """The chosen ones of a batch. A vector that is wrong in itself need not be compared."""
        for position in (chosen - self._found.rows for chosen in self._chosen):
            if 0 <= position < batch.num_rows and good[position]:
                yield stored_item(batch.slice(position, 1), self._data_name, int(rows[position]))

    def _check_order(self) -> None:
        rows = np.concatenate(self._rows[self._data_name])
        back = np.flatnonzero(np.diff(rows) <= 0)
        if len(back):
            before, after = rows[back[0]], rows[back[0] + 1]
            message = f"row_in_shard must rise, but {after} stands behind {before}"
            self._tell("rows", self._data_name, message)

    def _check_coverage(self) -> None:
        """Stored and quarantined rows together are each row of the shard once."""
        rows = np.sort(np.concatenate([part for parts in self._rows.values() for part in parts]))
        if not np.array_equal(rows, np.arange(len(rows))) and not self._tells("rows"):
            lost = sorted(set(range(len(rows))) - set(rows.tolist()))
            message = (
                f"rows 0 to {len(rows) - 1}, quarantined ones included, are not all there once: "
            )
            self._tell("rows", self._data_name, f"{message}{first_few(lost)} missing")

    def _tells(self, check: str) -> bool:
        return any(finding.check == check for finding in self._found.findings)


def other_columns(found: pa.Schema, wanted: pa.Schema) -> str | None:
    """How a file's leading columns differ from those that it must have; None where they do not."""
    for position, field_ in enumerate(wanted):
        other = found.field(position) if position < len(found) else None
        if other is None or not other.equals(field_):
            has = "is missing" if other is None else f"is {_told(other)}"
            return f"column {position} {has}, and must be {_told(field_)}; nothing else of it was looked at"
    return None


def _told(field_: pa.Field) -> str:
    return f"{field_.name}: {field_.type}{'' if field_.nullable else ' not null'}"


def _user_columns(schema: pa.Schema, ours: pa.Schema) -> str:
    return ", ".join(_told(schema.field(n)) for n in range(len(ours), len(schema)))


def _integers(column: Any) -> Rows:
    values: Rows = column.to_numpy(zero_copy_only=False).astype(np.int64)
    return values
