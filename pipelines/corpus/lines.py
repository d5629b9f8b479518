"""Formats of lines: one pass over the bytes finds where shards begin, and a shard reads only its own bytes."""

import csv
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from pipelines.corpus.base import Record, Shard, file_state, rows_changed
from pipelines.corpus.tables import Row, TableCorpus
from pipelines.images import record_uri
from pipelines.storage import StoredFile
from slq.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
"""Longer lines are no rows; they are passed over without being held in memory."""
T = TypeVar("T")
_BOM = b"\xef\xbb\xbf"
_MAGICS = {
    b"\x1f\x8b": "compressed with gzip, and no shard can begin inside of it; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, and no shard can begin inside of it; unpack it",
    b"\xff\xfe": "UTF-16; write it as UTF-8",
    b"\xfe\xff": "UTF-16; write it as UTF-8",
}


class BadRowError(Exception):
    """A row that cannot be understood; the next one can."""


class Lines(Iterator[bytes]):
    """Lines of a file with their ends, and where the last one ended.

    Args:
        file: Read from where it stands.
        start: Where that is.
        stop: Where to stop; the file's end by default.

    Attributes:
        position: First byte behind the last line.
    """

    def __init__(self, file: IO[bytes], start: int = 0, stop: int | None = None) -> None:
        self._file = file
        self._stop = stop
        self.position = start

    def __next__(self) -> bytes:
        """The next line.

        Raises:
            BadRowError: It is too long; the line behind it comes next.
        """
        start = self.position
        line = self._part()
        if not line:
            raise StopIteration
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            return line.removeprefix(_BOM) if start == 0 else line
        while line and not line.endswith(b"\n"):
            line = self._part()
        raise BadRowError(f"the line has more than {MAX_LINE_BYTES} bytes")

    def _part(self) -> bytes:
        """A line, or as much of it as may be held in memory."""
        size = MAX_LINE_BYTES
        if self._stop is not None:
            size = max(0, min(size, self._stop - self.position))
        part = self._file.readline(size)
        self.position += len(part)
        return part


def every_row(rows: Iterator[T]) -> Iterator[T | BadRowError]:
    """Rows as they come, also after one that cannot be told from its bytes, which comes as its error."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except BadRowError as error:
            yield error
        except csv.Error as error:  # the parser begins anew with the next line
            yield BadRowError(f"it is no CSV: {error}")
        else:
            yield row


@dataclass(frozen=True, slots=True)
class Fields:
    """What a row says.

    Attributes:
        id: None where it has none.
        uri: Of its image in a file of its own.
        columns: The user's own.
        problem: Why it cannot be used; None where it can.
    """

    id: str | None = None
    text: str | None = None
    uri: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class LineCorpus(TableCorpus):
    """A corpus whose rows are told apart by reading its bytes in order.

    A subclass says what a row is, once for the plan and for reading, so both always count the same rows.
    """

    keeps_places = False

    @abstractmethod
    def _raw_rows(self, lines: Lines) -> Iterator[Any]:
        """Rows, not understood yet, or a BadRowError each; when one comes, `lines.position` is its end."""

    @abstractmethod
    def _fields(self, raw: Any, header: Any) -> Fields:
        """What a row says.

        Raises:
            BadRowError: It cannot be understood.
        """

    def _header(self, name: str, lines: Lines) -> Any:  # noqa: ARG002 - of formats that have one
        """What stands before the first row; the lines are left where that begins.

        Raises:
            DataError: The file cannot be used.
        """
        return None

    def _cut(self, files: Iterator[StoredFile], shard_rows: int) -> Iterator[Shard]:
        for file in files:
            with self._opened(file.name) as opened:
                self._require_text(file.name, opened)
                lines, state = Lines(opened), file_state(file.name, file)
                self._header(file.name, lines)
                start, offset, row = 0, lines.position, 0
                for row, _ in enumerate(self._raw_rows(lines), start=1):
                    if row - start == shard_rows:
                        yield Shard(-1, file.name, start, row, offset, lines.position, state=state)
                        start, offset = row, lines.position
                if start < row:
                    yield Shard(-1, file.name, start, row, offset, lines.position, state=state)

    def _require_text(self, name: str, opened: IO[bytes]) -> None:
        head = opened.read(4)
        opened.seek(0)
        for magic, what in _MAGICS.items():
            if head.startswith(magic):
                raise DataError(f"corpus {self.store.url(name)} is {what}")

    def records(self, shard: Shard) -> Iterator[Record]:
        """See `Corpus.records`; a row that cannot be understood is a record with the problem `bad_row`."""
        with self._opened(shard.source) as opened:
            yield from self._followed(self._rows(opened, shard), shard.source)

    def _rows(self, opened: IO[bytes], shard: Shard) -> Iterator[Row]:
        header = self._header(shard.source, Lines(opened))
        opened.seek(shard.offset)
        number = shard.start
        for raw in self._raw_rows(Lines(opened, shard.offset, shard.end)):
            yield self._row(raw, header, shard.source, number)
            number += 1
        if number != shard.stop:
            raise rows_changed(shard, number - shard.start)

    def _row(self, raw: Any, header: Any, name: str, number: int) -> Row:
        found = self._understood(raw, header)
        record = Record(
            id=found.id or f"{name}:{number}",
            uri=record_uri(self.store.url(name), number),
            image=None,
            text=found.text,
            columns=found.columns,
            problem=found.problem and f"row {number} of {name}: {found.problem}",
            reason="bad_row" if found.problem else "unreadable",
        )
        return record, found.uri

    def _understood(self, raw: Any, header: Any) -> Fields:
        if isinstance(raw, BadRowError):
            return Fields(problem=str(raw))
        try:
            return self._fields(raw, header)
        except BadRowError as error:
            return Fields(problem=str(error))
