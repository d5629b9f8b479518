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
    for shard_rows in SHARD_ROWS if place == "disk" else (4, 1000):
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


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_every_image_of_a_folder_comes_once_and_its_uri_leads_back_to_it(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    written = write_images(tmp_path / "c")
    (tmp_path / "c" / "notes.md").write_text("no image")
    location = str(tmp_path / "c")
    if place == "s3":
        location = upload(tmp_path / "c", request.getfixturevalue("object_store"), "some/where")
    corpus = open_corpus(location)
    assert (corpus.format, corpus.location) == ("images", location)
    for shard_rows in (1, 4, 11, 1000):
        shards = list(corpus.shards(shard_rows))
        assert shards == list(corpus.shards(shard_rows))
        found = [record for shard in shards for record in corpus.records(shard)]
        assert len(found) == len(written)
        assert {record.id: record.image for record in found} == written
        assert all(after.start == before.stop for before, after in pairwise(shards))
        assert max(shard.num_rows or 0 for shard in shards) <= shard_rows
        assert all(corpus.state(shard) == shard.state for shard in shards)
    assert [fetch_image(record.uri) for record in found] == [record.image for record in found]
    assert corpus.user_schema() == pa.schema([])


@pytest.mark.parametrize("kind", WRITERS)
def test_any_store_of_fsspec_will_do(tmp_path: Path, kind: str) -> None:
    import fsspec  # type: ignore[import-untyped]

    write, suffix = WRITERS[kind]
    write(tmp_path / f"c{suffix}", rows())
    location = f"memory://{tmp_path.name}/{kind.replace(' ', '-')}"
    fsspec.filesystem("memory").put(f"{tmp_path}/", f"{location}/", recursive=True)
    corpus = open_corpus(location, kind.split()[0])  # type: ignore[arg-type]
    shards = list(corpus.shards(7))
    found = [record for shard in shards for record in corpus.records(shard)]
    assert [(r.id, *shown(r)) for r in found] == wanted(kind, [f"c{suffix}"])
    assert [fetch_image(record.uri) for record in found] == [record.image for record in found]
    assert all(corpus.state(shard) == shard.state for shard in shards)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_corpus_can_be_pickled_and_reads_the_same(tmp_path: Path, kind: str) -> None:
    write, suffix = WRITERS[kind]
    corpus = open_corpus(write(tmp_path / f"c{suffix}", rows()))
    copy: Corpus = pickle.loads(pickle.dumps(corpus))
    assert list(copy.all_records()) == list(corpus.all_records())
    assert copy.user_schema() == corpus.user_schema()


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("parquet", {"tag": pa.int64()}),
        ("jsonl", {"tag": pa.int64()}),
        ("csv", {"tag": pa.string()}),
        ("webdataset", {"json": pa.string()}),
        ("text", {}),
    ],
)
def test_the_users_own_columns_are_carried(
    tmp_path: Path, kind: str, schema: dict[str, pa.DataType]
) -> None:
    write, suffix = WRITERS[kind]
    corpus = open_corpus(write(tmp_path / f"c{suffix}", rows()))
    assert {field.name: field.type for field in corpus.user_schema()} == schema
    found = [record.columns for record in corpus.all_records()]
    tags = {"csv": str, "webdataset": lambda n: f'{{"tag": {n}}}'}.get(kind, int)
    names = list(schema)
    assert found == [{name: tags(n) for name in names} for n in range(NUM_ROWS)]


def test_a_location_need_not_be_absolute_and_its_uris_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "c.parquet", rows())
    monkeypatch.chdir(tmp_path)
    corpora = [open_corpus("c.parquet"), open_corpus(f"file://{tmp_path}/c.parquet")]
    monkeypatch.chdir("/")  # a service runs elsewhere than the embedding command did
    for corpus in corpora:
        found = list(corpus.all_records())
        assert [fetch_image(record.uri) for record in found] == [row["image"] for row in rows()]


def test_a_link_to_a_table_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    write_parquet(tmp_path / "blobs" / "5f2c", rows())  # as model hubs keep files
    (tmp_path / "c.parquet").symlink_to(tmp_path / "blobs" / "5f2c")
    assert len(list(open_corpus(tmp_path / "c.parquet").all_records())) == NUM_ROWS


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        ({}, "auto", r"c holds nothing that can be embedded \(\.jpg, \.jpeg, .*\.txt\)"),
        ({"a.md": b""}, "auto", "holds nothing that can be embedded"),
        (
            {"a.png": b"", "b.txt": b"x"},
            "auto",
            r"the formats images \(a\.png\) and text \(b\.txt\); set data\.corpus_format",
        ),
        ({"a.jsonl.gz": b""}, "auto", r"a\.jsonl\.gz is compressed, and no shard can begin"),
        ({"a.jsonl": b"{}", "b.jsonl.zst": b""}, "jsonl", r"b\.jsonl\.zst is compressed"),
        ({"a.tgz": b""}, "auto", r"a\.tgz is compressed"),
        ({"a.png": b""}, "pictures", "data.corpus_format is 'pictures'; it must be auto, images"),
    ],
)
def test_a_folder_that_is_no_corpus_says_why(
    tmp_path: Path, files: dict[str, bytes], wanted: Any, message: str
) -> None:
    (tmp_path / "c").mkdir()
    for name, data in files.items():
        (tmp_path / "c" / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        list(open_corpus(tmp_path / "c", wanted).shards(4))


def test_a_format_that_is_named_passes_over_files_of_others(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", rows())
    write_images(tmp_path / "c")
    assert len(list(open_corpus(tmp_path / "c", "parquet").all_records())) == NUM_ROWS
    assert len(list(open_corpus(tmp_path / "c", "images").all_records())) == 11


def test_a_single_file_may_have_any_suffix_if_its_format_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "records.list", rows())
    assert len(list(open_corpus(tmp_path / "records.list", "jsonl").all_records())) == NUM_ROWS


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("gone.parquet", "auto", r"gone\.parquet does not exist"),
        (
            "c.bin",
            "auto",
            r"c\.bin is neither a folder nor a file that ends with \.parquet, \.tar, .*csv",
        ),
        ("c.png", "auto", r"c\.png is one file; images are read from a folder"),
        ("c.bin", "images", "images are read from a folder"),
        ("c.csv.gz", "auto", r"c\.csv\.gz is compressed"),
        ("pipe.jsonl", "auto", r"pipe\.jsonl is no regular file"),
        ("s3://", "auto", "is empty, or does not exist"),
    ],
)
def test_a_file_that_is_no_corpus_says_why(
    tmp_path: Path, name: str, wanted: Any, message: str, object_store: str
) -> None:
    for existing in ("c.bin", "c.png", "c.csv.gz"):
        (tmp_path / existing).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    location = f"s3://{object_store}" if name == "s3://" else tmp_path / name
    with pytest.raises(ConfigError, match=message):
        list(open_corpus(location, wanted).shards(4))


def test_a_missing_object_is_a_config_error(object_store: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://.*/gone\.parquet does not exist"):
        open_corpus(f"s3://{object_store}/gone.parquet")


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        ({"txt": "a"}, "c.parquet", "data.columns.txt is unknown; id, image, text, uri are mapped"),
        ({"id": "a", "text": "a"}, "c.parquet", "data.columns gives one column two meanings"),
        ({"id": "a"}, "c.txt", r"names columns of tables, but .*c\.txt is read as text"),
    ],
)
def test_column_names_that_make_no_sense_are_refused(
    tmp_path: Path, columns: dict[str, str], name: str, message: str
) -> None:
    write_parquet(tmp_path / "c.parquet", rows())
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ConfigError, match=message):
        open_corpus(tmp_path / name, columns=columns)


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(png(1))
    with pytest.raises(DataError, match=r"file name '.*udcff\.png' is no UTF-8; rename"):
        list(open_corpus(tmp_path).shards(4))


@pytest.mark.parametrize("kind", [*WRITERS, "images"])
def test_a_store_that_cannot_be_reached_is_no_records_fault(
    tmp_path: Path, object_store: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    if kind == "images":
        write_images(tmp_path)
    else:
        write, suffix = WRITERS[kind]
        write(tmp_path / f"c{suffix}", rows())
    location = upload(tmp_path, object_store, "c")
    corpus = open_corpus(location, kind.split()[0], retry_s=0.2)  # type: ignore[arg-type]
    (shard,) = corpus.shards(1000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # where nobody listens
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(corpus, "store", ObjectStore(corpus.store.location, 0.2))
    with pytest.raises(StorageError, match="check the store, its endpoint"):
        list(corpus.records(shard))
    with pytest.raises(StorageError):
        corpus.require_unchanged(shard)
    with pytest.raises(StorageError):
        fetch_image(f"{location}/x.png", retry_s=0.2)
