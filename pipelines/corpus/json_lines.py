"""JSON Lines manifests as a corpus: one object per line."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipelines.corpus.lines import BadRowError, Fields, LineCorpus, Lines
from pipelines.corpus.text import filled_lines, utf8
from slq.errors import DataError

_SAMPLE_BYTES = 2**20


class JsonLinesCorpus(LineCorpus):
    """Objects with `text` and/or `uri`, and `id`; without one it is `name:row`.

    The user's own columns and their types are those of the corpus' first MiB, as far as they are not null throughout.
    Other keys are ignored later, and a value of another type makes a bad row.
    """

    def user_schema(self) -> pa.Schema:
        """See `Corpus.user_schema`."""
        return self._user_schema

    @cached_property
    def _user_schema(self) -> pa.Schema:
        where = f"corpus {self.location}"
        objects = list(self._sample())
        if not objects:
            raise DataError(
                f"{where}: none of its first lines is a JSON object; each line must hold one, as {{...}}"
            )
        values: dict[str, list[Any]] = {}
        for found in objects:
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        ours = set(self._columns.find_links(values, where).values())
        fields = [
            pa.field(name, kind)
            for name, column in values.items()
            if name not in ours and (kind := _common_type(name, column, where)) is not None
        ]
        return pa.schema(fields)

    @cached_property
    def _ours(self) -> dict[str, str]:
        """Our name -> the key; also where the first lines lack it."""
        names = self._columns.names
        left = {own: own for own in ("id", "text", "uri") if own not in names.values()}
        return left | dict(names)

    def _sample(self) -> Iterator[dict[str, Any]]:
        """The objects of the first MiB."""
        size = 0
        for file in self.files():
            with self._opened(file.name) as opened:
                self._require_text(file.name, opened)
                for raw in self._raw_rows(Lines(opened)):
                    if isinstance(raw, bytes):
                        size += len(raw)
                        try:
                            yield _object(raw)
                        except BadRowError:
                            continue
                    if size >= _SAMPLE_BYTES:
                        return

    def _header(self, name: str, lines: Lines) -> Mapping[str, pa.DataType]:  # noqa: ARG002
        return {field.name: field.type for field in self._user_schema}

    def _raw_rows(self, lines: Lines) -> Iterator[bytes | BadRowError]:
        return filled_lines(lines)

    def _fields(self, raw: bytes, header: Mapping[str, pa.DataType]) -> Fields:
        row = _object(raw)
        found = {own: row.get(key) for own, key in self._ours.items()}
        for own, value in found.items():
            if type(value) not in ((str, int, type(None)) if own == "id" else (str, type(None))):
                raise BadRowError(f"{self._ours[own]} cannot be {json.dumps(value)[:100]}")
        item_id = None if found.get("id") is None else str(found["id"])
        columns = {name: row.get(name) for name in header}
        misfits = [name for name, kind in header.items() if not _fits(columns[name], kind)]
        if misfits:
            name = misfits[0]
            problem = f"{name} is no {header[name]}, which it is in the corpus' first lines"
            return Fields(id=item_id, text=found.get("text"), problem=problem)
        return Fields(item_id, found.get("text"), found.get("uri") or None, columns)


def _object(line: bytes) -> dict[str, Any]:
    """The object of a line. Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become `?`."""
    try:
        found = json.loads(utf8(line))
        if b"\\ud" in line.lower():
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRowError(f"it is no JSON object, but a {type(found).__name__}")
    return found


def _common_type(name: str, values: list[Any], where: str) -> pa.DataType | None:
    """The Arrow type of a column; None where no value tells it.

    Raises:
        DataError: The values have no common type.
    """
    try:
        kind = pa.infer_type(values)
    except (ValueError, TypeError, pa.ArrowException):
        kind = None
    if kind is None or not all(_fits(value, kind) for value in values):
        raise DataError(
            f"{where}: the values of {name} have no common type in the first lines; give them one, or leave it out"
        )
    return kind if _is_known(kind) else None


def _is_known(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _is_known(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_known(field.type) for field in kind)
    return not pa.types.is_null(kind)


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Whether a JSON value can be stored in a column without loss; Arrow itself would cut 1.5 to 1."""
    if value is None:
        return True
    if isinstance(value, dict):
        return pa.types.is_struct(kind) and all(
            _fits(value.get(field.name), field.type) for field in kind
        )
    if isinstance(value, list):
        return pa.types.is_list(kind) and all(_fits(item, kind.value_type) for item in value)
    if isinstance(value, bool):
        return bool(pa.types.is_boolean(kind))
    if isinstance(value, int):
        return abs(value) < (2**63 if pa.types.is_integer(kind) else 2**53) and bool(
            pa.types.is_integer(kind) or pa.types.is_floating(kind)
        )
    return bool(
        pa.types.is_floating(kind) if isinstance(value, float) else pa.types.is_string(kind)
    )
