"""Readers of benchmarks: the tables of files as their publishers lay them out, and what is refused by name."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.console import generate_files
from pipelines.corpus import open_corpus
from pipelines.pairs import Pairs
from pipelines.recipe import DataConfig
from slq.arrow import CANDIDATES, RELEVANCE
from slq.benchmarks.contract import EVERY_KIND, BenchmarkConfig
from slq.benchmarks.mmeb_eval import SETS
from slq.benchmarks.overlap import refuse_shared_images
from slq.benchmarks.records import first_of_list
from slq.benchmarks.registry import AnyBenchmark
from slq.errors import ConfigError, DataError
from tests.unit.benchmark_files import WRITERS, edited, picture, write_json

TABLES = ("gallery", "queries", "relevance", "candidates")
CONFIGS: dict[str, type[BenchmarkConfig]] = {
    get_args(config.model_fields["format"].annotation)[0]: config
    for config in get_args(get_args(AnyBenchmark)[0])
}


def made(folder: Path, name: str, **changes: Any) -> DataConfig:
    """The tables of a small benchmark, and the section that they were made from."""
    return write(folder, {**WRITERS[name](folder), **changes})


def write(folder: Path, section: dict[str, Any]) -> DataConfig:
    parsed = DataConfig.parse({"dir": str(folder), "benchmark": section}, source="x.yaml")
    assert isinstance(parsed, DataConfig)
    generate_files(parsed)
    return parsed


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return found


def answers(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in rows(folder, "relevance"):
        assert row["grade"] == 1
        found.setdefault(row["query_id"], set()).add(row["item_id"])
    return found


def test_every_registered_benchmark_has_a_small_one_here() -> None:
    assert set(CONFIGS) == set(WRITERS)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_tables_have_the_schema_that_stages_read_and_images_that_open(
    tmp_path: Path, name: str
) -> None:
    made(tmp_path, name)
    assert pq.read_schema(tmp_path / "relevance.parquet") == RELEVANCE
    assert pq.read_schema(tmp_path / "candidates.parquet") == CANDIDATES
    for table in ("gallery", "queries"):
        for record in open_corpus(tmp_path / f"{table}.parquet").all_records():
            assert record.problem is None
            assert record.image or record.text
    marker = json.loads((tmp_path / "benchmark.json").read_text())
    assert marker["complete"]
    assert marker["source"].startswith("https://")
    assert {"name", "split", "direction", "headline"} <= set(marker)
    assert marker["counts"] == marker["counts"] | marker["settings"]["expected"]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_count_that_is_not_the_expected_one_is_refused_with_both_and_the_source(
    tmp_path: Path, name: str
) -> None:
    section = WRITERS[name](tmp_path)
    count = next(iter(section["expected"]))
    right = section["expected"][count]
    section["expected"] = {count: right + 1}
    message = (
        rf"{count}: expected {right + 1}, found {right}\. Its files come from https://.*`expected`"
    )
    with pytest.raises(DataError, match=message):
        write(tmp_path, section)
    assert not any((tmp_path / f"{table}.parquet").exists() for table in TABLES)
    with pytest.raises(ConfigError, match=r"expected\.nonsense is none of the counts of"):
        write(tmp_path, section | {"expected": {"nonsense": 1}})
    write(tmp_path, section | {"expected": {}})


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"mbeir"}))
def test_a_part_is_refused_without_being_told_so(tmp_path: Path, name: str) -> None:
    """M-BEIR has too many tasks for counts of its own."""
    section = WRITERS[name](tmp_path)
    del section["expected"]
    with pytest.raises(DataError, match=r"is not what it should be: .*expected [\d,]+, found \d"):
        write(tmp_path, section)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_missing_images_are_counted_and_named(tmp_path: Path, name: str) -> None:
    section = WRITERS[name](tmp_path)
    image = next(
        path
        for path in sorted([*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")])
        if "train" not in path.parts
    )
    image.unlink()
    with pytest.raises(DataError, match=rf"1 of \d+ images are missing below .*{image.name}"):
        write(tmp_path, section)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_missing_source_is_a_config_error_that_says_where_to_get_it(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    section = WRITERS[name](folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"(does not exist|holds no|has no).*https://"):
        write(tmp_path / "empty", section)


def test_tables_are_made_once_and_stay_when_the_sources_are_gone(tmp_path: Path) -> None:
    section = WRITERS["cirr"](tmp_path)

    def times() -> list[int]:
        write(tmp_path, section)
        return [(tmp_path / f"{name}.parquet").stat().st_mtime_ns for name in TABLES]

    first = times()
    assert times() == first
    edited(tmp_path / "captions" / "cap.rc2.val.json", lambda x: x[0].update(caption="other"))
    second = times()
    assert second != first
    (tmp_path / "captions" / "cap.rc2.val.json").unlink()
    assert times() == second


def test_cirr_masks_the_reference_and_ranks_image_sets(tmp_path: Path) -> None:
    made(tmp_path, "cirr")
    queries = {row["id"]: row for row in rows(tmp_path, "queries")}
    assert list(queries) == ["cirr-10", "cirr-10-subset", "cirr-11", "cirr-11-subset"]
    assert queries["cirr-10"]["text"] == "the same with change 10"
    assert queries["cirr-10"]["uri"] == "img_raw/dev/dev-0-0-img0.png"
    assert [row["kind"] for row in queries.values()] == ["all images", "subset"] * 2
    assert len(rows(tmp_path, "gallery")) == 7
    assert answers(tmp_path)["cirr-11"] == answers(tmp_path)["cirr-11-subset"] == {"dev-1-0-img1"}
    ranked = {row["query_id"]: row for row in rows(tmp_path, "candidates")}
    assert ranked["cirr-10"]["item_ids"] is None
    assert ranked["cirr-10"]["excluded_ids"] == ["dev-0-0-img0"]
    assert ranked["cirr-10-subset"]["item_ids"] == [f"dev-{n}-0-img{n % 2}" for n in range(6)]
    assert ranked["cirr-10-subset"]["excluded_ids"] == ["dev-0-0-img0"]


def test_cirr_makes_training_pairs_of_its_training_split(tmp_path: Path) -> None:
    made(tmp_path, "cirr", train=True)
    (pair,) = rows(tmp_path, "train")
    assert pair["query_uri"] == "img_raw/train/34/train-1-0-img0.png"
    assert pair["positive_uri"] == "img_raw/train/34/train-2-0-img1.png"
    assert (pair["query_text"], pair["positive_text"]) == ("x", None)
    assert Pairs(tmp_path / "train.parquet").check(0.0) == ([0], {})


def test_the_test_split_of_cirr_has_no_targets(tmp_path: Path) -> None:
    section = WRITERS["cirr"](tmp_path)
    edited(tmp_path / "captions" / "cap.rc2.val.json", lambda x: x[1].pop("target_hard") and None)
    with pytest.raises(DataError, match=r"\[1\] has no 'target_hard': targets of the test split"):
        write(tmp_path, section)


def test_a_cirr_image_in_both_splits_is_refused(tmp_path: Path) -> None:
    section = WRITERS["cirr"](tmp_path)
    path = tmp_path / "image_splits" / "split.rc2.train.json"
    edited(path, lambda x: x | {"dev-3-0-img1": "./dev/dev-3-0-img1.png"})
    with pytest.raises(DataError, match=r"1 images of the measured split are in the training spl"):
        write(tmp_path, section)


def test_a_fashion_iq_query_is_two_wordings_that_rank_their_category(tmp_path: Path) -> None:
    made(tmp_path, "fashion_iq")
    queries = rows(tmp_path, "queries")
    assert [(row["id"], row["query_group"], row["text"]) for row in queries[:2]] == [
        ("dress-00000-0", "dress-00000", "is red and has sleeves"),
        ("dress-00000-1", "dress-00000", "has sleeves and is red"),
    ]
    assert [row["pool"] for row in queries] == ["dress"] * 4 + ["shirt"] * 2
    gallery = rows(tmp_path, "gallery")
    assert [row["id"] for row in gallery] == [
        "dress/B1", "dress/B2", "dress/B3", "shirt/B3", "shirt/B4", "shirt/B5", "shirt/B6",
    ]  # fmt: skip
    assert answers(tmp_path) == {
        "dress-00000": {"dress/B2"}, "dress-00001": {"dress/B3"}, "shirt-00000": {"shirt/B6"},
    }  # fmt: skip
    assert rows(tmp_path, "candidates") == []


def test_a_fashion_iq_reference_is_excluded_on_request(tmp_path: Path) -> None:
    made(tmp_path, "fashion_iq", exclude_reference=True)
    found = {row["query_id"]: row["excluded_ids"] for row in rows(tmp_path, "candidates")}
    assert found["shirt-00000"] == ["shirt/B3"]


def test_a_fashion_iq_image_in_both_splits_or_twice_is_refused(tmp_path: Path) -> None:
    section = WRITERS["fashion_iq"](tmp_path)
    train = tmp_path / "image_splits" / "split.dress.train.json"
    write_json(train, ["B9", "B2"])
    with pytest.raises(DataError, match="in the training split too, first 'B2'"):
        write(tmp_path, section)
    train.unlink()
    write_json(tmp_path / "image_splits" / "split.dress.val.json", ["B1", "B2", "B3", "B1"])
    with pytest.raises(DataError, match="image 'B1' stands there twice"):
        write(tmp_path, section)


@pytest.mark.parametrize("positive", ["first", "second"])
def test_a_sugar_crepe_image_ranks_its_two_captions(tmp_path: Path, positive: str) -> None:
    made(tmp_path, "sugar_crepe", positive=positive)
    gallery = rows(tmp_path, "gallery")
    true, false = ("replace_obj-2-true", "replace_obj-2-false")
    order = [true, false] if positive == "first" else [false, true]
    assert [row["id"] for row in gallery[2:4]] == order
    assert all(row["uri"] is None for row in gallery)
    assert {row["id"]: row["text"] for row in gallery}[false] == "a b beside a dog"
    (query,) = [row for row in rows(tmp_path, "queries") if row["id"] == "replace_obj-2"]
    assert (query["text"], query["uri"]) == (None, "val2017/000000000001.jpg")
    assert answers(tmp_path)["replace_obj-2"] == {true}
    ranked = {row["query_id"]: row["item_ids"] for row in rows(tmp_path, "candidates")}
    assert set(ranked["replace_obj-2"]) == {true, false}
    assert json.loads((tmp_path / "benchmark.json").read_text())["groups"] == {
        "replace": ["replace_obj"],
        "swap": ["swap_att"],
    }


def test_urban1k_pairs_numbers(tmp_path: Path) -> None:
    made(tmp_path, "urban1k")
    texts = {row["id"]: row["text"] for row in rows(tmp_path, "queries")}
    assert texts["urban1k-10"] == "A long caption of street 10. It has two lines."
    assert answers(tmp_path)["urban1k-10"] == {"urban1k/10"}
    picture(tmp_path / "image" / "11.jpg")
    (tmp_path / "benchmark.json").unlink()
    for name in TABLES:
        (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match=r"1 images have no caption, first 11\.jpg"):
        write(tmp_path, {"format": "urban1k", "expected": {}})


def test_sharegpt4v_takes_the_first_records_of_a_long_list(tmp_path: Path) -> None:
    made(tmp_path, "sharegpt4v")
    texts = [row["text"] for row in rows(tmp_path, "queries")]
    assert texts == [f'A picture {n}. With, "details" and [brackets].' for n in range(3)]
    assert rows(tmp_path, "gallery")[2]["uri"] == "sam/images/sa_2.jpg"


def test_the_first_records_of_a_list_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slq.benchmarks.records._BLOCK", 7)
    whole = [{"a": "x" * n, "b": [1, {"c": "],["}]} for n in range(6)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(whole, indent=1))
    for count in (1, 4, 6, 9):
        assert first_of_list(path, count) == whole[:count]
    path.write_text(json.dumps(whole)[:-20])
    assert first_of_list(path, 5) == whole[:5]
    with pytest.raises(DataError, match="breaks off after 5 entries"):
        first_of_list(path, 6)
    path.write_text("{}")
    with pytest.raises(DataError, match="must hold a JSON list"):
        first_of_list(path, 1)


def karr_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "karr_bench.jsonl").read_text().split("\n")[:4]]


@pytest.mark.parametrize("form", ["json", "parquet", "bytes", "struct"])
def test_karr_pairs_are_the_same_from_every_form_of_the_file(tmp_path: Path, form: str) -> None:
    first, second = tmp_path / "lines", tmp_path / form
    for folder in (first, second):
        folder.mkdir()
    made(first, "karr")
    section = WRITERS["karr"](second)
    found = [{"picture": row["image"], **row} for row in karr_rows(second)]
    if form in ("bytes", "struct"):
        for row in found:
            content = (second / row["image"]).read_bytes()
            row["picture"] = content if form == "bytes" else {"bytes": content, "path": "x.jpg"}
    name = "pairs.json" if form == "json" else "pairs.parquet"
    if form == "json":
        write_json(second / name, found)
    else:
        pq.write_table(pa.Table.from_pylist(found), second / name)
    write(second, section | {"annotations": name, "columns": {"image": "picture"}})
    for table in ("queries", "relevance"):
        assert rows(first, table) == rows(second, table)
    contents = [
        [record.image for record in open_corpus(folder / "gallery.parquet").all_records()]
        for folder in (first, second)
    ]
    assert contents[0] == contents[1]
    assert [row["kind"] for row in rows(second, "queries")][:2] == [
        "tool or utensil use",
        "cultural symbolism",
    ]


def test_a_karr_image_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    section = WRITERS["karr"](tmp_path)
    with (tmp_path / "karr_bench.jsonl").open("a") as file:
        file.write(json.dumps(karr_rows(tmp_path)[1]))
    with pytest.raises(DataError, match=r":6 has the image of .*:2; ids must be unique"):
        write(tmp_path, section)


def mmeb_id(subset: str, text: str, uri: str) -> str:
    return f"{subset}/{hashlib.sha256(f'{text}{chr(0)}{uri}'.encode()).hexdigest()[:20]}"


def test_an_mmeb_query_ranks_its_candidates_and_nothing_tells_which_stood_first(
    tmp_path: Path,
) -> None:
    made(tmp_path, "mmeb_eval")
    gallery = rows(tmp_path, "gallery")
    labels = [row for row in gallery if row["pool"] == "VOC2007"]
    assert {row["text"] for row in labels} == {"zebra", "ant", "moth"}
    queries = {row["id"]: row for row in rows(tmp_path, "queries")}
    assert queries["VOC2007-00001"]["text"] == "Which class?"
    assert queries["VOC2007-00001"]["uri"] == "images/all/1.jpg"
    assert queries["MSCOCO_t2i-00000"]["kind"] == queries["MSCOCO_t2i-00000"]["pool"]
    assert answers(tmp_path)["VOC2007-00001"] == {mmeb_id("VOC2007", "ant", "")}
    ranked = {row["query_id"]: row["item_ids"] for row in rows(tmp_path, "candidates")}
    assert set(ranked) == {"MSCOCO_t2i-00000", "MSCOCO_t2i-00001"}  # labels are the whole pool
    images = [mmeb_id("MSCOCO_t2i", "", f"images/all/{n}.jpg") for n in range(5)]
    assert ranked["MSCOCO_t2i-00000"] == sorted([images[2], images[1]])  # the same image twice
    assert answers(tmp_path)["MSCOCO_t2i-00000"] == {images[2]}
    for pool in ("VOC2007", "MSCOCO_t2i"):
        ids = [row["id"] for row in gallery if row["pool"] == pool]
        assert ids == sorted(ids)


def test_mmeb_has_36_sets_in_four_groups(tmp_path: Path) -> None:
    facts = CONFIGS["mmeb_eval"].model_validate({"format": "mmeb_eval"}).facts()
    assert len(SETS) == len(set(SETS)) == 36
    sizes = {name: len(kinds) for name, kinds in facts.groups.items()}
    assert sizes == {"classification": 10, "VQA": 10, "retrieval": 12, "grounding": 4, "all": 36}
    assert set(facts.counts.values()) == {1000}


def test_mbeir_reads_both_sides_and_puts_instructions_before_queries(tmp_path: Path) -> None:
    made(tmp_path, "mbeir", instructions="instructions.tsv")
    queries = {row["id"]: row for row in rows(tmp_path, "queries")}
    assert queries["9:1"]["text"] == "Find an image. a cat"
    assert queries["9:2"]["text"] == "Say what it is."
    assert [row["kind"] for row in queries.values()] == ["text -> image", "image -> text"]
    assert answers(tmp_path) == {"9:1": {"9:1", "9:3"}, "9:2": {"9:2"}}
    both = rows(tmp_path, "gallery")[2]
    assert (both["text"], both["uri"]) == ("b", "mbeir_images/1.jpg")
    write(tmp_path, MBEIR_ALONE)
    assert {row["id"]: row["text"] for row in rows(tmp_path, "queries")} == {
        "9:1": "a cat",
        "9:2": None,
    }


MBEIR_ALONE = {
    "format": "mbeir",
    "queries": "queries.jsonl",
    "pool": "pool.jsonl",
    "expected": {},
}


def set_at(*place: Any, to: Any) -> Callable[[Any], None]:
    """A change of one value of a JSON file; None removes it."""

    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        if to is None:
            del content[place[-1]]
        else:
            content[place[-1]] = to

    return change


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("cirr", "captions/cap.rc2.val.json", set_at(1, "pairid", to="x"), r"\[1\]: 'pairid' must"),
        ("cirr", "captions/cap.rc2.val.json", set_at(1, "pairid", to=10), "query 'cirr-10' stands"),
        ("cirr", "captions/cap.rc2.val.json", set_at(0, "caption", to=" "), "'caption' is empty"),
        ("cirr", "captions/cap.rc2.val.json", set_at(0, "caption", to=None), "has no 'caption'"),
        ("cirr", "captions/cap.rc2.val.json", set_at(0, "reference", to="y"), "image 'y' is not"),
        ("cirr", "captions/cap.rc2.val.json", set_at(0, to=3), r"\[0\] has no 'reference'"),
        ("cirr", "captions/cap.rc2.val.json", set_at(0, "img_set", "members", to=["z"]), "the targ"),
        ("cirr", "image_splits/split.rc2.val.json", set_at("dev-1-0-img1", to="../x.png"), "below"),
        ("cirr", "image_splits/split.rc2.val.json", set_at("dev-1-0-img1", to=[1]), "must be a pat"),
        ("fashion_iq", "captions/cap.dress.val.json", set_at(0, "captions", to=["a"]), "two sent"),
        ("fashion_iq", "captions/cap.dress.val.json", set_at(0, "target", to="B4"), "'B4' is not"),
        ("fashion_iq", "image_splits/split.shirt.val.json", set_at(0, to=7), "must hold image names"),
        ("sugar_crepe", "data/swap_att.json", set_at("5", "caption", to=None), "has no 'caption'"),
        ("sugar_crepe", "data/swap_att.json", set_at("5", "filename", to="/a.jpg"), "must stay belo"),
        ("sugar_crepe", "data/swap_att.json",
         set_at("5", "negative_caption", to="a green beside a cat"), "are the same"),
        ("sharegpt4v", "share-captioner_coco_lcs_sam_1246k_1107.json",
         set_at(1, "conversations", to=[]), "a question and its answer"),
        ("sharegpt4v", "share-captioner_coco_lcs_sam_1246k_1107.json",
         set_at(1, "image", to="sam/images/sa_0.jpg"), "stands there twice"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_refused_with_its_place(
    tmp_path: Path, name: str, file: str, change: Callable[[Any], None], message: str
) -> None:
    section = WRITERS[name](tmp_path)
    edited(tmp_path / file, change)
    with pytest.raises(DataError, match=message):
        write(tmp_path, section)
    assert not any((tmp_path / f"{table}.parquet").exists() for table in TABLES)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cirr", "captions/cap.rc2.val.json"),
        ("fashion_iq", "image_splits/split.dress.val.json"),
        ("karr", "karr_bench.jsonl"),
        ("mbeir", "pool.jsonl"),
        ("mmeb_eval", "VOC2007/test-00000-of-00001.parquet"),
        ("sharegpt4v", "share-captioner_coco_lcs_sam_1246k_1107.json"),
        ("sugar_crepe", "data/swap_att.json"),
        ("urban1k", "caption/1.txt"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, name: str, file: str) -> None:
    section = WRITERS[name](tmp_path)
    for content in (b'"text"', b"\xff\xfe no text", b""):
        (tmp_path / file).write_bytes(content)
        if name == "urban1k" and content == b'"text"':
            continue
        with pytest.raises(DataError, match=Path(file).name):
            write(tmp_path, section)


def mbeir_line(folder: Path, file: str, number: int, **changes: Any) -> None:
    path = folder / f"{file}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[number] |= changes
    path.write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("file", "number", "change", "message"),
    [
        ("queries", 0, {"pos_cand_list": []}, r"queries\.jsonl:1: 'pos_cand_list' must name at le"),
        ("queries", 0, {"pos_cand_list": ["9:1", "9:7"]}, "the answer '9:7' of query '9:1' is not"),
        ("queries", 0, {"pos_cand_list": ["9:7"]}, "candidate '9:7' is not in the pool"),
        ("queries", 1, {"qid": "9:1"}, "query '9:1' stands there 2 times"),
        ("queries", 1, {"query_img_path": None}, "has neither 'query_txt' nor 'query_img_path'"),
        ("queries", 1, {"query_txt": 3}, "must be strings or null"),
        ("queries", 1, {"qid": "8:1"}, "no prompt for 8, image, text"),
        ("pool", 2, {"did": "9:1"}, "item '9:1' stands there 2 times"),
        ("pool", 2, {"modality": 2}, "'modality' must be a str"),
    ],
)
def test_a_malformed_line_of_mbeir_is_refused(
    tmp_path: Path, file: str, number: int, change: dict[str, Any], message: str
) -> None:
    section = WRITERS["mbeir"](tmp_path)
    if "no prompt" in message:
        section["instructions"] = "instructions.tsv"
    mbeir_line(tmp_path, file, number, **change)
    with pytest.raises(DataError, match=message):
        write(tmp_path, section)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt_text": []}, "must be lists of the same length"),
        ({"tgt_text": [], "tgt_img_path": []}, "has no candidates"),
        ({"tgt_text": ["", "ant", "moth"]}, "has a side with neither text nor image"),
        ({"qry_text": "", "qry_img_path": ""}, "has a side with neither text nor image"),
        ({"qry_img_path": "../x.jpg"}, "must stay below data.benchmark.images"),
    ],
)
def test_a_malformed_row_of_mmeb_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    section = WRITERS["mmeb_eval"](tmp_path)
    path = tmp_path / "VOC2007" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    found = table.to_pylist()
    found[1] |= change
    pq.write_table(pa.Table.from_pylist(found, schema=table.schema), path)
    with pytest.raises(DataError, match=rf"row 1.*{message}"):
        write(tmp_path, section)


def test_a_missing_column_of_mmeb_is_named(tmp_path: Path) -> None:
    section = WRITERS["mmeb_eval"](tmp_path)
    path = tmp_path / "VOC2007" / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns("tgt_img_path"), path)
    with pytest.raises(DataError, match="has no column 'tgt_img_path'"):
        write(tmp_path, section)


@pytest.mark.parametrize(
    ("name", "row", "shared"),
    [
        ("sugar_crepe", {"uri": "train/COCO_val2014_000000000001.jpg"}, True),
        ("cirr", {"query_uri": "elsewhere/dev-0-0-img0.png"}, True),
        ("cirr", {"positive_uri": "elsewhere/dev-99-0-img0.png"}, False),
        ("urban1k", {"uri": "elsewhere/1.jpg"}, False),  # every data set has a 1.jpg
        ("urban1k", {"uri": "image/1.jpg"}, True),
        ("mbeir", {"uri": "elsewhere/1.jpg"}, False),  # nor do numbers in each of its folders
        ("mbeir", {"query_uri": "mbeir_images/2.jpg"}, True),
        ("mmeb_eval", {"positive_uri": "images/CIRR/1.jpg"}, False),
        ("mmeb_eval", {"positive_uri": "images/all/1.jpg"}, True),
    ],
)
def test_a_training_file_of_ones_own_is_searched_for_the_benchmark(
    tmp_path: Path, name: str, row: dict[str, str], shared: bool
) -> None:
    section = WRITERS[name](tmp_path)
    pq.write_table(pa.Table.from_pylist([{"id": "x", **row}]), tmp_path / "train.parquet")
    if shared:
        with pytest.raises(DataError, match="is an image of the benchmark; training on what is me"):
            write(tmp_path, section)
    else:
        write(tmp_path, section)


def test_a_training_file_without_names_is_told_and_one_that_is_none_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a command that another test ran in this process has its own handler, and lets caplog hear nothing
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)
    path = tmp_path / "own.parquet"
    pq.write_table(pa.table({"id": ["6"], "text": ["x"]}), path)
    refuse_shared_images(path, {"a.jpg"}, by_name=True)
    assert "it was not compared with the benchmark" in caplog.text
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be compared with the benchmark"):
        refuse_shared_images(path, {"a.jpg"}, by_name=True)


def test_keys_of_a_benchmark_are_those_of_its_own_format() -> None:
    def refusal(section: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            DataConfig.parse({"benchmark": section}, source="x.yaml")
        return str(caught.value)

    wrong = refusal({"format": "fashion_iq", "catgories": ["dress"]})
    assert (
        "benchmark.fashion_iq.catgories is unknown; did you mean benchmark.fashion_iq.cat" in wrong
    )
    assert "'nlvr' found using 'format' does not match any of the expected tags: 'cirr'" in refusal(
        {"format": "nlvr"}
    )
    assert "columns.colour is unknown" in refusal({"format": "karr", "columns": {"colour": "x"}})
    with pytest.raises(ConfigError, match="scenes and benchmark would write the same files"):
        DataConfig.parse({"scenes": {}, "benchmark": {"format": "karr"}}, source="x.yaml")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_facts_name_metrics_that_are_measured(tmp_path: Path, name: str) -> None:
    section = WRITERS[name](tmp_path) | {"expected": None}
    facts = CONFIGS[name].model_validate(section).facts()
    assert facts.depths
    for metrics in facts.headline.values():
        assert all(metric.partition("@")[0] in ("hit", "recall") for metric in metrics)
    if EVERY_KIND not in facts.headline:
        assert len(facts.headline) > 1
