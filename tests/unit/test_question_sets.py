"""MMMU, RealWorldQA and OCRBench as published: what is read, and what is refused with a word on it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slq.benchmarks.mmmu import MmmuConfig, python_list
from slq.benchmarks.ocrbench import OcrBenchConfig
from slq.benchmarks.questions import CHOICE, OPEN, Question, QuestionSet, require_count
from slq.benchmarks.realworldqa import RealWorldQaConfig, kind_of
from slq.errors import ConfigError, DataError, MediaError
from tests.questions import (
    MMMU,
    SUBJECTS,
    cell,
    encoded,
    mmmu_row,
    mmmu_rows,
    ocrbench_records,
    ocrbench_rows,
    write_mmmu,
    write_ocrbench,
    write_ocrbench_json,
    write_realworldqa,
)


def read(source: QuestionSet) -> list[Question]:
    return list(source.questions())


# MMMU --------------------------------------------------------------------------------------------------------


def test_mmmu_is_read_with_options_images_and_several_answers(tmp_path: Path) -> None:
    first, second, third, *others = read(MmmuConfig(dir=write_mmmu(tmp_path)))
    assert (first.id, first.kind, first.group) == ("validation_Accounting_1", CHOICE, "Accounting")
    assert first.options == ("$6", "$7", "the buyer's", "both")
    assert first.answers == ("B",)
    assert first.images == {1: encoded(101)}
    assert second.images == {1: encoded(201), 2: encoded(202)}
    assert (third.kind, third.options, third.answers) == (OPEN, (), ("8.33",))
    assert [one.group for one in others] == ["Art_Theory"] * 3
    assert others[0].options == ("<image 2>", "<image 3>")
    assert others[2].answers == ("Nude", "The Nude")


def test_mmmu_words_its_questions_as_its_publisher_does(tmp_path: Path) -> None:
    source = MmmuConfig(dir=write_mmmu(tmp_path))
    choice, _, opened, *_ = read(source)
    assert source.asked(choice) == (
        "Which sum is right? <image 1> Question 1.\n\n(A) $6\n(B) $7\n(C) the buyer's\n(D) both\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert source.asked(opened) == (
        "How much? <image 1>\n\nAnswer the question using a single word or phrase."
    )
    assert source.is_right(choice, "B")
    assert not source.is_right(choice, "A")
    assert not source.is_right(choice, "")
    assert source.is_right(opened, "It is $8.333.")


def test_a_choice_of_subjects_is_read_and_counted_as_published(tmp_path: Path) -> None:
    write_mmmu(tmp_path)
    one = MmmuConfig(dir=tmp_path, subjects=("Art_Theory",))
    assert {question.group for question in read(one)} == {"Art_Theory"}
    assert (one.published, MmmuConfig(dir=tmp_path).published) == (30, 900)
    assert MmmuConfig(dir=tmp_path, split="dev").published == 150
    with pytest.raises(
        ConfigError, match=r"mmmu\.subjects: .* has no questions of 'Art Theory'; a"
    ):
        read(MmmuConfig(dir=tmp_path, subjects=("Art_Theory", "Art Theory")))


def test_one_file_of_all_subjects_gives_the_same_questions(tmp_path: Path) -> None:
    apart = read(MmmuConfig(dir=write_mmmu(tmp_path / "apart")))
    rows = [row for found in mmmu_rows().values() for row in found]
    together = read(MmmuConfig(dir=write_mmmu(tmp_path / "together", {"data": rows})))
    assert together == apart


def test_the_digest_of_a_set_follows_its_files(tmp_path: Path) -> None:
    source = MmmuConfig(dir=write_mmmu(tmp_path))
    before = source.digests()
    assert sorted(before) == [f"{name}/validation-00000-of-00001.parquet" for name in SUBJECTS]
    rows = mmmu_rows()
    rows["Accounting"][0]["answer"] = "C"
    write_mmmu(tmp_path, rows)
    changed = source.digests()
    assert [name for name in before if before[name] != changed[name]] == [
        "Accounting/validation-00000-of-00001.parquet"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "?"}, "question validation_Art_1 has no answer; those of the test split are"),
        ({"answer": None}, "has no answer"),
        ({"answer": "E"}, "answer 'E' is no letter of its 4 options"),
        ({"answer": "AB"}, "answer 'AB' is no letter"),
        ({"options": "['a']"}, "it has 1 options; a choice has 2 to 26 of them"),
        ({"options": "a, b"}, "options must be the text of a list, not 'a, b'"),
        ({"options": "__import__('os').getcwd()"}, "options must be the text of a list, not .__imp"),
        ({"options": "{'a': 1}"}, "must be the text of a list"),
        ({"options": None}, "options must be the text of a list with at most 20000 characters"),
        ({"question_type": "essay"}, "question_type is 'essay'; it must be multiple-choice or open"),
        ({"question_type": "open", "answer": "[]"}, "answer is an empty list"),
        ({"question": "  "}, "question is '  '; it must be a text"),
        ({"question": "See <image 3>."}, "validation_Art_1 shows <image 3>, and has no such image"),
        ({"options": "['<image 7>', 'b']"}, "shows <image 7>, and has no such image"),
        ({"image_1": cell(b"no image")}, "validation_Art_1: image_1: the file is none of JPEG"),
        ({"image_1": {"bytes": None, "path": "a.png"}}, "image_1 holds no bytes; an image is a str"),
        ({"id": "validation_Art_2"}, "id 'validation_Art_2' occurs twice; every question is asked"),
    ],
)  # fmt: skip
def test_a_question_of_mmmu_that_cannot_be_asked_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rows = [mmmu_row("Art", 1, **changes), mmmu_row("Art", 2)]
    with pytest.raises(DataError, match=message):
        read(MmmuConfig(dir=write_mmmu(tmp_path, {"Art": rows})))


def test_an_image_that_is_cut_short_keeps_its_reason(tmp_path: Path) -> None:
    row = mmmu_row("Art", 1, image_1=cell(b"\x89PNG\r\n\x1a\n"))
    with pytest.raises(MediaError, match="question validation_Art_1: image_1: ") as caught:
        read(MmmuConfig(dir=write_mmmu(tmp_path, {"Art": [row]})))
    assert caught.value.reason in ("corrupt", "unknown_format")


def test_a_folder_or_file_that_is_not_mmmu_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retention\.mmmu\.dir: no folder in .* has validation-"):
        read(MmmuConfig(dir=tmp_path))
    write_mmmu(tmp_path)
    path = tmp_path / "Accounting" / "validation-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([mmmu_row("A", 1)], schema=MMMU).drop_columns("image_7"), path)  # fmt: skip
    with pytest.raises(DataError, match="has no column 'image_7'; MMMU has id, question, options"):
        read(MmmuConfig(dir=tmp_path))
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=r"validation-00000-of-00001\.parquet cannot be read"):
        read(MmmuConfig(dir=tmp_path))


def test_a_list_of_literals_is_read_and_nothing_is_run() -> None:
    assert python_list(r"['\sqrt{2}', '\\pi']", "x") == [r"\sqrt{2}", r"\pi"]
    assert python_list("['a', \"b's\", 3]", "x") == ["a", "b's", 3]
    for text in ("[" * 5000, "['a'] * 10**9", "[open('x')]", "['a", "[" + "'a'," * 6000 + "]"):
        with pytest.raises(DataError, match="x must be the text of a list"):
            python_list(text, "x")


# RealWorldQA ---------------------------------------------------------------------------------------------------


def test_realworldqa_is_read_over_its_files(tmp_path: Path) -> None:
    source = RealWorldQaConfig(dir=write_realworldqa(tmp_path))
    found = read(source)
    assert [one.id for one in found] == [f"realworldqa-{n:04d}" for n in range(3)]
    assert [one.answers for one in found] == [("A",), ("3",), ("Yes",)]
    assert [one.group for one in found] == ["letter", "number", "word"]
    assert found[2].images == {1: encoded(2, "WEBP")}
    assert source.asked(found[0]) == "Which way?\nA. Left\nB. Right\n Please answer directly."
    moved = tmp_path / "data"
    assert read(RealWorldQaConfig(dir=moved)) == found
    assert len(source.digests()) == 2
    assert [kind_of(text) for text in ("B", "a", "2.5", "-", "no")] == [
        "letter", "word", "number", "word", "word",
    ]  # fmt: skip


def test_realworldqa_matches_as_its_setting_says(tmp_path: Path) -> None:
    exact = RealWorldQaConfig(dir=write_realworldqa(tmp_path))
    loose = RealWorldQaConfig(dir=tmp_path, match="contains")
    _, number, _ = read(exact)
    assert exact.is_right(number, "Three.")
    assert not exact.is_right(number, "There are 3 cars")
    assert loose.is_right(number, "There are 3 cars")
    assert not loose.is_right(number, "There are 33 cars")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": cell(None)}, "question realworldqa-0000 has no image"),
        ({"image": cell(b"GIF89a")}, "question realworldqa-0000: image: the file is none of JPEG"),
        ({"answer": None}, "question realworldqa-0000: answer is None; it must be a text"),
        ({"question": ""}, "question is ''"),
    ],
)
def test_a_question_of_realworldqa_that_cannot_be_asked_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    row = {"image": cell(encoded(1, "WEBP")), "question": "q?", "answer": "A", **change}
    write_realworldqa(tmp_path, [row])
    with pytest.raises(DataError, match=message):
        read(RealWorldQaConfig(dir=tmp_path))


def test_a_folder_without_realworldqa_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retention\.realworldqa\.dir: neither .* has test-\*"):
        read(RealWorldQaConfig(dir=tmp_path))


# OCRBench ------------------------------------------------------------------------------------------------------


def test_both_forms_of_ocrbench_give_the_same_questions(tmp_path: Path) -> None:
    hub = read(OcrBenchConfig(dir=write_ocrbench(tmp_path / "hub")))
    own = read(OcrBenchConfig(dir=write_ocrbench_json(tmp_path / "own")))
    assert [one.group for one in hub] == [row["question_type"] for row in ocrbench_rows()]
    assert hub[1:] == own[1:]
    assert own[0].answers == ("CENTRE",)  # a text in place of a list
    assert hub[0].answers == ("CENTRE", "CENTER")
    assert hub[2].source == "HME100k"


def test_ocrbench_counts_formulas_by_a_rule_of_their_own(tmp_path: Path) -> None:
    source = OcrBenchConfig(dir=write_ocrbench(tmp_path))
    word, _, formula = read(source)
    assert source.is_right(word, "it says center")
    assert not source.is_right(formula, "it says center")
    assert source.is_right(formula, "C E N\nT E R")
    assert not source.is_right(word, "C E N T E R")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_path": "../../secret.jpg"}, "image_path '../../secret.jpg' leads out of"),
        ({"image_path": "none.jpg"}, "question 7: image .*none.jpg cannot be read: No such file"),
        ({"answers": []}, r"its answers are \[\]; they must be texts"),
        ({"answers": ["", "x"]}, "they must be texts"),
        ({"answers": 5}, "its answers are 5; they must be texts"),
        ({"type": ""}, "type is ''; it must be a text"),
        ({"id": 1}, "id '1' occurs twice"),
        ({"question": None}, "question is None"),
    ],
)
def test_a_question_of_ocrbench_that_cannot_be_asked_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    records = ocrbench_records()
    records[0]["id"] = 7
    write_ocrbench_json(tmp_path, records)
    records[0] |= change
    (tmp_path / "OCRBench.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        read(OcrBenchConfig(dir=tmp_path))


def test_files_that_are_not_ocrbench_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has test-\*\.parquet; .*, or OCRBench\.json of its aut"
    ):
        read(OcrBenchConfig(dir=tmp_path))
    for text, message in (("{", "is no JSON"), ('{"a": 1}', "must hold a list of questions")):
        (tmp_path / "OCRBench.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read(OcrBenchConfig(dir=tmp_path))
    (tmp_path / "OCRBench.json").write_text(json.dumps([{"id": 3, "type": "x"}]))
    with pytest.raises(DataError, match="question 3 has no 'dataset_name'; OCRBench has dataset_n"):
        read(OcrBenchConfig(dir=tmp_path))
    rows = [{**ocrbench_rows()[0], "image": cell(None)}]
    with pytest.raises(DataError, match="question 0 has no image"):
        read(OcrBenchConfig(dir=write_ocrbench(tmp_path / "hub", rows)))


# Counts --------------------------------------------------------------------------------------------------------


def test_a_set_that_is_not_complete_is_refused_unless_the_recipe_says_so() -> None:
    require_count(765, 765, None, what="RealWorldQA", key="retention.realworldqa")
    require_count(3, 765, 3, what="RealWorldQA", key="retention.realworldqa")
    with pytest.raises(
        DataError,
        match=r"RealWorldQA: 764 questions, but 765 are published; complete the files, or set "
        r"retention\.realworldqa\.expected to 764 to ask these",
    ):
        require_count(764, 765, None, what="RealWorldQA", key="retention.realworldqa")
    with pytest.raises(DataError, match=r"but 5 are expected by retention\.ocrbench\.expected"):
        require_count(765, 765, 5, what="OCRBench", key="retention.ocrbench")
