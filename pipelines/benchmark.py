"""What an evaluation measures on: gallery, queries, relevance and what each query ranks, read into memory."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import Corpus, Record, corpus_of, open_corpus
from pipelines.ranked_items import allowed_items
from pipelines.recipe import Recipe, require_files
from slq.benchmarks.contract import Facts
from slq.errors import DataError, MediaError
from slq.media import decode_image
from slq.metrics import Relevance, with_equal_items
from slq.schema import Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """Gallery, queries and relevance, in memory.

    Attributes:
        items: Gallery items.
        queries: Query items; `columns` hold kind, hard, split where given. Of a query with several wordings the first.
        relevant: (queries, items) bool; never true where `allowed` is not.
        num_unreadable: Items and queries that could not be read, with the queries that only those answer.
        grades: Of relevant pairs, by id of query and item, where they are not 1.
        allowed: (queries, items) bool, what each query ranks; None where every query ranks everything.
        wordings: Further wordings of each query, whose scores are averaged with those of the first; None without any.
        facts: Of a benchmark that is known by name.
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

    allowed: NDArray[np.bool_] | None = None
    wordings: Sequence[Sequence[Item]] | None = None
    facts: Facts | None = None

    def of_queries(self, chosen: Sequence[int]) -> "Benchmark":
        """The same with some of its queries."""
        return replace(
            self,
            queries=[self.queries[n] for n in chosen],
            relevant=self.relevant[list(chosen)],
            allowed=None if self.allowed is None else self.allowed[list(chosen)],
            wordings=None if self.wordings is None else [self.wordings[n] for n in chosen],
        )

    @property
    def worded(self) -> list[Item]:
        """Every wording of every query: all the first ones, then the further ones of each query in turn."""
        return [*self.queries, *(item for further in self.wordings or () for item in further)]

    @property
    def query_of_wording(self) -> NDArray[np.int64]:
        """(wordings,) which query each of `worded` belongs to."""
        further = [n for n, items in enumerate(self.wordings or ()) for _ in items]
        return np.array([*range(len(self.queries)), *further], dtype=np.int64)

    def averaged(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(queries, dimension) vectors whose scores are the means over a query's wordings.

        Args:
            vectors: (wordings, dimension), of `worded`.
        """
        if self.wordings is None:
            return vectors
        owner = self.query_of_wording
        found = np.zeros((len(self.queries), vectors.shape[1]), np.float32)
        np.add.at(found, owner, vectors)
        found /= np.bincount(owner).astype(np.float32)[:, None]
        return found

    def masked(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """(queries, items) scores with -inf for what a query does not rank."""
        if self.allowed is None:
            return scores
        return np.where(self.allowed, scores, np.float32(-np.inf))

    def depths(self, ks: tuple[int, ...]) -> tuple[int, ...]:
        """The recipe's depths with those that the benchmark's own metrics need."""
        return ks if self.facts is None else tuple(sorted({*ks, *self.facts.depths}))


@dataclass(frozen=True)
class _Read:
    """A table's readable items, the ids of the others, and a digest of each item's content."""

    items: list[Item]
    lost: set[str]
    contents: list[bytes]


def load_benchmark(recipe: Recipe) -> Benchmark:
    """Read the recipe's corpus, queries, relevance and, where there are any, candidates.

    Raises:
        DataError: Relevance or candidates name an unknown query or item, or a query has no right answer that it ranks.
    """
    require_files(recipe, "corpus", "queries", "relevance")
    gallery = _read_items(corpus_of(recipe))
    read = _read_items(open_corpus(recipe.data.path("queries")))
    queries, wordings = _grouped(read)
    items = gallery.items
    row = {query.id: n for n, query in enumerate(queries)}
    column = {item.id: n for n, item in enumerate(items)}
    relevant, grades, orphaned = _relevance(recipe, row, column, gallery.lost, read.lost)
    if _is_together(recipe, gallery.contents):
        relevant, grades = _with_equal(relevant, grades, (row, column), gallery.contents)
    allowed = allowed_items(
        recipe.data.path("candidates"),
        queries,
        items,
        lost_queries=read.lost,
        lost_items=gallery.lost,
    )
    if allowed is not None:
        relevant &= allowed
    answered: NDArray[np.bool_] = np.asarray(relevant.any(axis=1))
    missing = [queries[n].id for n in np.flatnonzero(~answered)]
    unknown = [name for name in missing if name not in orphaned]
    if unknown:
        among = "" if allowed is None else " among the items that they rank"
        raise DataError(
            f"{len(unknown)} queries have no relevant item{among}, first {unknown[0]!r}"
        )
    num_unreadable = len(gallery.lost) + len(read.lost) + len(missing)
    if num_unreadable:
        log.warning(
            "%d items and %d queries cannot be read, and %d queries lost their only answer: left out",
            len(gallery.lost),
            len(read.lost),
            len(missing),
        )
    if not items or not answered.any():
        raise DataError("nothing is left to measure: no item or no query can be read")
    whole = Benchmark(
        items,
        queries,
        relevant,
        num_unreadable,
        grades=grades,
        allowed=allowed,
        wordings=wordings,
        facts=facts_of(recipe),
    )
    return whole if answered.all() else whole.of_queries(np.flatnonzero(answered).tolist())


def facts_of(recipe: Recipe) -> Facts | None:
    """What is known of the benchmark that the recipe makes its tables of; None of users' own files."""
    for section in (recipe.data.benchmark, recipe.data.karpathy):
        if section is not None:
            return section.facts()
    return None


def _relevance(
    recipe: Recipe,
    row: dict[str, int],
    column: dict[str, int],
    lost_items: set[str],
    lost_queries: set[str],
) -> tuple[NDArray[np.bool_], dict[tuple[str, str], float], set[str]]:
    """(queries, items) bool, grades that are not 1, and the queries that an unreadable item answers."""
    path = recipe.data.path("relevance")
    relevant = np.zeros((len(row), len(column)), dtype=bool)
    orphaned, grades = set(), {}
    for entry in pq.read_table(path).to_pylist():
        if entry["query_id"] in lost_queries:
            continue
        if entry["item_id"] in lost_items and entry["query_id"] in row:
            orphaned.add(entry["query_id"])
            continue
        if entry["query_id"] not in row or entry["item_id"] not in column:
            raise DataError(
                f"{path}: {entry['query_id']} -> {entry['item_id']} names a query or item "
                "that is not in the files"
            )
        relevant[row[entry["query_id"]], column[entry["item_id"]]] = entry["grade"] > 0
        if entry["grade"] > 0 and entry["grade"] != 1:
            grades[entry["query_id"], entry["item_id"]] = float(entry["grade"])
    return relevant, grades, orphaned


def _is_together(recipe: Recipe, contents: list[bytes]) -> bool:
    """Whether there are equal items and the recipe says that they count alike."""
    num_same = len(contents) - len(set(contents))
    if not num_same:
        return False
    told = recipe.eval.same_images
    log.info("%d items have the content of another one; eval.same_images: %s", num_same, told)
    return told == "together"


def _with_equal(
    relevant: NDArray[np.bool_],
    grades: Mapping[tuple[str, str], float],
    numbers: tuple[dict[str, int], dict[str, int]],
    contents: list[bytes],
) -> tuple[NDArray[np.bool_], dict[tuple[str, str], float]]:
    """Relevance and grades where each item has the highest grade that any item of its content has.

    Args:
        relevant: (queries, items).
        grades: Those that are not 1, by id.
        numbers: Row of each query and column of each item, by id.
        contents: Of each item, equal where items are.
    """
    row, column = numbers
    query, item = relevant.nonzero()
    given = {(row[q], column[i]): grade for (q, i), grade in grades.items()}
    pairs = zip(query.tolist(), item.tolist(), strict=True)
    grade = np.array([given.get(pair, 1.0) for pair in pairs], dtype=np.float64)
    num_queries, num_items = relevant.shape
    judged = Relevance(num_queries, num_items, query, item, grade)
    found = with_equal_items(judged, contents)
    together = np.zeros_like(relevant)
    together[found.query, found.item] = True
    query_ids, item_ids = list(row), list(column)
    return together, {
        (query_ids[found.query[n]], item_ids[found.item[n]]): float(found.grade[n])
        for n in np.flatnonzero(found.grade != 1)
    }


def _grouped(read: _Read) -> tuple[list[Item], list[list[Item]] | None]:
    """Queries, each the first wording of its group under the group's name, and further wordings.

    A group that has lost a wording is lost: its score would be another one.
    """
    groups: dict[str, list[Item]] = {}
    for item in read.items:
        group = item.columns.get("query_group")
        name = item.id if group is None else str(group)
        if name not in read.lost:
            groups.setdefault(name, []).append(item)
    queries = [replace(items[0], id=name) for name, items in groups.items()]
    further = [items[1:] for items in groups.values()]
    return queries, further if any(further) else None


def _read_items(corpus: Corpus) -> _Read:
    """Readable items in order, and what is lost; the embedding flow quarantines the same ones."""
    items: list[Item] = []
    lost: set[str] = set()
    contents: list[bytes] = []
    for record in corpus.all_records():
        try:
            image = decode_image(record.image) if record.image is not None else None
            problem = record.problem
        except MediaError as error:
            image, problem = None, str(error)
        if problem or (image is None and not (record.text or "").strip()):
            log.warning("%s: item %r is left out: %s", record.uri, record.id, problem or "empty")
            lost |= {record.id, *_group_of(record.columns)}
            continue
        items.append(Item(id=record.id, text=record.text, image=image, columns=record.columns))
        contents.append(_content(record))
    return _Read(items, lost, contents)


def _group_of(columns: dict[str, Any]) -> set[str]:
    group = columns.get("query_group")
    return set() if group is None else {str(group)}


def _content(record: Record) -> bytes:
    """A digest of image bytes and text."""
    digest = hashlib.sha256(record.image or b"")
    digest.update(b"\0" + (record.text or "").encode("utf-8", "surrogatepass"))
    return digest.digest()
