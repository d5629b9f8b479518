"""Writing a benchmark's tables: a row group at a time, each file whole or not at all, and once per settings."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slq.errors import ConfigError, SlqError, StorageError
from slq.files import write_json

ROWS_PER_GROUP = 16_384


def write_rows(
    path: Path,
    schema: pa.Schema,
    rows: Iterable[Mapping[str, Any]],
    *,
    rows_per_group: int = ROWS_PER_GROUP,
) -> int:
    """Write a Parquet file from a stream, holding one row group at a time.

    Returns:
        Rows written.

    Raises:
        OSError: The file cannot be written; what stood there before is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    stream, count = iter(rows), 0
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while block := list(islice(stream, rows_per_group)):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
            count += len(block)
    partial.replace(path)
    return count


def generate(
    marker: Path,
    files: Sequence[str],
    settings: Mapping[str, Any],
    write: Callable[[], Mapping[str, Any]],
    *,
    facts: Mapping[str, Any] | None = None,
) -> bool:
    """Let `write` make the files beside `marker`, unless it has done so with the same settings.

    The marker stands there, incomplete, before the first file does. So a run that was cut short is told from files
    that somebody else put there, and those are never overwritten.

    Args:
        marker: JSON file that records the settings, and what `write` returned.
        files: Names that `write` makes in the marker's folder.
        settings: What the files depend on, as plain data.
        write: Makes the files; its result, plain data too, is kept in the marker.
        facts: Stands in the marker too, and decides nothing.

    Returns:
        Whether anything was written.

    Raises:
        ConfigError: One of the files is there and is not ours.
        StorageError: The folder cannot be written.
    """
    try:
        recorded = _recorded(marker)
        present = [name for name in files if (marker.parent / name).exists()]
        current = recorded is not None and recorded.get("settings") == dict(settings)
        if recorded and current and recorded.get("complete") and len(present) == len(files):
            return False
        if recorded is None and present:
            raise ConfigError(
                f"{marker.parent / present[0]} exists and was not made from this recipe's data section; move it "
                "away, or name it in a recipe without that section"
            )
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"settings": dict(settings), "complete": False})
        counts = _counts(marker, files, write)
        ours = {"settings": dict(settings), "complete": True, "counts": counts}
        write_json(marker, {**(facts or {}), **ours})
    except OSError as error:
        raise StorageError(
            f"{marker.parent} cannot be written: {error}; free space or choose another folder"
        ) from None
    return True


def _counts(
    marker: Path, files: Sequence[str], write: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    try:
        return dict(write())
    except SlqError:
        if not any((marker.parent / name).exists() for name in files):
            marker.unlink()  # refused before the first file: nothing here is ours
        raise


def _recorded(marker: Path) -> dict[str, Any] | None:
    """What the marker says; an unreadable one says nothing but is ours."""
    try:
        values = json.loads(marker.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def uri_prefix(folder: Path, images: str, key: str) -> str:
    """What stands before an image's path in a `uri` column.

    Args:
        folder: The tables' folder.
        images: Folder of the images, relative to `folder` or absolute; or `s3://bucket/prefix`.
        key: The recipe key of `images`, for the message.

    Returns:
        `s3://bucket/prefix/`, or a relative path that ends in `/` (empty for `folder` itself).

    Raises:
        ConfigError: The images lie outside `folder`. Readers follow no table out of its own folder.
    """
    if images.startswith("s3://"):
        return images.rstrip("/") + "/"
    if "://" in images:
        raise ConfigError(f"{key}: {images} is neither a folder nor s3://; copy the images there")
    root, place = folder.resolve(), (folder / images).resolve()
    if not place.is_relative_to(root):
        raise ConfigError(
            f"{key}: {place} is not below {root}, and tables name only files below their own folder; set data.dir to "
            "a folder that holds the images"
        )
    relative = place.relative_to(root).as_posix()
    return "" if relative == "." else relative + "/"
