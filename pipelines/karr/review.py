"""What people say of the candidates, in CSV files that the next run reads back.

A run writes `review/review.csv`, a line per candidate with empty columns `decision`, `edited_caption`, `annotator` and
`note`, and keeps there what somebody has filled in. Further annotators put files of their own beside it, as the review
sheet saves them. A decision is `accept`, `reject` or `edit`, the last one with new words.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slq.errors import DataError, StorageError
from slq.karr.agreement import MISSING, agreement
from slq.karr.categories import clue_type
from slq.karr.checks import check_words
from slq.karr.config import KarrConfig
from slq.karr.lexicon import Lexicon
from slq.karr.reasons import RejectedError
from slq.karr.targets import Rewriting, Target, replaced_words

FOLDER, SHEET = "review", "review.csv"
DECISIONS = ("accept", "reject", "edit")
FILLED = ("decision", "edited_caption", "annotator", "note")
COLUMNS = ("id", "target", "category", "original", "caption", *FILLED)
_MAX_BYTES = 64 * 2**20
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """What one annotator says of one candidate.

    Attributes:
        id: Of the candidate: the id of its source row.
        where: File and line, for messages.
    """

    id: str
    decision: str
    edited_caption: str
    annotator: str
    note: str
    where: str


def read_decisions(
    folder: Path, known: Mapping[str, Row], retired: frozenset[str]
) -> list[Decision]:
    """All decisions of all CSV files of a review folder, in the order of file names and lines.

    Args:
        folder: Where the files are; it may be missing.
        known: Candidates by id.
        retired: Ids of captions that were read but are no candidates; what is said of them counts no more.

    Raises:
        DataError: A line breaks the rules; file and line are named.
    """
    found: list[Decision] = []
    seen: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.csv")):
        for one in _of_file(path):
            if one.id in retired:
                continue
            if one.id not in known:
                raise DataError(
                    f"{one.where}: id {one.id!r} is no candidate of this run; remove the line"
                )
            before = seen.setdefault((one.id, one.annotator), one.where)
            if before != one.where:
                raise DataError(
                    f"{one.where}: {one.annotator} decides on {one.id} a second time, first in {before}; keep one"
                )
            found.append(one)
    return found


def _of_file(path: Path) -> Iterator[Decision]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} has more than {_MAX_BYTES} bytes; is it a review file?")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        missing = [name for name in ("id", *FILLED) if name not in header]
        if missing:
            raise DataError(f"{path}: line 1: column {missing[0]} is missing")
        for cells in reader:
            if any(cell.strip() for cell in cells):
                where = f"{path}: line {reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, but {len(header)} columns")
                one = _decision(dict(zip(header, cells, strict=True)), where)
                if one is not None:
                    yield one
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None


def _decision(cells: Mapping[str, str], where: str) -> Decision | None:
    """A line's decision; None where nothing is filled in."""
    filled = {name: _unquoted(cells[name]).strip() for name in FILLED}
    decision = filled["decision"].casefold()
    if not decision:
        if filled["edited_caption"]:
            raise DataError(
                f"{where}: edited_caption is filled in, but decision is empty; write edit"
            )
        return None
    if decision not in DECISIONS:
        raise DataError(f"{where}: decision {decision!r} is none of {', '.join(DECISIONS)}")
    if not filled["annotator"]:
        raise DataError(f"{where}: a decision without an annotator; write who decided")
    if (decision == "edit") != bool(filled["edited_caption"]):
        rule = "needs edited_caption" if decision == "edit" else "must leave edited_caption empty"
        raise DataError(f"{where}: {decision} {rule}")
    edited, annotator, note = (filled[name] for name in FILLED[1:])
    return Decision(_unquoted(cells["id"]), decision, edited, annotator, note, where)


def reviewed(
    candidates: Sequence[Row], decisions: Sequence[Decision], config: KarrConfig, lexicon: Lexicon
) -> list[Row]:
    """The candidates with what people say of them: `reason` where they reject one, new words where they edit one.

    More than half of a candidate's annotators must accept or edit it. Each row gains `annotations`.

    Args:
        candidates: Rows of shards that nothing rejects.
        decisions: About them.
        config: The recipe's section.
        lexicon: Knows other names of targets: new words must not name them either.

    Raises:
        DataError: New words break a rule, or two annotators give different ones; file and line are named.
    """
    of_row: dict[str, list[Decision]] = {}
    for one in decisions:
        of_row.setdefault(one.id, []).append(one)
    return [_reviewed(row, of_row.get(row["source_id"], []), config, lexicon) for row in candidates]


def _reviewed(row: Row, decisions: list[Decision], config: KarrConfig, lexicon: Lexicon) -> Row:
    said = [
        {"annotator": one.annotator, "decision": one.decision, "note": one.note}
        for one in decisions
    ]
    row = {**row, "annotations": said}
    edits = {one.edited_caption: one for one in decisions if one.decision == "edit"}
    for one in edits.values():
        _check_edit(row, one, config, lexicon)
    if len(edits) > 1:
        first, second = list(edits.values())[:2]
        raise DataError(
            f"{second.where}: another edit of {row['source_id']} than in {first.where}; agree on one"
        )
    rejecting = sum(one.decision == "reject" for one in decisions)
    if 2 * rejecting >= len(decisions) > 0:
        return {**row, "reason": "annotators", "detail": f"{rejecting} of {len(decisions)} reject"}
    if not decisions and config.review.required:
        return {**row, "reason": "unreviewed", "detail": ""}
    return _edited(row, next(iter(edits))) if edits else row


def _edited(row: Row, caption: str) -> Row:
    """The row with new words; that its words were checked anew stands among its checks."""
    words = replaced_words(row["original"], _target(row), caption)
    clue = " ".join(words or ())
    told = {"caption": caption, "clue": clue, "clue_type": clue_type(clue)}
    return {**row, **told, "checks": [*row["checks"], "edited"]}


def _target(row: Row) -> Target:
    return Target(row["target"], row["start"], row["start"] + len(row["phrase"]))


def _check_edit(row: Row, one: Decision, config: KarrConfig, lexicon: Lexicon) -> None:
    rewriting = Rewriting(one.edited_caption, "", row["category"])
    try:
        check_words(
            row["original"],
            _target(row),
            rewriting,
            lexicon,
            max_chars=config.max_caption_chars,
            max_clue_words=config.max_clue_words,
        )
    except RejectedError as error:
        raise DataError(
            f"{one.where}: the edited caption is refused, {error.reason}: {error}"
        ) from None


def human_agreement(decisions: Sequence[Decision]) -> dict[str, Any]:
    """How far annotators agree on whether a candidate stays; `edit` counts as `accept`."""
    rows = {name: place for place, name in enumerate(dict.fromkeys(one.id for one in decisions))}
    people = {name: n for n, name in enumerate(sorted({one.annotator for one in decisions}))}
    votes = np.full((len(rows), len(people)), MISSING, dtype=np.int64)
    for one in decisions:
        votes[rows[one.id], people[one.annotator]] = one.decision != "reject"
    counts = Counter(one.decision for one in decisions)
    return {
        **agreement(votes),
        "decisions": dict(sorted(counts.items())),
        "annotators": list(people),
    }


def write_sheet(folder: Path, candidates: Sequence[Row]) -> Path:
    """Write `review.csv` with a line per candidate; what is filled in there stays.

    Raises:
        DataError: The file that is there breaks the rules.
        StorageError: It cannot be written.
    """
    path = folder / SHEET
    kept: dict[str, list[Decision]] = {}
    for one in _of_file(path) if path.is_file() else ():
        kept.setdefault(one.id, []).append(one)
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in candidates:
        told = [row["source_id"], row["target"], row["category"], row["original"], row["caption"]]
        for filled in map(_filled, kept.pop(row["source_id"], [None])):
            writer.writerow([_quoted(str(cell)) for cell in (*told, *filled)])
    for orphaned in kept.values():  # no candidates any more, but somebody's work
        for one in orphaned:
            writer.writerow([_quoted(cell) for cell in (one.id, "", "", "", "", *_filled(one))])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        if not path.is_file() or path.read_text(encoding="utf-8-sig") != sink.getvalue():
            partial.write_text(sink.getvalue(), encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}; free space and run it again"
        ) from None
    return path


def _filled(one: Decision | None) -> tuple[str, ...]:
    return tuple(getattr(one, name) for name in FILLED) if one else ("",) * len(FILLED)


def _quoted(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: words of a model stand there."""
    return f"'{cell}" if cell.startswith((*_FORMULA, "'")) else cell


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:2] in (*_FORMULA, "'") else cell
