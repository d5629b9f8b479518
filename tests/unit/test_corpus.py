"""Corpora: the plan covers every row once, rows come back as they were written, `uri` leads back to the image."""

import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import Corpus, Record, fetch_image, open_corpus
from pipelines.storage import ObjectStore
from slq.errors import ConfigError, DataError, StorageError
from tests.corpora import (
    NUM_ROWS,
    linked,
    members_of,
    png,
    rows,
    tar_bytes,
    upload,
    write_csv,
    write_images,
    write_jsonl,
    write_parquet,
)

SHARD_ROWS = (1, 4, 7, 23, 1000)
PARTS = (slice(0, 9), slice(9, 10), slice(10, None))  # of the rows, over three files
Shown = list[tuple[Any, ...]]


def shown(found: Record) -> tuple[Any, ...]:
    return found.image, found.text, found.problem


def expected(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["image"], item["text"], None


def in_one(place: Path, write: Callable[..., Path], suffix: str) -> str:
    write(place / f"c{suffix}", rows())
    return f"c{suffix}"


def write_tar(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members_of(items)))
    return path


def write_uris(path: Path, items: list[dict[str, Any]]) -> Path:
    """A Parquet file whose images lie beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(linked(path.parent, items)), path, row_group_size=5)
    return path


def write_texts(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n\n".join(f"{item['id']} für Ä".encode() for item in items))
    return path


WRITERS: dict[str, tuple[Callable[..., Path], str]] = {
    "parquet": (write_parquet, ".parquet"),
    "parquet with uris": (write_uris, ".parquet"),
    "jsonl": (write_jsonl, ".jsonl"),
    "csv": (write_csv, ".csv"),
    "webdataset": (write_tar, ".tar"),
    "text": (write_texts, ".txt"),
}


def wanted(kind: str, names: list[str]) -> Shown:
    """Id and content of every record, from the rows that were written."""
    found: Shown = []
    for name, part in zip(names, PARTS if len(names) > 1 else (slice(None),), strict=True):
        for number, item in enumerate(rows()[part]):
            if kind == "text":
                found.append((f"{name}:{number}", None, f"{item['id']} für Ä", None))
            elif kind == "webdataset":
                found.append((f"{name}:some/{item['id']}", *expected(item)))
            else:
                found.append((item["id"], *expected(item)))
    return found


@pytest.mark.parametrize("many", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_every_row_comes_once_in_order_and_its_uri_leads_back_to_its_image(
    tmp_path: Path, place: str, kind: str, many: bool, request: pytest.FixtureRequest
) -> None:
    write, suffix = WRITERS[kind]
    parts = PARTS if many else (slice(None),)
    names = [f"{'sub/' if n == 2 else ''}{n}{suffix}" for n, _ in enumerate(parts)]
    for name, part in zip(names, parts, strict=True):
        write(tmp_path / "c" / name, rows()[part])
    location = str(tmp_path / "c")
    if place == "s3":
        location = upload(tmp_path / "c", request.getfixturevalue("object_store"), "some/where")
    format_ = kind.split()[0]
    # the pictures of a manifest lie in its folder, so that the format must be named
    corpus = open_corpus(location if many else f"{location}/{names[0]}", format_)  # type: ignore[arg-type]
    for shard_rows in SHARD_ROWS:
        shards = list(corpus.shards(shard_rows))
        assert shards == list(corpus.shards(shard_rows))
        assert [shard.shard_id for shard in shards] == list(range(len(shards)))
        found = [list(corpus.records(shard)) for shard in shards]
        for shard, records in zip(shards, found, strict=True):
            assert shard.num_rows == (None if kind == "webdataset" else len(records))
            assert kind == "webdataset" or len(records) <= shard_rows
            assert corpus.state(shard) == shard.state
            corpus.require_unchanged(shard)
        everything = [record for records in found for record in records]
        assert [(r.id, *shown(r)) for r in everything] == wanted(kind, names)
    assert [fetch_image(record.uri) for record in everything] == [r.image for r in everything]
