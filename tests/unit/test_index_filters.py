"""Predicates of strangers: what they select, and what they cannot reach."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from slq.errors import DataError
from slq.index.filters import MAX_LENGTH, Filters, matching_rows
from slq.index.items import ROW

NONE = np.zeros(0, np.int64)
SECRET = pa.table({"id": ["secret"]})  # a variable that DuckDB would find by its name


def items() -> pa.Table:
    return pa.table(
        {
            "id": [f"i{n}" for n in range(6)],
            "price": pa.array([1, 5, None, 7, 9, 5]),
            "lang": ["de", "en", "de", None, "en", "de"],
            "tags": [["a"], ["a", "b"], [], None, ["b"], ["c"]],
            ROW: pa.array(range(6), pa.int64()),
        }
    )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("price < 6", [0, 1, 5]),
        ("price < 6 and lang = 'de'", [0, 5]),
        ("lang is null or price is null", [2, 3]),
        ("list_contains(tags, 'b')", [1, 4]),
        ("id in ('i4', 'i0', 'nothing')", [0, 4]),
        ("lang like 'd%' -- a remark\n", [0, 2, 5]),
        ("false", []),
    ],
)
def test_a_predicate_selects_rows(where: str, expected: list[int]) -> None:
    assert sorted(matching_rows(items(), where).tolist()) == expected


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("prise < 6", "prise"),
        ("price <", "syntax error"),
        ("", "cannot be used"),
        ("price < 6 or", "syntax error"),
        ("'x'::int = 3", "Could not convert"),
    ],
)
def test_what_is_no_predicate_is_refused_with_the_columns(where: str, reason: str) -> None:
    with pytest.raises(DataError, match=r"columns are id, price, lang, tags$") as caught:
        matching_rows(items(), where)
    assert repr(where) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_has_a_limit() -> None:
    with pytest.raises(DataError, match=r"the filter has 5000 characters; 4096 are allowed"):
        matching_rows(items(), "x" * 5000)
    assert MAX_LENGTH == 4096


def test_a_filter_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import slq.index.filters

    monkeypatch.setattr(slq.index.filters, "_PATIENCE_S", 0.2)
    endless = "(select sum(a.range * b.range) from range(10000000) a, range(10000000) b) > price"
    with pytest.raises(DataError, match=r"took longer than 0\.2 s; ask for less"):
        matching_rows(items(), endless)


@pytest.mark.parametrize(
    "attack",
    [
        "true); DROP TABLE items; --",
        "true); CREATE TABLE t AS (SELECT 1); SELECT row FROM items WHERE (true",
        "exists (select * from read_csv('{file}'))",
        "exists (select * from '{file}')",
        "(select content from read_text('{file}')) like '%root%'",
        "exists (select * from glob('/*'))",
        "exists (select * from SECRET)",
        "getenv('HOME') <> ''",
        "true); SET enable_external_access = true; SELECT row FROM items WHERE (true",
        "true); COPY items TO '{file}.out'; SELECT row FROM items WHERE (true",
        "true); ATTACH '{file}.db'; SELECT row FROM items WHERE (true",
        "true); INSTALL httpfs; SELECT row FROM items WHERE (true",
    ],
)
def test_a_predicate_reaches_no_file_no_variable_and_no_setting(
    tmp_path: Path, attack: str
) -> None:
    file = tmp_path / "secret.csv"
    file.write_text("a\nroot\n")
    with pytest.raises(DataError, match="cannot be used"):
        matching_rows(items(), attack.format(file=file))
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_deleted_rows_are_never_selected_and_answers_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import slq.index.filters

    asked: list[str] = []
    original = slq.index.filters.matching_rows

    def watching(table: pa.Table, where: str) -> object:
        asked.append(where)
        return original(table, where)

    monkeypatch.setattr(slq.index.filters, "matching_rows", watching)
    monkeypatch.setattr(slq.index.filters, "_KEPT", 2)
    filters = Filters(items(), np.array([1, 4]))
    for where in ("price < 6", "price < 6", "true", "price < 6", "id = 'i1'", "price < 6", "true"):
        selected = filters.select(where)
        assert selected is not None
        assert not {1, 4} & set(selected.rows.tolist())
        bits = np.unpackbits(selected.bits, bitorder="little")[:6]
        assert np.flatnonzero(bits).tolist() == selected.rows.tolist()
    assert asked == ["price < 6", "true", "id = 'i1'", "true"]
    everything = filters.select(None)
    assert everything is not None
    assert everything.rows.tolist() == [0, 2, 3, 5]
    assert Filters(items(), NONE).select(None) is None
