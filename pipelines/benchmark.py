"""What an evaluation measures on: gallery, queries and relevance, read into memory."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import Corpus, corpus_of, open_corpus
from pipelines.recipe import Recipe, require_files
from slq.errors import DataError, MediaError
from slq.media import decode_image
from slq.schema import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """Gallery, queries and relevance, in memory.

    Attributes:
        items: Gallery items.
        queries: Query items; `columns` hold kind, hard, split where given.
        relevant: (queries, items) bool.
        num_unreadable: Items and queries that could not be read, with the queries that only those answer.
        grades: Of relevant pairs, by id of query and item, where they are not 1.
    """

    items: list[Item]
    queries: list[Item]
    relevant: NDArray[np.bool_]
    num_unreadable: int = 0
    grades: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @cached_property
    def graded(self) -> NDArray[np.bool_] | NDArray[np.float32]:
        """(queries, items) grades: `relevant` itself where all are 1."""
        if not self.grades:
            return self.relevant
        row = {query.id: n for n, query in enumerate(self.queries)}
        column = {item.id: n for n, item in enumerate(self.items)}
        graded = self.relevant.astype(np.float32)
        for (query, item), grade in self.grades.items():
            if query in row and item in column and self.relevant[row[query], column[item]]:
                graded[row[query], column[item]] = grade
        return graded


def load_benchmark(recipe: Recipe) -> Benchmark:
    """Read the recipe's corpus, queries and relevance.

    Raises:
        DataError: Relevance names an unknown query or item, or a query has none.
    """
    require_files(recipe, "corpus", "queries", "relevance")
    items, lost_items = _read_items(corpus_of(recipe))
    queries, lost_queries = _read_items(open_corpus(recipe.data.path("queries")))
    row = {query.id: n for n, query in enumerate(queries)}
    column = {item.id: n for n, item in enumerate(items)}
    relevant = np.zeros((len(queries), len(items)), dtype=bool)
    orphaned, grades = set(), {}
    for entry in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if entry["query_id"] in lost_queries:
            continue
        if entry["item_id"] in lost_items and entry["query_id"] in row:
            orphaned.add(entry["query_id"])
            continue
        if entry["query_id"] not in row or entry["item_id"] not in column:
            raise DataError(
                f"{recipe.data.path('relevance')}: {entry['query_id']} -> {entry['item_id']} names a query or item "
                "that is not in the files"
            )
        relevant[row[entry["query_id"]], column[entry["item_id"]]] = entry["grade"] > 0
        if entry["grade"] > 1:
            grades[entry["query_id"], entry["item_id"]] = float(entry["grade"])
    answered: NDArray[np.bool_] = np.asarray(relevant.any(axis=1))
    missing = [queries[n].id for n in np.flatnonzero(~answered)]
    unknown = [name for name in missing if name not in orphaned]
    if unknown:
        raise DataError(f"{len(unknown)} queries have no relevant item, first {unknown[0]!r}")
    kept = [queries[n] for n in np.flatnonzero(answered)]
    num_unreadable = len(lost_items) + len(lost_queries) + len(missing)
    if num_unreadable:
        log.warning(
            "%d items and %d queries cannot be read, and %d queries lost their only answer: left out",
            len(lost_items),
            len(lost_queries),
            len(missing),
        )
    if not items or not kept:
        raise DataError("nothing is left to measure: no item or no query can be read")
    return Benchmark(items, kept, relevant[answered], num_unreadable, grades)


def _read_items(corpus: Corpus) -> tuple[list[Item], set[str]]:
    """Readable items in order, and the ids of the others; the embedding flow quarantines the same ones."""
    items, lost = [], set()
    for record in corpus.all_records():
        try:
            image = decode_image(record.image) if record.image is not None else None
        except MediaError as error:
            log.warning("%s: item %r is left out: %s", record.uri, record.id, error)
            lost.add(record.id)
            continue
        if record.problem or (image is None and not (record.text or "").strip()):
            log.warning(
                "%s: item %r is left out: %s", record.uri, record.id, record.problem or "empty"
            )
            lost.add(record.id)
            continue
        items.append(Item(id=record.id, text=record.text, image=image, columns=record.columns))
    return items, lost
