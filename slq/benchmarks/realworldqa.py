"""RealWorldQA: 765 questions about photographs, with options and instruction in their text.

The layout of `xai-org/RealworldQA`: Parquet files named after their split (`test-00000-of-00002.parquet`) in `dir` or
in its folder `data`. Columns that are read: `question`, `answer` (a letter, a word or a number), and `image`, a struct
of bytes and path. Questions have no id; theirs is their row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slq.benchmarks.matching import holds_answer, says_exactly
from slq.benchmarks.questions import (
    OPEN,
    Question,
    columns_of,
    digests,
    image_of,
    rows_of,
    text_of,
)
from slq.config import Section
from slq.errors import ConfigError, DataError

NUM_QUESTIONS = 765
_COLUMNS = ("question", "answer", "image")


class RealWorldQaConfig(Section):
    """RealWorldQA's files, and how its questions are asked and scored."""

    title: ClassVar[str] = "RealWorldQA"
    published: ClassVar[int] = NUM_QUESTIONS

    dir: Path
    """Folder with the Parquet files."""
    split: str = "test"
    """Which files: those whose name begins with it."""
    expected: Annotated[int, Field(gt=0)] | None = None
    """Questions that must be there; 765 if null."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 16
    """Tokens that an answer may have."""
    match: Literal["exact", "contains"] = "exact"
    """Whether what is said must be the answer, or may hold it among other words."""

    @property
    def files(self) -> list[Path]:
        """The Parquet files, in order.

        Raises:
            ConfigError: There are none.
        """
        return split_files(self.dir, self.split, "retention.realworldqa.dir", "xai-org/RealworldQA")

    def digests(self) -> dict[str, str]:
        """sha256 of what is read, by name."""
        return digests(self.dir, self.files)

    def questions(self) -> Iterator[Question]:
        """Questions in the order of the files.

        Raises:
            ConfigError: There are no files.
            DataError: A file or a row is malformed, or an image is missing.
            MediaError: An image cannot be decoded; the question is named.
        """
        number = 0
        for path in self.files:
            columns_of(path, _COLUMNS, self.title)
            for row in rows_of(path, _COLUMNS):
                yield _question(row, number, path)
                number += 1

    def asked(self, question: Question) -> str:
        """The question as it is: it says how to answer."""
        return question.text

    def is_right(self, question: Question, said: str) -> bool:
        """As `match` says."""
        compare = says_exactly if self.match == "exact" else holds_answer
        return any(compare(said, answer) for answer in question.answers)


def split_files(folder: Path, split: str, key: str, source: str) -> list[Path]:
    """Parquet files of a split in a folder or its `data`, in order.

    Args:
        folder: Where they lie.
        split: Their names begin with it.
        key: Of the recipe, that names the folder.
        source: What it should hold.

    Raises:
        ConfigError: There are none.
    """
    name = f"{split}-*.parquet"
    found = sorted(folder.glob(name)) or sorted((folder / "data").glob(name))
    if not found:
        raise ConfigError(
            f"{key}: neither {folder} nor its folder data has {name}; it should hold {source}"
        )
    return found


def _question(row: dict[str, Any], number: int, path: Path) -> Question:
    name = f"realworldqa-{number:04d}"
    where = f"{path}: question {name}"
    image = image_of(row["image"], f"{where}: image")
    if image is None:
        raise DataError(f"{where} has no image")
    answer = text_of(row, "answer", where).strip()
    return Question(
        id=name,
        kind=OPEN,
        group=kind_of(answer),
        text=text_of(row, "question", where),
        answers=(answer,),
        images={1: image},
    )


def kind_of(answer: str) -> str:
    """What an answer is: `letter` of an option, `number`, or `word`."""
    if len(answer) == 1 and answer.isalpha() and answer.isupper():
        return "letter"
    return "number" if answer.replace(".", "", 1).isdigit() else "word"
