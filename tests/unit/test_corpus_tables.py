"""Tables as corpora: row groups, columns and their types, and images that rows name by uri."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus import Record, fetch_image, open_corpus
from pipelines.images import ImageReader
from slq.errors import DataError, MediaError, RefusedReadError, StorageError
from slq.media import DEFAULT_LIMITS
from tests.corpora import NUM_ROWS, png, rows, upload, write_images, write_parquet


def read(path: Path | str, **columns: str) -> list[Record]:
    return list(open_corpus(path, columns=columns).all_records())


@pytest.mark.parametrize("row_group_size", [1, 5, 100])
@pytest.mark.parametrize("shard_rows", [1, 4, 5, 7, 23, 1000])
def test_shards_need_not_end_with_row_groups(
    tmp_path: Path, shard_rows: int, row_group_size: int
) -> None:
    corpus = open_corpus(write_parquet(tmp_path / "c.parquet", rows(), row_group_size))
    found = list(corpus.all_records(shard_rows))
    assert [record.id for record in found] == [row["id"] for row in rows()]
    assert [record.columns for record in found] == [{"tag": n} for n in range(NUM_ROWS)]
    assert [fetch_image(record.uri) for record in found] == [row["image"] for row in rows()]


def test_a_shard_reads_only_its_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", rows())  # row groups of 5
    corpus = open_corpus(path)
    shards = list(corpus.shards(5))
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2)
    start = group.column(1).dictionary_page_offset or group.column(1).data_page_offset
    data[start : start + 20] = b"\xff" * 20  # of the third
    path.write_bytes(data)
    for shard in shards:
        if shard.start != 10:
            assert len(list(corpus.records(shard))) == shard.num_rows
    with pytest.raises(DataError, match=r"c\.parquet cannot be read: "):
        list(corpus.records(shards[2]))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "jpg": [png(1)], "caption": ["x"], "id": ["mine"]})
    pq.write_table(table, tmp_path / "c.parquet")
    (record,) = read(tmp_path / "c.parquet", id="key", image="jpg", text="caption")
    assert (record.id, record.image, record.text) == ("a", png(1), "x")
    assert record.columns == {"id": "mine"}  # the output refuses it by name
    assert fetch_image(record.uri) == png(1)


def test_a_column_name_of_any_letters_leads_back_to_the_image(tmp_path: Path) -> None:
    name = "the image#row=1 & / %41 ü"
    pq.write_table(pa.table({"id": ["a"], name: [png(3)]}), tmp_path / "c.parquet")
    (record,) = read(tmp_path / "c.parquet", image=name)
    assert fetch_image(record.uri) == png(3)


def test_images_with_their_path_beside_them_are_read(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(1), "path": "a.png"}, None], kind)
    pq.write_table(pa.table({"id": [1, 2], "image": images}), tmp_path / "c.parquet")
    found = read(tmp_path / "c.parquet")
    assert [(record.id, record.image) for record in found] == [("1", png(1)), ("2", None)]
    assert [fetch_image(record.uri) for record in found] == [png(1), None]


def test_a_row_without_id_is_a_bad_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", None], "text": ["x", "y"]}), tmp_path / "c.parquet")
    good, bad = read(tmp_path / "c.parquet")
    assert good.problem is None
    assert (bad.id, bad.reason) == ("c.parquet:1", "bad_row")
    assert bad.problem == "row 1 of c.parquet: it has no id"


def test_a_string_that_is_no_utf8_is_its_own_rows_problem(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xff\xfeb"))
    pq.write_table(pa.table({"id": ["x", "y", "z"], "text": texts}), tmp_path / "c.parquet")
    first, bad, last = read(tmp_path / "c.parquet")
    assert [(one.id, one.text, one.problem) for one in (first, last)] == [
        ("x", "a", None),
        ("z", "b", None),
    ]
    assert (bad.id, bad.text, bad.reason) == ("y", None, "bad_row")
    assert (bad.problem or "").startswith(
        "row 1 of c.parquet: column text is no UTF-8: 'utf-8' codec"
    )


def test_an_image_far_inside_of_a_row_group_is_found_without_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [png(n) for n in range(40)]
    table = pa.table({"id": [str(n) for n in range(40)], "image": images})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=25)
    monkeypatch.delattr(pq.ParquetFile, "read_row_group")
    uris = [record.uri for record in read(tmp_path / "c.parquet")]
    assert [fetch_image(uri) for uri in uris] == images


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failure_of_the_machine_is_no_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_images(tmp_path / "c")

    def failing(self: Path, *_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    corpus = open_corpus(str(tmp_path / "c"))
    (shard,) = corpus.shards(1000)
    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(StorageError, match=r"cannot be read: .*; run the same command again"):
        list(corpus.records(shard))


def test_a_uri_that_a_store_refuses_is_its_own_rows_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(url: str, *_: Any) -> bytes:
        raise RefusedReadError(f"{url} cannot be read: Forbidden")

    monkeypatch.setattr("pipelines.images._object_bytes", refused)
    long = "s3://bucket/" + "k" * 1025
    for n, uri in enumerate(("s3://other/secret.png", long)):
        write_row(tmp_path / f"{n}.parquet", uri)
    (forbidden,) = read(tmp_path / "0.parquet")
    assert (forbidden.reason, forbidden.problem) == (
        "unreadable",
        "s3://other/secret.png cannot be read: Forbidden",
    )
    assert read(tmp_path / "1.parquet")[0].reason == "path_refused"
    with pytest.raises(MediaError, match="Forbidden"):
        ImageReader(tmp_path).check("s3://other/secret.png")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"name": ["a"], "image": [b"x"]},
            r"needs a column `id`; it has \['image', 'name'\]: name the",
        ),
        ({"id": ["a"], "caption": ["x"]}, "needs one of `image`, `text`, `uri`; it has"),
        ({"id": [1.5], "text": ["x"]}, "column id is read as id, and cannot be double"),
        ({"id": ["a"], "text": [1]}, "column text is read as text, and cannot be int64"),
        ({"id": ["a"], "image": ["x"]}, "column image is read as image, and cannot be string"),
        ({"id": ["a"], "uri": [b"x"]}, "column uri is read as uri, and cannot be binary"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_says_why(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=rf"c\.parquet:? {message}"):
        read(tmp_path / "c.parquet")


def test_a_named_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", rows())
    with pytest.raises(DataError, match=r"no column 'caption', which data\.columns names for text"):
        read(tmp_path / "c.parquet", text="caption")


def test_an_empty_or_damaged_parquet_file_says_so(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", [])
    with pytest.raises(DataError, match=r"corpus .*c\.parquet is empty"):
        read(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"c\.parquet cannot be read"):
        read(path)


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([["a"], ["x"], ["y"]], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"has a column twice: \['id', 'text', 'text'\]; rename"):
        read(tmp_path / "c.parquet")


def test_files_of_a_folder_must_have_one_schema(tmp_path: Path) -> None:
    for name, tag in (("a", [1]), ("b", ["x"])):
        pq.write_table(
            pa.table({"id": ["i"], "text": ["x"], "tag": tag}), tmp_path / f"{name}.parquet"
        )
    with pytest.raises(
        DataError, match=r"b\.parquet: column tag is not the same as in .* first file"
    ):
        read(tmp_path)


@pytest.mark.parametrize("uri", ["pictures/a.png", "pictures/../pictures/a.png", "link.png"])
@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "c.csv"])
def test_a_uri_names_a_file_below_the_tables_own_folder(
    tmp_path: Path, uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tables" / "deep"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures/a.png").write_bytes(png(9))
    (folder / "link.png").symlink_to(folder / "pictures/a.png")
    write_row(folder / name, uri)
    (record,) = open_corpus(tmp_path / "tables", name.partition(".")[2]).all_records()  # type: ignore[arg-type]
    assert (record.id, record.image) == ("a", png(9))
    monkeypatch.chdir("/")
    assert fetch_image(record.uri) == png(9)


def write_row(path: Path, uri: str) -> None:
    """A table of one row that names an image."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": ["a"], "uri": [uri]}), path)
    elif path.suffix == ".jsonl":
        spelt = uri.replace("\x00", "\\u0000")
        path.write_text(f'{{"id": "a", "uri": "{spelt}"}}\n')
    else:
        path.write_text(f"id,uri\na,{uri}\n")


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    """A folder for a table, with a picture outside of it and links that lead there."""
    (tmp_path / "secret.png").write_bytes(png(66))
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    (inner / "up").symlink_to(tmp_path)
    (inner / "loop").symlink_to(inner / "loop")
    (inner / "c.parquet#row=0").write_bytes(png(7))
    return inner


OUTSIDE = [
    "../secret.png",
    "up/secret.png",
    "link.png",
    "{outer}/secret.png",
    "{outer}/inner/c.parquet",
    "https://example.org/a.png",
    "http://169.254.169.254/latest",
    "file:///etc/hostname",
    "s3://bucket",
    "s3:///key",
    "a\x00.png",
    "c.parquet#row=0",
    "s3://bucket/c.parquet#row=0",
    "x.tar#bytes=0-5",
    ".",
]


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "c.csv"])
@pytest.mark.parametrize("uri", OUTSIDE[:-1])
def test_a_uri_that_leaves_the_tables_folder_is_refused(
    inner: Path, tmp_path: Path, uri: str, name: str
) -> None:
    write_row(inner / name, uri.format(outer=tmp_path))
    (record,) = read(inner / name)
    assert (record.image, record.reason) == (None, "path_refused")
    assert "no relative path" in str(record.problem) or "names no file" in str(record.problem)
    assert record.uri == f"{inner}/{name}#{'row' if name == 'c.parquet' else 'record'}=0"
    assert fetch_image(record.uri) is None


@pytest.mark.parametrize("uri", [*OUTSIDE, "../gone.png"])
def test_bytes_win_over_the_uri_and_are_what_is_shown_later(
    inner: Path, tmp_path: Path, uri: str
) -> None:
    table = pa.table({"id": ["a"], "uri": [uri.format(outer=tmp_path)], "image": [png(1)]})
    pq.write_table(table, inner / "c.parquet")
    (record,) = read(inner / "c.parquet")
    assert (record.image, record.problem) == (png(1), None)
    assert record.uri == f"{inner}/c.parquet#row=0"
    assert fetch_image(record.uri) == png(1)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("a.png", None),
        ("./x/../a.png", None),
        ("{bucket}/elsewhere/a.png", None),
        ("gone.png", "unreadable"),
        ("../elsewhere/a.png", "path_refused"),
        ("x/../../elsewhere/a.png", "path_refused"),
        ("/elsewhere/a.png", "path_refused"),
        ("..", "path_refused"),
        (".", "path_refused"),
        ("https://example.org/a.png", "path_refused"),
        ("file:///etc/hostname", "path_refused"),
    ],
)
def test_a_uri_in_a_table_of_an_object_store_stays_below_its_prefix_or_is_a_whole_one(
    tmp_path: Path, object_store: str, uri: str, reason: str | None
) -> None:
    for place in ("c/deep/a.png", "elsewhere/a.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(png(8))
    write_row(tmp_path / "c/deep/t.parquet", uri.format(bucket=f"s3://{object_store}/data"))
    location = upload(tmp_path, object_store, "data")
    (record,) = open_corpus(f"{location}/c", "parquet").all_records()
    assert (record.image is None, record.problem and record.reason) == (reason is not None, reason)
    assert fetch_image(record.uri) == record.image


def test_a_local_table_may_name_objects(tmp_path: Path, object_store: str) -> None:
    images = write_images(tmp_path / "c")
    location = upload(tmp_path / "c", object_store, "c")
    table = pa.table({"id": list(images), "uri": [f"{location}/{name}" for name in images]})
    pq.write_table(table, tmp_path / "c.parquet")
    found = read(tmp_path / "c.parquet")
    assert {record.id: record.image for record in found} == images
    assert [record.uri for record in found] == table["uri"].to_pylist()


def test_a_file_of_a_folder_cannot_pass_for_a_row_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "c.parquet#row=0").write_bytes(png(7))
    (tmp_path / "c.parquet#row=0.png").write_bytes(png(7))
    (record,) = read(tmp_path)  # the other one is no image by its suffix
    assert (record.id, record.image) == ("c.parquet#row=0.png", None)
    assert (record.reason, "rename it" in str(record.problem)) == ("path_refused", True)


@pytest.mark.parametrize("kind", ["folder", "uri"])
def test_a_file_above_the_byte_limit_is_never_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "c"
    place.mkdir()
    with (place / "large.png").open("wb") as file:
        file.truncate(DEFAULT_LIMITS.max_bytes + 1)
    pq.write_table(pa.table({"id": ["a"], "uri": ["large.png"]}), place / "c.parquet")
    corpus = open_corpus(place, "images") if kind == "folder" else open_corpus(place / "c.parquet")
    opened: list[str] = []
    genuine = Path.open

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return genuine(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    (record,) = corpus.all_records()
    assert (record.image, record.reason) == (None, "too_many_bytes")
    assert "large.png" not in opened
    with pytest.raises(MediaError, match="at most"):
        fetch_image(str(place / "large.png"))
    assert "large.png" not in opened


def test_an_object_above_the_byte_limit_is_refused(
    tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    location = upload(tmp_path, object_store, "c")
    monkeypatch.setattr("pipelines.images.DEFAULT_LIMITS", type(DEFAULT_LIMITS)(max_bytes=10))
    (record,) = open_corpus(location).all_records()
    assert (record.image, record.reason) == (None, "too_many_bytes")
    assert record.problem == f"{location}/a.png has more than 10 bytes; at most 10 are allowed"


@pytest.mark.timeout(20)
def test_a_pipe_named_like_an_image_does_not_hang_the_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (record,) = read(tmp_path)
    assert (record.image, record.reason) == (None, "unreadable")


@pytest.mark.timeout(20)
def test_a_pipe_named_like_a_table_does_not_hang_the_plan(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: it is gone, or no regular"):
        read(tmp_path)


def test_one_missing_picture_does_not_stop_the_shard(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    table = pa.table({"id": ["a", "b", "c"], "uri": ["a.png", "gone.png", None]})
    pq.write_table(table, tmp_path / "c.parquet")
    first, second, third = read(tmp_path / "c.parquet")
    assert first.image == png(1)
    assert (second.image, second.reason) == (None, "unreadable")
    assert (third.image, third.problem) == (None, None)


def test_a_dangling_link_in_a_folder_does_not_stop_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "named-like-an-image.png").mkdir()
    corpus = open_corpus(tmp_path)
    (shard,) = corpus.shards(10)
    first, second = corpus.records(shard)
    assert first.image == png(1)
    assert (second.image, second.reason) == (None, "unreadable")
    corpus.require_unchanged(shard)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gone.png", r"gone\.png cannot be read"),
        ("gone.parquet#row=0", r"gone\.parquet#row=0 cannot be read"),
        (f"c.parquet#row={NUM_ROWS}", "points past the end of its file"),
        ("c.parquet#bytes=0-99999", "points past the end of its file"),
        ("c.parquet#bytes=7", "cannot be read"),
        ("c.parquet#bytes=0-99999999999", "at most"),
        ("a.png#row=0", "cannot be read"),
    ],
)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_uri_that_leads_nowhere_is_a_data_error(
    tmp_path: Path, uri: str, message: str, place: str, request: pytest.FixtureRequest
) -> None:
    write_parquet(tmp_path / "c.parquet", rows())
    (tmp_path / "a.png").write_bytes(png(1))
    location = str(tmp_path)
    if place == "s3":
        location = upload(tmp_path, request.getfixturevalue("object_store"), "c")
    with pytest.raises(DataError, match=message):
        fetch_image(f"{location}/{uri}")


def test_a_reader_of_training_images_and_a_corpus_refuse_alike(inner: Path, tmp_path: Path) -> None:
    for uri in OUTSIDE[:-1]:
        with pytest.raises(MediaError) as caught:
            ImageReader(inner).read(uri.format(outer=tmp_path))
        assert caught.value.reason == "path_refused"
