"""Runs as files: what is read of them, what is refused, and what other tools read of ours."""

import random
from pathlib import Path
from typing import Any

import ir_measures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.reranking.runs import read_run, trec_lines
from slq.errors import ConfigError, DataError

ROWS = [("q2", "a", 0.5), ("q1", "b", 0.1), ("q2", "c", 0.9), ("q1", "a", 0.1), ("q2", "b", 0.5)]


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in read_run(path).to_pylist()]


def test_queries_come_as_they_stand_and_their_best_candidates_first(tmp_path: Path) -> None:
    names = zip(("query_id", "item_id", "score"), zip(*ROWS, strict=True), strict=True)
    path = parquet(tmp_path / "run.parquet", **{name: list(column) for name, column in names})
    wanted = [
        ("q2", "c", 0.9),
        ("q2", "a", 0.5),
        ("q2", "b", 0.5),
        ("q1", "b", 0.1),
        ("q1", "a", 0.1),
    ]
    assert rows_of(path) == wanted


def test_a_trec_run_is_read_as_the_same_run_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bm25.trec"
    path.write_text("".join(f"{q} Q0\t{i}  1 {s} bm25\n" for q, i, s in ROWS) + "\n")
    columns = dict(zip(("query_id", "item_id", "score"), zip(*ROWS, strict=True), strict=True))
    same = parquet(tmp_path / "run.parquet", **{name: list(c) for name, c in columns.items()})
    assert rows_of(path) == rows_of(same)


def test_ranks_stand_for_scores_where_there_are_none(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "r.parquet", query_id=["q"] * 3, item_id=["a", "b", "c"], rank=[3, 1, 2]
    )
    assert [row[1] for row in rows_of(path)] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query_id": ["q"], "score": [1.0]}, "no column item_id"),
        ({"query_id": ["q"], "item_id": ["a"]}, "no column score or rank"),
        ({"query_id": ["q"], "item_id": ["a"], "score": ["high"]}, "high"),
        (
            {"query_id": ["q", None], "item_id": ["a", "b"], "score": [1.0, 2.0]},
            "1 nulls in query_id",
        ),
        ({"query_id": ["q"], "item_id": ["a"], "score": [float("nan")]}, "no finite numbers"),
        ({"query_id": ["q"], "item_id": ["a"], "score": [float("-inf")]}, "no finite numbers"),
        (
            {"query_id": ["q"] * 2, "item_id": ["a"] * 2, "score": [1.0, 0.5]},
            "'a' for query 'q' 2 times",
        ),
        ({"query_id": [], "item_id": [], "score": []}, "holds no candidates"),
    ],
)
def test_a_run_that_is_none_is_refused_in_words(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_run(parquet(tmp_path / "run.parquet", **columns))


def test_a_missing_file_a_damaged_one_and_a_wrong_line_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rerank.run: .*none.parquet does not exist"):
        read_run(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path / "broken.parquet")
    (tmp_path / "bytes.trec").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path / "bytes.trec")
    (tmp_path / "run.trec").write_text("q Q0 a 1 0.5 x\nq Q0 a 1 0.5\n")
    with pytest.raises(DataError, match=r"run.trec: line 2 has 5 columns; a TREC run has 6"):
        read_run(tmp_path / "run.trec")


def test_what_is_written_for_trec_is_scored_by_its_tools_as_ranked(tmp_path: Path) -> None:
    """ir-measures sorts by score; the order that it finds is ours, and so is nDCG by hand."""
    rng = random.Random(3)
    rows = [
        {"query_id": f"q{q}", "item_id": f"i{i}", "rank": n + 1, "score": 10.0 - n}
        for q in range(4)
        for n, i in enumerate(rng.sample(range(50), 6))
    ]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "ours.trec"
    path.write_bytes(trec_lines(table, "slq_fine"))
    assert [row[:2] for row in rows_of(path)] == [(row["query_id"], row["item_id"]) for row in rows]
    relevant = {f"q{q}": {rows[6 * q + q]["item_id"]: 1} for q in range(4)}  # at ranks 1 to 4
    (measure,) = [ir_measures.RR]
    found = ir_measures.calc_aggregate(
        [measure], relevant, list(ir_measures.read_trec_run(str(path)))
    )
    assert found[measure] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_an_id_with_a_blank_cannot_go_into_a_trec_file() -> None:
    table = pa.table({"query_id": ["q 1"], "item_id": ["a"], "rank": [1], "score": [0.5]})
    with pytest.raises(DataError, match="query_id 'q 1' holds white space"):
        trec_lines(table, "x")
