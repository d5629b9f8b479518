"""OCRBench: 1,000 questions about text in images, of ten types and 29 data sets.

Two layouts are read. The Hub's (`echo840/OCRBench`): Parquet files `test-*.parquet` in `dir` or its folder `data`, with
columns `dataset`, `question`, `question_type`, `answer` (a list of texts) and `image`, a struct of bytes and path; the
id of a question is its row. The authors' (`Yuliang-Liu/MultimodalOCR`): a JSON list `OCRBench.json` of objects with
`id`, `dataset_name`, `type`, `question`, `answers` (a text or a list) and `image_path`, below the folder
`OCRBench_Images`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from slq.benchmarks.matching import holds_text
from slq.benchmarks.questions import (
    OPEN,
    Question,
    checked,
    columns_of,
    complete,
    digests,
    image_of,
    rows_of,
    text_of,
)
from slq.benchmarks.realworldqa import split_files
from slq.config import Section
from slq.errors import ConfigError, DataError

NUM_QUESTIONS = 1000
FORMULAS = "HME100k"
"""The data set of handwritten formulas, which is scored by a rule of its own."""
_KEYS = {
    "dataset_name": "dataset",
    "type": "question_type",
    "question": "question",
    "answers": "answer",
    "image_path": "image",
}
"""What the authors' form calls the columns of the Hub's."""


class OcrBenchConfig(Section):
    """OCRBench's files, and how its questions are asked."""

    title: ClassVar[str] = "OCRBench"
    published: ClassVar[int] = NUM_QUESTIONS

    dir: Path
    """Folder with the Parquet files, or with `json_file` and `images`."""
    json_file: str = "OCRBench.json"
    """The authors' form; it is read where it exists."""
    images: str = "OCRBench_Images"
    """Folder below `dir` that the image paths of `json_file` belong to."""
    expected: Annotated[int, Field(gt=0)] | None = None
    """Questions that must be there; 1,000 if null."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 100
    """Tokens that an answer may have; as many as the authors' own script allows."""

    @property
    def files(self) -> list[Path]:
        """The tables: the JSON file, or the Parquet files in order.

        Raises:
            ConfigError: There are none.
        """
        path = self.dir / self.json_file
        if path.is_file():
            return [path]
        try:
            return split_files(self.dir, "test", "retention.ocrbench.dir", "echo840/OCRBench")
        except ConfigError as error:
            raise ConfigError(f"{error}, or {self.json_file} of its authors") from None

    def digests(self) -> dict[str, str]:
        """sha256 of the tables, by name."""
        return digests(self.dir, self.files)

    def questions(self) -> Iterator[Question]:
        """Questions in the order of the files.

        Raises:
            ConfigError: There are no files.
            DataError: A file or a row is malformed, an image is missing, or an id occurs twice.
            MediaError: An image cannot be decoded; the question is named.
        """
        tables = self.files
        is_json = tables[0].suffix == ".json"
        found = self._of_json(tables[0]) if is_json else self._of_tables(tables)
        return complete(found, f"OCRBench in {self.dir}")

    def asked(self, question: Question) -> str:
        """The question as it is."""
        return question.text

    def is_right(self, question: Question, said: str) -> bool:
        """Whether an answer stands in what was said; formulas without white space."""
        return holds_text(said, question.answers, is_formula=question.source == FORMULAS)

    def _of_tables(self, tables: list[Path]) -> Iterator[Question]:
        number = 0
        for path in tables:
            columns = tuple(_KEYS.values())
            columns_of(path, columns, self.title)
            for row in rows_of(path, columns):
                where = f"{path}: question {number}"
                image = image_of(row["image"], f"{where}: image")
                if image is None:
                    raise DataError(f"{where} has no image")
                yield _question(row, str(number), where, image, _KEYS)
                number += 1

    def _of_json(self, path: Path) -> Iterator[Question]:
        names = {key: key for key in _KEYS}
        for number, record in enumerate(_records(path)):
            where = f"{path}: question {record.get('id', number)}"
            for key in _KEYS:
                if key not in record:
                    raise DataError(f"{where} has no {key!r}; OCRBench has {', '.join(_KEYS)}")
            image = self._image(text_of(record, "image_path", where), where)
            yield _question(record, str(record.get("id", number)), where, image, names)

    def _image(self, place: str, where: str) -> bytes:
        root = (self.dir / self.images).resolve()
        path = (root / place).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{where}: image_path {place!r} leads out of {root}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{where}: image {path} cannot be read: {error.strerror}") from None
        checked(data, f"{where}: image {path}")
        return data


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DataError(f"{path} must hold a list of questions, each an object")
    return found


def _question(
    row: dict[str, Any], number: str, where: str, image: bytes, names: dict[str, str]
) -> Question:
    given = row[names["answers"]]
    answers = tuple(given) if isinstance(given, list) else (given,)
    if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise DataError(f"{where}: its answers are {given!r}; they must be texts")
    return Question(
        id=number,
        kind=OPEN,
        group=text_of(row, names["type"], where),
        text=text_of(row, names["question"], where),
        answers=answers,
        images={1: image},
        source=text_of(row, names["dataset_name"], where),
    )
