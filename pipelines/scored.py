"""What runs are worth: any run against any relevance, by named metrics, and two runs against one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.runs import read_judgements, read_run
from slq.errors import DataError
from slq.metrics import Floats, Metric, Ranks, compared, figures, values_of
from slq.metrics.ranks import within

_NAMED = 100  # ids that a report holds of each sort of trouble


@dataclass(frozen=True)
class _Judged:
    """Relevant pairs.

    Attributes:
        queries: Ids of the queries that have any, as they first come.
        query: (pairs,) row of the query.
        item: (pairs,) ids.
        grade: (pairs,) above 0.
        without: Ids of judged queries that have none.
    """

    queries: pa.Array
    query: NDArray[np.int64]
    item: pa.ChunkedArray
    grade: Floats
    without: list[str]


def score_runs(runs: Sequence[Path], qrels: Path, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Figures of one run, or of several and every two of them compared.

    All queries with a relevant item are counted; one that a run lacks counts 0 (trec_eval does so with `-c` only, and
    leaves it out otherwise). Equal scores count against the run; scores decide, not the ranks that stand beside them.

    Args:
        runs: Parquet or TREC files.
        qrels: Relevance, Parquet or TREC.
        metrics: What is measured.

    Returns:
        As JSON: `num_queries`, `without_relevant` (judged queries that cannot be measured), of each run its `figures`,
        the queries `missing` from it and those that it has and nobody `judged`, and `compared` by metric.

    Raises:
        ConfigError: There is no such file.
        DataError: A file is malformed, or no query has a relevant item.
    """
    judged = _judged(qrels)
    values, told = {}, []
    for number, path in enumerate(runs):
        run = read_run(path, named="run")
        values[str(number)] = values_of(_ranks(run, judged), metrics)
        known = pc.unique(run["query_id"])
        missing = judged.queries.filter(pc.invert(pc.is_in(judged.queries, known)))
        judged_ids = pa.concat_arrays([judged.queries, pa.array(judged.without, pa.string())])
        unjudged = known.filter(pc.invert(pc.is_in(known, judged_ids)))
        told.append(
            {
                "run": str(path),
                "figures": figures(values[str(number)]),
                "missing": _named(missing.to_pylist()),
                "unjudged": _named(unjudged.to_pylist()),
            }
        )
    pairs = [(str(a), str(b)) for a in range(len(runs)) for b in range(a + 1, len(runs))]
    tests = compared(values, pairs)
    for entry in (one for entries in tests.values() for one in entries):
        entry["runs"] = [str(runs[int(number)]) for number in entry.pop("systems")]
    return {
        "qrels": str(qrels),
        "metrics": [metric.name for metric in metrics],
        "num_queries": len(judged.queries),
        "without_relevant": _named(judged.without),
        "runs": told,
        "compared": tests,
    }


def _named(ids: list[str]) -> dict[str, Any]:
    return {"count": len(ids), "first": ids[:_NAMED]}


def _judged(path: Path) -> _Judged:
    table = read_judgements(path)
    relevant = table.filter(pc.greater(table["grade"], 0))
    queries = pc.unique(relevant["query_id"])
    if not len(queries):
        raise DataError(f"qrels: {path} has no grade above 0, so there is nothing to measure by")
    every = pc.unique(table["query_id"])
    return _Judged(
        queries,
        pc.index_in(relevant["query_id"], queries).to_numpy().astype(np.int64),
        relevant["item_id"],
        relevant["grade"].to_numpy(),
        every.filter(pc.invert(pc.is_in(every, queries))).to_pylist(),
    )


def _ranks(run: pa.Table, judged: _Judged) -> Ranks:
    """Ranks of the relevant items in a run; 0 where it lacks them."""
    run = run.filter(pc.is_in(run["query_id"], judged.queries))
    query = pc.index_in(run["query_id"], judged.queries).to_numpy().astype(np.int64)
    items = pc.unique(pa.chunked_array([*run["item_id"].chunks, *judged.item.chunks]))
    item, relevant_item = (
        pc.index_in(ids, items).to_numpy().astype(np.int64) for ids in (run["item_id"], judged.item)
    )
    keys, relevant = query * len(items) + item, judged.query * len(items) + relevant_item
    by_key = np.argsort(relevant)
    near = by_key[np.searchsorted(relevant, keys, sorter=by_key).clip(max=len(relevant) - 1)]
    of_row = np.where(relevant[near] == keys, near, -1)  # the relevant pair of a row of the run
    grade = np.where(of_row >= 0, judged.grade[near], 0.0)
    order = np.lexsort((item, grade, -run["coarse_score"].to_numpy(), query))
    rank = np.zeros(len(relevant), np.int64)
    ranked = of_row[order]
    rank[ranked[ranked >= 0]] = within(query[order])[ranked >= 0]
    return Ranks.sorted(len(judged.queries), judged.query, rank, judged.grade)
