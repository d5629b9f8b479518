"""What people decide: read back from their files, refused by line where it breaks the rules, never lost."""

import csv
from pathlib import Path
from typing import Any

import pytest

from jobs.report.karr_review import review_page
from pipelines.karr.review import (
    COLUMNS,
    SHEET,
    human_agreement,
    read_decisions,
    reviewed,
    write_sheet,
)
from slq.errors import DataError
from slq.karr.config import KarrConfig
from slq.karr.lexicon import Lexicon
from tests.browser import chromium, launched

CONFIG, LEXICON = KarrConfig(), Lexicon()


def candidate(name: str, **changes: Any) -> dict[str, Any]:
    row = {
        "source_id": name,
        "target": "dog",
        "phrase": "a dog",
        "start": 0,
        "category": "encyclopaedic",
        "clue": "the animal that barks",
        "clue_type": "action",
        "original": "a dog left of an owl",
        "caption": "the animal that barks left of an owl",
        "reason": None,
        "detail": "",
        "checks": [],
        "votes": [],
    }
    return {**row, **changes}


ROWS = [candidate(name) for name in ("a", "b", "c")]
KNOWN = {row["source_id"]: row for row in ROWS}


def write(folder: Path, name: str, *lines: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([{**dict.fromkeys(COLUMNS, ""), **line} for line in lines])
    return path


def said(name: str, decision: str, annotator: str = "ann", **more: str) -> dict[str, str]:
    return {"id": name, "decision": decision, "annotator": annotator, **more}


def outcome(folder: Path, config: KarrConfig = CONFIG) -> dict[str, dict[str, Any]]:
    decisions = read_decisions(folder, KNOWN, frozenset({"gone"}))
    return {row["source_id"]: row for row in reviewed(ROWS, decisions, config, LEXICON)}


def test_decisions_accept_reject_and_edit(tmp_path: Path) -> None:
    edited = "the loyal friend of humans left of an owl"
    write(
        tmp_path,
        "x.csv",
        said("a", "Accept "),
        said("b", "reject", note="vague"),
        said("c", "edit", edited_caption=edited),
    )
    found = outcome(tmp_path)
    assert [found[name]["reason"] for name in "abc"] == [None, "annotators", None]
    assert found["b"]["annotations"] == [
        {"annotator": "ann", "decision": "reject", "note": "vague"}
    ]
    assert (found["c"]["caption"], found["c"]["clue"]) == (edited, "loyal friend of humans")
    assert found["c"]["clue_type"] == "description"
    assert found["c"]["checks"] == ["edited"]
    assert found["a"]["caption"] == KNOWN["a"]["caption"]


def test_more_than_half_must_accept(tmp_path: Path) -> None:
    write(tmp_path, "x.csv", said("a", "reject"), said("b", "reject"), said("c", "accept"))
    write(
        tmp_path,
        "y.csv",
        said("a", "accept", "bob"),
        said("b", "accept", "bob"),
        said("c", "accept", "bob"),
    )
    write(tmp_path, "z.csv", said("b", "accept", "cyd"))
    found = outcome(tmp_path)
    assert [found[name]["reason"] for name in "abc"] == ["annotators", None, None]
    stats = human_agreement(read_decisions(tmp_path, KNOWN, frozenset()))
    assert stats["annotators"] == ["ann", "bob", "cyd"]
    assert stats["decisions"] == {"accept": 5, "reject": 2}
    assert stats["percent_agreement"] == pytest.approx((0 + 1 / 3 + 1) / 3)


def test_what_nobody_has_seen_stays_unless_a_review_is_required(tmp_path: Path) -> None:
    write(tmp_path, "x.csv", said("a", "accept"))
    required = KarrConfig.parse({"review": {"required": True}}, source="karr")
    assert isinstance(required, KarrConfig)
    assert [row["reason"] for row in outcome(tmp_path).values()] == [None, None, None]
    found = outcome(tmp_path, required)
    assert [row["reason"] for row in found.values()] == [None, "unreviewed", "unreviewed"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (said("a", "maybe"), r"line 3: decision 'maybe' is none of accept, reject, edit"),
        (said("a", "accept", " "), "line 3: a decision without an annotator"),
        (said("a", "edit"), "line 3: edit needs edited_caption"),
        (said("a", "accept", edited_caption="x"), "line 3: accept must leave edited_caption empty"),
        (
            {"id": "a", "edited_caption": "x"},
            "line 3: edited_caption is filled in, but decision is empty",
        ),
        (said("z", "accept"), "line 3: id 'z' is no candidate of this run"),
        (said("b", "reject"), "line 3: ann decides on b a second time, first in .*x.csv: line 2"),
        (
            said("a", "edit", edited_caption="the barking dog left of an owl"),
            "line 3: the edited caption is refused, names_target: it says 'dog'",
        ),
        (
            said("a", "edit", edited_caption="the hound left of an owl"),
            "line 3: the edited caption is refused, names_synonym",
        ),
        (
            said("a", "edit", edited_caption="the animal that barks right of an owl"),
            "line 3: the edited caption is refused, changes_rest",
        ),
    ],
)
def test_bad_lines_are_refused_by_file_and_line(
    tmp_path: Path, line: dict[str, str], problem: str
) -> None:
    write(tmp_path, "x.csv", said("b", "accept"), line)
    with pytest.raises(DataError, match=rf"x\.csv: {problem}"):
        outcome(tmp_path)


def test_two_different_edits_of_one_caption_are_refused(tmp_path: Path) -> None:
    for who, words in (
        ("ann", "the animal that barks left of an owl"),
        ("bob", "an animal left of an owl"),
    ):
        write(tmp_path, f"{who}.csv", said("a", "edit", who, edited_caption=words))
    with pytest.raises(
        DataError,
        match=r"bob.csv: line 2: another edit of a than in .*ann.csv: line 2; agree on one",
    ):
        outcome(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"id,decision\n", r"line 1: column edited_caption is missing"),
        (b"", r"line 1: column id is missing"),
        (
            b"id,decision,edited_caption,annotator,note\na,accept\n",
            "line 2: 2 cells, but 5 columns",
        ),
        (b'id,decision,edited_caption,annotator,note\n"a"x,accept,,ann,\n', "line 2"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        outcome(tmp_path)


def test_what_was_a_candidate_once_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "x.csv", said("gone", "accept"), said("a", "reject"))
    assert outcome(tmp_path)["a"]["reason"] == "annotators"


def test_the_sheet_keeps_what_people_have_filled_in(tmp_path: Path) -> None:
    path = write_sheet(tmp_path, ROWS)
    assert [line["decision"] for line in csv.DictReader(path.read_text().splitlines())] == [
        "",
        "",
        "",
    ]
    write(tmp_path, SHEET, said("b", "accept"), said("b", "reject", "bob"), said("gone", "accept"))
    write_sheet(tmp_path, ROWS)
    before = path.stat().st_mtime_ns
    write_sheet(tmp_path, ROWS)
    assert (
        path.stat().st_mtime_ns == before
    )  # nothing changed, so somebody's open file is left alone
    lines = [
        (one["id"], one["decision"], one["annotator"])
        for one in csv.DictReader(path.read_text().splitlines())
    ]
    assert lines == [
        ("a", "", ""), ("b", "accept", "ann"), ("b", "reject", "bob"), ("c", "", ""), ("gone", "accept", "ann"),
    ]  # fmt: skip
    assert len(read_decisions(tmp_path, KNOWN, frozenset({"gone"}))) == 2
    assert list(tmp_path.glob(".*")) == []


def test_words_of_a_model_become_no_formula_and_come_back_as_they_are(tmp_path: Path) -> None:
    formula = "=HYPERLINK(A1) left of an owl"
    rows = [candidate("=a", caption=formula), candidate("'b"), candidate("-c")]
    path = write_sheet(tmp_path, rows)
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert all(
        not cell.startswith(("=", "+", "-", "@")) for line in lines for cell in line.values()
    )
    assert lines[0]["caption"] == f"'{formula}"
    decided = [{**line, "decision": "accept", "annotator": "ann"} for line in lines]
    write(tmp_path, SHEET, *decided)
    found = read_decisions(tmp_path, {row["source_id"]: row for row in rows}, frozenset())
    assert [one.id for one in found] == ["=a", "'b", "-c"]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    picture = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    more = {
        "image": picture,
        "before": "",
        "after": " left of an owl",
        "category_title": "encyclopaedic",
    }
    return {**row, "id": row["source_id"], **more}


def test_a_page_needs_nothing_else_and_runs_no_words_of_a_model() -> None:
    evil = '"><script>alert(1)</script>'
    page = review_page([shown(candidate(evil, caption=evil, clue=evil))], title="1", key="k 1")
    assert "<script>alert" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<article") == 1


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_decisions_made_on_the_page_are_read_back(tmp_path: Path) -> None:
    page_file = tmp_path / "review-001.html"
    rows = [*ROWS[:2], candidate("=c", original="a dog, 'so' to say", phrase="a dog")]
    page_file.write_text(review_page([shown(row) for row in rows], title="1 to 3 of 3", key="k 1"))
    edited = "the animal that barks, \"loud\", 'so' to say"
    with launched() as browser:
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(page_file.as_uri())
        assert page.locator("#save").is_disabled()
        page.locator("article").first.focus()
        for key in "ajrje":
            page.keyboard.press(key)
        page.locator(".edited").nth(2).fill(edited)
        page.locator(".note").nth(1).fill("too vague, really")
        page.fill("#annotator", "Ann B.")
        page.reload()  # nothing is lost
        with page.expect_download() as waiting:
            page.locator("#save").click()
        waiting.value.save_as(tmp_path / "ann.csv")
        assert (waiting.value.suggested_filename, problems) == ("review-Ann_B.-1.csv", [])
    found = read_decisions(tmp_path, {row["source_id"]: row for row in rows}, frozenset())
    assert [(one.id, one.decision, one.annotator) for one in found] == [
        ("a", "accept", "Ann B."), ("b", "reject", "Ann B."), ("=c", "edit", "Ann B."),
    ]  # fmt: skip
    assert (found[1].note, found[2].edited_caption) == ("too vague, really", edited)
