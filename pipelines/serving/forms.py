"""Forms (`multipart/form-data`) as the JSON bodies that they stand for, so that routes know one form only."""

import asyncio
import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Scope

from pipelines.serving.bodies import check_json
from pipelines.serving.config import ServeConfig
from pipelines.serving.refusal import RequestRefusedError

BODY, IMAGE, INPUT = "body", "image", "input"
_MAX_FIELDS = 64
_OF_QUERY = ("text", IMAGE, "embedding")
_WORDS = ("text", "mode", "model", "user", "encoding_format")  # never read as JSON: "1" is a text
_BOUNDARY_FORM = re.compile(
    rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]"
)  # RFC 2046, 5.1.1


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form.

    Attributes:
        name: Of the field.
        is_file: Whether it has a file name.
        data: As it was sent.
    """

    name: str
    is_file: bool
    data: bytes

    @property
    def text(self) -> str:
        """What it says, in UTF-8, whatever it calls itself: some decoders of Python take time without bound.

        Raises:
            RequestRefusedError: It is a file, or no text.
        """
        try:
            if not self.is_file:
                return self.data.decode()
        except UnicodeDecodeError:
            pass
        raise RequestRefusedError(
            400, f"the form's {self.name} must be a text in UTF-8 and no file"
        )


async def as_json(scope: Scope, path: str, body: bytes, settings: ServeConfig) -> bytes:
    """A body as JSON; one that is no form, or not for a route that takes one, as it is.

    The scope's headers are changed to what the body is then.

    Raises:
        RequestRefusedError: The form is malformed, or tells a field twice.
    """
    make = {"/search": search_body, "/v1/embeddings": embeddings_body}.get(path)
    kind, options = parse_options_header(Headers(scope=scope).get("content-type"))
    if make is None or kind.strip().lower() != b"multipart/form-data":
        return body
    most = max(_MAX_FIELDS, settings.max_inputs)
    boundary = options.get(b"boundary", b"")

    def made() -> bytes:
        return json.dumps(make(parts_of(boundary, body, most))).encode()

    try:
        data = await asyncio.to_thread(made)
    except RecursionError:
        raise RequestRefusedError(400, "the form holds JSON that is nested too deep") from None
    dropped = (b"content-type", b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    length = str(len(data)).encode()
    scope["headers"] = [
        *kept,
        (b"content-type", b"application/json"),
        (b"content-length", length),
    ]
    return data


@dataclass
class _Reading:
    """What a parser of forms has told so far."""

    most: int
    parts: list[Part] = field(default_factory=list)
    is_whole: bool = False
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _data: bytearray = field(default_factory=bytearray)
    _place: bytes = b""

    def begin(self) -> None:
        if len(self.parts) == self.most:
            raise RequestRefusedError(400, f"the form has more than {self.most} parts")
        self._place, self._data = b"", bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._place = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def content(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def end(self) -> None:
        _, options = parse_options_header(self._place)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise RequestRefusedError(400, "a part of the form has no name")
        self.parts.append(Part(name, b"filename" in options, bytes(self._data)))

    def finish(self) -> None:
        self.is_whole = True


def parts_of(boundary: bytes, body: bytes, most: int) -> list[Part]:
    """The parts of a form.

    Args:
        boundary: Between them.
        body: Of the request.
        most: Parts that it may have.

    Raises:
        RequestRefusedError: It is malformed or cut off, or has too many parts.
    """
    if not _BOUNDARY_FORM.fullmatch(boundary):
        raise RequestRefusedError(400, "the form's boundary is missing or malformed")
    told = _Reading(most)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": told.begin,
            "on_part_data": told.content,
            "on_part_end": told.end,
            "on_header_field": told.header_field,
            "on_header_value": told.header_value,
            "on_header_end": told.header_end,
            "on_end": told.finish,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError:
        told.is_whole = False
    if not told.is_whole:
        raise RequestRefusedError(400, "the form is malformed or cut off")
    return told.parts


def search_body(parts: Sequence[Part]) -> dict[str, Any]:
    """Body of POST /search: the query's `text`, `image` and `embedding`, and all other fields as they are named."""
    body = _base(parts)
    query = body.setdefault("query", {})
    for part in parts:
        if part.name == BODY:
            continue
        place = query if part.name in _OF_QUERY else body
        if not isinstance(place, dict):
            raise RequestRefusedError(400, f"the form's {BODY}: query must be an object")
        if part.name in place:
            raise _told_twice(part.name)
        place[part.name] = _value(part)
    return body


def embeddings_body(parts: Sequence[Part]) -> dict[str, Any]:
    """Body of POST /v1/embeddings: each `image` and each `input` is an input, in their order."""
    body = _base(parts)
    inputs: list[Any] = []
    for part in parts:
        if part.name == BODY:
            continue
        if part.name == IMAGE:
            inputs.append({IMAGE: _value(part)})
        elif part.name == INPUT:
            inputs.append(part.text)
        elif part.name in body:
            raise _told_twice(part.name)
        else:
            body[part.name] = _value(part)
    if inputs and INPUT in body:
        raise _told_twice(INPUT)
    if inputs:
        body[INPUT] = inputs
    return body


def _told_twice(name: str) -> RequestRefusedError:
    return RequestRefusedError(400, f"the form tells {name!r} twice")


def _base(parts: Sequence[Part]) -> dict[str, Any]:
    """What the part `body` tells in JSON."""
    found = [part for part in parts if part.name == BODY]
    if not found:
        return {}
    if len(found) > 1:
        raise _told_twice(BODY)
    try:
        body = _json(found[0].data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestRefusedError(400, f"the form's {BODY} must be a JSON object")
    return body


def _value(part: Part) -> Any:
    """A field as it would stand in JSON."""
    if part.name == IMAGE and part.is_file:
        return base64.b64encode(part.data).decode()
    if part.name == IMAGE or part.name in _WORDS or part.is_file:
        return part.text
    try:
        return _json(part.data)
    except (ValueError, RecursionError):
        return part.text


def _json(text: bytes) -> Any:
    check_json(text)
    return json.loads(text)
