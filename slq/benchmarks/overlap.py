"""Refuses training files that hold images of a benchmark."""

import logging
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from slq.errors import DataError

log = logging.getLogger(__name__)
_COCO_PREFIX = re.compile(r"^COCO_(?:train|val|test)\d{4}_")
_COLUMNS = ("uri", "query_uri", "positive_uri", "image_key", "filename")


def file_stem(path: str) -> str:
    """What names an image in every release: the file's name without suffix and without COCO's old prefix."""
    return _COCO_PREFIX.sub("", PurePosixPath(path).stem)


def refuse_shared_images(train: Path, held_out: Collection[str], *, by_name: bool) -> None:
    """Refuse a training file that names images of a benchmark.

    Args:
        train: Parquet file of training pairs; its columns `uri`, `query_uri`, `positive_uri`, `image_key` and
            `filename` are compared.
        held_out: The benchmark's uris.
        by_name: Compare file names in any folder and spelling too, not only whole uris.

    Raises:
        DataError: They share an image; the first is named. Or the file cannot be read.
    """
    whole = set(held_out)
    stems = {file_stem(uri) for uri in whole} if by_name else set()
    try:
        file = pq.ParquetFile(train)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for name in columns:
                for value in batch[name].to_pylist():
                    if value is not None and (value in whole or file_stem(str(value)) in stems):
                        raise DataError(
                            f"{train}: {name} {value!r} is an image of the benchmark; training on what is measured is "
                            "refused, remove it"
                        )
    except (OSError, ValueError) as error:
        raise DataError(f"{train} cannot be compared with the benchmark: {error}") from None
    if not columns:
        log.warning(
            "%s has none of %s: it was not compared with the benchmark", train, ", ".join(_COLUMNS)
        )


def refuse_shared_names(held_out: Collection[str], train: Collection[str], where: Path) -> None:
    """Refuse a split whose ids also stand in the publisher's training split.

    Raises:
        DataError: They do; the first is named.
    """
    shared = sorted(set(held_out) & set(train))
    if shared:
        raise DataError(
            f"{where}: {len(shared)} images of the measured split are in the training split too, first {shared[0]!r}; "
            "get the publisher's files anew"
        )
