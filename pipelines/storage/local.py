"""A folder as a store."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipelines.storage.base import Store, StoredFile, unwritable
from slq.errors import StorageError

_COPY_BYTES = 4 * 2**20
_PARTIAL = ".partial"  # ends the names of files that are being written; no listing shows them


class LocalStore(Store):
    """A folder. What is written is flushed to the disk, name included, before a call returns."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def path(self, name: str) -> Path:
        """The path of a file."""
        return self.root / name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store.read`."""
        with self.open(name) as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def open(self, name: str) -> IO[bytes]:
        """See `Store.open`."""
        try:
            return self.path(name).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(self.url(name)) from None
        except OSError as error:
            raise StorageError(f"{self.url(name)} cannot be read: {error.strerror}") from None

    def size(self, name: str) -> int | None:
        """See `Store.size`."""
        try:
            return self.path(name).stat().st_size
        except OSError:
            return None

    def stat(self, name: str) -> StoredFile | None:
        """See `Store.stat`."""
        try:
            found = self.path(name).stat()
        except (OSError, ValueError):  # a link that leads nowhere is listed, too
            return StoredFile(name, 0, "unreadable") if os.path.lexists(self.path(name)) else None
        return StoredFile(name, found.st_size, str(found.st_mtime_ns))

    def write(self, name: str, data: bytes) -> None:
        """See `Store.write`."""
        self._put(name, data, os.replace)

    def create(self, name: str, data: bytes) -> bool:
        """See `Store.create`; a hard link is what only one writer can make."""
        try:
            self._put(name, data, os.link)
        except FileExistsError:
            return self._holds(name, data)
        return True

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def _put(self, name: str, data: bytes, put: Callable[[Path, Path], object]) -> None:
        path = self.path(name)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            put(partial, path)
            sync_folder(path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            raise unwritable(self.url(name), error) from None
        finally:
            partial.unlink(missing_ok=True)

    def upload(self, file: Path, name: str) -> None:
        """See `Store.upload`; a file on the same disk is moved."""
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            try:
                file.replace(path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._copy_in(file, path)
            sync_folder(path.parent)
        except OSError as error:
            raise unwritable(self.url(name), error) from None

    @staticmethod
    def _copy_in(file: Path, path: Path) -> None:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
        try:
            with file.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def move(self, name: str, target: str) -> bool:
        """See `Store.move`."""
        try:
            self.path(target).parent.mkdir(parents=True, exist_ok=True)
            self.path(name).replace(self.path(target))
            sync_folder(self.path(target).parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unwritable(self.url(target), error) from None
        return True

    def remove(self, name: str) -> None:
        """See `Store.remove`."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.url(name), error) from None

    def files(self, folder: str = "") -> Iterator[StoredFile]:
        """See `Store.files`: folder by folder, names sorted; a link that leads nowhere is listed with size 0."""
        try:
            entries = sorted(os.scandir(self.path(folder)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StorageError(f"{self.url(folder)} cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from self.files(name)
            elif not entry.name.endswith(_PARTIAL):
                yield self._listed(entry, name)

    @staticmethod
    def _listed(entry: "os.DirEntry[str]", name: str) -> StoredFile:
        try:
            found = entry.stat()
        except OSError:
            return StoredFile(name, 0, "unreadable")
        return StoredFile(name, found.st_size, str(found.st_mtime_ns))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a file's own fsync does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
