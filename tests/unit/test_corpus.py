"""Corpora: the plan covers every row once, rows come back as they were written, `uri` leads back to the image."""

import io
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
    fetch_image,
    plan_shards,
    read_shard,
)
from slq.errors import ConfigError, DataError

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


@pytest.mark.parametrize("name", ["pictures/a.png", "absolute"])
def test_a_uri_column_names_files_beside_the_table_and_leads_back_to_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pictures/a.png"
    file.parent.mkdir()
    file.write_bytes(png(9))
    uri = str(file) if name == "absolute" else name
    pq.write_table(pa.table({"id": ["a"], "uri": [uri]}), tmp_path / "c.parquet")
    (record,) = everything(tmp_path / "c.parquet", 10)
    assert record.image == png(9)
    monkeypatch.chdir("/")  # a service runs elsewhere than the embedding command did
    assert fetch_image(record.uri) == png(9)


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
    assert corpus_digest(first) == corpus_digest(second)
    changed = second if kind == "parquet" else second / "00.PNG"
    with changed.open("ab") as file:
        file.write(b"!")
    assert corpus_digest(first) != corpus_digest(second)
