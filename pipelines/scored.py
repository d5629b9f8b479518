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
from slq.differences import Standing
from slq.errors import DataError
from slq.metrics import Floats, Metric, Ranks, compared, figures, values_of
from slq.metrics.ranks import within

_NAMED = 100  # ids that a report holds of each sort of trouble


@dataclass(frozen=True)
class Judged:
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

    @classmethod
    def of_table(cls, table: pa.Table) -> "Judged":
        """Those of a table as `JUDGEMENTS`; it may hold none."""
        relevant = table.filter(pc.greater(table["grade"], 0))
        queries = pc.unique(relevant["query_id"])
        every = pc.unique(table["query_id"])
        return cls(
            queries,
            pc.index_in(relevant["query_id"], queries).to_numpy().astype(np.int64),
            relevant["item_id"],
            relevant["grade"].to_numpy(),
            every.filter(pc.invert(pc.is_in(every, queries))).to_pylist(),
        )


@dataclass(frozen=True)
class Ranked:
    """The rows of a run whose queries have relevant items, as they rank: equal scores count against the run.

    Attributes:
        judged: What they are ranked against.
        run: The rows as `CANDIDATES`, in any order.
        order: (rows,) places in `run`, query by query in the order of `judged.queries`, the best first; of equal scores
            first what is not relevant, then by rising grade, then as the run has them.
        query: (rows,) row of the query, in that order.
        pair: (rows,) the relevant pair of a row, in that order; -1 where the item is not relevant.
    """

    judged: Judged
    run: pa.Table
    order: NDArray[np.int64]
    query: NDArray[np.int64]
    pair: NDArray[np.int64]

    @property
    def rows(self) -> pa.Table:
        """The run in its order."""
        return self.run.take(self.order)

    @property
    def ranks(self) -> Ranks:
        """Of the relevant items; 0 where the run lacks them."""
        judged, is_relevant = self.judged, self.pair >= 0
        rank = np.zeros(len(judged.query), np.int64)
        rank[self.pair[is_relevant]] = within(self.query)[is_relevant]
        return Ranks.sorted(len(judged.queries), judged.query, rank, judged.grade)

    @property
    def standings(self) -> dict[str, Standing]:
        """Rank of the first relevant item of each query that the run has."""
        ranks = self.ranks
        _, best = np.unique(
            ranks.query, return_index=True
        )  # every query has a pair, the best rank first
        depths = np.bincount(self.query, minlength=len(best)).tolist()
        names, firsts = self.judged.queries.to_pylist(), ranks.rank[best].tolist()
        return {
            name: Standing(rank or None, depth)
            for name, rank, depth in zip(names, firsts, depths, strict=True)
            if depth
        }


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
        values[str(number)] = values_of(ranked(run, judged).ranks, metrics)
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


def _judged(path: Path) -> Judged:
    judged = Judged.of_table(read_judgements(path))
    if not len(judged.queries):
        raise DataError(f"qrels: {path} has no grade above 0, so there is nothing to measure by")
    return judged


def ranked(run: pa.Table, judged: Judged) -> Ranked:
    """A run against relevance.

    Args:
        run: As `CANDIDATES`; scores decide, and where they are equal relevance does, against the run.
        judged: Relevance.
    """
    run = run.filter(pc.is_in(run["query_id"], judged.queries))
    query = pc.index_in(run["query_id"], judged.queries).to_numpy().astype(np.int64)
    items = pc.unique(pa.chunked_array([*run["item_id"].chunks, *judged.item.chunks], pa.string()))
    item, relevant_item = (
        pc.index_in(ids, items).to_numpy().astype(np.int64) for ids in (run["item_id"], judged.item)
    )
    keys, relevant = query * len(items) + item, judged.query * len(items) + relevant_item
    by_key = np.argsort(relevant)
    near = by_key[np.searchsorted(relevant, keys, sorter=by_key).clip(max=len(relevant) - 1)]
    pair = np.where(relevant[near] == keys, near, -1)
    grade = np.where(pair >= 0, judged.grade[near], 0.0)
    order = np.lexsort((grade, -run["coarse_score"].to_numpy(), query))  # it is stable
    return Ranked(judged, run, order, query[order], pair[order])
