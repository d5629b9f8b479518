"""`slq diff`: two runs over the same queries, and which queries one of them answers better. It needs no Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import Record, corpus_of, open_corpus
from pipelines.recipe import Recipe, require_files
from pipelines.reranking.judged import read_relevance
from pipelines.runs import SUFFIXES, read_run
from slq.differences import Change, changes
from slq.errors import DataError
from slq.metrics import paired_permutation

_SCORES = ("coarse_score", "fine_score")
ALL = "all queries"


@dataclass(frozen=True)
class Place:
    """One item of a ranking; scores where the run has them."""

    item_id: str
    score: float
    coarse: float | None
    fine: float | None


@dataclass(frozen=True)
class Difference:
    """Two runs.

    Attributes:
        first: Places of each query, the best first.
        second: The same of the other run.
        relevant: Relevant item ids of each judged query.
        queries: Records of the queries that are compared.
        changes: Of all compared queries, what changed most first.
        left_out: How many queries are in one run alone, or not judged: `first only`, `second only`, `not judged`.
    """

    first: dict[str, list[Place]]
    second: dict[str, list[Place]]
    relevant: dict[str, set[str]]
    queries: dict[str, Record]
    changes: list[Change]
    left_out: dict[str, int]


def compare_runs(recipe: Recipe, first: Path, second: Path) -> Difference:
    """Read and compare two runs of one benchmark.

    Args:
        recipe: Names corpus, queries and relevance.
        first: As `slq eval` or `slq rerank` writes it, or TREC.
        second: The run that is compared with it.

    Raises:
        ConfigError: A file is missing.
        DataError: A run cannot be read, or both have no judged query in common.
    """
    require_files(recipe, "corpus", "queries", "relevance")
    runs = [read_places(path, key) for path, key in ((first, "RUN_A"), (second, "RUN_B"))]
    relevant = read_relevance(recipe)
    one, other = (
        {name: [p.item_id for p in places] for name, places in run.items()} for run in runs
    )
    found = changes(one, other, relevant)
    if not found:
        raise DataError(
            f"{first} and {second} have no query in common that {recipe.data.path('relevance')} judges; are they runs "
            "of this recipe's data?"
        )
    wanted = {change.query_id for change in found}
    queries = _records(open_corpus(recipe.data.path("queries")).all_records(), wanted)
    _require(wanted, queries, f"data.queries {recipe.data.path('queries')}")
    both = one.keys() & other.keys()
    left_out = {
        "first only": len(one.keys() - other.keys()),
        "second only": len(other.keys() - one.keys()),
        "not judged": len(both - relevant.keys()),
    }
    return Difference(runs[0], runs[1], relevant, queries, found, left_out)


def read_places(path: Path, key: str) -> dict[str, list[Place]]:
    """The places of each query of a run, the best first; scores of both stages where the file has them.

    Args:
        path: Parquet or TREC.
        key: What names it, for messages.

    Raises:
        ConfigError: There is no such file.
        DataError: It is no run.
    """
    run = read_run(path, named=key)
    stages: dict[tuple[str, str], tuple[float | None, float | None]] = {}
    if path.suffix not in SUFFIXES:
        table = pq.read_table(path)
        columns = [
            table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
            for name in ("query_id", "item_id", *_SCORES)
        ]
        for query, item, *scores in zip(*columns, strict=True):
            coarse, fine = (_number(path, key, score) for score in scores)
            stages[str(query), str(item)] = (coarse, fine)
    found: dict[str, list[Place]] = {}
    for row in run.to_pylist():
        query, item, score = row["query_id"], row["item_id"], row["coarse_score"]
        coarse, fine = stages.get((query, item), (None, None))
        found.setdefault(query, []).append(Place(item, score, coarse, fine))
    return found


def _number(path: Path, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and np.isfinite(value):
        return float(value)
    raise DataError(f"{key}: {path} has the score {value!r}, which is no finite number")


def items_of(recipe: Recipe, wanted: set[str]) -> dict[str, Record]:
    """Records of items of the corpus.

    Raises:
        DataError: One is not there.
    """
    found = _records(corpus_of(recipe).all_records(), wanted)
    _require(wanted, found, f"data.corpus {recipe.data.corpus_location}")
    return found


def _records(records: Iterable[Record], wanted: set[str]) -> dict[str, Record]:
    return {record.id: record for record in records if record.id in wanted}


def _require(wanted: set[str], found: Mapping[str, Record], where: str) -> None:
    missing = sorted(wanted - found.keys())
    if missing:
        raise DataError(
            f"{where} has no {missing[0]!r}, which a run names ({len(missing)} are missing); name the recipe that the "
            "runs were made with"
        )


def tags_of(record: Record) -> list[str]:
    """What kind of query it is, by the columns that scenes and benchmarks have."""
    columns = record.columns
    hard = "hard subset" if columns.get("hard") else None
    unseen = "unseen objects" if columns.get("split") == "unseen" else None
    tags = (columns.get("kind"), columns.get("category"), hard, unseen)
    return list(dict.fromkeys(str(tag).replace("_", " ") for tag in tags if tag))


def summary(found: Difference) -> dict[str, dict[str, Any]]:
    """Won, lost and same of all queries and of each kind, with hit@1 and MRR of both and paired tests.

    Returns:
        By `ALL` and by tag: `num_queries`, `won`, `lost`, `same`, `hit@1` and `mrr` (both systems' means), `hit@1_p`
        and `mrr_p`, two-sided and not corrected for the number of rows.
    """
    tags: dict[str, list[Change]] = {ALL: found.changes}
    for change in found.changes:
        for tag in tags_of(found.queries[change.query_id]):
            tags.setdefault(tag, []).append(change)
    first, *others = tags
    return {name: _figures(tags[name]) for name in (first, *sorted(others))}


def _figures(found: Sequence[Change]) -> dict[str, Any]:
    ordered = sorted(found, key=lambda one: one.query_id)
    reciprocal = [
        _reciprocal([one.first for one in ordered]),
        _reciprocal([one.second for one in ordered]),
    ]
    values = {"hit@1": [(one == 1).astype(np.float64) for one in reciprocal], "mrr": reciprocal}
    outcomes = [one.outcome for one in found]
    report: dict[str, Any] = {"num_queries": len(found)}
    report |= {name: outcomes.count(name) for name in ("won", "lost", "same")}
    for name, (one, other) in values.items():
        report[name] = [float(one.mean()), float(other.mean())]
        report[f"{name}_p"] = paired_permutation(other, one)
    return report


def _reciprocal(ranks: Sequence[int | None]) -> NDArray[np.float64]:
    return np.array([0.0 if rank is None else 1 / rank for rank in ranks])
