"""MMEB-train: two items a pair, placeholders gone, the required columns checked before anything is written."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.console import generate_files
from pipelines.pairs import Pairs
from pipelines.recipe import DataConfig
from slq.benchmarks.mmeb import COLUMNS, ITEM_PAIRS, MmebConfig, plain_text, write_mmeb
from slq.errors import ConfigError, DataError
from slq.schema import Item

MEME = {
    "qry": "<|image_1|>\nIs this hateful?\n",
    "qry_image_path": "images/HatefulMemes/Train/0.jpg",
    "pos_text": "No",
    "pos_image_path": "",
    "neg_text": "Yes",
    "neg_image_path": "",
}
FOUND = {
    "qry": "Find a picture of a dog.",
    "qry_image_path": "",
    "pos_text": "<|image_1|>\n",
    "pos_image_path": "images/MSCOCO_t2i/Train/0.jpg",
    "neg_text": None,
    "neg_image_path": None,
}


@pytest.fixture(autouse=True)
def _audible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that another test ran in this process has its own handler, and lets caplog hear nothing."""
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)


def subset(root: Path, name: str, rows: list[dict[str, Any]], split: str = "original") -> Path:
    path = root / name / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def made(root: Path, **settings: Any) -> list[dict[str, Any]]:
    write_mmeb(root, MmebConfig(**settings))
    rows: list[dict[str, Any]] = pq.read_table(root / "train.parquet").to_pylist()
    return rows


def test_each_side_is_a_text_an_image_or_both(tmp_path: Path) -> None:
    subset(tmp_path, "HatefulMemes", [MEME])
    subset(tmp_path, "MSCOCO_t2i", [FOUND])
    assert made(tmp_path) == [
        {
            "id": "HatefulMemes-0000000",
            "query_text": "Is this hateful?",
            "query_uri": "images/HatefulMemes/Train/0.jpg",
            "positive_text": "No",
            "positive_uri": None,
            "image_key": "images/HatefulMemes/Train/0.jpg",
            "subset": "HatefulMemes",
        },
        {
            "id": "MSCOCO_t2i-0000000",
            "query_text": "Find a picture of a dog.",
            "query_uri": None,
            "positive_text": None,
            "positive_uri": "images/MSCOCO_t2i/Train/0.jpg",
            "image_key": "images/MSCOCO_t2i/Train/0.jpg",
            "subset": "MSCOCO_t2i",
        },
    ]
    assert pq.read_schema(tmp_path / "train.parquet") == ITEM_PAIRS


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    subset(tmp_path, "HatefulMemes", [MEME])
    picture = tmp_path / MEME["qry_image_path"]
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    generate_files(DataConfig(dir=tmp_path, mmeb=MmebConfig()))
    pairs = Pairs(tmp_path / "train.parquet")
    assert pairs.check(0.0) == ([0], {})
    query = pairs.item(0, "query")
    assert query.image is not None
    assert (query.image.size, query.text) == ((8, 8), "Is this hateful?")
    assert pairs.item(0, "positive") == Item(text="No")


def test_images_may_lie_on_s3(tmp_path: Path) -> None:
    subset(tmp_path, "HatefulMemes", [MEME])
    (row,) = made(tmp_path, images="s3://bucket/mmeb")
    assert row["query_uri"] == "s3://bucket/mmeb/images/HatefulMemes/Train/0.jpg"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<|image_1|>\nWhat is it?\nTell me.\n", "What is it?\nTell me."),
        ("Compare <|image_1|> with <|image_2|>", "Compare  with"),
        ("<|image_pad|> <|image|>", None),
        ("a < b | image", "a < b | image"),
        ("", None),
        (None, None),
    ],
)
def test_image_placeholders_are_removed(text: str | None, plain: str | None) -> None:
    assert plain_text(text) == plain


def test_pairs_with_an_empty_side_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = [MEME | {"pos_text": " "}, MEME | {"qry": "<|image_1|>", "qry_image_path": None}]
    subset(tmp_path, "HatefulMemes", [MEME, *empty, MEME])
    # ids keep the row's number, so that they do not shift when a row is mended
    assert [row["id"][-1] for row in made(tmp_path)] == ["0", "3"]
    counts = json.loads((tmp_path / "mmeb.json").read_text())["counts"]
    assert counts == {"HatefulMemes": 2, "left_out": 2}
    assert "2 pairs with an empty side left out" in caplog.text


def test_large_subsets_are_drawn_from_and_each_alone(tmp_path: Path) -> None:
    rows = [MEME | {"pos_text": str(n)} for n in range(100)]
    for name in ("A", "B"):
        subset(tmp_path, name, rows)
    subset(tmp_path, "C", rows[:5])
    both = made(tmp_path, max_pairs=10)
    assert [sum(row["subset"] == name for row in both) for name in "ABC"] == [10, 10, 5]
    alone = made(tmp_path, max_pairs=10, subsets=("B",))
    assert alone == [row for row in both if row["subset"] == "B"]
    drawn = [[row["positive_text"] for row in both if row["subset"] == name] for name in "AB"]
    assert drawn[0] != drawn[1]
    assert len(made(tmp_path, max_pairs=None)) == 205
    assert made(tmp_path, max_pairs=10, seed=1) != both


def test_the_other_split_is_other_files(tmp_path: Path) -> None:
    subset(tmp_path, "A", [MEME])
    subset(tmp_path, "A", [MEME | {"pos_text": "said otherwise"}], "diverse_instruction")
    (row,) = made(tmp_path, split="diverse_instruction")
    assert row["positive_text"] == "said otherwise"
    with pytest.raises(
        ConfigError, match=r"A has no test-\*\.parquet; it has diverse_instruction-"
    ):
        made(tmp_path, split="test", subsets=("A",))


def test_a_folder_without_subsets_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.mmeb\.dir: no folder in .*MMEB-train"):
        made(tmp_path)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_or_odd_column_is_named_before_anything_is_written(
    tmp_path: Path, column: str
) -> None:
    subset(tmp_path, "A", [MEME])
    subset(tmp_path, "B", [{name: text for name, text in MEME.items() if name != column}])
    with pytest.raises(DataError, match=f"B/original-.* has no column '{column}'"):
        made(tmp_path)
    subset(tmp_path, "B", [MEME | {column: ["a", "list"]}])
    with pytest.raises(DataError, match=f"column '{column}' holds list.*; it must hold strings"):
        made(tmp_path)
    assert not (tmp_path / "train.parquet").exists()


def test_the_table_is_made_once(tmp_path: Path) -> None:
    subset(tmp_path, "A", [MEME])
    made(tmp_path)
    before = (tmp_path / "train.parquet").stat().st_mtime_ns
    made(tmp_path)
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == before
    made(tmp_path, seed=3)
    assert (tmp_path / "train.parquet").stat().st_mtime_ns != before
