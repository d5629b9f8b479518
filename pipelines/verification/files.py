"""The files of one shard: which there must be, and reading each of them once, for its hash and for what is in it."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit, errors_name
from pipelines.storage import LocalStore, Store

_COPY_BYTES = 8 * 2**20


def committed_files(commit: Commit) -> dict[str, str | None]:
    """Names of the files of a shard -> sha256; None for a quarantine file of a record that knows none."""
    files: dict[str, str | None] = dict(commit.files())
    if commit.quarantined:
        files.setdefault(errors_name(commit.shard_id, commit.generation), None)
    return files


def read_once(
    store: Store, name: str, sha256: str | None, look: Callable[[pq.ParquetFile], None]
) -> str | None:
    """Read a file once, for its hash and for what is in it.

    Args:
        store: Of the data set.
        name: Of the file.
        sha256: That it must have; None where nobody knows it.
        look: Gets the file, if its hash is right.

    Returns:
        What keeps it from being looked at, in words.

    Raises:
        StorageError: The store cannot be reached.
    """
    try:
        with _fetched(store, name) as (file, found):
            if sha256 not in (None, found):
                return f"its sha256 is {found}, but {sha256} was committed"
            look(pq.ParquetFile(file))
    except FileNotFoundError:
        return "it is gone, though it was committed"
    except (OSError, pa.ArrowException) as error:
        return f"it is no Parquet file that can be read: {error}"
    return None


@contextmanager
def _fetched(store: Store, name: str) -> Iterator[tuple[IO[bytes], str]]:
    """A file to read from any place, and its sha256; one of an object store is fetched onto the disk."""
    with store.open(name) as source, tempfile.TemporaryFile(prefix="slq-verify-") as copy:
        file = source if isinstance(store, LocalStore) else copy
        if file is copy:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
            copy.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        file.seek(0)
        yield file, sha256
