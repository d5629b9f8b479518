"""What every corpus offers: a deterministic plan of shards, their records as a stream, and their state in the store."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa

from pipelines.corpus.columns import Columns
from pipelines.corpus.formats import Source
from pipelines.corpus.reading import ahead
from pipelines.storage import LocalStore, StoredFile
from slq.errors import DataError

_STATE_DIGITS = 16  # 64 bits for each file, in which its old and its new state differ


@dataclass(frozen=True, slots=True)
class Shard:
    """One unit of work: consecutive rows of one file, or a run of image files.

    Attributes:
        shard_id: Its number in the plan, from 0.
        source: Name of the file in the corpus' store; "" for image folders.
        start: First row in the source; of an image folder, in the whole folder.
        stop: First row behind the shard; -1 for a tar, whose rows are known when it is read.
        offset: First byte, of formats of lines.
        end: First byte behind the shard, of formats of lines.
        paths: Of an image folder, the shard's files. Workers never list the folder again: a file that comes or
            goes meanwhile would shift every row behind it.
        state: 16 hexadecimal digits for each of `files`, in order: what it was like when it was planned.
    """

    shard_id: int
    source: str
    start: int
    stop: int
    offset: int = 0
    end: int = 0
    paths: tuple[str, ...] = ()
    state: str = ""

    @property
    def num_rows(self) -> int | None:
        """Rows that the shard holds, quarantined ones included; None where only reading it can tell."""
        return None if self.stop < 0 else self.stop - self.start

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that it reads."""
        return self.paths or (self.source,)

    @property
    def states(self) -> tuple[str, ...]:
        """What each of `files` was like when it was planned."""
        starts = range(0, len(self.state), _STATE_DIGITS)
        return tuple(self.state[start : start + _STATE_DIGITS] for start in starts)


@dataclass(frozen=True, slots=True)
class Record:
    """One raw item as read, before decoding.

    Attributes:
        uri: Where `pipelines.images.fetch_image` finds the image: a file, or a place in one.
        problem: Why the record cannot be used; None where it can.
        reason: Stable short code that goes with `problem`: `unreadable`, `too_many_bytes`, `path_refused`, or
            `bad_row` where the row itself cannot be understood.
    """

    id: str
    uri: str
    image: bytes | None
    text: str | None
    columns: dict[str, Any]
    problem: str | None = None
    reason: str = "unreadable"


class Corpus(ABC):
    """Items in files of one format, on a disk or in an object store; cheap to pickle.

    Args:
        source: The files.
        columns: What the user's tables call our columns.
        retry_s: How long failures of an object store are tried again where a table names objects.

    Attributes:
        location: Where it is, as users write it.
        format: Of its files.
        store: Their folder.
        keeps_places: Whether rows stay where they were when others of their file are mended.
    """

    keeps_places = True

    def __init__(self, source: Source, columns: Columns, retry_s: float) -> None:
        self.location = source.location
        self.format = source.format
        self.store = source.store
        self._source = source
        self._columns = columns
        self._retry_s = retry_s

    def shards(self, shard_rows: int) -> Iterator[Shard]:
        """Cut the corpus into shards as a stream; the same corpus always gives the same shards.

        Args:
            shard_rows: Rows of a shard at most. A shard ends with its file; only image folders have shards of many.

        Raises:
            ConfigError: The corpus is gone, or holds more than one format.
            DataError: A file cannot be used, or there is no row at all.
            StorageError: The store cannot be read.
        """
        shard_id = -1
        for shard_id, shard in enumerate(self._cut(self.files(), shard_rows)):
            yield replace(shard, shard_id=shard_id)
        if shard_id < 0:
            raise DataError(f"corpus {self.location} is empty")

    def files(self) -> Iterator[StoredFile]:
        """The corpus' files as they are now, as a stream; errors as `shards`."""
        return self._source.files()

    def has_rows(self, file: StoredFile) -> bool:
        """Whether a shard would be cut out of a file; errors as `shards`."""
        return next(self._cut(iter([file]), 1), None) is not None

    @abstractmethod
    def _cut(self, files: Iterator[StoredFile], shard_rows: int) -> Iterator[Shard]:
        """The shards of files, not numbered yet."""

    @abstractmethod
    def records(self, shard: Shard) -> Iterator[Record]:
        """The raw records of one shard in order, as a stream.

        Raises:
            DataError: Its file cannot be read, or has other rows than were planned.
            StorageError: A store cannot be reached: no record's own fault.
        """

    def user_schema(self) -> pa.Schema:
        """Names and types of the columns that are the user's own.

        Raises:
            DataError: The first file cannot be used.
            StorageError: The store cannot be read.
        """
        return pa.schema([])

    def digest(self) -> str:
        """sha256 over names, sizes and states of all files: no byte of them is read.

        Raises:
            ConfigError: The corpus is gone.
            StorageError: The store cannot be read.
        """
        digest = hashlib.sha256()
        for file in self._source.files():
            digest.update(f"{file_state(file.name, file)}\n".encode())
        return digest.hexdigest()

    def all_records(self, shard_rows: int = 4096) -> Iterator[Record]:
        """The records of all shards, where one process reads the whole corpus; errors as `shards` and `records`."""
        for shard in self.shards(shard_rows):
            yield from self.records(shard)

    def state(self, shard: Shard) -> str:
        """What the shard's files are like now, to be compared with `shard.state`.

        Raises:
            StorageError: The store cannot be read.
        """
        return "".join(
            file_state(name, found) for name, found in ahead(self.store.stat, shard.files)
        )

    def require_mendable(self, shard: Shard) -> None:
        """Check that rows of a shard can be read again by the plan, though some of them may have been mended.

        Raises:
            DataError: Other rows may have moved to their places; the file is named.
            StorageError: The store cannot be read.
        """
        if not self.keeps_places and self.state(shard) != shard.state:
            raise DataError(
                f"{self.store.url(shard.source)} was written to since it was planned, and rows of its format may have "
                "moved, so none of them can be read again; embed the corpus into another storage.dir"
            )

    def require_unchanged(self, shard: Shard) -> None:
        """Check that what was planned is what is there now.

        Raises:
            DataError: A file is gone or another; it and the shard are named.
            StorageError: The store cannot be read.
        """
        found = ahead(self.store.stat, shard.files)
        for (name, now), planned in zip(found, shard.states, strict=True):
            if file_state(name, now) != planned:
                verb = "is another" if now else "is gone"
                raise corpus_changed(f"{name} of shard {shard.shard_id} {verb}")

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the corpus.

        Raises:
            DataError: It is gone, or damaged as what `with` is used for tells.
            StorageError: The store cannot be read.
        """
        url = self.store.url(name)
        if isinstance(self.store, LocalStore) and not self.store.path(name).is_file():
            raise DataError(f"{url} cannot be read: it is gone, or no regular file")
        try:
            with self.store.open(name) as file:
                yield file
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{url} cannot be read: {error}") from None


def file_state(name: str, found: StoredFile | None) -> str:
    """16 hexadecimal digits that change when a file may have changed."""
    what = f"{name}:{found.size}:{found.state}" if found else f"{name} is gone"
    return hashlib.sha256(what.encode()).hexdigest()[:_STATE_DIGITS]


def rows_changed(shard: Shard, rows: int) -> DataError:
    """The error of a shard that does not have its planned number of rows."""
    return corpus_changed(f"shard {shard.shard_id} has {rows} rows, {shard.num_rows} were planned")


def corpus_changed(what: str) -> DataError:
    """The error of a corpus that is not what was planned."""
    return DataError(
        f"the corpus changed while it was read: {what}; let it rest and embed it into another storage.dir"
    )
