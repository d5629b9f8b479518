"""Reading publishers' files: JSON, JSON lines, and fields of records, each fault with its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slq.errors import ConfigError, DataError

_BLOCK = 2**20


def require_files(paths: list[Path], publisher: str) -> list[Path]:
    """The paths.

    Args:
        paths: Files that a benchmark is read from.
        publisher: Where they come from, for the message.

    Raises:
        ConfigError: One is missing.
    """
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                f"data.benchmark: {path} does not exist; it is one of the files of {publisher}"
            )
    return paths


def read_json(path: Path, form: type[Any]) -> Any:
    """A JSON file.

    Args:
        path: The file.
        form: `dict` or `list`, what it must hold.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, form):
        raise DataError(
            f"{path} must hold a JSON {'list' if form is list else 'object'}, not a {type(content).__name__}"
        )
    return content


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line of a JSONL file; empty lines are skipped.

    Raises:
        DataError: A line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} must be a JSON object, not a {type(record).__name__}")
    return record


def first_of_list(path: Path, count: int) -> list[Any]:
    """The first entries of a JSON file that holds a list, without reading what stands behind them.

    Raises:
        DataError: It holds no list, or breaks off.
    """
    decoder = json.JSONDecoder()
    found: list[Any] = []
    try:
        with path.open(encoding="utf-8") as file:
            rest, more = file.read(_BLOCK).lstrip(), True
            if not rest.startswith("["):
                raise DataError(f"{path} must hold a JSON list")
            rest = rest[1:]
            while len(found) < count:
                rest = rest.lstrip(", \t\r\n")
                if rest.startswith("]"):
                    break
                try:
                    entry, end = decoder.raw_decode(rest)
                except ValueError:
                    block = file.read(_BLOCK) if more else ""
                    more = bool(block)
                    if not more:
                        raise DataError(f"{path} breaks off after {len(found)} entries") from None
                    rest += block
                    continue
                found.append(entry)
                rest = rest[end:]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return found


def value_of(record: Any, name: str, form: type[Any], where: str) -> Any:
    """A field of a record.

    Args:
        record: A JSON object.
        name: Of the field.
        form: What it must be.
        where: The record, for messages.

    Raises:
        DataError: The record is no object, or has no such field of that form.
    """
    if not isinstance(record, dict) or name not in record:
        raise DataError(f"{where} has no {name!r}")
    value = record[name]
    if not isinstance(value, form) or isinstance(value, bool):
        raise DataError(f"{where}: {name!r} must be a {form.__name__}, not {value!r:.80}")
    return value


def text_of(record: Any, name: str, where: str) -> str:
    """A field that holds a text, with runs of white space as single spaces.

    Raises:
        DataError: It is missing, no string, or empty.
    """
    text = " ".join(str(value_of(record, name, str, where)).split())
    if not text:
        raise DataError(f"{where}: {name!r} is empty; the results would not be comparable")
    return text
