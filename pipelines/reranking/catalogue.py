"""Where the items and queries of a run are: id -> uri of the image, and text.

Items are looked up in the recipe's embedding data set, whose columns hold all that is needed; without one the corpus
itself is read, in tasks. Images stay where they are until their shard is scored.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.commits import shard_name
from pipelines.corpus import Corpus, Record, Shard, corpus_of, open_corpus
from pipelines.ledger_reader import LedgerReader
from pipelines.recipe import Recipe
from pipelines.tasks import collect
from slq.errors import DataError

PLACES = pa.schema(
    [("id", pa.string()), ("uri", pa.string()), ("text", pa.string()), ("problem", pa.string())]
)
"""`uri` is null where there is no image; `problem` says why an item cannot be used, where it cannot."""
_SHARD_ROWS = 4096


class Catalogue:
    """Looks up items and queries of one recipe.

    Args:
        recipe: The resolved recipe.

    Raises:
        ArtifactError: The embedding data set is damaged.
        ConfigError: There is neither a data set nor a corpus, or no queries.
    """

    def __init__(self, recipe: Recipe) -> None:
        reader = LedgerReader(recipe.storage.embeddings, recipe.storage.retry_s)
        self._data_set = reader if reader.manifest() is not None else None
        self._corpus = None if self._data_set is not None else corpus_of(recipe)
        self._queries = open_corpus(recipe.data.path("queries"))

    def items_state(self) -> dict[str, str]:
        """What items are looked up in, and a digest of what it holds now."""
        if self._data_set is not None:
            return {"embeddings": self._data_set.store.location, "sha256": _state(self._data_set)}
        assert self._corpus is not None
        return {"corpus": self._corpus.location, "sha256": self._corpus.digest()}

    def queries_state(self) -> dict[str, str]:
        """The same of queries."""
        return {"queries": self._queries.location, "sha256": self._queries.digest()}

    def items(self, wanted: pa.Array) -> pa.Table:
        """The places of items, as `PLACES`.

        Args:
            wanted: Ids; those that are nowhere are left out.

        Raises:
            DataError: The corpus cannot be read, or has an id twice.
        """
        if self._data_set is not None:
            return _once(_of_data_set(self._data_set, wanted), self._data_set.store.location)
        assert self._corpus is not None
        return _once(_of_corpus(self._corpus, wanted), self._corpus.location)

    def queries(self) -> pa.Table:
        """The places of all queries; errors as `items`."""
        corpus = self._queries
        rows = [row for shard in corpus.shards(_SHARD_ROWS) for row in _rows(corpus, shard)]
        return _once([pa.Table.from_pylist(rows, schema=PLACES)], corpus.location)


def _of_data_set(reader: LedgerReader, wanted: pa.Array) -> list[pa.Table]:
    tables = []
    for commit in reader.required_commits():  # their vectors are not read, so not hashed either
        with reader.store.open(shard_name(commit.shard_id, commit.generation)) as file:
            rows = pq.read_table(file, columns=["id", "uri", "text", "modality"])
        rows = rows.filter(pc.is_in(rows["id"], wanted))
        shown = pc.match_substring(rows["modality"], "image")
        columns = [
            rows["id"],
            pc.if_else(shown, rows["uri"], pa.scalar(None, pa.string())),
            rows["text"],
            pa.nulls(rows.num_rows, pa.string()),
        ]
        tables.append(pa.Table.from_arrays(columns, schema=PLACES))
    return tables


def _state(reader: LedgerReader) -> str:
    """What a data set holds, told by its commit records."""
    digest = hashlib.sha256()
    for commit in reader.required_commits():
        digest.update(f"{commit.shard_id} {commit.generation} {commit.sha256}\n".encode())
    return digest.hexdigest()


def _of_corpus(corpus: Corpus, wanted: pa.Array) -> list[pa.Table]:
    import ray

    task = ray.remote(num_cpus=1)(located)
    ids = ray.put(wanted)
    tasks = [task.remote(corpus, shard, ids) for shard in corpus.shards(_SHARD_ROWS)]
    return collect(tasks, "rerank looked through corpus shard")


def located(corpus: Corpus, shard: Shard, wanted: pa.Array) -> pa.Table:
    """The places of those items of a shard that are wanted."""
    rows = pa.Table.from_pylist(list(_rows(corpus, shard)), schema=PLACES)
    return rows.filter(pc.is_in(rows["id"], wanted))


def _rows(corpus: Corpus, shard: Shard) -> Iterator[dict[str, Any]]:
    for record in corpus.records(shard):
        uri = record.uri if record.image is not None or record.problem else None
        yield {"id": record.id, "uri": uri, "text": record.text, "problem": _problem(record)}


def _problem(record: Record) -> str | None:
    if record.problem is not None:
        return record.problem
    if record.image is None and not (record.text or "").strip():
        return "it has neither an image nor a text"
    return None


def _once(tables: list[pa.Table], where: str) -> pa.Table:
    """One table, in which no id stands twice."""
    found = pa.concat_tables(tables) if tables else PLACES.empty_table()
    counts = found.group_by("id").aggregate([([], "count_all")])
    twice = counts.filter(pc.greater(counts["count_all"], 1)).slice(0, 1).to_pylist()
    if twice:
        raise DataError(
            f"{where} holds id {twice[0]['id']!r} {twice[0]['count_all']} times, so a run cannot name its items"
        )
    return found
