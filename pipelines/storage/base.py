"""What every store offers.

Names are relative and use `/`. A write is seen whole or not at all; `create` is seen by one of many writers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from slq.errors import StorageError

_NUM_THREADS = 16  # an object store answers in some 20 ms, however many ask
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store as a listing shows it.

    Attributes:
        name: Relative to the store's root.
        size: In bytes.
        state: Changes when the content may have: modification time on a disk, entity tag in an object store.
    """

    name: str
    size: int
    state: str


class WriterLock:
    """Says whether other writers are at work below a root. This one cannot tell, so nobody is ever alone."""

    def take(self) -> bool:
        """Note this writer as live, and keep others waiting; True if there is no other one."""
        return False

    def share(self) -> None:
        """Let other writers work too, but none of them be alone."""

    def close(self) -> None:
        """Say that this writer is no longer at work; its end does the same."""


class Store(ABC):
    """The files below one root.

    Args:
        location: The root as users write it: a folder, or `scheme://...`.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def url(self, name: str = "") -> str:
        """Where a file is, for people and for other tools."""
        return f"{self.location}/{name}" if name else self.location

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` - 1 of a file, fewer where it ends before.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: The store cannot be read.
        """

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file for reading from any place; errors as `read`."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    @abstractmethod
    def stat(self, name: str) -> StoredFile | None:
        """A file as a listing would show it now; None where there is none.

        Raises:
            StorageError: The store cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it; a reader sees the old one or the new one, never a part.

        Raises:
            StorageError: It cannot be written.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not be there yet.

        Returns:
            True if it now holds `data`; False if another writer's is there.

        Raises:
            StorageError: It cannot be written.
        """

    @abstractmethod
    def upload(self, file: Path, name: str) -> None:
        """Give the store a local file under this name, whole or not at all; the local one may be gone afterwards.

        Raises:
            StorageError: It cannot be written.
        """

    @abstractmethod
    def move(self, name: str, target: str) -> bool:
        """Give a file another name; what was there before is replaced. False where there is no such file.

        Raises:
            StorageError: The store cannot be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none.

        Raises:
            StorageError: The store cannot be written.
        """

    @abstractmethod
    def files(self, folder: str = "") -> Iterator[StoredFile]:
        """All files below a folder of the store in a stable order, as a stream.

        Raises:
            StorageError: The store cannot be read.
        """

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def lock(self, name: str) -> WriterLock:  # noqa: ARG002 - stores that know locks keep theirs in a file
        """A lock under this name, which tells whether other writers are at work."""
        return WriterLock()

    def remove_folder(self, folder: str) -> None:
        """Remove all files below a folder, and the folder; errors as `remove`."""
        for _ in concurrently(self.remove, (file.name for file in self.files(folder))):
            pass

    def remove_partials(self) -> None:  # noqa: B027 - most stores keep no part of a file
        """Remove what writers that were killed left of unfinished files; only while no other writer is at work."""

    def sha256(self, name: str) -> str:
        """sha256 of a file, read in blocks; errors as `read`."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def concurrently(
    call: Callable[[T], R], items: Iterable[T], num_threads: int = _NUM_THREADS
) -> Iterator[R]:
    """Results of `call` for all items, in their order; up to `num_threads` calls are under way at once."""
    with ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(call, items)


def unwritable(url: str, error: OSError) -> StorageError:
    """The error of a file that cannot be written."""
    return StorageError(
        f"{url} cannot be written: {error}; free space and run the same command again"
    )
