"""Questions about images, as benchmarks of question answering ask them, and what their files must hold."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from slq.errors import DataError, MediaError
from slq.files import file_sha256
from slq.media import check_image

MARKER = re.compile(r"<image (\d+)>")
"""Where a question or an option shows an image, counted from 1."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE, OPEN = "multiple-choice", "open"
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: Unique in its benchmark.
        kind: `multiple-choice` or `open`: whether a letter is chosen or words are said.
        group: What it is counted with: MMMU's subject, OCRBench's question type, RealWorldQA's kind of answer.
        text: The question, with `MARKER`s where images stand; images without one come first.
        answers: Right answers, any of which will do; of a choice its letter.
        options: Of a choice, in the order of the letters.
        images: Encoded, by number.
        source: Of which data set it was taken, where that decides how it is scored.
    """

    id: str
    kind: str
    group: str
    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    images: dict[int, bytes] = field(default_factory=dict)
    source: str = ""


class QuestionSet(Protocol):
    """What the configuration of a benchmark offers."""

    title: ClassVar[str]
    """As people know it."""
    dir: Path
    expected: int | None
    max_new_tokens: int

    @property
    def published(self) -> int:
        """Questions that the publisher has."""

    def digests(self) -> dict[str, str]:
        """sha256 of what is read, by name."""

    def questions(self) -> Iterator[Question]:
        """All questions, checked."""

    def asked(self, question: Question) -> str:
        """What the model reads, with markers where images stand."""

    def is_right(self, question: Question, said: str) -> bool:
        """Whether the model's letter or words answer the question."""


def columns_of(path: Path, wanted: Sequence[str], benchmark: str) -> list[str]:
    """Columns of a Parquet file.

    Raises:
        DataError: It cannot be read, or lacks a column.
    """
    try:
        names: list[str] = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for name in wanted:
        if name not in names:
            raise DataError(
                f"{path} has no column {name!r}; {benchmark} has {', '.join(wanted)}, and this file {', '.join(names)}"
            )
    return names


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, a few at a time.

    Raises:
        DataError: The file is damaged.
    """
    try:
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=list(columns)):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """A string that must be there.

    Raises:
        DataError: It is null, empty, or something else.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {column} is {value!r}; it must be a text")
    return value


def image_of(cell: Any, where: str) -> bytes | None:
    """Bytes of an image column of the Hub's form, a struct of `bytes` and `path`; None where there is no image.

    Raises:
        DataError: The cell has another form, or names a file instead of holding it.
        MediaError: As `slq.media.check_image`, with the question and the column.
    """
    if cell is None or (isinstance(cell, dict) and not any(cell.values())):
        return None
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(
            f"{where} holds no bytes; an image is a struct of bytes and path, with the file in bytes"
        )
    checked(data, where)
    return data


def checked(data: bytes, where: str) -> None:
    """Refuse an image of which the header shows that it cannot be decoded; errors as `image_of`."""
    try:
        check_image(data)
    except MediaError as error:
        raise MediaError(error.reason, f"{where}: {error}") from None


def complete(questions: Iterable[Question], what: str) -> Iterator[Question]:
    """The same questions.

    Raises:
        DataError: Two have the same id, or one shows an image that it does not have.
    """
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(
                f"{what}: id {question.id!r} occurs twice; every question is asked once"
            )
        seen.add(question.id)
        for part in (question.text, *question.options):
            for number in map(int, MARKER.findall(part)):
                if number not in question.images:
                    raise DataError(
                        f"{what}: question {question.id} shows <image {number}>, and has no such image"
                    )
        yield question


def require_count(found: int, published: int, expected: int | None, *, what: str, key: str) -> None:
    """Check that no question is missing.

    Args:
        found: How many there are.
        published: How many the publisher has.
        expected: How many the recipe says there are; the published ones if None.
        what: Benchmark and place, for the message.
        key: Of the recipe, that says otherwise.

    Raises:
        DataError: There are more or fewer.
    """
    wanted = published if expected is None else expected
    if found == wanted:
        return
    origin = "are published" if expected is None else f"are expected by {key}.expected"
    raise DataError(
        f"{what}: {found} questions, but {wanted} {origin}; complete the files, or set {key}.expected to {found} "
        "to ask these"
    )


def digests(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 of files, by their path below `root`."""
    return {str(path.relative_to(root)): file_sha256(path) for path in files}
