"""Text files and JSON Lines manifests as a corpus: one row per line, blank lines are passed over."""

from collections.abc import Iterator

from pipelines.corpus.lines import BadRowError, Fields, LineCorpus, Lines, every_row


def filled_lines(lines: Lines) -> Iterator[bytes | BadRowError]:
    """Lines that hold more than blanks."""
    return (line for line in every_row(lines) if isinstance(line, BadRowError) or line.strip())


class TextCorpus(LineCorpus):
    """One text per line; its id is `name:row`."""

    def _raw_rows(self, lines: Lines) -> Iterator[bytes | BadRowError]:
        return filled_lines(lines)

    def _fields(self, raw: bytes, header: None) -> Fields:  # noqa: ARG002 - there is none
        return Fields(text=utf8(raw.rstrip(b"\r\n")))


def utf8(data: bytes) -> str:
    """Bytes as text.

    Raises:
        BadRowError: They are no UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(f"byte {error.start} is no UTF-8") from None
