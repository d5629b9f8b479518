"""The benchmark as files: rows in KARR's form with their provenance, and the tables that `slq eval` measures on."""

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipelines.fetching import fetch_images
from slq.arrow import ITEMS, RELEVANCE
from slq.benchmarks.tables import write_rows
from slq.errors import DataError, StorageError

FOLDER = "benchmark"
KIND = "knowledge"
_IMAGES_AT_ONCE = 64
_VOTE = pa.struct([("judge", pa.string()), ("accept", pa.bool_()), ("margin", pa.float32())])
_ANNOTATION = pa.struct(
    [("annotator", pa.string()), ("decision", pa.string()), ("note", pa.string())]
)
KARR = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("text", pa.string()),
        ("category", pa.string()),
        ("clue_type", pa.string()),
        ("item_id", pa.string()),
        ("source_id", pa.string()),
        ("original", pa.string()),
        ("target", pa.string()),
        ("clue", pa.string()),
        ("rewriter", pa.string()),
        ("model", pa.string()),
        ("prompt_hash", pa.string()),
        ("seed", pa.int64()),
        ("tries", pa.int32()),
        ("checks", pa.list_(pa.string())),
        ("lead", pa.float32()),
        ("votes", pa.list_(_VOTE)),
        ("annotations", pa.list_(_ANNOTATION)),
        ("made", pa.string()),
    ]
)
"""A row of the benchmark: `image`, `text` and `category` as KARR-Bench has them, then where it comes from."""
QUERIES = pa.schema(
    [*ITEMS, ("kind", pa.string()), ("category", pa.string()), ("clue_type", pa.string())]
)
IMAGES = "images"
Row = dict[str, Any]


def row_id(source_id: str) -> str:
    """The id of a row of the benchmark."""
    return f"karr-{source_id}"


def export(
    folder: Path, rows: Sequence[Row], gallery: Sequence[tuple[str, str]], retry_s: float
) -> None:
    """Write all files, each whole or not at all.

    Args:
        folder: Where they go.
        rows: Of the benchmark.
        gallery: (item id, uri) of the images to search among.
        retry_s: How long failures of an object store are tried again.

    Raises:
        DataError: An image is gone since its caption was worded anew.
        StorageError: A file cannot be written, or a store cannot be reached.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = _with_images(map(_told, rows), rows, retry_s)
        names: list[str] = []
        write_rows(folder / "karr.parquet", KARR, _saved(folder, whole, names))
        lines = zip(map(_told, rows), names, strict=True)
        _write_lines(folder / "karr.jsonl", ({**row, "image": name} for row, name in lines))
        for stale in {*(folder / IMAGES).glob("*")} - {folder / name for name in names}:
            stale.unlink()
        items = [{"id": name, "text": None, "uri": uri} for name, uri in gallery]
        write_rows(folder / "gallery.parquet", ITEMS, _with_images(iter(items), items, retry_s))
        write_rows(folder / "queries.parquet", QUERIES, map(_query, rows))
        write_rows(folder / "relevance.parquet", RELEVANCE, map(_answer, rows))
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space and run the same command again"
        ) from None


def _told(row: Row) -> Row:
    names = [name for name in KARR.names if name not in ("id", "image", "text")]
    told = {name: row[name] for name in names}
    if told["lead"] is not None and not math.isfinite(told["lead"]):
        told["lead"] = None  # older folders hold infinity where there was no neighbour
    return {"id": row_id(row["source_id"]), "text": row["caption"], **told}


def _with_images(told: Iterator[Row], rows: Sequence[Row], retry_s: float) -> Iterator[Row]:
    """Rows with the image behind the `uri` of each; few are in memory at a time."""
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        uris = [row["uri"] for row in rows[start : start + _IMAGES_AT_ONCE]]
        images = fetch_images(list(dict.fromkeys(uris)), retry_s)
        for uri in uris:
            data = images[uri]
            if not isinstance(data, bytes):
                raise DataError(
                    f"image {uri} is gone since its caption was worded anew: {data or 'nothing is there'}; put it back "
                    "and run `slq karr` again"
                )
            yield {**next(told), "image": data}


def _saved(folder: Path, rows: Iterator[Row], names: list[str]) -> Iterator[Row]:
    """The rows, with each one's image also saved as a file; `names` gains its name, which its content gives."""
    (folder / IMAGES).mkdir(exist_ok=True)
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as opened:
            suffix = str(opened.format).lower()
        name = f"{IMAGES}/{hashlib.sha256(row['image']).hexdigest()[:32]}.{suffix}"
        path = folder / name
        if not path.is_file():
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(row["image"])
            partial.replace(path)
        names.append(name)
        yield row


def _write_lines(path: Path, rows: Iterator[Row]) -> None:
    """JSON Lines; `image` is a path from the file's folder."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)


def _query(row: Row) -> Row:
    name, text = row_id(row["source_id"]), row["caption"]
    told = {"kind": KIND, "category": row["category"], "clue_type": row["clue_type"]}
    return {"id": name, "image": None, "text": text, **told}


def _answer(row: Row) -> Row:
    return {"query_id": row_id(row["source_id"]), "item_id": row["item_id"], "grade": 1}
