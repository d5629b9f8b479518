"""A folder as a store."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipelines.storage.base import Store, StoredFile, WriterLock, unwritable
from slq.errors import StorageError
from slq.files import sync

_TRIES = 5
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
            try:
                file.seek(start)
                return file.read(-1 if stop is None else max(0, stop - start))
            except OSError as error:
                raise self._unreadable(name, error) from None

    def open(self, name: str) -> IO[bytes]:
        """See `Store.open`."""
        try:
            return self.path(name).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(self.url(name)) from None
        except OSError as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: OSError) -> StorageError:
        return StorageError(f"{self.url(name)} cannot be read: {error.strerror or error}")

    def size(self, name: str) -> int | None:
        """See `Store.size`."""
        try:
            found = self.path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(name, error) from None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def stat(self, name: str) -> StoredFile | None:
        """See `Store.stat`."""
        try:
            found = self.path(name).stat()
        except (OSError, ValueError):  # a link that leads nowhere is listed, too
            return StoredFile(name, 0, "unreadable") if os.path.lexists(self.path(name)) else None
        if stat.S_ISDIR(found.st_mode):
            return None
        return StoredFile(name, found.st_size, str(found.st_mtime_ns))

    def write(self, name: str, data: bytes) -> None:
        """See `Store.write`."""
        try:
            self._put(name, data, os.replace)
        except OSError as error:
            raise unwritable(self.url(name), error) from None

    def create(self, name: str, data: bytes) -> bool:
        """See `Store.create`; a hard link is what only one writer can make."""
        try:
            self._put(name, data, os.link)
        except FileExistsError as error:
            if self.exists(name):
                return self._holds(name, data)
            raise unwritable(
                self.url(name), error
            ) from None  # a file is where its folder should be
        except OSError as error:
            raise unwritable(self.url(name), error) from None
        return True

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def _put(self, name: str, data: bytes, put: Callable[[Path, Path], object]) -> None:
        for attempt in range(_TRIES):
            try:
                self._put_once(name, data, put)
            except FileNotFoundError:  # another driver removed the folder between two of our steps
                if attempt + 1 == _TRIES:
                    raise
            else:
                return

    def _put_once(self, name: str, data: bytes, put: Callable[[Path, Path], object]) -> None:
        path = self.path(name)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            put(partial, path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # what went wrong first is the one to tell
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
            sync(path.parent)
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
            sync(self.path(target).parent)
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

    def lock(self, name: str) -> WriterLock:
        """See `Store.lock`."""
        return FileLock(self.path(name))

    def remove_folder(self, folder: str) -> None:
        """See `Store.remove_folder`; what another writer adds meanwhile stays."""
        for parent, _, names in os.walk(self.path(folder), topdown=False):
            try:
                for name in names:
                    Path(parent, name).unlink(missing_ok=True)
                Path(parent).rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise unwritable(self.url(folder), error) from None

    def remove_partials(self) -> None:
        """See `Store.remove_partials`."""
        for parent, _, names in os.walk(self.root):
            for name in names:
                if name.endswith(_PARTIAL):
                    Path(parent, name).unlink(missing_ok=True)

    def files(self, folder: str = "") -> Iterator[StoredFile]:
        """See `Store.files`: folder by folder, names sorted.

        A link that leads nowhere is listed with size 0. Linked folders are left out: they may form a loop.
        """
        try:
            entries = sorted(os.scandir(self.path(folder)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StorageError(f"{self.url(folder)} cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self.files(name)
            elif not entry.name.endswith(_PARTIAL):
                yield from self._listed(entry, name)

    @staticmethod
    def _listed(entry: "os.DirEntry[str]", name: str) -> Iterator[StoredFile]:
        try:
            found = entry.stat()
        except OSError:
            yield StoredFile(name, 0, "unreadable")
            return
        if not stat.S_ISDIR(found.st_mode):
            yield StoredFile(name, found.st_size, str(found.st_mtime_ns))


class FileLock(WriterLock):
    """A file that live writers hold locked; the kernel lets go of it with the process.

    Where a file system knows no locks nobody is ever alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """See `WriterLock.take`; waits while another one keeps the folder to itself.

        Raises:
            StorageError: The lock's file cannot be made.
        """
        try:
            if self._handle is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(str(self._path), error) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.share()  # not before the other is done: it removes every partial file, also one begun just now
            return False
        except OSError:
            return False
        return True

    def share(self) -> None:
        """See `WriterLock.share`."""
        if self._handle is not None:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_SH)
            except OSError:
                self.close()

    def close(self) -> None:
        """See `WriterLock.close`."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
