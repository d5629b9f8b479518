"""Forms (`multipart/form-data`) as the JSON bodies that they stand for, so that routes know one form only."""

import base64
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Scope

from pipelines.serving.config import ServeConfig
from pipelines.serving.refusal import RequestRefusedError

BODY, IMAGE, INPUT = "body", "image", "input"
_MAX_FIELDS = 64
_BOUNDARY_FORM = re.compile(
    rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]"
)  # RFC 2046, 5.1.1
_OF_QUERY = ("text", IMAGE, "embedding")
_WORDS = ("text", "mode", "model", "user", "encoding_format")  # never read as JSON: "1" is a text


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
    form = await _parsed(options.get(b"boundary", b""), body, max_files=settings.max_inputs)
    try:
        data = json.dumps(await make(form)).encode()
    except RecursionError:
        raise RequestRefusedError(400, "the form holds JSON that is nested too deep") from None
    finally:
        await form.close()
    dropped = (b"content-type", b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    length = str(len(data)).encode()
    scope["headers"] = [
        *kept,
        (b"content-type", b"application/json"),
        (b"content-length", length),
    ]
    return data


async def _parsed(boundary: bytes, body: bytes, *, max_files: int) -> FormData:
    """The parts; texts are in UTF-8, whatever charset was named: some decoders of Python take time without bound."""
    if not _BOUNDARY_FORM.fullmatch(boundary):
        raise RequestRefusedError(400, "the form's boundary is missing or malformed")
    kind = b'multipart/form-data; boundary="' + boundary + b'"'

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        Headers(raw=[(b"content-type", kind)]),
        stream(),
        max_files=max_files,
        max_fields=max(_MAX_FIELDS, max_files),
        max_part_size=len(body),
    )
    parser.spool_max_size = (
        len(body) + 1
    )  # it is in memory already; no file on a disk that may be full
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise RequestRefusedError(400, f"the form cannot be read: {error.message}") from None


async def search_body(form: FormData) -> dict[str, Any]:
    """Body of POST /search: the query's `text`, `image` and `embedding`, and all other fields as they are named."""
    body = await _base(form)
    query = body.setdefault("query", {})
    for name, value in form.multi_items():
        if name == BODY:
            continue
        place = query if name in _OF_QUERY else body
        if not isinstance(place, dict):
            raise RequestRefusedError(400, f"the form's {BODY}: query must be an object")
        if name in place or name == "query":
            raise RequestRefusedError(400, f"the form tells {name!r} twice")
        place[name] = await _value(name, value)
    return body


async def embeddings_body(form: FormData) -> dict[str, Any]:
    """Body of POST /v1/embeddings: each `image` and each `input` is an input, in their order."""
    body = await _base(form)
    inputs: list[Any] = []
    for name, value in form.multi_items():
        if name == BODY:
            continue
        if name == IMAGE:
            inputs.append({IMAGE: await _value(name, value)})
        elif name == INPUT:
            inputs.append(_text(name, value))
        elif name in body:
            raise RequestRefusedError(400, f"the form tells {name!r} twice")
        else:
            body[name] = await _value(name, value)
    if inputs and INPUT in body:
        raise RequestRefusedError(400, f"the form tells {INPUT!r} twice")
    if inputs:
        body[INPUT] = inputs
    return body


async def _base(form: FormData) -> dict[str, Any]:
    """What the part `body` tells in JSON."""
    parts = form.getlist(BODY)
    if not parts:
        return {}
    if len(parts) > 1:
        raise RequestRefusedError(400, f"the form tells {BODY!r} twice")
    part = parts[0]
    try:
        body = json.loads(await part.read() if isinstance(part, UploadFile) else part)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestRefusedError(400, f"the form's {BODY} must be a JSON object")
    return body


def _text(name: str, value: str | UploadFile) -> str:
    if isinstance(value, UploadFile):
        raise RequestRefusedError(400, f"the form's {name} must be no file")
    return value


async def _value(name: str, value: str | UploadFile) -> Any:
    """A field as it would stand in JSON."""
    if isinstance(value, UploadFile):
        if name != IMAGE:
            raise RequestRefusedError(400, f"the form's {name} must be no file")
        return base64.b64encode(await value.read()).decode()
    if name == IMAGE or name in _WORDS:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
