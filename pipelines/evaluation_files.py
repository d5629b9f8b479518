"""The files of an evaluation beside its results: runs and relevance, in Parquet and in TREC's format."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmark import Benchmark
from pipelines.ranking import RANKS_FILE, Scores, rank_table, run_file, run_table
from pipelines.runs import qrels_lines, trec_lines
from slq.arrow import RELEVANCE
from slq.errors import DataError, StorageError

log = logging.getLogger(__name__)
QRELS = "qrels.trec"


def write_runs(
    folder: Path, benchmark: Benchmark, scores: Mapping[str, Scores], *, depth: int
) -> None:
    """Write `run_SYSTEM.parquet`, the same as `.trec`, `ranks.parquet` and `qrels.trec`; other runs are removed.

    Ids that hold white space and grades that are no whole numbers cannot be told to TREC's tools: then there is no such
    `.trec` file, and a warning says why.

    Args:
        folder: Made if it is not there.
        benchmark: What was measured on.
        scores: Of each system.
        depth: Items of each query.

    Raises:
        StorageError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = set()
        for system, found in scores.items():
            table, name = run_table(benchmark, found, depth=depth), run_file(system)
            unfinished = folder / f".{name}.partial"
            pq.write_table(table, unfinished)
            unfinished.replace(folder / name)
            written |= {name} | _write_trec(folder, name, partial(trec_lines, table, system))
        unfinished = folder / f".{RANKS_FILE}.partial"
        pq.write_table(rank_table(benchmark, scores), unfinished)
        unfinished.replace(folder / RANKS_FILE)
        written |= _write_trec(folder, QRELS, lambda: qrels_lines(relevance_table(benchmark)))
        patterns = ("run_*.parquet", "run_*.trec", QRELS)
        for stale in (path for pattern in patterns for path in folder.glob(pattern)):
            if stale.name not in written:
                stale.unlink()
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space or choose another folder"
        ) from None


def _write_trec(folder: Path, name: str, lines: Callable[[], bytes]) -> set[str]:
    """Write a file with the suffix `.trec`, and give its name, unless an id or a grade forbids it."""
    path = (folder / name).with_suffix(".trec")
    try:
        content = lines()
    except DataError as error:
        log.warning("no %s: %s", path, error)
        return set()
    unfinished = folder / f".{path.name}.partial"
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return {path.name}


def relevance_table(benchmark: Benchmark) -> pa.Table:
    """Relevant pairs of what was measured, as `RELEVANCE`: without what could not be read.

    Raises:
        DataError: A grade is no whole number, or none that 32 bits hold.
    """
    rows = []
    for query, item in np.argwhere(benchmark.relevant).tolist():
        ids = benchmark.queries[query].id, benchmark.items[item].id
        grade = benchmark.grades.get(ids, 1.0)
        if not (float(grade).is_integer() and grade < 2**31):
            raise DataError(
                f"{ids[0]} -> {ids[1]} has the grade {grade:g}, and TREC's qrels hold whole numbers below 2^31; score "
                "the runs with data.relevance itself"
            )
        rows.append((*ids, int(grade)))
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = [pa.array(c, field.type) for c, field in zip(columns, RELEVANCE, strict=True)]
    return pa.Table.from_arrays(arrays, schema=RELEVANCE)
