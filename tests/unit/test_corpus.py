"""Corpora: the plan covers every row once, rows come back as they were written, `uri` leads back to the image."""

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.corpus import (
    Record,
    ShardPlan,
    corpus_digest,
    corpus_state,
    fetch_image,
    plan_shards,
    read_shard,
    require_unchanged,
)
from slq.errors import ConfigError, DataError
from slq.media import DEFAULT_LIMITS

NUM_ROWS = 23


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows() -> list[dict[str, Any]]:
    return [
        {"id": f"r{n:02d}", "image": png(n) if n % 3 else None, "text": f"row {n}", "tag": n}
        for n in range(NUM_ROWS)
    ]


def parquet(path: Path, row_group_size: int = 5) -> Path:
    pq.write_table(pa.Table.from_pylist(rows()), path, row_group_size=row_group_size)
    return path


def folder(path: Path) -> Path:
    for n in range(11):
        place = path / ("deep/er" if n % 2 else "") / f"{n:02d}.{('png', 'PNG')[n % 3 == 0]}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(n))
    (path / "notes.txt").write_text("no image")
    return path


def everything(corpus: Path, shard_rows: int) -> list[Record]:
    return [record for plan in plan_shards(corpus, shard_rows) for record in read_shard(plan)]


@pytest.mark.parametrize("row_group_size", [1, 5, 100])
@pytest.mark.parametrize("shard_rows", [1, 4, 5, 7, 23, 1000])
def test_shards_of_a_parquet_file_hold_every_row_once_in_order(
    tmp_path: Path, shard_rows: int, row_group_size: int
) -> None:
    corpus = parquet(tmp_path / "c.parquet", row_group_size)
    found = everything(corpus, shard_rows)
    written = rows()
    assert [record.id for record in found] == [row["id"] for row in written]
    assert [record.image for record in found] == [row["image"] for row in written]
    assert [record.text for record in found] == [row["text"] for row in written]
    assert [record.columns for record in found] == [{"tag": row["tag"]} for row in written]


@pytest.mark.parametrize("shard_rows", [1, 4, 11, 1000])
def test_shards_of_a_folder_hold_every_image_once(tmp_path: Path, shard_rows: int) -> None:
    corpus = folder(tmp_path / "c")
    found = everything(corpus, shard_rows)
    assert len(found) == 11
    assert {record.id: record.image for record in found} == {
        str(path.relative_to(corpus)): path.read_bytes()
        for path in corpus.rglob("*")
        if path.suffix.lower() == ".png"
    }
    assert [record.id for record in found] == [
        record.id for record in everything(corpus, shard_rows)
    ]


@pytest.mark.parametrize("shard_rows", [1, 4, 7, 23, 50])
def test_the_plan_is_the_same_twice_and_its_shards_meet_without_gap(
    tmp_path: Path, shard_rows: int
) -> None:
    corpus = parquet(tmp_path / "c.parquet")
    plans = plan_shards(corpus, shard_rows)
    assert plans == plan_shards(corpus, shard_rows)
    assert [plan.shard_id for plan in plans] == list(range(len(plans)))
    borders = [plan.start for plan in plans] + [plans[-1].stop]
    assert borders == sorted(set(borders))
    assert (borders[0], borders[-1]) == (0, NUM_ROWS)
    assert sum(plan.num_rows for plan in plans) == NUM_ROWS
    assert all(plan.stop == after.start for plan, after in pairwise(plans))
    assert max(plan.num_rows for plan in plans) <= shard_rows


def test_a_uri_leads_back_to_the_image_in_parquet(tmp_path: Path) -> None:
    found = everything(parquet(tmp_path / "c.parquet"), 7)
    assert [fetch_image(record.uri) for record in found] == [record.image for record in found]


def test_a_uri_leads_back_to_the_image_in_a_folder(tmp_path: Path) -> None:
    for record in everything(folder(tmp_path / "c"), 4):
        assert fetch_image(record.uri) == record.image


@pytest.mark.parametrize("uri", ["pictures/a.png", "pictures/../pictures/a.png", "link.png"])
def test_a_uri_column_names_files_beside_the_table_and_leads_back_to_them(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pictures/a.png"
    file.parent.mkdir()
    file.write_bytes(png(9))
    (tmp_path / "link.png").symlink_to(file)
    pq.write_table(pa.table({"id": ["a"], "uri": [uri]}), tmp_path / "c.parquet")
    (record,) = everything(tmp_path / "c.parquet", 10)
    assert record.image == png(9)
    monkeypatch.chdir("/")  # a service runs elsewhere than the embedding command did
    assert fetch_image(record.uri) == png(9)


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
    "file:///etc/hostname",
    "a\x00.png",
    "c.parquet#row=0",
    ".",
]


@pytest.mark.parametrize("uri", OUTSIDE[:-1])
def test_a_uri_that_leaves_the_tables_folder_is_refused(
    inner: Path, tmp_path: Path, uri: str
) -> None:
    uri = uri.format(outer=tmp_path)
    pq.write_table(pa.table({"id": ["a"], "uri": [uri]}), inner / "c.parquet")
    (record,) = everything(inner / "c.parquet", 10)
    assert (record.image, record.reason) == (None, "path_refused")
    assert "no relative path" in str(record.problem) or "names no file" in str(record.problem)
    assert record.uri == f"{inner}/c.parquet#row=0"
    assert fetch_image(record.uri) is None


@pytest.mark.parametrize("uri", [*OUTSIDE, "../gone.png"])
def test_bytes_win_over_the_uri_and_are_what_is_shown_later(
    inner: Path, tmp_path: Path, uri: str
) -> None:
    table = pa.table({"id": ["a"], "uri": [uri.format(outer=tmp_path)], "image": [png(1)]})
    pq.write_table(table, inner / "c.parquet")
    (record,) = everything(inner / "c.parquet", 10)
    assert (record.image, record.problem) == (png(1), None)
    assert record.uri == f"{inner}/c.parquet#row=0"
    assert fetch_image(record.uri) == png(1)


def test_a_file_of_a_folder_cannot_pass_for_a_row_of_a_table(inner: Path) -> None:
    found = {record.id: record for record in everything(inner, 10)}
    assert "c.parquet#row=0" not in found  # no image by its suffix
    (inner / "c.parquet#row=0.png").write_bytes(png(7))
    record = {r.id: r for r in everything(inner, 10)}["c.parquet#row=0.png"]
    assert (record.image, record.reason) == (None, "path_refused")


@pytest.mark.parametrize("kind", ["folder", "uri"])
def test_a_file_above_the_byte_limit_is_never_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "c"
    place.mkdir()
    with (place / "large.png").open("wb") as file:
        file.truncate(DEFAULT_LIMITS.max_bytes + 1)
    pq.write_table(pa.table({"id": ["a"], "uri": ["large.png"]}), place / "c.parquet")
    plans = plan_shards(place if kind == "folder" else place / "c.parquet", 10)
    opened: list[str] = []
    genuine = Path.open

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return genuine(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    (record,) = read_shard(plans[0])
    assert (record.image, record.reason) == (None, "too_many_bytes")
    assert "large.png" not in opened
    with pytest.raises(DataError, match="at most"):
        fetch_image(str(place / "large.png"))
    assert "large.png" not in opened


@pytest.mark.timeout(20)
def test_a_pipe_named_like_an_image_does_not_hang_the_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (record,) = everything(tmp_path, 10)
    assert (record.image, record.reason) == (None, "unreadable")


def test_a_text_corpus_has_no_images_behind_its_uris(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x", "y"]}), tmp_path / "c.parquet")
    found = everything(tmp_path / "c.parquet", 10)
    assert [record.text for record in found] == ["x", "y"]
    assert [fetch_image(record.uri) for record in found] == [None, None]


def test_a_uri_of_a_missing_file_or_row_is_a_data_error(tmp_path: Path) -> None:
    corpus = parquet(tmp_path / "c.parquet")
    for uri in (
        str(tmp_path / "gone.png"),
        f"{tmp_path}/gone.parquet#row=0",
        f"{corpus}#row={NUM_ROWS}",
    ):
        with pytest.raises(DataError, match=r"cannot be read|past the end"):
            fetch_image(uri)


def test_one_missing_picture_does_not_stop_the_shard(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    table = pa.table({"id": ["a", "b"], "uri": ["a.png", "gone.png"]})
    pq.write_table(table, tmp_path / "c.parquet")
    found = read_shard(ShardPlan(0, str(tmp_path / "c.parquet"), 0, 2))
    assert [record.id for record in found] == ["a", "b"]
    assert found[0].image == png(1)
    assert not found[1].image


def test_a_dangling_link_in_a_folder_does_not_stop_the_plan(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "a.png").write_bytes(png(1))
    (corpus / "b.png").symlink_to(tmp_path / "gone.png")
    (corpus / "named-like-an-image.png").mkdir()
    corpus_digest(corpus)
    found = everything(corpus, 10)
    assert found[0].image == png(1)


def test_a_corpus_that_is_no_corpus_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id\n1\n")
    with pytest.raises(ConfigError, match=r"c\.csv is neither a folder of images nor a \.parquet"):
        plan_shards(tmp_path / "c.csv", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no images \(\.jpg, \.jpeg, \.png, \.webp"):
        plan_shards(tmp_path / "empty", 4)


def test_a_parquet_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"name": ["a"], "image": [b"x"]}), path)
    with pytest.raises(DataError, match=r"needs a column `id`.*it has \['image', 'name'\]"):
        plan_shards(path, 4)
    pq.write_table(pa.table({"id": ["a"], "caption": ["x"]}), path)
    with pytest.raises(DataError, match="one of `image`, `text`, `uri`"):
        plan_shards(path, 4)
    pq.write_table(pa.Table.from_pylist(rows()).slice(0, 0), path)
    with pytest.raises(DataError, match="is empty"):
        plan_shards(path, 4)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"c\.parquet cannot be read"):
        plan_shards(path, 4)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_the_digest_names_the_content_wherever_it_lies(tmp_path: Path, kind: str) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    make = (lambda p: parquet(p / "c.parquet")) if kind == "parquet" else folder
    first, second = (make(place) for place in places)
    for path in first.rglob("*.*"):  # a copy that keeps times, as cp -p and rsync -t make it
        found = path.stat()
        os.utime(second / path.relative_to(first), ns=(found.st_atime_ns, found.st_mtime_ns))
    assert corpus_digest(first) == corpus_digest(second)
    changed = second if kind == "parquet" else second / "00.PNG"
    with changed.open("ab") as file:
        file.write(b"!")
    assert corpus_digest(first) != corpus_digest(second)


def test_the_digest_of_a_folder_changes_with_a_file_of_equal_size(tmp_path: Path) -> None:
    corpus = folder(tmp_path / "c")
    before, size = corpus_digest(corpus), (corpus / "00.PNG").stat().st_size
    (corpus / "00.PNG").write_bytes(b"x" * size)
    assert corpus_digest(corpus) != before


def test_files_that_come_or_go_after_the_plan_shift_no_row(tmp_path: Path) -> None:
    corpus = folder(tmp_path / "c")
    plans = plan_shards(corpus, 4)
    planned = [record.id for plan in plans for record in read_shard(plan)]
    (corpus / "000.png").write_bytes(png(1))  # first of all by name
    (corpus / planned[2]).unlink()
    found = [record for plan in plans for record in read_shard(plan)]
    assert [record.id for record in found] == planned
    assert [record.id for record in found if record.problem] == [planned[2]]


@pytest.mark.parametrize("change", ["added", "gone", "another"])
def test_a_folder_that_changed_is_named_with_its_file_and_shard(
    tmp_path: Path, change: str
) -> None:
    corpus = folder(tmp_path / "c")
    before, plans = corpus_state(corpus), plan_shards(corpus, 4)
    require_unchanged(corpus, before, plans)
    name = {"added": "000.png"}.get(change, plans[1].paths[0])
    if change == "gone":
        (corpus / name).unlink()
    else:
        (corpus / name).write_bytes(png(77))
    place = "of no shard was added" if change == "added" else f"of shard 1 is {change}"
    with pytest.raises(DataError, match=f"corpus changed while it was read: {name} {place}"):
        require_unchanged(corpus, before, plans)


def test_a_parquet_file_that_lost_rows_after_the_plan_is_named_with_the_shard(
    tmp_path: Path,
) -> None:
    corpus = parquet(tmp_path / "c.parquet")
    before, plans = corpus_state(corpus), plan_shards(corpus, 8)
    pq.write_table(pa.Table.from_pylist(rows()[:18]), corpus)
    with pytest.raises(DataError, match=r"changed while it was read: shard 2 has 2 rows, 7 were"):
        read_shard(plans[2])
    with pytest.raises(DataError, match="the Parquet file of shards 0 to 2 is another"):
        require_unchanged(corpus, before, plans)
    corpus.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"shard 2 of .*c\.parquet cannot be read"):
        read_shard(plans[2])
