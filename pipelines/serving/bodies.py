"""Reads a request's body within limits of size and time, and hands it on as it came."""

import asyncio
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from pipelines.serving.refusal import RequestRefusedError

_MAX_VALUES = 100_000
# Possessive: nothing is kept to go back to, however long a string is.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_MAX_HEADERS, _MAX_HEADER_BYTES = 100, 32 * 2**10
MOST_DIGITS = 18
"""Of a content-length: more are no length of anything, and Python reads no number of thousands of digits."""


class ClientGoneError(Exception):
    """The client went away before its body was here: nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a body may be at most.

    Attributes:
        max_bytes: Its size.
        timeout_s: How long it may take.
    """

    max_bytes: int
    timeout_s: float


def check_headers(headers: Headers, max_bytes: int) -> None:
    """Refuse what the headers alone tell to be wrong.

    Raises:
        RequestRefusedError: 431 where there are too many; 400 where they do not tell one length of the body; 413 where
            it is too long.
    """
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > _MAX_HEADERS or size > _MAX_HEADER_BYTES:
        message = f"send at most {_MAX_HEADERS} headers of {_MAX_HEADER_BYTES} bytes together"
        raise RequestRefusedError(431, message)
    lengths = set(headers.getlist("content-length"))
    is_one = len(lengths) <= 1 and all(one.isascii() and one.isdigit() for one in lengths)
    if not is_one or any(len(one) > MOST_DIGITS for one in lengths):
        raise RequestRefusedError(400, "content-length must be one whole number of bytes")
    if lengths and "transfer-encoding" in headers:
        raise RequestRefusedError(400, "send a content-length or a transfer-encoding, not both")
    if int(next(iter(lengths), 0)) > max_bytes:
        raise _too_large(max_bytes)


def has_body(headers: Headers) -> bool:
    """Whether a request has a body, by headers that `check_headers` passed (RFC 9112, section 6.3)."""
    return int(headers.get("content-length", "0")) > 0 or "transfer-encoding" in headers


def _too_large(max_bytes: int) -> RequestRefusedError:
    return RequestRefusedError(413, f"the body exceeds {max_bytes} bytes", "too_large")


async def read_body(receive: Receive, limits: BodyLimits) -> bytes:
    """The whole body; it is counted as it comes, whatever its headers say.

    Raises:
        RequestRefusedError: 408 where it took too long, 413 where it is too long.
        ClientGoneError: The client went away.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                size += len(part)
                if size > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestRefusedError(
            408,
            f"the body was not here within {limits.timeout_s:g} s",
            "timeout",
            headers={"connection": "close"},
        ) from None


def check_json(text: bytes) -> None:
    """Refuse JSON of so many values that reading it would keep all other requests waiting for seconds.

    In another encoding than UTF-8, the only one of JSON between systems (RFC 8259, section 8.1), marks could not be
    counted, and Python would read it all the same.

    Raises:
        RequestRefusedError: 400.
    """
    if b"\0" in text or not _is_utf8(text):
        raise RequestRefusedError(400, "the body is not JSON in UTF-8")
    if _num_values(text) <= _MAX_VALUES:
        return
    # Not more strings than so many values and their keys: the marks of further ones count, which are too many anyhow.
    if _num_values(_JSON_STRING.sub(b"", text, 2 * _MAX_VALUES)) > _MAX_VALUES:
        raise RequestRefusedError(400, f"the body holds more than {_MAX_VALUES} values")


def _is_utf8(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _num_values(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then goes on as the one that it was read from."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
