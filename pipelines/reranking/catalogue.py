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


def item_places(recipe: Recipe, wanted: pa.Array) -> tuple[pa.Table, dict[str, str]]:
    """The places of these items, as `PLACES`, and what they were looked up in.

    Args:
        recipe: The resolved recipe.
        wanted: Ids; those that are nowhere are left out.

    Raises:
        ArtifactError: The embedding data set is damaged.
        ConfigError: There is neither a data set nor a corpus.
        DataError: The corpus cannot be read, or has an id twice.
    """
    reader = LedgerReader(recipe.storage.embeddings, recipe.storage.retry_s)
    if reader.manifest() is not None:
        tables = _of_data_set(reader, wanted)
        found = {"embeddings": reader.store.location, "sha256": _state(reader)}
    else:
        corpus = corpus_of(recipe)
        tables = _of_corpus(corpus, wanted)
        found = {"corpus": corpus.location, "sha256": corpus.digest()}
    return _once(tables, next(iter(found.values()))), found


def query_places(recipe: Recipe) -> tuple[pa.Table, dict[str, str]]:
    """The places of all queries of the recipe; as `item_places`."""
    corpus = open_corpus(recipe.data.path("queries"))
    rows = [row for shard in corpus.shards(_SHARD_ROWS) for row in _rows(corpus, shard)]
    found = {"queries": corpus.location, "sha256": corpus.digest()}
    return _once([pa.Table.from_pylist(rows, schema=PLACES)], corpus.location), found


def _of_data_set(reader: LedgerReader, wanted: pa.Array) -> list[pa.Table]:
    tables = []
    for commit in reader.required_commits():
        reader.require_shard(commit)
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
