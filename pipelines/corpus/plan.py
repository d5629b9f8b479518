"""The plan of an embedding run as a Parquet file: written and read as a stream, single shards found without it all."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.base import Corpus, Shard, corpus_changed, file_state
from pipelines.storage import Store
from slq.errors import ArtifactError, StorageError

_GROUP_SHARDS = 64
_GROUP_PATHS = 65_536  # paths are the one thing of a shard that may take megabytes
_DIGEST, _ROWS = b"slq_digest", b"slq_num_rows"
_SCHEMA = pa.schema(
    [
        ("shard_id", pa.int64()),
        ("source", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("offset", pa.int64()),
        ("end", pa.int64()),
        ("paths", pa.list_(pa.string())),
        ("state", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a plan amounts to.

    Attributes:
        num_shards: Shards.
        num_rows: Rows, quarantined ones included; None where only reading them can tell.
        digest: sha256 over names, rows and states of all shards: names the corpus' content.
    """

    num_shards: int
    num_rows: int | None
    digest: str


class _Count:
    """Sums up shards as they pass."""

    def __init__(self) -> None:
        self._shards, self._rows, self._digest = 0, 0, hashlib.sha256()
        self._known = True

    def passing(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        for shard in shards:
            self._shards += 1
            self._known &= shard.num_rows is not None
            self._rows += shard.num_rows or 0
            place = [shard.source, shard.start, shard.stop, shard.offset, shard.end, shard.state]
            self._digest.update(f"{place}\n".encode())
            yield shard

    def summary(self) -> PlanSummary:
        rows = self._rows if self._known else None
        return PlanSummary(self._shards, rows, self._digest.hexdigest())


def summarise(shards: Iterable[Shard]) -> PlanSummary:
    """What a plan amounts to; takes the shards as a stream."""
    count = _Count()
    for _ in count.passing(shards):
        pass
    return count.summary()


def write_plan(shards: Iterable[Shard], file: Path) -> PlanSummary:
    """Write a plan as it is made.

    Args:
        shards: All shards in order, as `Corpus.shards` gives them.
        file: A local file, to be uploaded.

    Raises:
        StorageError: The file cannot be written. Errors of `Corpus.shards` come through.
    """
    count = _Count()
    try:
        with pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_statistics=False) as writer:
            for group in _groups(count.passing(shards)):
                writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            summary = count.summary()
            rows = "" if summary.num_rows is None else str(summary.num_rows)
            writer.add_key_value_metadata({_DIGEST: summary.digest, _ROWS: rows})
    except OSError as error:
        raise StorageError(
            f"{file} cannot be written: {error}; free space and run the same command again"
        ) from None
    return summary


def _groups(shards: Iterable[Shard]) -> Iterator[list[dict[str, Any]]]:
    """Rows of one row group each."""
    group: list[dict[str, Any]] = []
    paths = 0
    for shard in shards:
        group.append(asdict(shard))
        paths += len(shard.paths)
        if len(group) == _GROUP_SHARDS or paths >= _GROUP_PATHS:
            yield group
            group, paths = [], 0
    if group:
        yield group


class Plan:
    """A stored plan, from which single shards are read.

    Args:
        store: Of the embedding data set.
        name: Of the file there.

    Attributes:
        summary: What it amounts to.

    Raises:
        ArtifactError: The file is gone, damaged, or no plan.
        StorageError: The store cannot be read.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        with self._opened() as file:
            metadata = file.metadata
            found = metadata.metadata or {}
            sizes = [metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if not {_DIGEST, _ROWS} <= found.keys():
            raise ArtifactError(f"{store.url(name)} is no plan of a corpus")
        self._ends = list(accumulate(sizes))
        rows = found[_ROWS].decode()
        self.summary = PlanSummary(len(self), int(rows) if rows else None, found[_DIGEST].decode())
        self._cached: tuple[int, list[Shard]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Shard]:
        """All shards in order; one row group is in memory."""
        for group in range(len(self._ends)):
            yield from self._group(group)

    def shard(self, shard_id: int) -> Shard:
        """One shard; its row group is kept for the next one.

        Raises:
            ArtifactError: There is no such shard, or the file is gone or damaged.
            StorageError: The store cannot be read.
        """
        if not 0 <= shard_id < len(self):
            raise ArtifactError(
                f"{self._store.url(self._name)} has no shard {shard_id}; it has {len(self)} shards"
            )
        group = bisect_right(self._ends, shard_id)
        if self._cached[0] != group:
            self._cached = (group, self._group(group))
        shard: Shard = self._cached[1][shard_id - self._ends[group]]  # counted from the group's end
        return shard

    def _group(self, group: int) -> list[Shard]:
        with self._opened() as file:
            rows = file.read_row_group(group).to_pylist()
        return [Shard(**{**row, "paths": tuple(row["paths"])}) for row in rows]

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            with self._store.open(self._name) as file:
                yield pq.ParquetFile(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{self._store.url(self._name)} cannot be read: {error}; embed into another storage.dir"
            ) from None


def read_plan(store: Store, name: str) -> Plan:
    """Open a stored plan; errors as `Plan`."""
    return Plan(store, name)


def require_same_plan(corpus: Corpus, plan: Plan) -> None:
    """Check that a corpus would be planned as it was: no file was added, removed or written to.

    Files that are there are listed and held against those of the plan, which come in the same order; none is read but
    those without rows, which are in no plan.

    Raises:
        DataError: It is another one now; a file and its shard are named.
        StorageError: The store cannot be read.
    """
    planned = _files(plan)
    old = next(planned, None)
    for file in corpus.files():
        if old is not None and old.name == file.name:
            if old.state != file_state(file.name, file):
                raise corpus_changed(f"{old.name} of shard {old.shard_id} is another")
            old = next(planned, None)
        elif old is not None and corpus.store.stat(old.name) is None:
            break
        elif corpus.has_rows(file):
            raise corpus_changed(f"{file.name} of no shard was added")
    if old is not None:
        raise corpus_changed(f"{old.name} of shard {old.shard_id} is gone")


class _Planned(NamedTuple):
    """A file of a plan, in the first shard that reads it."""

    shard_id: int
    name: str
    state: str


def _files(plan: Iterable[Shard]) -> Iterator[_Planned]:
    """Each file that a plan reads, once."""
    last = ""
    for shard in plan:
        for name, state in zip(shard.files, shard.states, strict=True):
            if name != last:
                yield _Planned(shard.shard_id, name, state)
                last = name
