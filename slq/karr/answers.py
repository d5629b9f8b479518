"""Answers of a language model: one JSON object of known keys, bounded, or nothing.

Captions are data and may hold anything, "ignore what was said before" included. So whatever a model answers is read as
one small JSON object, and everything else counts as unparseable.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from slq.karr.reasons import RejectedError

MAX_CHARS = 4_000
MAX_WORD_CHARS = 1_000
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)


def parse_answer(text: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """The object that an answer is.

    Args:
        text: As the model wrote it; one fence around the object is taken off.
        keys: Exactly the keys that it must have, with the type of each: `str` or `bool`. Strings are one line, lose
            outer white space and must not be empty.

    Raises:
        RejectedError: `unparseable`, with what was wrong.
    """
    if len(text) > MAX_CHARS:
        raise _rubbish(f"it has {len(text)} characters; at most {MAX_CHARS} are read")
    fenced = _FENCED.fullmatch(text.strip())
    try:
        found = json.loads(
            fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise _rubbish(f"it is no JSON: {error}") from None
    if not isinstance(found, dict) or found.keys() != keys.keys():
        raise _rubbish(f"it is not an object of exactly {', '.join(keys)}")
    return {name: _value(name, found[name], kind) for name, kind in keys.items()}


def _value(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _rubbish(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    if not isinstance(value, str):
        return value
    if any(unicodedata.category(sign) in {"Cc", "Cs", "Co", "Cf"} for sign in value.strip()):
        raise _rubbish(f"{name} holds a control or an invisible character")
    text = " ".join(value.split())
    if not text or len(text) > MAX_WORD_CHARS:
        raise _rubbish(f"{name} has {len(text)} characters; 1 to {MAX_WORD_CHARS} are read")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _rubbish(problem: str) -> RejectedError:
    return RejectedError("unparseable", problem)
