"""A prefix of an object store as a store. Failures that may pass are tried again, with growing and random waits."""

import errno
import io
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from pipelines.storage.base import Store, StoredFile
from pipelines.storage.multipart import PART_BYTES, upload_parts
from slq.errors import ConfigError, RefusedReadError, SlqError, StorageError

RETRY_S = 60.0
"""How long a store may fail before the failure is ours."""
_LONGEST_WAIT_S = 10.0
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _SHORTEST_TIMEOUT_S = 10.0, 60.0, 5.0
_BUFFER_BYTES = 4 * 2**20
_FINAL_ERRNOS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOSPC, errno.EINVAL}
_S3 = ("s3", "s3a")
T = TypeVar("T")


class ObjectStore(Store):
    """A prefix of an object store that fsspec knows: `s3://` through s3fs, or any other scheme.

    Args:
        location: `scheme://bucket/prefix`; endpoint, region and credentials come from the environment.
        retry_s: How long failures that may pass are tried again.
    """

    def __init__(self, location: str, retry_s: float = RETRY_S) -> None:
        super().__init__(location)
        self._retry_s = retry_s
        self._fs, self._root = _file_system(location, retry_s)
        self._is_s3 = hasattr(self._fs, "call_s3")

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str, float]]:
        return type(self), (
            self.location,
            self._retry_s,
        )  # a pickled file system forgets its settings

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, name: str, verb: str, call: Callable[[], T]) -> T:
        """Call until it works, a failure is final, or time is up.

        Raises:
            FileNotFoundError: From `call`, unchanged.
            FileExistsError: From `call`, unchanged.
            SlqError: From `call`, unchanged: a signal may raise one anywhere.
            RefusedReadError: The store refuses, and will do so again.
            StorageError: Anything else.
        """
        waits = wait_random_exponential(multiplier=0.1, max=_LONGEST_WAIT_S)

        def wait(state: RetryCallState) -> float:  # so that the last try comes when time is up
            return min(waits(state), max(0.0, self._retry_s - (state.seconds_since_start or 0.0)))

        try:
            for attempt in Retrying(
                retry=retry_if_exception(_may_pass),
                wait=wait,
                stop=stop_after_delay(self._retry_s),
                reraise=True,
            ):
                with attempt:
                    return call()
        except (FileNotFoundError, FileExistsError, SlqError):
            raise
        except Exception as error:  # noqa: BLE001 - botocore's and aiohttp's errors share no base with OSError
            kind = RefusedReadError if verb == "read" and _is_refused(error) else StorageError
            raise kind(
                f"{self.url(name)} cannot be {verb}: {error or type(error).__name__}; check the store, its endpoint "
                "and the credentials in the environment, and run the same command again"
            ) from None
        raise AssertionError("unreachable: tenacity returns or raises")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store.read`."""
        if stop is not None and stop <= start:
            return b""
        key = self._key(name)

        def call() -> bytes:
            try:  # always a range: whole files cost s3fs a second request, for the size
                data: bytes = self._fs.cat_file(key, start=start, end=stop)
            except OSError as error:
                if _code(error) == "InvalidRange":  # of a file that ends before `start`
                    return b""
                raise
            return data

        return self._try(name, "read", call)

    def open(self, name: str) -> IO[bytes]:
        """See `Store.open`; each buffer is one request, tried again by itself."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(self.url(name))
        return io.BufferedReader(_Ranges(self, name, size), _BUFFER_BYTES)

    def size(self, name: str) -> int | None:
        """See `Store.size`."""
        try:
            found = self._try(name, "read", lambda: self._fs.info(self._key(name)))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def _try_write(self, name: str, call: Callable[[], T]) -> T:
        try:
            return self._try(name, "written", call)
        except FileNotFoundError as error:  # of the bucket
            raise StorageError(f"{self.url(name)} cannot be written: {error}") from None

    def write(self, name: str, data: bytes) -> None:
        """See `Store.write`."""
        self._try_write(name, lambda: self._fs.pipe_file(self._key(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """See `Store.create`: a conditional put. A lost answer to our own put is told by the content."""

        def call() -> None:
            try:
                self._fs.pipe_file(self._key(name), data, mode="create")
            except OSError as error:
                if _code(error) == "PreconditionFailed":  # s3fs knows it from AWS only
                    raise FileExistsError(self.url(name)) from None
                raise

        try:
            self._try_write(name, call)
        except FileExistsError:
            try:
                return self.read(name) == data
            except FileNotFoundError:  # removed meanwhile
                return False
        return True

    def upload(self, file: Path, name: str) -> None:
        """See `Store.upload`; the size that arrived is checked."""
        wanted = file.stat().st_size
        if self._is_s3 and wanted >= 2 * PART_BYTES:
            self._upload_parts(file, name)
        else:
            self._try_write(name, lambda: self._fs.put_file(str(file), self._key(name)))
        found = self.size(name)
        if found != wanted:
            raise StorageError(
                f"{self.url(name)} cannot be written: {found or 0} of {wanted} bytes arrived; "
                "run the same command again"
            )

    def _upload_parts(self, file: Path, name: str) -> None:
        def patiently(operation: str, **arguments: Any) -> Any:
            return self._try(name, "written", lambda: self._fs.call_s3(operation, **arguments))

        bucket, _, key = self._key(name).partition("/")
        try:
            upload_parts(self._fs.call_s3, patiently, file, bucket, key)
        except FileNotFoundError as error:
            raise StorageError(f"{self.url(name)} cannot be written: {error}") from None

    def move(self, name: str, target: str) -> bool:
        """See `Store.move`: a copy inside the store, then the old name goes."""
        try:
            self._try(
                target, "written", lambda: self._fs.cp_file(self._key(name), self._key(target))
            )
        except FileNotFoundError:
            return False
        self.remove(name)
        return True

    def remove(self, name: str) -> None:
        """See `Store.remove`."""
        try:
            self._try(name, "removed", lambda: self._fs.rm_file(self._key(name)))
        except FileNotFoundError:
            return

    def stat(self, name: str) -> StoredFile | None:
        """See `Store.stat`: one request."""
        try:
            found = self._try(name, "read", lambda: self._fs.info(self._key(name)))
        except FileNotFoundError:
            return None
        if found["type"] != "file":
            return None
        return StoredFile(name, int(found["size"]), _state(found))

    def files(self, folder: str = "") -> Iterator[StoredFile]:
        """See `Store.files`: in the order of the keys; S3 is read page by page."""
        pages = self._s3_pages if self._is_s3 else self._all
        for key, size, state in pages(folder):
            name = key.strip("/").removeprefix(self._root.strip("/")).lstrip("/")
            if name and not name.endswith("/"):
                yield StoredFile(name, size, state)

    def _s3_pages(self, folder: str) -> Iterator[tuple[str, int, str]]:
        bucket, _, key = self._key(folder).partition("/")
        arguments = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        while True:
            try:
                page = self._try(
                    folder, "listed", lambda: self._fs.call_s3("list_objects_v2", **arguments)
                )
            except FileNotFoundError as error:  # of the bucket
                raise StorageError(f"{self.url(folder)} cannot be listed: {error}") from None
            for entry in page.get("Contents", ()):
                yield f"{bucket}/{entry['Key']}", int(entry["Size"]), str(entry["ETag"]).strip('"')
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _all(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """Of any other scheme, whose listing is held in memory."""
        try:
            found = self._try(
                folder, "listed", lambda: self._fs.find(self._key(folder), detail=True)
            )
        except FileNotFoundError:
            return
        for key in sorted(found):
            yield key, int(found[key]["size"]), _state(found[key])


def _state(entry: dict[str, Any]) -> str:
    """What changes with the content of a file, of its entry as fsspec gives it."""
    names = ("ETag", "etag", "mtime", "created")
    state = next((entry[name] for name in names if entry.get(name)), "")
    # listings of fsspec's memory give seconds, where its entries of single files give dates
    return str(state.timestamp() if isinstance(state, datetime) else state).strip('"')


class _Ranges(io.RawIOBase):
    """A file of an object store, read range by range."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        self._store, self._name, self._size, self._at = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._store.read(self._name, self._at, stop) if stop > self._at else b""
        if len(data) < stop - self._at:
            raise StorageError(
                f"{self._store.url(self._name)} became shorter while it was read; let it rest and run again"
            )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _file_system(location: str, retry_s: float) -> tuple[Any, str]:
    """The fsspec file system of a location, and the location without its scheme."""
    import fsspec  # type: ignore[import-untyped]

    scheme, _, rest = location.partition("://")
    try:
        if scheme not in _S3:
            return fsspec.filesystem(scheme), rest.rstrip("/")
        # a server that takes requests and never answers must not cost much more than `retry_s` either
        longest = min(_READ_TIMEOUT_S, max(_SHORTEST_TIMEOUT_S, retry_s))
        timeouts = {"connect_timeout": min(_CONNECT_TIMEOUT_S, longest), "read_timeout": longest}
        file_system = fsspec.filesystem(
            scheme,
            use_listings_cache=False,  # it would hide what other processes write
            config_kwargs={**timeouts, "retries": {"total_max_attempts": 1}},
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{location} cannot be used: {error}") from None
    file_system.retries = 1  # trying again is left to `_try`
    return file_system, rest.strip("/")


def _code(error: BaseException) -> str | None:
    """The code of an S3 error; None of any other."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may work a moment later."""
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return False
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | SlqError):
        return False
    try:
        from botocore.exceptions import (  # type: ignore[import-untyped]
            NoCredentialsError,
            ParamValidationError,
        )
    except ImportError:
        return isinstance(error, Exception)
    return isinstance(error, Exception) and not isinstance(
        error, NoCredentialsError | ParamValidationError | TypeError | ValueError
    )


def _is_refused(error: Exception) -> bool:
    """Whether it is the name that is refused, and not whoever asks for it."""
    try:
        from botocore.exceptions import ParamValidationError
    except ImportError:
        return isinstance(error, PermissionError)
    return isinstance(error, PermissionError | ParamValidationError)
