"""CSV manifests as a corpus: a header line, commas, and quotes in which lines may go on."""

import csv
from collections.abc import Iterator
from functools import cached_property

import pyarrow as pa

from pipelines.corpus.lines import BadRowError, Fields, LineCorpus, Lines, every_row
from pipelines.corpus.text import utf8
from slq.errors import DataError


class CsvCorpus(LineCorpus):
    """Rows with `text` and/or `uri`, and `id`; without one it is `name:row`. The user's own columns are strings.

    Python's parser tells rows apart, in the plan as in reading: a line end inside of quotes ends no row. It gives up a
    field above 128 KiB, so a quote that is never closed costs some rows, which one bad row stands for, not the file.
    """

    def user_schema(self) -> pa.Schema:
        """See `Corpus.user_schema`; all files must have the columns of the first one."""
        ours = set(self._ours.values())
        return pa.schema([(name, pa.string()) for name in self._names if name not in ours])

    @cached_property
    def _names(self) -> list[str]:
        """The columns of the corpus' first file that has any."""
        for file in self.files():
            with self._opened(file.name) as opened:
                self._require_text(file.name, opened)
                names = self._read_header(file.name, Lines(opened))
            if names:
                return names
        raise DataError(f"corpus {self.location} is empty")

    @cached_property
    def _ours(self) -> dict[str, str]:
        """Our name -> the column."""
        return self._columns.find_links(self._names, f"corpus {self.location}")

    def _read_header(self, name: str, lines: Lines) -> list[str]:
        first = next(self._raw_rows(lines), [])
        where = f"corpus {self.store.url(name)}"
        try:
            names = _decoded(first)
        except BadRowError as error:
            raise DataError(f"{where}: the header cannot be read: {error}") from None
        if len(set(names)) < len(names):
            raise DataError(f"{where} has a column twice in its header: {names}")
        return names

    def _header(self, name: str, lines: Lines) -> list[str]:
        names = self._read_header(name, lines)
        if names and set(names) != set(self._names):
            raise DataError(
                f"corpus {self.store.url(name)} has the columns {sorted(names)}, the corpus' first file "
                f"{sorted(self._names)}; write all files with the same header"
            )
        return names

    def _raw_rows(self, lines: Lines) -> Iterator[list[str] | BadRowError]:
        # As Latin-1, in which each byte is a letter: commas, quotes and line ends are bytes of their own in UTF-8.
        reader = csv.reader(map(_as_latin, lines), strict=True)
        return (values for values in every_row(reader) if values)  # of a blank line there are none

    def _fields(self, raw: list[str], header: list[str]) -> Fields:
        values = _decoded(raw)
        if len(values) != len(header):
            raise BadRowError(f"it has {len(values)} values for {len(header)} columns")
        row = dict(zip(header, values, strict=True))
        own = {own: row.pop(name) or None for own, name in self._ours.items()}
        return Fields(own.get("id"), own.get("text"), own.get("uri"), row)


def _as_latin(line: bytes) -> str:
    return line.decode("latin-1")


def _decoded(values: list[str] | BadRowError) -> list[str]:
    if isinstance(values, BadRowError):
        raise values
    return [utf8(value.encode("latin-1")) for value in values]
