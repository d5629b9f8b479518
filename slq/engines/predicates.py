"""Predicates over stored columns, for engines that speak no SQL: what all of them can evaluate, with SQL's meaning.

    price < 20 and (lang in ('de', 'fr') or lang is null) and not (taken between '2024-01-01' and '2024-06-30')

They come from strangers, so they are read here and written anew in an engine's own words. `not` is pushed down to the
comparisons as they are read: with three-valued logic `not (a and b)` is `not a or not b`, and `not (x < 3)` is `x >= 3`
also where `x` is null, so that no engine needs to know how SQL negates what is unknown.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

from slq.errors import DataError
from slq.index.filters import MAX_LENGTH

Kind = Literal["text", "number", "flag", "date", "time", "other"]
"""Of a column. Dates and times are compared with texts in ISO 8601."""
Value = str | int | float | bool
Operator = Literal["=", "<>", "<", "<=", ">", ">="]
_MAX_DEPTH = 50  # of parentheses
_OPPOSITE: dict[Operator, Operator] = {
    "=": "<>",
    "<>": "=",
    "<": ">=",
    ">=": "<",
    ">": "<=",
    "<=": ">",
}
_SPELLINGS: dict[str, Operator] = {"==": "=", "!=": "<>", **{name: name for name in _OPPOSITE}}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*')
      | (?P<name>"(?:[^"]|"")+")
      | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<sign><=|>=|<>|!=|==|[=<>(),])
      | (?P<word>[^\W\d]\w*)
    )""",
    re.VERBOSE,
)
CAN = (
    "columns may be compared with values by = <> < <= > >=, in (...), between, like and is null, joined by and, or, "
    "not and parentheses"
)


@dataclass(frozen=True)
class Comparison:
    """A column beside a value; not true where the column is null."""

    column: str
    kind: Kind
    operator: Operator
    value: Value


@dataclass(frozen=True)
class Among:
    """Whether a column is one of some values; not true where the column is null, negated or not."""

    column: str
    kind: Kind
    values: tuple[Value, ...]
    is_negated: bool


@dataclass(frozen=True)
class Like:
    """A text beside a pattern: `%` stands for any characters, `_` for one; not true where the column is null."""

    column: str
    pattern: str
    is_negated: bool


@dataclass(frozen=True)
class Null:
    """Whether a column is null."""

    column: str
    is_negated: bool


@dataclass(frozen=True)
class Group:
    """All of some predicates (`and`), or any (`or`)."""

    joined_by: Literal["and", "or"]
    parts: tuple["Predicate", ...]


Predicate = Comparison | Among | Like | Null | Group


def parsed(where: str, columns: Mapping[str, Kind]) -> Predicate:
    """Read a predicate.

    Args:
        where: As users write it.
        columns: Kind of each stored column.

    Raises:
        DataError: It is no predicate of this kind over these columns.
    """
    if len(where) > MAX_LENGTH:
        raise DataError(f"the filter has {len(where)} characters; {MAX_LENGTH} are allowed")
    reader = _Reader(where, columns)
    found = reader.any_of(is_negated=False)
    reader.require_end()
    return found


class _Reader:
    """Reads a predicate from left to right.

    Args:
        where: As users write it.
        columns: Kind of each stored column.
    """

    def __init__(self, where: str, columns: Mapping[str, Kind]) -> None:
        self._where, self._columns = where, columns
        self._tokens: list[tuple[str, str]] = []
        place, end = 0, len(where.rstrip())
        while place < end:
            match = _TOKEN.match(where, place)
            if match is None:
                raise self._refusal(f"{where[place:].strip()[:20]!r} cannot be read")
            self._tokens.append((str(match.lastgroup), match[match.lastgroup or 0]))
            place = match.end()
        self._tokens.append(("end", "the end"))
        self._place = self._depth = 0

    def _refusal(self, reason: str) -> DataError:
        names = ", ".join(self._columns)
        return DataError(
            f"the filter {self._where!r} cannot be used: {reason}; columns are {names}; {CAN}"
        )

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._place]
        self._place = min(self._place + 1, len(self._tokens) - 1)
        return token

    def _takes(self, word: str) -> bool:
        """Whether this word or sign comes next; then it is behind us."""
        kind, text = self._tokens[self._place]
        if kind not in ("word", "sign") or text.lower() != word:
            return False
        self._place += 1
        return True

    def _expect(self, word: str) -> None:
        if not self._takes(word):
            raise self._refusal(f"{word!r} is expected instead of {self._tokens[self._place][1]}")

    def require_end(self) -> None:
        """Refuse what is left."""
        kind, text = self._tokens[self._place]
        if kind != "end":
            raise self._refusal(f"{text} comes too much")

    def any_of(self, *, is_negated: bool) -> Predicate:
        """`a or b`."""
        parts = [self._all_of(is_negated=is_negated)]
        while self._takes("or"):
            parts.append(self._all_of(is_negated=is_negated))
        return _group("and" if is_negated else "or", parts)

    def _all_of(self, *, is_negated: bool) -> Predicate:
        parts = [self._one(is_negated=is_negated)]
        while self._takes("and"):
            parts.append(self._one(is_negated=is_negated))
        return _group("or" if is_negated else "and", parts)

    def _one(self, *, is_negated: bool) -> Predicate:
        while self._takes("not"):
            is_negated = not is_negated
        if not self._takes("("):
            return self._comparison(is_negated=is_negated)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._refusal(f"more than {_MAX_DEPTH} parentheses stand in one another")
        found = self.any_of(is_negated=is_negated)
        self._expect(")")
        self._depth -= 1
        return found

    def _comparison(self, *, is_negated: bool) -> Predicate:
        column = self._column()
        kind = self._columns[column]
        if self._takes("is"):
            is_negated ^= self._takes("not")
            self._expect("null")
            return Null(column, is_negated)
        if kind == "other":
            raise self._refusal(f"{column} holds nothing that can be compared")
        has_not = self._takes("not")
        found = self._membership(column, kind, is_negated=is_negated ^ has_not)
        if found is not None:
            return found
        operator = _SPELLINGS.get(self._tokens[self._place][1])
        if operator is None or has_not:
            raise self._refusal(
                f"a comparison is expected behind {column} instead of {self._tokens[self._place][1]}"
            )
        self._next()
        operator = _OPPOSITE[operator] if is_negated else operator
        return Comparison(column, kind, operator, self._value(column, kind))

    def _membership(self, column: str, kind: Kind, *, is_negated: bool) -> Predicate | None:
        """What may stand behind `not`; None where something else comes."""
        if self._takes("in"):
            return Among(column, kind, self._values(column, kind), is_negated)
        if self._takes("like"):
            return Like(column, self._pattern(column, kind), is_negated)
        if not self._takes("between"):
            return None
        low = self._value(column, kind)
        self._expect("and")
        high = self._value(column, kind)
        above = Comparison(column, kind, "<" if is_negated else ">=", low)
        below = Comparison(column, kind, ">" if is_negated else "<=", high)
        return Group("or" if is_negated else "and", (above, below))

    def _column(self) -> str:
        kind, text = self._next()
        if kind not in ("word", "name"):
            raise self._refusal(f"a column is expected instead of {text}")
        name = text[1:-1].replace('""', '"') if kind == "name" else text
        for known in self._columns:  # as SQL does, whatever their case
            if known.lower() == name.lower():
                return known
        raise self._refusal(f"there is no column {name}")

    def _values(self, column: str, kind: Kind) -> tuple[Value, ...]:
        self._expect("(")
        values = [self._value(column, kind)]
        while self._takes(","):
            values.append(self._value(column, kind))
        self._expect(")")
        return tuple(values)

    def _pattern(self, column: str, kind: Kind) -> str:
        pattern = self._value(column, kind)
        if kind != "text" or "\\" in str(pattern):  # engines differ in what it escapes
            raise self._refusal(
                f"{column} like {pattern!r}: patterns are of texts, without backslashes"
            )
        return str(pattern)

    def _value(self, column: str, kind: Kind) -> Value:
        """A value that can stand beside a column of this kind."""
        token, text = self._next()
        if token == "number" and kind == "number":
            return float(text) if re.search(r"[.eE]", text) else int(text)
        if token == "word" and kind == "flag" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if token == "text" and kind in ("text", "date", "time"):
            value = text[1:-1].replace("''", "'")
            try:
                return value if kind == "text" else iso(kind, value)
            except ValueError:
                raise self._refusal(
                    f"{column} is a {kind}, and {text} is none in ISO 8601"
                ) from None
        wanted = {"number": "a number", "flag": "true or false", "text": "a text in single quotes"}
        raise self._refusal(
            f"{column} is compared with {wanted.get(kind, f'a {kind} in single quotes')}, not with {text}"
        )


def _group(joined_by: Literal["and", "or"], parts: list[Predicate]) -> Predicate:
    return parts[0] if len(parts) == 1 else Group(joined_by, tuple(parts))


def iso(kind: Kind, value: str | date) -> str:
    """A date or a time in the one form in which they are stored and compared: texts in the order of time.

    Raises:
        ValueError: A text is none.
    """
    if kind == "date":
        given = date.fromisoformat(value) if isinstance(value, str) else value
        return given.isoformat()[:10]
    time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return (time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time).isoformat()
