"""Karpathy's files: the splits by id, no test image in the training pairs, whole tables once."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.console import generate_files
from pipelines.corpus import open_corpus
from pipelines.pairs import Pairs
from pipelines.recipe import DataConfig
from slq.arrow import RELEVANCE
from slq.benchmarks.karpathy import KarpathyConfig, read_karpathy, require_disjoint, write_karpathy
from slq.errors import ConfigError, DataError, StorageError
from slq.training.reading import SIDES

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
SPLITS = ("train", "restval", "val", "test", "train", "test")
TABLES = ("train.parquet", "gallery.parquet", "queries.parquet", "relevance.parquet")


@pytest.fixture(autouse=True)
def _audible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that another test ran in this process has its own handler, and lets caplog hear nothing."""
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)


def coco_record(number: int, split: str, captions: int = 6) -> dict[str, Any]:
    folder = "train2014" if split == "train" else "val2014"
    sentids = [100 * number + n for n in range(captions)]
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "sentids": sentids,
        "imgid": number - 1,
        "cocoid": number,
        "split": split,
        "sentences": [
            {"tokens": ["a"], "raw": f"Caption {n} of  {number}.\n", "imgid": 0, "sentid": sentid}
            for n, sentid in enumerate(sentids)
        ],
    }


def coco(folder: Path, **changes: Any) -> Path:
    """A file of six images in COCO's form; `changes` are of the images by `i<position>`."""
    images = [coco_record(number, split) for number, split in enumerate(SPLITS, start=1)]
    for key, change in changes.items():
        images[int(key.removeprefix("i"))] |= change
    for image in images:
        touch(folder / image["filepath"] / image["filename"])
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def touch(path: Path) -> None:
    """An image file, as far as anybody looks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def part(**changes: Any) -> KarpathyConfig:
    """The config of so small a part of COCO."""
    return KarpathyConfig(**({"expected": {}} | changes))


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def test_train_and_restval_become_pairs_with_every_caption(tmp_path: Path) -> None:
    coco(tmp_path)
    write_karpathy(tmp_path, part())
    rows = table(tmp_path, "train")
    assert len(rows) == 3 * 6
    assert rows[0] == {
        "id": "coco-1-100",
        "image_key": "coco-1",
        "uri": "train2014/COCO_train2014_000000000001.jpg",
        "text": "Caption 0 of 1.",
    }
    assert {row["image_key"] for row in rows} == {"coco-1", "coco-2", "coco-5"}


def test_test_images_become_gallery_queries_and_relevance(tmp_path: Path) -> None:
    coco(tmp_path)
    write_karpathy(tmp_path, part(images="s3://bucket/coco/"))
    assert table(tmp_path, "gallery") == [
        {"id": f"coco-{n}", "uri": f"s3://bucket/coco/val2014/COCO_val2014_{n:012d}.jpg"}
        for n in (4, 6)
    ]
    queries = table(tmp_path, "queries")
    assert [query["id"] for query in queries] == [
        f"coco-{n}-{100 * n + k}" for n in (4, 6) for k in range(5)
    ]
    assert {query["kind"] for query in queries} == {"caption"}
    assert pq.read_schema(tmp_path / "relevance.parquet") == RELEVANCE
    answers = {row["query_id"]: row["item_id"] for row in table(tmp_path, "relevance")}
    assert answers == {query["id"]: query["id"].rpartition("-")[0] for query in queries}


def test_what_is_written_is_what_the_stages_read(tmp_path: Path) -> None:
    coco(tmp_path)
    for number, split in enumerate(SPLITS, start=1):
        record = coco_record(number, split)
        path = tmp_path / "images" / record["filepath"] / record["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    write_karpathy(tmp_path, part(images="images"))
    pairs = Pairs(tmp_path / "train.parquet")
    assert pairs.check(0.0) == (list(range(18)), {})
    assert pairs.image_keys == [f"coco-{n}" for n in (1, 2, 5) for _ in range(6)]
    first = tmp_path / "images" / "train2014" / "COCO_train2014_000000000001.jpg"
    query, positive = (pairs.item(0, side) for side in SIDES)
    assert np.array_equal(np.asarray(query.image), np.asarray(Image.open(first)))
    assert positive.text == "Caption 0 of 1."
    records = list(open_corpus(tmp_path / "gallery.parquet").all_records())
    assert [record.problem for record in records] == [None, None]
    assert all(record.image for record in records)


def test_a_dry_run_needs_no_data(tmp_path: Path) -> None:
    where = ("--set", f"data.dir={tmp_path}", "--json")
    result = CliRunner().invoke(app, ["embed", str(RECIPES / "coco.yaml"), "--dry-run", *where])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"] == {"corpus": "generated first"}
    assert not list(tmp_path.iterdir())


def test_flickr30k_has_no_cocoid_no_filepath_and_here_no_training(tmp_path: Path) -> None:
    records = []
    for number, split in enumerate(("train", "test")):
        record = coco_record(number, split) | {"filename": f"{1000 + number}.jpg"}
        records.append(
            {k: v for k, v in record.items() if k not in ("cocoid", "filepath")} | {"imgid": number}
        )
    touch(tmp_path / "flickr30k-images" / "1001.jpg")
    (tmp_path / "dataset_flickr30k.json").write_text(
        json.dumps({"images": records, "dataset": "flickr30k"})
    )
    config = part(
        annotations=Path("dataset_flickr30k.json"), images="flickr30k-images", train_splits=()
    )
    write_karpathy(tmp_path, config)
    assert table(tmp_path, "gallery") == [{"id": "flickr30k-1", "uri": "flickr30k-images/1001.jpg"}]
    assert not (tmp_path / "train.parquet").exists()


def test_an_id_in_both_splits_is_refused_by_name(tmp_path: Path) -> None:
    path = coco(tmp_path, i5={"cocoid": 1})
    with pytest.raises(
        DataError, match="'coco-1' stands there twice, in split 'train' and in split 'test'"
    ):
        read_karpathy(path)


def test_a_file_name_in_both_splits_is_refused_in_any_spelling(tmp_path: Path) -> None:
    coco(tmp_path, i5={"filename": "000000000001.jpg", "filepath": "train2017"})
    with pytest.raises(
        DataError, match="coco-1 of split 'train' and coco-6 of split 'test' are the same file"
    ):
        write_karpathy(tmp_path, part())
    assert not any((tmp_path / name).exists() for name in TABLES)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"id": "x", "image_key": "coco-6"}, "image_key 'coco-6'"),
        ({"id": "x", "image_id": 6}, "image_id 6"),
        (
            {"id": "x", "uri": "coco2017_train/000000000006.jpg"},
            "uri 'coco2017_train/000000000006.jpg'",
        ),
        ({"id": "x", "uri": "s3://b/COCO_train2014_000000000004.jpg"}, "uri 's3://b/"),
        ({"id": "coco-4-17", "text": "x"}, "id 'coco-4-17'"),
    ],
)
def test_a_training_file_of_ones_own_with_test_images_is_refused(
    tmp_path: Path, row: dict[str, Any], named: str
) -> None:
    coco(tmp_path)
    own = tmp_path / "own.parquet"
    pq.write_table(pa.Table.from_pylist([row]), own)
    data = DataConfig(dir=tmp_path, train=Path("own.parquet"), karpathy=part())
    with pytest.raises(DataError, match=f"own.parquet: {named}.* is an image of .*gallery.parquet"):
        generate_files(data)


def test_a_disjoint_training_file_of_ones_own_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco(tmp_path)
    write_karpathy(tmp_path, part())
    own = tmp_path / "own.parquet"
    # a pair that happens to have the number of a test image is no test image
    rows = [{"id": "6", "image_key": "coco-1", "uri": "a/000000000002.jpg"}]
    pq.write_table(pa.Table.from_pylist(rows), own)
    require_disjoint(own, tmp_path / "gallery.parquet")
    assert "only ids were compared" not in caplog.text
    pq.write_table(pa.table({"id": ["6"], "text": ["x"]}), own)
    require_disjoint(own, tmp_path / "gallery.parquet")
    assert "only ids were compared" in caplog.text


@pytest.mark.parametrize("field", ["filename", "split", "sentences", "sentids"])
def test_a_missing_field_is_named_with_its_place(tmp_path: Path, field: str) -> None:
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    del content["images"][3][field]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"images\[3\] has no '{field}'"):
        read_karpathy(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentids": [1]}, r"images\[2\] is malformed"),
        ({"sentences": [{"raw": None}]}, r"images\[2\] is malformed"),
        ({"cocoid": 2}, "image 'coco-2' stands there twice"),
        ({"sentids": [300, 300, 1, 2, 3, 4]}, "caption 'coco-3-300' stands there twice"),
    ],
)
def test_a_malformed_record_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_karpathy(coco(tmp_path, i2=change))


@pytest.mark.parametrize("text", ["[", "[]", "{}", "1"])
def test_a_file_that_is_none_of_karpathys_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dataset_coco.json"
    path.write_text(text)
    with pytest.raises(DataError, match="cannot be read as a Karpathy file"):
        read_karpathy(path)


def test_empty_captions_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = coco_record(1, "train")["sentences"]
    empty[2]["raw"] = " \n"
    path = coco(tmp_path, i0={"sentences": empty})
    write_karpathy(tmp_path, part())
    assert len(table(tmp_path, "train")) == 3 * 6 - 1
    assert "1 empty captions left out" in caplog.text
    assert json.loads((tmp_path / "karpathy.json").read_text())["counts"]["empty_captions"] == 1
    assert read_karpathy(path)[0].captions[2] == ("103", "Caption 3 of 1.")


def test_a_test_image_without_caption_is_refused(tmp_path: Path) -> None:
    coco(tmp_path, i3={"sentences": [], "sentids": []})
    with pytest.raises(DataError, match="coco-4 of split 'test' has no caption"):
        write_karpathy(tmp_path, part())


def test_tables_are_made_once_and_again_when_something_changes(tmp_path: Path) -> None:
    coco(tmp_path)

    def times() -> list[int]:
        write_karpathy(tmp_path, config)
        return [(tmp_path / name).stat().st_mtime_ns for name in TABLES]

    config = part()
    first = times()
    assert times() == first
    config = part(eval_captions=2)
    assert times() != first
    assert len(table(tmp_path, "queries")) == 4
    second = times()
    coco(tmp_path, i4={"split": "val"})
    assert times() != second
    assert len(table(tmp_path, "train")) == 12
    (tmp_path / "train.parquet").unlink()
    write_karpathy(tmp_path, config)
    assert len(table(tmp_path, "train")) == 12
    third = times()
    (tmp_path / "dataset_coco.json").unlink()  # needed no more
    assert times() == third


def test_a_run_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    coco(tmp_path)
    write_karpathy(tmp_path, part())
    marker = tmp_path / "karpathy.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"complete": False}))
    (tmp_path / "train.parquet").write_bytes(b"of other settings")
    write_karpathy(tmp_path, part())
    assert len(table(tmp_path, "train")) == 18
    marker.write_text('{"comple')
    write_karpathy(tmp_path, part())
    assert json.loads(marker.read_text())["complete"]


def test_a_run_that_was_refused_claims_nothing(tmp_path: Path) -> None:
    coco(tmp_path, i5={"cocoid": 1})
    with pytest.raises(DataError):
        write_karpathy(tmp_path, part())
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"dataset_coco.json"}


def test_files_of_another_origin_are_never_overwritten(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"train\.parquet exists and was not made from"):
        write_karpathy(tmp_path, part())
    assert (tmp_path / "train.parquet").read_bytes() == b"mine"


def test_missing_annotations_and_unknown_splits_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.karpathy\.annotations: .*dataset_coco\.json does not exist"
    ):
        write_karpathy(tmp_path, part())
    coco(tmp_path)
    with pytest.raises(ConfigError, match="no split 'tset'; it has restval, test, train, val"):
        write_karpathy(tmp_path, part(eval_split="tset"))


@pytest.mark.parametrize("images", ["..", "/elsewhere", "gs://bucket/x"])
def test_images_outside_the_data_folder_are_refused(tmp_path: Path, images: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    coco(folder)
    with pytest.raises(ConfigError, match=r"data\.karpathy\.images: "):
        write_karpathy(folder, part(images=images))


def test_an_evaluation_split_in_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_split 'val' is among train_splits"):
        KarpathyConfig.parse({"train_splits": ["train", "val"], "eval_split": "val"}, source="x")


def test_two_origins_of_one_file_are_refused() -> None:
    with pytest.raises(ConfigError, match="scenes and karpathy would write the same files"):
        DataConfig.parse({"scenes": {}, "karpathy": {}}, source="x.yaml")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    annotations = coco(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_karpathy(tmp_path / "file", part(annotations=annotations))


def test_a_part_of_the_data_set_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    coco(tmp_path)
    with pytest.raises(
        DataError,
        match=r"COCO 5K \(test\) is not what it should be: gallery: expected 5,000, found 2; captions: expected "
        r"25,010, found 12; queries: expected 25,000, found 10\. Its files come from https://cs\.stanford\.edu",
    ):
        write_karpathy(tmp_path, part(expected=None))
    assert not any((tmp_path / name).exists() for name in TABLES)
    write_karpathy(tmp_path, part(expected={"gallery": 2, "train": 18}))
    with pytest.raises(ConfigError, match=r"expected\.images is none of the counts of COCO 5K: g"):
        write_karpathy(tmp_path, part(expected={"images": 2}))


def test_missing_test_images_are_counted_and_named(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000006.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are missing.*val2014_000000000006\.jpg"):
        write_karpathy(tmp_path, part())


def test_known_counts_are_those_of_the_published_splits() -> None:
    flickr = KarpathyConfig(annotations=Path("dataset_flickr30k.json"), train_splits=())
    assert flickr.facts().counts == {"gallery": 1000, "captions": 5000, "queries": 5000}
    assert KarpathyConfig(eval_captions=1).facts().counts["queries"] == 5000
    assert KarpathyConfig(annotations=Path("dataset_mine.json")).facts().counts == {}


def test_counts_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco(tmp_path)
    with caplog.at_level(logging.INFO, logger="slq"):
        write_karpathy(tmp_path, part())
    assert "'train': 18" in caplog.text
    assert "'gallery': 2" in caplog.text
