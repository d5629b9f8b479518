"""MMEB-train as training pairs.

The layout of `TIGER-Lab/MMEB-train`: one folder per subset (`A-OKVQA`, `CIRR`, ..., `WebQA`), in it Parquet files named
after their split (`original-00000-of-00001.parquet`, `diverse_instruction-...`), and the images below `images/` once
its archives are unpacked. Four string columns are required and checked: `qry`, `qry_image_path`, `pos_text`,
`pos_image_path`; an empty string or null stands for an absent part. Hard negatives (`neg_text`, `neg_image_path`) are
not read: the loss takes its negatives from the batch.

Either side of a pair may be a text, an image, or both (an image with an instruction or a question), so a pair is two
items, `query` and `positive`, each with an optional text and an optional image uri. The loss is symmetric in them, as
in images and captions.
"""

import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from slq.benchmarks.tables import generate, uri_prefix, write_rows
from slq.config import Section
from slq.errors import ConfigError, DataError

log = logging.getLogger(__name__)
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
_PLACEHOLDER = re.compile(r"<\|image(?:_\w+)?\|>")
_BATCH_ROWS = 8192

ITEM_PAIRS = pa.schema(
    [
        (name, pa.string())
        for name in (
            "id",
            "query_text",
            "query_uri",
            "positive_text",
            "positive_uri",
            "image_key",
            "subset",
        )
    ]
)
"""Pairs of items. `image_key` is the uri of the pair's first image, or its query text where it has none."""


class MmebConfig(Section):
    """Which part of MMEB-train to use, and where it is."""

    dir: Path = Path()
    """Folder with one folder per subset; relative paths belong to `data.dir`."""
    subsets: tuple[str, ...] = ()
    """Folders to read; all that hold Parquet files of the split if empty."""
    split: str = "original"
    """Which files: those whose name begins with it. `diverse_instruction` words the tasks in several ways."""
    images: str = "."
    """What the image paths are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""
    max_pairs: Annotated[int, Field(gt=0)] | None = 50_000
    """Most pairs of a subset, drawn at random, so that large subsets do not drown the others; all if null."""
    seed: int = 0
    """Seed of the draw."""


def write_mmeb(folder: Path, config: MmebConfig) -> None:
    """Write `train.parquet` with the columns of ITEM_PAIRS; does nothing twice.

    Sources that change are not noticed, for they are large: remove `mmeb.json` to read them again.

    Raises:
        ConfigError: A subset or its split is missing, images lie outside `folder`, or a file of another origin is in
            the way.
        DataError: A file lacks a column, or has one of another type.
        StorageError: The files cannot be written.
    """
    marker = folder / "mmeb.json"
    settings = config.model_dump(mode="json")
    if generate(marker, ("train.parquet",), settings, lambda: _write(folder, config)):
        log.info("%s: %s", folder, json.loads(marker.read_text())["counts"])


def _write(folder: Path, config: MmebConfig) -> dict[str, int]:
    prefix = uri_prefix(folder, config.images, "data.mmeb.images")
    sources = subset_files(folder / config.dir, config.subsets, config.split)
    for files in sources.values():
        for path in files:
            _require_columns(path)  # all of them first: a run must not fail after half an hour
    counts = dict.fromkeys((*sources, "left_out"), 0)
    write_rows(folder / "train.parquet", ITEM_PAIRS, _pairs(sources, config, prefix, counts))
    if counts["left_out"]:
        log.warning(
            "%s: %d pairs with an empty side left out", folder / config.dir, counts["left_out"]
        )
    return counts


def subset_files(root: Path, subsets: tuple[str, ...], split: str) -> dict[str, list[Path]]:
    """The Parquet files of each subset, in order.

    Raises:
        ConfigError: A subset has no files of the split, or none is found at all; what is there is named.
    """
    names = subsets or tuple(sorted(path.parent.name for path in root.glob(f"*/{split}-*.parquet")))
    found = {name: sorted((root / name).glob(f"{split}-*.parquet")) for name in names}
    for name, files in found.items():
        if not files:
            present = sorted(path.name for path in (root / name).glob("*.parquet"))
            raise ConfigError(
                f"data.mmeb.subsets: {root / name} has no {split}-*.parquet; it has {', '.join(present) or 'no tables'}"
            )
    if not found:
        raise ConfigError(
            f"data.mmeb.dir: no folder in {root} has {split}-*.parquet; it should hold TIGER-Lab/MMEB-train"
        )
    return found


def _require_columns(path: Path) -> None:
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for name in COLUMNS:
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}; MMEB-train has {', '.join(COLUMNS)}")
        kind = schema.field(name).type
        if not (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        ):
            raise DataError(f"{path}: column {name!r} holds {kind}; it must hold strings")


def _pairs(
    sources: dict[str, list[Path]], config: MmebConfig, prefix: str, counts: dict[str, int]
) -> Iterator[dict[str, str | None]]:
    """Rows of the training file; `counts` is brought up to date as they pass."""
    for subset, files in sources.items():
        chosen = _chosen(subset, files, config)
        for number, record in enumerate(_records(files)):
            if chosen is not None and not chosen[number]:
                continue
            row = _pair(record, f"{subset}-{number:07d}", subset, prefix)
            counts[subset if row else "left_out"] += 1
            if row:
                yield row


def _records(files: list[Path]) -> Iterator[dict[str, Any]]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=list(COLUMNS)):
            yield from batch.to_pylist()


def _chosen(subset: str, files: list[Path], config: MmebConfig) -> NDArray[np.bool_] | None:
    """(rows,) bool: which rows of a subset are taken; None for all. It depends on no other subset."""
    count = sum(pq.read_metadata(path).num_rows for path in files)
    if config.max_pairs is None or count <= config.max_pairs:
        return None
    rng = np.random.default_rng([config.seed, zlib.crc32(subset.encode())])
    chosen = np.zeros(count, dtype=bool)
    chosen[rng.choice(count, config.max_pairs, replace=False)] = True
    return chosen


def _pair(
    record: dict[str, Any], name: str, subset: str, prefix: str
) -> dict[str, str | None] | None:
    """One row of ITEM_PAIRS; None where a side has neither text nor image."""
    query, positive = plain_text(record["qry"]), plain_text(record["pos_text"])
    query_uri, positive_uri = (
        prefix + record[column] if record[column] else None
        for column in ("qry_image_path", "pos_image_path")
    )
    if not (query or query_uri) or not (positive or positive_uri):
        return None
    return {
        "id": name,
        "query_text": query,
        "query_uri": query_uri,
        "positive_text": positive,
        "positive_uri": positive_uri,
        "image_key": query_uri or positive_uri or query,
        "subset": subset,
    }


def plain_text(text: str | None) -> str | None:
    """The text without image placeholders such as `<|image_1|>`, which belong to another model's template.

    Returns:
        None where nothing is left. Line ends inside the text stay.
    """
    return _PLACEHOLDER.sub("", text or "").strip() or None
