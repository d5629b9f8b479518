"""MMMU: multiple-choice and open questions of 30 college subjects, with one to seven images each.

The layout of `MMMU/MMMU`: one folder per subject (`Accounting`, ..., `Sociology`), in it Parquet files named after
their split (`validation-00000-of-00001.parquet`). Columns that are read: `id` (`validation_Accounting_1`), `question`
and `options` with `<image 1>` where an image stands, `answer`, `question_type` (`multiple-choice` or `open`), and
`image_1` to `image_7`, structs of bytes and path, null where there is none. `options` is the text of a Python list; so
is `answer` where an open question has several right ones. The validation split has 30 questions of each subject, `dev`
five; answers of `test` are not published. Files that hold several subjects, in whichever folder, are read too.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slq.benchmarks.matching import says_openly
from slq.benchmarks.questions import (
    CHOICE,
    LETTERS,
    OPEN,
    Question,
    columns_of,
    complete,
    digests,
    image_of,
    rows_of,
    text_of,
)
from slq.config import Section
from slq.errors import ConfigError, DataError

NUM_SUBJECTS = 30
NUM_IMAGES = 7
PER_SUBJECT = {"validation": 30, "dev": 5}
_TEXTS = ("id", "question", "options", "answer", "question_type")
_IMAGES = tuple(f"image_{number}" for number in range(1, NUM_IMAGES + 1))
_ID = re.compile(r"(?P<split>[a-z]+)_(?P<subject>.+)_(?P<number>\d+)")
_MOST_LIST_CHARS = 20_000
_CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
_OPEN_INSTRUCTION = "Answer the question using a single word or phrase."
_NO_ANSWERS = ("", "?")


class MmmuConfig(Section):
    """MMMU's files, and how open questions are asked."""

    title: ClassVar[str] = "MMMU"

    dir: Path
    """Folder with one folder per subject."""
    split: Literal["validation", "dev"] = "validation"
    """Which files: those whose name begins with it."""
    subjects: tuple[str, ...] = ()
    """Subjects that are asked; all if empty."""
    expected: Annotated[int, Field(gt=0)] | None = None
    """Questions that must be there; as many as are published of those subjects if null."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 32
    """Tokens that the answer to an open question may have."""

    @property
    def published(self) -> int:
        """Questions that the publisher has of these subjects."""
        return PER_SUBJECT[self.split] * (len(self.subjects) or NUM_SUBJECTS)

    @property
    def files(self) -> list[Path]:
        """The Parquet files of the split, in order.

        Raises:
            ConfigError: There are none.
        """
        found = sorted(self.dir.glob(f"*/{self.split}-*.parquet"))
        if not found:
            raise ConfigError(
                f"retention.mmmu.dir: no folder in {self.dir} has {self.split}-*.parquet; it should hold MMMU/MMMU, "
                "a folder per subject"
            )
        return found

    def digests(self) -> dict[str, str]:
        """sha256 of what is read, by name."""
        return digests(self.dir, self.files)

    def questions(self) -> Iterator[Question]:
        """Questions in the order of the files.

        Raises:
            ConfigError: There are no files, or none of a subject.
            DataError: A file or a row is malformed, has no answer, or an id occurs twice.
            MediaError: An image cannot be decoded; the question and the image are named.
        """
        found: set[str] = set()
        for question in complete(self._all(), f"MMMU in {self.dir}"):
            if not self.subjects or question.group in self.subjects:
                found.add(question.group)
                yield question
        for subject in self.subjects:
            if subject not in found:
                raise ConfigError(
                    f"retention.mmmu.subjects: {self.dir} has no questions of {subject!r}; a subject is named as its "
                    "folder, such as Art_Theory"
                )

    def asked(self, question: Question) -> str:
        """Question, options and instruction, worded as the publisher's configurations word them."""
        if question.kind == OPEN:
            return f"{question.text}\n\n{_OPEN_INSTRUCTION}"
        options = "".join(
            f"({letter}) {option}\n"
            for letter, option in zip(LETTERS, question.options, strict=False)
        )
        return f"{question.text}\n\n{options}\n{_CHOICE_INSTRUCTION}"

    def is_right(self, question: Question, said: str) -> bool:
        """The letter itself, or for an open question `says_openly`."""
        if question.kind == OPEN:
            return says_openly(said, question.answers)
        return said in question.answers

    def _all(self) -> Iterator[Question]:
        for path in self.files:
            columns_of(path, (*_TEXTS, *_IMAGES), self.title)
            for row in rows_of(path, (*_TEXTS, *_IMAGES)):
                yield _question(row, path)


def _question(row: dict[str, Any], path: Path) -> Question:
    name = text_of(row, "id", str(path))
    where = f"{path}: question {name}"
    kind = text_of(row, "question_type", where)
    if kind not in (CHOICE, OPEN):
        raise DataError(f"{where}: question_type is {kind!r}; it must be {CHOICE} or {OPEN}")
    options = _options(row["options"], where) if kind == CHOICE else ()
    images = {
        number: data
        for number, column in enumerate(_IMAGES, start=1)
        if (data := image_of(row[column], f"{where}: {column}")) is not None
    }
    parts = _ID.fullmatch(name)
    return Question(
        id=name,
        kind=kind,
        group=parts["subject"] if parts else path.parent.name,
        text=text_of(row, "question", where),
        answers=_answers(row["answer"], options, where),
        options=options,
        images=images,
    )


def _options(text: Any, where: str) -> tuple[str, ...]:
    options = tuple(map(str, python_list(text, f"{where}: options")))
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError(
            f"{where}: it has {len(options)} options; a choice has 2 to {len(LETTERS)} of them"
        )
    return options


def _answers(answer: Any, options: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not isinstance(answer, str) or answer.strip() in _NO_ANSWERS:
        raise DataError(
            f"{where} has no answer; those of the test split are not published, use validation"
        )
    if options:
        if answer.strip() not in tuple(LETTERS[: len(options)]):
            raise DataError(
                f"{where}: answer {answer!r} is no letter of its {len(options)} options"
            )
        return (answer.strip(),)
    if answer.lstrip().startswith("["):
        found = tuple(map(str, python_list(answer, f"{where}: answer")))
        if not found:
            raise DataError(f"{where}: answer is an empty list")
        return found
    return (answer,)


def python_list(text: Any, where: str) -> list[Any]:
    """The list of literals that a text writes in Python; nothing in it is run.

    Raises:
        DataError: It is no such text, or a very long one.
    """
    if not isinstance(text, str) or len(text) > _MOST_LIST_CHARS:
        raise DataError(
            f"{where} must be the text of a list with at most {_MOST_LIST_CHARS} characters"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a formula's backslashes
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list):
        raise DataError(f"{where} must be the text of a list, not {text[:80]!r}")
    return found
