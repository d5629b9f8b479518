"""Stores: the files of a data set below one root, on a disk or in an object store, behind one small interface."""

from pathlib import Path

from pipelines.storage.base import Store, StoredFile, WriterLock, concurrently
from pipelines.storage.local import LocalStore
from pipelines.storage.objects import RETRY_S, ObjectStore

__all__ = [
    "RETRY_S",
    "LocalStore",
    "ObjectStore",
    "Store",
    "StoredFile",
    "WriterLock",
    "concurrently",
    "open_store",
    "split_location",
]


def open_store(location: str | Path, retry_s: float = RETRY_S) -> Store:
    """The store behind a location.

    Args:
        location: A folder, `file://...`, or `scheme://bucket/prefix` of an object store.
        retry_s: How long failures of an object store are tried again.

    Raises:
        ConfigError: The scheme is unknown, or what it needs is not installed.
    """
    text = str(location)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(Path(text))
    if scheme == "file":
        return LocalStore(Path(rest))
    return ObjectStore(text.rstrip("/"), retry_s)


def split_location(location: str | Path) -> tuple[str, str]:
    """The location of a file's folder, and its name there."""
    text = str(location)
    if "://" not in text:
        path = Path(text)
        return str(path.parent), path.name
    folder, _, name = text.rstrip("/").rpartition("/")
    return folder, name
