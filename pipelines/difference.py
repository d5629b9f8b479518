"""`slq diff`: two runs over the same queries, and which queries one of them answers better. It needs no Ray.

Queries and right answers are those of an evaluation, read without decoding or keeping the gallery's images: several
wordings are one query, and with `eval.same_images: together` items of the same content are right together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import Record, corpus_of, open_corpus
from pipelines.embedding.prepare import content_hash
from pipelines.recipe import Recipe, require_files
from pipelines.reranking.judged import read_relevance
from pipelines.runs import JUDGEMENTS, SUFFIXES, read_run
from pipelines.scored import Judged, Ranked, ranked
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
        first: Places of each judged query, the best first; of equal scores the relevant items last.
        second: The same of the other run.
        relevant: Relevant item ids of each judged query.
        queries: Records of the queries that are compared; of several wordings the first, under the query's name.
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
    named = ((first, "RUN_A"), (second, "RUN_B"))
    runs = [read_run(path, named=key) for path, key in named]
    relevant = _right_answers(recipe)
    judged = _judged(relevant)
    against = [ranked(run, judged) for run in runs]
    found = changes(against[0].standings, against[1].standings)
    if not found:
        raise DataError(
            f"{first} and {second} have no query in common that {recipe.data.path('relevance')} judges; are they runs "
            "of this recipe's data?"
        )
    wanted = {change.query_id for change in found}
    queries = _queries(recipe, wanted)
    _require(wanted, queries, f"data.queries {recipe.data.path('queries')}")
    one, other = (set(run["query_id"].unique().to_pylist()) for run in runs)
    left_out = {
        "first only": len(one - other),
        "second only": len(other - one),
        "not judged": len((one & other) - relevant.keys()),
    }
    places = [_places(run, *name) for run, name in zip(against, named, strict=True)]
    return Difference(places[0], places[1], relevant, queries, found, left_out)


def _right_answers(recipe: Recipe) -> dict[str, set[str]]:
    """Relevant items of each judged query, with those of the same content where the recipe counts them alike."""
    relevant = read_relevance(recipe)
    if recipe.eval.same_images == "apart":
        return relevant
    contents: dict[str, str] = {}
    alike: dict[str, set[str]] = {}
    for record in corpus_of(recipe).all_records():
        if record.problem is None:  # what cannot be read is like nothing else
            contents[record.id] = content_hash(record)
            alike.setdefault(contents[record.id], set()).add(record.id)
    return {
        query: items.union(*(alike[contents[item]] for item in items if item in contents))
        for query, items in relevant.items()
    }


def _judged(relevant: Mapping[str, set[str]]) -> Judged:
    """The same as runs are ranked against it."""
    pairs = [
        {"query_id": query, "item_id": item, "grade": 1.0}
        for query, items in relevant.items()
        for item in items
    ]
    return Judged.of_table(pa.Table.from_pylist(pairs, schema=JUDGEMENTS))


def _queries(recipe: Recipe, wanted: set[str]) -> dict[str, Record]:
    """Records of the queries of these names: a query of several wordings has that of their `query_group`."""
    found: dict[str, Record] = {}
    for record in open_corpus(recipe.data.path("queries")).all_records():
        group = record.columns.get("query_group")
        name = record.id if group is None else str(group)
        if name in wanted and name not in found:
            found[name] = replace(record, id=name)
    return found


def _places(run: Ranked, path: Path, key: str) -> dict[str, list[Place]]:
    """The places of each query of a run, the best first; scores of both stages where the file has them.

    Args:
        run: As it ranks.
        path: Its file, Parquet or TREC.
        key: What names it, for messages.

    Raises:
        DataError: A score of the file is no finite number.
    """
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
    for row in run.rows.to_pylist():
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
