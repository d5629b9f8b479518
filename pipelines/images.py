"""Images behind a uri: in a row of a table, in a file of the table's own folder, in a tar, or in an object store.

A uri in a table comes from elsewhere and is read through `ImageReader`, which keeps it below the table's folder. A uri
of a stored embedding row is our own, and `pipelines.fetching` leads back to what was embedded.
"""

import errno
import posixpath
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.storage import LocalStore, open_store
from pipelines.storage.objects import RETRY_S
from slq.errors import MediaError, RefusedReadError, StorageError
from slq.media import DEFAULT_LIMITS, check_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_HEAD_BYTES = 2**18  # nearly every picture's header, with its thumbnail and colour profile
_S3_OBJECT = re.compile(r"s3://[^/]+/(?P<key>.+)", re.DOTALL)
_LONGEST_KEY_BYTES = 1024  # that S3 knows
_OWN_FAULTS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Failures of a file itself; all others are the machine's, and may be gone a moment later."""
_MARKS = ("#row=", "#bytes=", "#record=")


def row_uri(url: str, row: int, column: str = "image") -> str:
    """The uri of an image in a row of a Parquet file; rows count from 0."""
    return f"{url}#row={row}" + ("" if column == "image" else f"&image={quote(column, safe='')}")


def bytes_uri(url: str, start: int, stop: int) -> str:
    """The uri of an image in bytes `start` to `stop` - 1 of a file."""
    return f"{url}#bytes={start}-{stop}"


def record_uri(url: str, number: int) -> str:
    """The uri of a record of a file that holds no image of it; records count from 0."""
    return f"{url}#record={number}"


def is_ambiguous(name: str) -> bool:
    """Whether a file name could pass for a place inside of a file."""
    return any(mark in name for mark in _MARKS)


class ImageReader:
    """Reads the images that a table names; threads may share it.

    Args:
        folder: The table's folder, on a disk or in an object store. A table that came from elsewhere must not read
            the rest of it.
        absolute: Whether absolute paths are taken, where they lead into the folder.
        retry_s: How long failures of an object store are tried again.
    """

    def __init__(
        self, folder: str | Path, *, absolute: bool = False, retry_s: float = RETRY_S
    ) -> None:
        self._store = open_store(folder, retry_s)
        self._absolute = absolute
        self._retry_s = retry_s

    def locate(self, uri: str) -> str:
        """The path or URL of the file that a uri names.

        Raises:
            MediaError: With reason `path_refused`: it leads out of the folder, or is of a scheme that is not read.
        """
        if not is_ambiguous(uri):
            found = _S3_OBJECT.fullmatch(uri)
            if found and len(found["key"].encode(errors="replace")) <= _LONGEST_KEY_BYTES:
                return uri
            if "://" not in uri:
                return self._below_the_folder(uri)
        raise self._refusal(uri)

    def _below_the_folder(self, uri: str) -> str:
        if isinstance(self._store, LocalStore):
            return self._local(uri, self._store.root)
        name = posixpath.normpath(uri)
        if posixpath.isabs(name) or name.split("/")[0] in ("..", "."):
            raise self._refusal(uri)
        return self._store.url(name)

    def _local(self, uri: str, folder: Path) -> str:
        """The file with its links followed: they may lead out of the folder, too."""
        try:
            root = folder.resolve()
            path = (root / uri).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
            raise MediaError("path_refused", f"{uri!r} names no file: {error}") from None
        if not path.is_relative_to(root) or (Path(uri).is_absolute() and not self._absolute):
            raise self._refusal(uri)
        return str(path)

    def _refusal(self, uri: str) -> MediaError:
        return MediaError(
            "path_refused",
            f"{uri!r} is no relative path of a file below {self._store.location}, the table's own folder, and no "
            "s3://bucket/key",
        )

    def read(self, uri: str) -> bytes:
        """The encoded image behind a uri.

        Raises:
            MediaError: With reason `path_refused` as `locate`, `unreadable` or `too_many_bytes`.
            StorageError: The store cannot be reached.
        """
        try:
            return read_image(self.locate(uri), self._retry_s)
        except RefusedReadError as error:  # the uri came with the row, so it is the row's fault
            raise MediaError("unreadable", str(error)) from None

    def check(self, uri: str) -> None:
        """Refuse an image whose header cannot be read or breaks the limits; of an object only its head is read.

        Raises:
            MediaError: As `read`; or it is no image, or too large a one.
            StorageError: The store cannot be reached.
        """
        url = self.locate(uri)
        if "://" not in url:
            check_image(self.read(uri))
            return
        try:
            head = _object_bytes(url, 0, _HEAD_BYTES, self._retry_s)
        except RefusedReadError as error:
            raise MediaError("unreadable", str(error)) from None
        try:
            check_image(head)
        except MediaError:
            if len(head) < _HEAD_BYTES:
                raise
            check_image(self.read(uri))


def read_image(url: str, retry_s: float = RETRY_S) -> bytes:
    """The bytes of an image file that is not too large: one bad file must not stop a shard.

    Args:
        url: A path, or `scheme://bucket/key`.
        retry_s: How long failures of an object store are tried again.

    Raises:
        MediaError: With reason `unreadable` or `too_many_bytes`.
        StorageError: The store cannot be reached.
    """
    if "://" not in url:
        return _file_bytes(Path(url))
    limit = DEFAULT_LIMITS.max_bytes
    data = _object_bytes(url, 0, limit + 1, retry_s)
    if len(data) > limit:
        raise too_large(url, f"more than {limit}")
    return data


def _object_bytes(url: str, start: int, stop: int, retry_s: float) -> bytes:
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        return open_store(f"{scheme}://{bucket}", retry_s).read(key, start, stop)
    except FileNotFoundError:
        raise MediaError("unreadable", f"{url} cannot be read: there is no such object") from None


def _file_bytes(path: Path) -> bytes:
    limit = DEFAULT_LIMITS.max_bytes
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise MediaError("unreadable", f"{path} is no regular file")
        if found.st_size <= limit:
            with path.open("rb") as file:
                data = file.read(limit + 1)  # it may have grown meanwhile
            if len(data) <= limit:
                return data
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
        if error.errno in _OWN_FAULTS:
            raise MediaError("unreadable", problem) from None
        raise StorageError(f"{problem}; run the same command again") from None
    raise too_large(str(path), str(found.st_size))


def too_large(url: str, num_bytes: str) -> MediaError:
    """The error of a file that is larger than an image may be."""
    limit = DEFAULT_LIMITS.max_bytes
    return MediaError("too_many_bytes", f"{url} has {num_bytes} bytes; at most {limit} are allowed")


def image_value(value: Any) -> bytes | None:
    """The bytes of a cell of an image column: plain, or with their path beside them as `datasets` writes them."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None
