"""Queries with their rankings, chosen from a finished evaluation."""

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from jobs.report.style import data_uri, thumbnail
from pipelines.corpus import Record, corpus_of, open_corpus
from pipelines.recipe import Recipe
from slq.errors import DataError

Outcome = Literal["corrected", "kept", "spoiled", "missed", "found", "lost"]

SHOWN = 5

OUTCOMES: dict[Outcome, str] = {
    "corrected": "corrected by the fine stage",
    "kept": "right in both stages",
    "spoiled": "spoiled by the fine stage",
    "missed": "wrong in both stages",
    "found": "right",
    "lost": "wrong",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """One result in a gallery."""

    item_id: str
    image: bytes | None
    text: str
    cosine: float
    margin: float | None
    right: bool

    @property
    def source(self) -> str:
        """The thumbnail as a data URI; empty where the item is a text."""
        return "" if self.image is None else data_uri(thumbnail(self.image), "image/png")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The first results of one stage.

    Attributes:
        shown: What a gallery shows.
        right_rank: Where the first right one stands; None if it is not among the stored ones.
        depth: How many results were stored.
    """

    shown: list[Shown]
    right_rank: int | None
    depth: int


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its coarse and, where there is one, its fine ranking."""

    text: str
    tags: list[str]
    outcome: Outcome
    label: str
    coarse: Ranking
    fine: Ranking | None


@dataclass(frozen=True)
class Runs:
    """Queries, relevance and the stored rankings of the trained system.

    Attributes:
        queries: By query id.
        relevant: Right item ids of each query.
        coarse: Rows of each query in rank order.
        fine: The same after the fine stage; empty if it did not run.
    """

    queries: dict[str, Record]
    relevant: dict[str, set[str]]
    coarse: dict[str, list[dict[str, Any]]]
    fine: dict[str, list[dict[str, Any]]]

    def outcome(self, query_id: str) -> Outcome:
        """How first places compare with the truth."""
        relevant = self.relevant[query_id]
        coarse = self.coarse[query_id][0]["item_id"] in relevant
        if not self.fine:
            return "found" if coarse else "lost"
        if self.fine[query_id][0]["item_id"] in relevant:
            return "kept" if coarse else "corrected"
        return "spoiled" if coarse else "missed"


def read_runs(recipe: Recipe, systems: Iterable[str]) -> Runs | None:
    """The rankings of the trained system; None if it or its data files are missing.

    Args:
        recipe: The run's recipe.
        systems: What was measured; run files of earlier evaluations are ignored.

    Raises:
        DataError: The rankings belong to other queries.
    """
    coarse, fine = (
        _by_query(recipe.storage.evaluation / f"run_{name}.parquet") if name in systems else {}
        for name in ("slq", "slq_fine")
    )
    names = ("corpus", "queries", "relevance")
    if not coarse or not all(recipe.data.path(name).exists() for name in names):
        return None
    relevant: dict[str, set[str]] = {}
    for row in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if row["grade"] > 0:
            relevant.setdefault(row["query_id"], set()).add(row["item_id"])
    queries = {
        record.id: record for record in open_corpus(recipe.data.path("queries")).all_records()
    }
    _require(coarse, queries.keys() & relevant.keys(), recipe.data.path("queries"))
    return Runs(queries, relevant, coarse, fine)


def _require(wanted: Iterable[str], known: Container[str], path: Path | str) -> None:
    for name in wanted:
        if name not in known:
            raise DataError(
                f"{path} has no {name!r}, which was evaluated; run `slq eval` on the new data"
            )


def _by_query(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a run file in rank order; empty if there is none."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return rows
    for row in sorted(pq.read_table(path).to_pylist(), key=lambda row: int(row["rank"])):
        rows.setdefault(row["query_id"], []).append(row)
    return rows


def outcome_counts(runs: Runs) -> list[tuple[Outcome, str, int]]:
    """How many queries had each outcome: its key, its words and the number."""
    counts = Counter(runs.outcome(query_id) for query_id in runs.coarse)
    wanted = [key for key in OUTCOMES if (key in ("found", "lost")) != bool(runs.fine)]
    return [(key, OUTCOMES[key], counts[key]) for key in wanted]


def choose(runs: Runs, plan: Iterable[tuple[str, Outcome]]) -> list[str]:
    """Query ids for a plan of (group, outcome), from a fixed shuffle, and no right item twice.

    Where none has both, the outcome counts more than the group; else any query will do.
    """
    order = sorted(runs.coarse, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    used: set[str] = set()
    chosen = []
    for slot in plan:
        free = [name for name in order if not runs.relevant[name] & used]
        if free:
            chosen.append(max(free, key=partial(_fit, runs, slot)))  # the first of the best
            used |= runs.relevant[chosen[-1]]
    return chosen


def _fit(runs: Runs, slot: tuple[str, Outcome], name: str) -> tuple[bool, bool]:
    group, outcome = slot
    return runs.outcome(name) == outcome, _group(runs.queries[name]) == group


def _group(query: Record) -> str:
    kind = str(query.columns.get("kind"))
    if query.columns.get("split") == "unseen":
        return f"{kind} unseen"
    return f"{kind} hard" if query.columns.get("hard") and kind == "explicit" else kind


def examples(recipe: Recipe, runs: Runs, plan: Iterable[tuple[str, Outcome]]) -> list[Example]:
    """The chosen queries with their rankings and images."""
    chosen = choose(runs, plan)
    stages = (runs.coarse, runs.fine)
    rows = [row for stage in stages for name in chosen for row in stage.get(name, [])[:SHOWN]]
    wanted = {row["item_id"] for row in rows}
    corpus = corpus_of(recipe)
    items = {item.id: item for item in corpus.all_records() if item.id in wanted}
    _require(wanted, items, recipe.data.corpus_location)
    return [_example(name, runs, items) for name in chosen]


def _example(name: str, runs: Runs, items: Mapping[str, Record]) -> Example:
    query, outcome = runs.queries[name], runs.outcome(name)
    columns, relevant = query.columns, runs.relevant[name]
    hard = "hard subset" if columns.get("hard") else None
    unseen = "unseen objects" if columns.get("split") == "unseen" else None
    tags = (columns.get("kind"), columns.get("category"), hard, unseen)
    return Example(
        text=query.text or name,
        tags=[str(tag).replace("_", " ") for tag in tags if tag],
        outcome=outcome,
        label=OUTCOMES[outcome],
        coarse=_ranking(runs.coarse[name], relevant, items),
        fine=_ranking(runs.fine[name], relevant, items) if runs.fine else None,
    )


def _ranking(
    rows: Sequence[Mapping[str, Any]], relevant: set[str], items: Mapping[str, Record]
) -> Ranking:
    shown = [
        Shown(
            item_id=row["item_id"],
            image=items[row["item_id"]].image,
            text=items[row["item_id"]].text or "",
            cosine=row["coarse_score"],
            margin=row["fine_score"],
            right=row["item_id"] in relevant,
        )
        for row in rows[:SHOWN]
    ]
    ranks = (row["rank"] for row in rows if row["item_id"] in relevant)
    return Ranking(shown, next(ranks, None), len(rows))
