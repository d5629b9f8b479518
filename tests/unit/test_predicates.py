"""Predicates in every engine's words mean what DuckDB takes them for, also where values are null."""

import random
from collections.abc import Iterator
from datetime import date, datetime, timedelta

import duckdb
import pyarrow as pa
import pytest

from slq.arrow import vector_column
from slq.engines import SEARCH_ENGINES
from slq.engines.predicates import Group, Kind, Null, parsed
from slq.errors import DataError
from slq.index import SearchIndex
from tests.unit.engine_data import written
from tests.unit.index_data import unit_vectors

ROWS = 60
TEXTS = [
    "",
    "red",
    "red fox",
    "Red",
    "it's",
    'a "b"',
    "50%",
    "5_",
    "naïve\n雪",
    "back\\slash",
    "null",
]
COLUMNS: dict[str, Kind] = {
    "id": "text", "n": "number", "f": "number", "t": "text", "flag": "flag", "day": "date", "taken": "time",
}  # fmt: skip
OPERATORS = ("=", "<>", "!=", "<", "<=", ">", ">=")


def rows() -> pa.Table:
    """Every column but the ids has nulls."""
    chance = random.Random(5)

    def column(values: list[object], kind: pa.DataType) -> pa.Array:
        return pa.array(
            [None if chance.random() < 0.2 else chance.choice(values) for _ in range(ROWS)], kind
        )

    days = [date(2024, 1, 28) + timedelta(days=n) for n in range(8)]
    first = datetime(2024, 1, 31, 23, 59, 58)
    times = [first + timedelta(milliseconds=1250 * n) for n in range(6)]
    return pa.table(
        {
            "id": [f"item-{n}" for n in range(ROWS)],
            "embedding": vector_column(unit_vectors(ROWS).astype("float16")),
            "n": column([*range(-3, 4)], pa.int64()),
            "f": column([-1.5, -0.25, 0.0, 0.5, 2.0, 3.0], pa.float64()),
            "t": column([*TEXTS], pa.string()),
            "flag": column([True, False], pa.bool_()),
            "day": column([*days], pa.date32()),
            "taken": column([*times], pa.timestamp("us")),
            "content_hash": [str(n) for n in range(ROWS)],
        }
    )


def literal(kind: Kind, chance: random.Random) -> str:
    if kind == "number":
        return chance.choice(["-2", "0", "3", "1.5", "-0.25", "2.0", "+1", "1e0"])
    if kind == "flag":
        return chance.choice(["true", "FALSE"])
    if kind == "date":
        return f"'2024-0{chance.choice(['1-30', '2-01', '2-03'])}'"
    if kind == "time":
        return f"'2024-02-01{chance.choice(['', 'T00:00:00', ' 00:00:01.250000', 'T00:00:02.5'])}'"
    return "'" + chance.choice(TEXTS).replace("'", "''") + "'"


def leaf(chance: random.Random, engine: str) -> str:
    name, kind = chance.choice(list(COLUMNS.items()))
    no = chance.choice(["", "NOT "])
    value = [literal(kind, chance) for _ in range(3)]
    forms = [f"{name} is {no}null", f"{name} {no}in ({', '.join(value)})"]
    ordered = engine != "qdrant" or kind not in ("text", "flag")
    operators = OPERATORS if kind != "flag" and ordered else OPERATORS[:3]
    forms += [f'"{name.upper()}" {chance.choice(operators)} {value[0]}'] * 3
    if kind != "flag" and ordered:
        forms.append(f"{name} {no}between {value[0]} and {value[1]}")
    if kind == "text" and engine != "qdrant":
        forms.append(
            f"{name} {no}like '{chance.choice(['red%', '%e%', '_ed', '%', '5%', '', '%雪'])}'"
        )
    return chance.choice(forms)


def predicate(chance: random.Random, engine: str, depth: int = 3) -> str:
    if depth == 0 or chance.random() < 0.3:
        return leaf(chance, engine)
    left, right = (predicate(chance, engine, depth - 1) for _ in range(2))
    joined = f"{left} {chance.choice(['and', 'OR'])} {right}"
    return chance.choice([joined, f"({joined})", f"not ({joined})", f"not not ({joined})"])


@pytest.fixture(scope="module", params=list(SEARCH_ENGINES))
def index(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SearchIndex]:
    with written(request.param, tmp_path_factory.mktemp(request.param), rows()).open() as found:
        yield found


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_rows_that_duckdb_finds(index: SearchIndex, seed: int) -> None:
    where = predicate(random.Random(seed), type(index).engine.lower())  # type: ignore[attr-defined]
    items = rows().drop_columns(["embedding"])  # noqa: F841 - DuckDB finds it by its name
    expected = duckdb.sql(f"SELECT id FROM items WHERE {where}").fetchall()
    (hits,) = index.search(unit_vectors(1, seed=3), ROWS, where=where)
    assert {hit.id for hit in hits} == {name for (name,) in expected}, where


def test_what_is_stored_comes_back(index: SearchIndex) -> None:
    for row in rows().drop_columns(["embedding"]).to_pylist():
        if type(index).engine != "Lance":  # type: ignore[attr-defined]
            row |= {name: row[name] and row[name].isoformat() for name in ("day", "taken")}
        assert index.item(row["id"]) == row


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("", "a column is expected instead of the end"),
        ("n <", "n is compared with a number, not with the end"),
        ("n < 'x'", "n is compared with a number, not with 'x'"),
        ("t = 3", "t is compared with a text in single quotes, not with 3"),
        ("flag = 1", "flag is compared with true or false, not with 1"),
        ("day = 2024", "day is compared with a date in single quotes, not with 2024"),
        ("taken < 'noon'", "taken is a time, and 'noon' is none in ISO 8601"),
        ("n = null", "n is compared with a number, not with null"),
        ("m < 3", "there is no column m"),
        ("n 3", "a comparison is expected behind n instead of 3"),
        ("n not < 3", "a comparison is expected behind n instead of <"),
        ("n in 3", "'[(]' is expected instead of 3"),
        ("n in (1", "'[)]' is expected instead of the end"),
        ("n between 1 or 2", "'and' is expected instead of or"),
        ("n is 3", "'null' is expected instead of 3"),
        ("n < 3 n", "n comes too much"),
        ("n < 3) or (n < 4", "[)] comes too much"),
        ("n < 3; drop table items", "'; drop table items' cannot be read"),
        ("t like 3", "t is compared with a text in single quotes"),
        ("day like '2024%'", "none in ISO 8601"),
        (r"t like 'a\%'", "patterns are of texts, without backslashes"),
        ("t = 'open", '"\'open" cannot be read'),
        ("tags = 'x'", "tags holds nothing that can be compared"),
        ("'t' = t", "a column is expected instead of 't'"),
        ("(" * 51 + "n = 1" + ")" * 51, "more than 50 parentheses stand in one another"),
        ("not " * 2000 + "n = 1", "the filter has 8005 characters; 4096 are allowed"),
    ],
)
def test_what_is_no_predicate_is_refused_with_the_reason(where: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parsed(where, {**COLUMNS, "tags": "other"})


def test_a_refusal_says_what_there_is_and_what_can_be_asked() -> None:
    with pytest.raises(DataError) as caught:
        parsed("prize < 3", {"id": "text", "price": "number"})
    assert str(caught.value) == (
        "the filter 'prize < 3' cannot be used: there is no column prize; columns are id, price; columns may be "
        "compared with values by = <> < <= > >=, in (...), between, like and is null, joined by and, or, not and "
        "parentheses"
    )


def test_negation_reaches_the_comparisons() -> None:
    assert parsed("not (n is null or t is not null)", COLUMNS) == Group(
        "and", (Null("n", is_negated=True), Null("t", is_negated=False))
    )
    assert parsed('"tags" is null', {"tags": "other"}) == Null("tags", is_negated=False)
    assert (
        parsed("n >= 3", COLUMNS) == parsed("not not N>=+3", COLUMNS) == parsed("not n<3", COLUMNS)
    )
