"""Pairs from bytes, files and S3 are the same; tables read nothing outside their folder; bad ones are named."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import pairs as module
from pipelines.images import ImageReader
from pipelines.pairs import Pairs
from pipelines.storage import ObjectStore
from slq.benchmarks.mmeb import ITEM_PAIRS
from slq.errors import DataError, MediaError, StorageError
from slq.media import DEFAULT_LIMITS
from slq.schema import Item

NUM_IMAGES = 6


def png(shade: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image: Image.Image | None) -> int:
    assert image is not None
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def written(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=4)
    return path


def local_pairs(folder: Path, **changes: Any) -> Path:
    """Two captions for each image, in files below the table's folder; `changes` by `i<row>`."""
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for n in range(2 * NUM_IMAGES):
        name = f"images/{n // 2}.png"
        (folder / name).write_bytes(png(n // 2))
        rows.append({"id": f"p{n}", "uri": name, "text": f"caption {n}"})
    for key, change in changes.items():
        rows[int(key.removeprefix("i"))] |= change
    return written(folder / "pairs.parquet", rows)


@pytest.fixture
def bucket(object_store: str) -> str:
    """An S3 prefix that holds the images as 0.png and so on."""
    import s3fs

    store = s3fs.S3FileSystem()
    for n in range(NUM_IMAGES):
        store.pipe_file(f"{object_store}/coco/{n}.png", png(n))
    return f"s3://{object_store}/coco"


def sha256(image: bytes) -> str:
    """The digest of a pair whose query is an image alone."""
    return hashlib.sha256(image + b"\x00").hexdigest()


def s3_pairs(folder: Path, prefix: str) -> Path:
    rows = [
        {"id": f"p{n}", "uri": f"{prefix}/{n // 2}.png", "text": f"caption {n}"}
        for n in range(2 * NUM_IMAGES)
    ]
    return written(folder / "s3.parquet", rows)


def test_bytes_files_and_s3_read_the_same(tmp_path: Path, bucket: str) -> None:
    rows = [
        {"id": f"p{n}", "image": png(n // 2), "text": f"caption {n}"} for n in range(2 * NUM_IMAGES)
    ]
    tables = [
        written(tmp_path / "bytes.parquet", rows),
        local_pairs(tmp_path),
        s3_pairs(tmp_path, bucket),
    ]
    for path in tables:
        pairs = Pairs(path)
        assert len(pairs) == 2 * NUM_IMAGES
        assert [pairs.digest(n) for n in range(len(pairs))] == [sha256(r["image"]) for r in rows]
        texts = [pairs.item(n, "positive").text for n in range(len(pairs))]
        assert texts == [row["text"] for row in rows]
        query, positive = pairs.item(3, "query"), pairs.item(3, "positive")
        assert (shade(query.image), query.text) == (1, None)
        assert (positive.image, positive.text) == (None, "caption 3")
        assert pairs.check(0.0) == (list(range(len(pairs))), {})


def test_image_keys_come_from_their_column_the_bytes_or_the_uri(tmp_path: Path) -> None:
    assert Pairs(local_pairs(tmp_path)).image_keys == [
        f"images/{n // 2}.png" for n in range(2 * NUM_IMAGES)
    ]
    row = {"id": "a", "image": png(1), "text": "x"}
    digest = hashlib.sha256(png(1)).hexdigest()
    assert Pairs(written(tmp_path / "b.parquet", [row])).image_keys == [digest]
    assert Pairs(written(tmp_path / "c.parquet", [row | {"image_key": "k"}])).image_keys == ["k"]
    assert Pairs(written(tmp_path / "d.parquet", [row | {"image_key": 7}])).image_keys == ["7"]


def test_captions_of_one_image_share_the_key_object(tmp_path: Path) -> None:
    keys = Pairs(local_pairs(tmp_path)).image_keys
    assert keys[0] is keys[1]
    assert Pairs(tmp_path / "pairs.parquet").query_keys == keys


def test_bytes_win_over_a_uri_and_either_may_be_null(tmp_path: Path) -> None:
    local_pairs(tmp_path)
    rows = [
        {"id": "a", "image": png(9), "uri": "images/0.png", "text": "x"},
        {"id": "b", "image": None, "uri": "images/1.png", "text": "y"},
    ]
    pairs = Pairs(written(tmp_path / "both.parquet", rows))
    assert [pairs.digest(n) for n in range(2)] == [sha256(png(9)), sha256(png(1))]
    assert pairs.check(0.0)[0] == [0, 1]
    with pytest.raises(DataError, match=r"none\.parquet: 1 pairs have no image; remove them"):
        Pairs(written(tmp_path / "none.parquet", [*rows, rows[1] | {"uri": None}]))


def test_pairs_of_items_have_two_sides(tmp_path: Path) -> None:
    local_pairs(tmp_path)
    images = ("images/0.png", "images/1.png")
    forms: list[tuple[Any, ...]] = [  # query text and uri, positive text and uri, key
        ("what?", images[0], "a dog", None, images[0]),
        ("find a dog", None, None, images[1], images[1]),
        (None, images[0], "a cat", None, images[0]),
        ("a", None, "b", None, "a"),
    ]
    names = [field.name for field in ITEM_PAIRS]
    rows = [dict(zip(names, (f"p{n}", *form, "S"), strict=True)) for n, form in enumerate(forms)]
    pairs = Pairs(written(tmp_path / "items.parquet", rows, ITEM_PAIRS))
    both, found = pairs.item(0, "query"), pairs.item(1, "positive")
    assert (shade(both.image), both.text) == (0, "what?")
    assert (shade(found.image), found.text) == (1, None)
    assert pairs.item(1, "query") == Item(text="find a dog")
    assert pairs.query_keys == ["images/0.png\nwhat?", "\nfind a dog", "images/0.png", "\na"]
    assert pairs.image_keys == [form[-1] for form in forms]
    assert (shade(pairs.item(2, "query").image), pairs.item(2, "positive").text) == (0, "a cat")
    assert pairs.digest(0) == hashlib.sha256(png(0) + b"\x00what?").hexdigest()
    assert not pairs.image_to_text
    assert Pairs(tmp_path / "pairs.parquet").image_to_text
    assert pairs.check(0.0) == ([0, 1, 2, 3], {})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"], "text": ["x"]}, "id, image and text: it has the columns id, text"),
        ({"text": ["x"], "uri": ["x"]}, "it has the columns text, uri"),
        ({"id": ["a"], "query_text": ["x"], "query_uri": ["y"]}, "cannot be read as pairs"),
        ({"id": ["a"], "uri": ["x"], "text": [None]}, "1 pairs have no text; remove them"),
        ({"id": ["a"], "uri": ["x"], "text": [{"de": "x"}]}, "cannot be read as pairs"),
    ],
)
def test_a_table_that_holds_no_pairs_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        Pairs(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("../secret.png", "file below"),
        ("images/../../secret.png", "file below"),
        ("http://host/x.png", "file below"),
        ("images/link.png", "file below"),
        ("images/absent.png", "cannot be read"),
        ("images", "no regular file"),
        ("a\0b", "names no file"),
    ],
)
def test_a_table_reads_no_file_outside_its_folder(tmp_path: Path, uri: str, reason: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=reason):
        ImageReader(folder, absolute=True).read(uri)


def test_absolute_paths_inside_the_folder_are_read(tmp_path: Path) -> None:
    local_pairs(tmp_path)
    path = str(tmp_path / "images" / "2.png")
    assert ImageReader(tmp_path, absolute=True).read(path) == png(2)
    with pytest.raises(DataError, match="no relative path of a file below"):
        ImageReader(tmp_path).read(path)


def test_bad_pairs_are_left_out_by_name_and_too_many_are_refused(tmp_path: Path) -> None:
    path = local_pairs(tmp_path, i3={"text": " \t"}, i4={"uri": "images/gone.png"})
    usable, refused = Pairs(path).check(0.2)
    assert usable == [n for n in range(2 * NUM_IMAGES) if n not in (3, 4)]
    assert refused["p3"] == "the caption is empty"
    assert "gone.png cannot be read" in refused["p4"]
    with pytest.raises(
        DataError, match="2 of 12 training pairs cannot be used, first 'p3': the caption"
    ):
        Pairs(path).check(0.1)


def test_the_check_of_uris_is_a_sample_and_its_share_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHECK_IMAGES", 3)
    path = local_pairs(tmp_path)
    read: list[str] = []
    check = ImageReader.check
    monkeypatch.setattr(
        ImageReader, "check", lambda self, uri: (read.append(uri), check(self, uri))[1]
    )
    assert Pairs(path).check(0.0) == (list(range(12)), {})
    assert len(read) == 3
    for name in read[:1]:
        (tmp_path / name).write_bytes(b"broken")
    # one of three images tried is bad, so two pairs are found and 6 * 1/3 more are to be expected
    with pytest.raises(
        DataError, match=r"4 of 12 training pairs cannot be used \(judged by 3 images\)"
    ):
        Pairs(path).check(0.3)
    usable, refused = Pairs(path).check(0.34)
    assert (len(usable), len(refused)) == (10, 2)


def test_images_in_the_table_are_decoded_to_their_end(tmp_path: Path) -> None:
    cut = png(3, (300, 300))[:-40]  # the header is whole
    rows = [{"id": "a", "image": cut, "text": "x"}, {"id": "b", "image": png(2), "text": "y"}]
    usable, refused = Pairs(written(tmp_path / "x.parquet", rows)).check(0.5)
    assert usable == [1]
    assert list(refused) == ["a"]


def test_a_missing_or_too_large_object_is_one_bad_image(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ImageReader(tmp_path)
    for uri in (f"{bucket}/absent.png", "s3://absent-bucket/x.png"):
        with pytest.raises(DataError, match="cannot be read"):
            reader.read(uri)
    monkeypatch.setattr("pipelines.images.DEFAULT_LIMITS", type(DEFAULT_LIMITS)(max_bytes=10))
    with pytest.raises(
        MediaError, match=r"0\.png has more than 10 bytes; at most 10 are"
    ) as caught:
        reader.read(f"{bucket}/0.png")
    assert caught.value.reason == "too_many_bytes"


def test_the_check_reads_only_the_head_of_an_object(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.images._HEAD_BYTES", 60)  # a PNG's header is shorter
    reader = ImageReader(tmp_path)
    ranges: list[tuple[int, int | None]] = []
    read = ObjectStore.read

    def watched(self: ObjectStore, name: str, start: int = 0, stop: int | None = None) -> bytes:
        ranges.append((start, stop))
        return read(self, name, start, stop)

    monkeypatch.setattr(ObjectStore, "read", watched)
    reader.check(f"{bucket}/0.png")
    assert ranges == [(0, 60)]
    monkeypatch.setattr("pipelines.images._HEAD_BYTES", 20)  # not enough: the whole object is read
    reader.check(f"{bucket}/0.png")
    assert ranges[1:] == [(0, 20), (0, DEFAULT_LIMITS.max_bytes + 1)]


def test_a_store_that_cannot_be_reached_is_no_pairs_fault(
    tmp_path: Path, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    pairs = Pairs(s3_pairs(tmp_path, "s3://pictures/coco"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # where nobody listens
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(pairs, "_images", ImageReader(tmp_path, retry_s=0.2))
    with pytest.raises(StorageError, match=r"0\.png cannot be read: .*check the store"):
        pairs.item(0, "query")
    with pytest.raises(StorageError):
        pairs.check(1.0)


def test_a_bad_image_that_the_check_missed_is_named_when_it_is_read(tmp_path: Path) -> None:
    pairs = Pairs(local_pairs(tmp_path))
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    with pytest.raises(MediaError, match="none of JPEG") as caught:
        pairs.item(0, "query")
    assert caught.value.reason == "unknown_format"
    assert pairs.item(0, "positive").text == "caption 0"  # needs no image
