"""Runs and relevance as files: Parquet, or TREC's columns, read and written.

A TREC run has six columns, `query Q0 item rank score name`, and TREC's qrels have four, `query 0 item grade`, as
trec_eval reads them; columns are separated by white space, so no id may hold any.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from slq.errors import ConfigError, DataError

SUFFIXES = (".trec", ".run", ".txt", ".qrels", ".qrel")
_RUN = ("query_id", "iteration", "item_id", "rank", "score", "name")
_QRELS = ("query_id", "iteration", "item_id", "grade")
_COLUMNS = {
    _RUN: "run has 6: query, Q0, item, rank, score, name",
    _QRELS: "file of relevance has 4: query, 0, item, grade",
}
CANDIDATES = pa.schema(
    [("query_id", pa.string()), ("item_id", pa.string()), ("coarse_score", pa.float64())]
)
"""A run as it is re-ranked: what its scores say is the coarse ranking."""
JUDGEMENTS = pa.schema(
    [("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.float64())]
)
"""Relevance as it is read; a grade above 0 means relevant."""


def read_run(path: Path, *, named: str = "rerank.run") -> pa.Table:
    """A run as `CANDIDATES`, queries in the order in which they first come, the best candidates first.

    Args:
        path: Parquet with query_id, item_id and score (or rank, where there is no score), or a TREC file.
        named: What asked for it, for messages.

    Raises:
        ConfigError: There is no such file.
        DataError: A column is missing, a value is null or no number, or a pair stands there twice.
    """
    if not path.is_file():
        raise ConfigError(
            f"{named}: {path} does not exist; `slq eval` writes runs, and so does any tool that knows TREC's format"
        )
    where = f"{named}: {path}"
    table = _read(path, _RUN, "score", where)
    missing = [name for name in ("query_id", "item_id") if name not in table.column_names]
    if missing or not {"score", "rank"} & set(table.column_names):
        wanted = ", ".join(missing) or "score or rank"
        raise DataError(f"{where} has no column {wanted}; it has {table.column_names}")
    found = _cast(table, "score" if "score" in table.column_names else "rank", CANDIDATES, where)
    if "score" not in table.column_names:
        found = found.set_column(2, "coarse_score", pc.negate(found["coarse_score"]))
    if not found.num_rows:
        raise DataError(f"{where} holds no candidates")
    _require_once(found, where)
    places = pc.index_in(found["query_id"], pc.unique(found["query_id"]))
    keyed = found.append_column("place", places).append_column(
        "row", pa.array(range(found.num_rows), pa.int64())
    )
    keys = [("place", "ascending"), ("coarse_score", "descending"), ("row", "ascending")]
    return found.take(pc.sort_indices(keyed, keys))


def read_judgements(path: Path, *, named: str = "qrels") -> pa.Table:
    """Relevance as `JUDGEMENTS`, in the order of the file.

    Args:
        path: Parquet with query_id, item_id and grade, or TREC's qrels.
        named: What asked for it, for messages.

    Raises:
        ConfigError: There is no such file.
        DataError: A column is missing, a value is null or no number, or a pair stands there twice.
    """
    if not path.is_file():
        raise ConfigError(
            f"{named}: {path} does not exist; `slq eval` writes qrels.trec, and data.relevance is one, too"
        )
    where = f"{named}: {path}"
    table = _read(path, _QRELS, "grade", where)
    missing = [name for name in JUDGEMENTS.names if name not in table.column_names]
    if missing:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {table.column_names}")
    found = _cast(table, "grade", JUDGEMENTS, where)
    if not found.num_rows:
        raise DataError(f"{where} holds no judgements")
    _require_once(found, where)
    return found


def _read(path: Path, names: tuple[str, ...], number: str, where: str) -> pa.Table:
    try:
        is_trec = path.suffix in SUFFIXES
        return _read_trec(path, names, number, where) if is_trec else pq.read_table(path)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read: {error}") from None


def _read_trec(path: Path, names: tuple[str, ...], number: str, where: str) -> pa.Table:
    """Columns by white space of ASCII, as trec_eval parts them; Arrow's reader wants one separator."""
    place, rows = names.index(number), []
    for line, text in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = [value.decode() for value in text.split()]
        if not row:
            continue
        if len(row) != len(names):
            raise DataError(
                f"{where}: line {line} has {len(row)} columns; a TREC {_COLUMNS[names]}"
            )
        if not _is_number(row[place]):
            raise DataError(
                f"{where}: line {line} has {number} {row[place]!r}, which is no number; a TREC {_COLUMNS[names]}"
            )
        rows.append(row)
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python reads 1_0, and no other tool does


def _cast(table: pa.Table, number: str, schema: pa.Schema, where: str) -> pa.Table:
    """Ids and a number as the schema has them, without nulls."""
    try:
        values = pc.cast(table[number], pa.float64())
        ids = [table[name].cast(pa.string()) for name in ("query_id", "item_id")]
    except pa.ArrowException as error:
        raise DataError(f"{where}: {error}") from None
    found = pa.Table.from_arrays([*ids, values], schema=schema)
    for name in found.column_names:
        if found[name].null_count:
            raise DataError(f"{where} has {found[name].null_count} nulls in {name}")
    if pc.any(pc.invert(pc.is_finite(values))).as_py():
        raise DataError(f"{where} has {number}s that are no finite numbers")
    return found


def _require_once(found: pa.Table, where: str) -> None:
    pairs = found.group_by(["query_id", "item_id"]).aggregate([([], "count_all")])
    if pairs.num_rows < found.num_rows:
        twice = pairs.filter(pc.greater(pairs["count_all"], 1)).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{where} has item {twice['item_id']!r} for query {twice['query_id']!r} "
            f"{twice['count_all']} times"
        )


def trec_lines(run: pa.Table, name: str) -> bytes:
    """A run in TREC's format.

    Args:
        run: With query_id, item_id, rank and score.
        name: Of the system, the last column.

    Raises:
        DataError: An id or the name holds white space, which TREC's format cannot carry.
    """
    count = run.num_rows
    columns = {
        "query_id": run["query_id"],
        "iteration": pa.array(["Q0"] * count),
        "item_id": run["item_id"],
        "rank": run["rank"],
        "score": run["score"],
        "name": pa.array([name] * count),
    }
    return _lines(pa.table(columns), ("query_id", "item_id", "name"))


def qrels_lines(relevance: pa.Table) -> bytes:
    """Relevance as TREC's qrels.

    Args:
        relevance: With query_id, item_id and grade.

    Raises:
        DataError: An id holds white space, which TREC's format cannot carry.
    """
    columns = {
        "query_id": relevance["query_id"],
        "iteration": pa.array(["0"] * relevance.num_rows),
        "item_id": relevance["item_id"],
        "grade": relevance["grade"],
    }
    return _lines(pa.table(columns), ("query_id", "item_id"))


def _lines(table: pa.Table, names: Sequence[str]) -> bytes:
    for column in names:
        bad = table.filter(pc.match_substring_regex(table[column], r"[\s\v]|^$"))
        if bad.num_rows:
            raise DataError(
                f"{column} {bad[column][0].as_py()!r} holds white space, which a TREC file cannot carry; use the "
                "Parquet file"
            )
    sink = pa.BufferOutputStream()
    options = pacsv.WriteOptions(include_header=False, delimiter=" ", quoting_style="none")
    pacsv.write_csv(table, sink, options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
