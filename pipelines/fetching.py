"""What lies behind a uri that our own flow wrote: a file, a row of a table, or some bytes of a file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import image_value, read_image, too_large
from pipelines.storage import concurrently, open_store, split_location
from pipelines.storage.objects import RETRY_S
from slq.errors import DataError, StorageError
from slq.media import DEFAULT_LIMITS

_BATCH_ROWS, _BUFFER_BYTES = 16, 2**20  # a row group may hold far more than fits into memory
_FETCH_RETRY_S = 5.0  # a service rather shows no picture than keep its user waiting
_PLACE = re.compile(r"(?P<file>.+)#(?P<kind>row|bytes|record)=(?P<place>\d[^#/]*)", re.DOTALL)


def fetch_image(uri: str, retry_s: float = _FETCH_RETRY_S) -> bytes | None:
    """The image bytes behind an embedding row's `uri`; None where the row has no image.

    Args:
        uri: Of a row of an embedding data set, which our own flow wrote.
        retry_s: How long failures of an object store are tried again.

    Raises:
        DataError: The file is gone, or larger than an image may be.
        StorageError: The store cannot be reached.
    """
    found = _PLACE.fullmatch(uri)
    if found is None:
        return read_image(uri, retry_s)
    url, kind, place = found.group("file", "kind", "place")
    if kind == "record":
        return None
    try:
        return _part(url, place, retry_s) if kind == "bytes" else _cell(url, place, retry_s)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{uri} cannot be read: {error}") from None


def fetch_images(
    uris: Sequence[str], retry_s: float = RETRY_S
) -> dict[str, bytes | DataError | None]:
    """As `fetch_image`, of many: a table's rows are read in one walk through it, files at the same time.

    Args:
        uris: Different ones.
        retry_s: As `fetch_image`.

    Returns:
        The bytes behind each uri, or what is wrong with this image and no other.

    Raises:
        StorageError: A store cannot be reached, or a file that holds many images cannot be read: no image's own fault.
    """
    tables: dict[tuple[str, str], dict[int, list[str]]] = {}
    single = []
    for uri in uris:
        found = _PLACE.fullmatch(uri)
        if found is None or found["kind"] != "row":
            single.append(uri)
            continue
        row, column = _row_and_column(found["place"])
        tables.setdefault((found["file"], column), {}).setdefault(row, []).append(uri)

    def fetched(uri: str) -> bytes | DataError | None:
        found = _PLACE.fullmatch(uri)
        try:
            if found is None or found["kind"] != "bytes":
                return fetch_image(uri, retry_s)
            return _part(found["file"], found["place"], retry_s)
        except DataError as error:
            return error
        except OSError as error:
            raise _unreadable(uri, error) from None

    images = dict(zip(single, concurrently(fetched, single), strict=True))
    for (url, column), rows in tables.items():
        images |= _cells(url, column, rows, retry_s)
    return images


def _cells(
    url: str, column: str, rows: Mapping[int, list[str]], retry_s: float
) -> dict[str, bytes | DataError | None]:
    """Images in rows of one table."""
    images: dict[str, bytes | DataError | None] = {}
    folder, name = split_location(url)
    try:
        with open_store(folder, retry_s).open(name) as opened:
            file = pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES)
            if column not in file.schema_arrow.names:
                return {uri: None for of_row in rows.values() for uri in of_row}
            for row, value in _walk(file, column, sorted(rows)):
                images |= dict.fromkeys(rows[row], image_value(value))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(url, error) from None
    for row, of_row in rows.items():
        past = DataError(f"{url}#row={row} points past the end of its file")
        images |= {uri: past for uri in of_row if uri not in images}
    return images


def _unreadable(url: str, error: Exception) -> StorageError:
    return StorageError(f"{url} cannot be read: {error}; run the same command again once it can")


def _walk(file: pq.ParquetFile, column: str, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Values of rows, which are ascending; groups that hold none are not read."""
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        wanted = [row for row in rows if start <= row < stop]
        at = start
        batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column])
        while wanted and (batch := next(batches, None)) is not None:
            while wanted and wanted[0] < at + batch.num_rows:
                row = wanted.pop(0)
                yield row, batch.column(0)[row - at].as_py()
            at += batch.num_rows
        start = stop


def _part(url: str, place: str, retry_s: float) -> bytes:
    start, _, stop = place.partition("-")
    first, last = int(start), int(stop)
    if last - first > DEFAULT_LIMITS.max_bytes:
        raise too_large(f"{url}#bytes={place}", str(last - first))
    folder, name = split_location(url)
    data = open_store(folder, retry_s).read(name, first, last)
    if len(data) != last - first:
        raise DataError(f"{url}#bytes={place} points past the end of its file")
    return data


def _cell(url: str, place: str, retry_s: float) -> bytes | None:
    row, column = _row_and_column(place)
    folder, name = split_location(url)
    with open_store(folder, retry_s).open(name) as opened:
        file = pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES)
        if column not in file.schema_arrow.names:
            return None
        for _, value in _walk(file, column, [row]):
            return image_value(value)
    raise DataError(f"{url}#row={place} points past the end of its file")


def _row_and_column(place: str) -> tuple[int, str]:
    number, _, column = place.partition("&image=")
    return int(number), unquote(column) or "image"
