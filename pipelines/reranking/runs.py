"""Runs: rankings of items for queries, in Parquet or in TREC's six columns, read and written."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from slq.errors import ConfigError, DataError

SUFFIXES = (".trec", ".run", ".txt")
_TREC = ("query_id", "iteration", "item_id", "rank", "score", "name")
CANDIDATES = pa.schema(
    [("query_id", pa.string()), ("item_id", pa.string()), ("coarse_score", pa.float64())]
)
"""A run as it is re-ranked: what its scores say is the coarse ranking."""


def read_run(path: Path, key: str = "rerank.run") -> pa.Table:
    """A run as `CANDIDATES`, queries in the order in which they first come, the best candidates first.

    Args:
        path: Parquet with query_id, item_id and score (or rank, where there is no score), or a TREC file.
        key: What names it, for messages.

    Raises:
        ConfigError: There is no such file.
        DataError: A column is missing, a value is null or no number, or a pair stands there twice.
    """
    where = f"{key}: {path}"
    if not path.is_file():
        raise ConfigError(
            f"{where} does not exist; `slq eval` writes runs, and so does any tool that knows TREC's format"
        )
    try:
        table = _read_trec(path, where) if path.suffix in SUFFIXES else pq.read_table(path)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read: {error}") from None
    missing = [name for name in ("query_id", "item_id") if name not in table.column_names]
    if missing or not {"score", "rank"} & set(table.column_names):
        wanted = ", ".join(missing) or "score or rank"
        raise DataError(f"{where} has no column {wanted}; it has {table.column_names}")
    return _in_order(where, _candidates(where, table))


def _read_trec(path: Path, where: str) -> pa.Table:
    """Columns by white space; Arrow's reader wants one separator."""
    lines = (line.split() for line in path.read_text().splitlines())
    rows = [line for line in lines if line]
    wrong = next((n for n, row in enumerate(rows, 1) if len(row) != len(_TREC)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: line {wrong} has {len(rows[wrong - 1])} columns; a TREC run has {len(_TREC)}: "
            "query, Q0, item, rank, score, name"
        )
    columns = zip(*rows, strict=True) if rows else [()] * len(_TREC)
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(_TREC, columns, strict=True)}
    )


def _candidates(where: str, table: pa.Table) -> pa.Table:
    try:
        if "score" in table.column_names:
            scores = pc.cast(table["score"], pa.float64())
        else:
            scores = pc.negate(pc.cast(table["rank"], pa.float64()))
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: {error}") from None
    columns = [table["query_id"].cast(pa.string()), table["item_id"].cast(pa.string()), scores]
    found = pa.Table.from_arrays(columns, schema=CANDIDATES)
    for name in found.column_names:
        if found[name].null_count:
            raise DataError(f"{where} has {found[name].null_count} nulls in {name}")
    if pc.any(pc.invert(pc.is_finite(found["coarse_score"]))).as_py():
        raise DataError(f"{where} has scores that are no finite numbers")
    return found


def _in_order(where: str, found: pa.Table) -> pa.Table:
    """Queries as they first come, within them by score, and equal scores as they stand."""
    if not found.num_rows:
        raise DataError(f"{where} holds no candidates; there is nothing to re-rank")
    places = pc.index_in(found["query_id"], pc.unique(found["query_id"]))
    keyed = found.append_column("place", places).append_column(
        "row", pa.array(range(found.num_rows), pa.int64())
    )
    order = pc.sort_indices(
        keyed, [("place", "ascending"), ("coarse_score", "descending"), ("row", "ascending")]
    )
    pairs = found.group_by(["query_id", "item_id"]).aggregate([([], "count_all")])
    if pairs.num_rows < found.num_rows:
        twice = pairs.filter(pc.greater(pairs["count_all"], 1)).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{where} has item {twice['item_id']!r} for query {twice['query_id']!r} "
            f"{twice['count_all']} times"
        )
    return found.take(order)


def trec_lines(run: pa.Table, name: str) -> bytes:
    """A run in TREC's format.

    Args:
        run: With query_id, item_id, rank and score.
        name: Of the system, the last column.

    Raises:
        DataError: An id holds white space, which TREC's format cannot carry.
    """
    for column in ("query_id", "item_id"):
        bad = run.filter(pc.match_substring_regex(run[column], r"\s|^$"))
        if bad.num_rows:
            raise DataError(
                f"{column} {bad[column][0].as_py()!r} holds white space, which a TREC run cannot carry; use the "
                "Parquet file"
            )
    count = run.num_rows
    columns = {
        "query_id": run["query_id"],
        "iteration": pa.array(["Q0"] * count),
        "item_id": run["item_id"],
        "rank": run["rank"],
        "score": run["score"],
        "name": pa.array([name] * count),
    }
    sink = pa.BufferOutputStream()
    options = pacsv.WriteOptions(include_header=False, delimiter=" ", quoting_style="none")
    pacsv.write_csv(pa.table(columns), sink, options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
