"""Writes a benchmark's tables, after everything in them was checked."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slq.arrow import CANDIDATES, RELEVANCE
from slq.benchmarks.contract import BenchmarkConfig, Entry, Facts, Tables
from slq.benchmarks.mmeb import ITEM_PAIRS
from slq.benchmarks.overlap import refuse_shared_images
from slq.benchmarks.tables import generate, write_rows
from slq.errors import ConfigError, DataError
from slq.files import file_sha256

log = logging.getLogger(__name__)
MARKER = "benchmark.json"
_FILES = ("gallery.parquet", "queries.parquet", "relevance.parquet", "candidates.parquet")
_CANDIDATE_ROWS = 1024
_NAMED = 3
_GALLERY_COLUMNS = {
    "text": pa.string(),
    "uri": pa.string(),
    "image": pa.binary(),
    "pool": pa.string(),
}
_QUERY_COLUMNS = _GALLERY_COLUMNS | {"kind": pa.string(), "query_group": pa.string()}


def write_benchmark(folder: Path, config: BenchmarkConfig, *, train: Path | None = None) -> None:
    """Write `gallery`, `queries`, `relevance`, `candidates` and, if the config says so, `train` as Parquet files.

    Does nothing twice. `benchmark.json` beside them says what they are: name, split, source, direction, headline
    metrics and counts.

    Args:
        folder: Where to write; relative paths of `config` belong to it.
        config: What to read.
        train: The training file that will be used. One that is not ours is searched for images of the benchmark.

    Raises:
        ConfigError: A file is missing, images lie outside `folder`, or a file of another origin is in the way.
        DataError: A record is malformed, an id stands twice, counts are wrong, images are missing, or training data
            holds images of the benchmark.
        StorageError: The files cannot be written.
    """
    marker = folder / MARKER
    settings = {**config.model_dump(mode="json"), "sha256": _digest(folder, config, marker)}
    files = (*_FILES, "train.parquet") if config.writes_train else _FILES
    facts = config.facts()
    if generate(
        marker, files, settings, lambda: _write(folder, config, facts), facts=facts.plain()
    ):
        log.info("%s: %s", folder, json.loads(marker.read_text())["counts"])
    if train is not None and train.is_file() and train not in {folder / name for name in files}:
        refuse_shared_images(train, _uris(folder), by_name=config.unique_names)


def _digest(folder: Path, config: BenchmarkConfig, marker: Path) -> str:
    """sha256 over the sources; the recorded one once they are gone, which are needed no more after tables are made."""
    try:
        whole = hashlib.sha256()
        for path in config.sources(folder):
            whole.update(f"{path.name} {file_sha256(path)}\n".encode())
        return whole.hexdigest()
    except ConfigError:
        try:
            return str(json.loads(marker.read_text())["settings"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise


def _uris(folder: Path) -> set[str]:
    """Of every image of the benchmark, queries' included."""
    found: set[str] = set()
    for name in ("gallery.parquet", "queries.parquet"):
        if "uri" in pq.read_schema(folder / name).names:
            found.update(pq.read_table(folder / name, columns=["uri"])["uri"].to_pylist())
    return found - {None}


def _write(folder: Path, config: BenchmarkConfig, facts: Facts) -> dict[str, int]:
    tables = config.read(folder)
    _require_unique(tables)
    _require_answers(tables)
    require_counts(config.expected, tables.counts, facts, tables.where)
    require_images(folder, (entry.uri for entry in (*tables.gallery, *tables.queries)))
    if config.writes_train:
        if not tables.train:
            raise DataError(f"{tables.where}: there is nothing to train on, and `train` is set")
        uris = {entry.uri for entry in (*tables.gallery, *tables.queries) if entry.uri}
        _refuse_own(tables.train, uris, tables.where)
        write_rows(folder / "train.parquet", ITEM_PAIRS, tables.train)
    _write_entries(folder / "gallery.parquet", tables.gallery, _GALLERY_COLUMNS)
    _write_entries(folder / "queries.parquet", tables.queries, _QUERY_COLUMNS)
    answers = ({"query_id": q, "item_id": i, "grade": 1} for q, i in tables.relevance)
    write_rows(folder / "relevance.parquet", RELEVANCE, answers)
    path = folder / "candidates.parquet"
    write_rows(path, CANDIDATES, _restrictions(tables), rows_per_group=_CANDIDATE_ROWS)
    return dict(tables.counts) | ({"train": len(tables.train)} if tables.train else {})


def _write_entries(
    path: Path, entries: Sequence[Entry], columns: Mapping[str, pa.DataType]
) -> None:
    """Columns that no entry has are left out; every table has `text` and `uri`."""
    kept = {
        name: kind
        for name, kind in columns.items()
        if name in ("text", "uri") or any(getattr(entry, name) is not None for entry in entries)
    }
    schema = pa.schema([("id", pa.string()), *kept.items()])
    write_rows(path, schema, ({n: getattr(entry, n) for n in schema.names} for entry in entries))


def _restrictions(tables: Tables) -> Iterator[dict[str, Any]]:
    """Rows of CANDIDATES, of queries that do not rank everything."""
    for name in dict.fromkeys((*tables.candidates, *tables.excluded)):
        yield {
            "query_id": name,
            "item_ids": tables.candidates.get(name),
            "excluded_ids": tables.excluded.get(name),
        }


def _require_unique(tables: Tables) -> None:
    for what, entries in (("item", tables.gallery), ("query", tables.queries)):
        for name, count in Counter(entry.id for entry in entries).items():
            if count > 1:
                raise DataError(
                    f"{tables.where}: {what} {name!r} stands there {count} times; ids must be unique"
                )


def _require_answers(tables: Tables) -> None:
    """Each query has an answer that it may rank, and nothing names what is not there."""
    items = {entry.id for entry in tables.gallery}
    queries = dict.fromkeys(entry.query_group or entry.id for entry in tables.queries)
    answers: dict[str, set[str]] = {name: set() for name in queries}
    for query, item in tables.relevance:
        if item not in items or query not in answers:
            raise DataError(
                f"{tables.where}: the answer {item!r} of query {query!r} is not in the gallery, or the query is "
                "not there; one of the publisher's files is of another version"
            )
        answers[query].add(item)
    for kind, named in (("candidate", tables.candidates), ("excluded item", tables.excluded)):
        for query, ids in named.items():
            unknown = next((name for name in ids if name not in items), None)
            if unknown is not None or query not in queries:
                raise DataError(
                    f"{tables.where}: the {kind} {unknown!r} of query {query!r} is not in the gallery"
                )
    for query, right in answers.items():
        ranked = right & set(tables.candidates.get(query, right))
        if not ranked - set(tables.excluded.get(query, ())):
            raise DataError(
                f"{tables.where}: query {query!r} has no right answer among the items that it ranks"
            )


def require_counts(
    expected: Mapping[str, int] | None, found: Mapping[str, int], facts: Facts, where: Path
) -> None:
    """Compare what was found with what must be there.

    Args:
        expected: The config's; those of the whole benchmark if None.
        found: By name.
        facts: Of the benchmark.
        where: The file that was read, for the message.

    Raises:
        ConfigError: A count is expected that the benchmark has not.
        DataError: A count differs.
    """
    wanted = facts.counts if expected is None else expected
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise ConfigError(
            f"expected.{unknown[0]} is none of the counts of {facts.name}: {', '.join(found)}"
        )
    wrong = [name for name, count in wanted.items() if found[name] != count]
    if wrong:
        said = "; ".join(
            f"{name}: expected {wanted[name]:,}, found {found[name]:,}" for name in wrong
        )
        raise DataError(
            f"{where}: {facts.name} ({facts.split}) is not what it should be: {said}. Its files come from "
            f"{facts.source}; for a part of them on purpose set `expected` to its counts"
        )
    if not wanted:
        log.warning("%s: counts of %s were not checked: %s", where, facts.name, dict(found))


def require_images(folder: Path, uris: Iterable[str | None]) -> None:
    """Check that image files are there; those of object stores are not asked for.

    Raises:
        DataError: Some are missing; the first are named.
    """
    local = {uri: None for uri in uris if uri is not None and "://" not in uri}
    missing = [uri for uri in local if not (folder / uri).is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(local):,} images are missing below {folder}, first "
            f"{', '.join(missing[:_NAMED])}; without them the results would not be comparable"
        )


def _refuse_own(train: Iterable[Mapping[str, Any]], held_out: set[str], where: Path) -> None:
    for row in train:
        for name in ("query_uri", "positive_uri"):
            if row[name] in held_out:
                raise DataError(
                    f"{where}: training pair {row['id']!r} holds {row[name]}, an image of the benchmark; training on "
                    "what is measured is refused"
                )
