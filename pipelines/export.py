"""Hands an embedding data set over to another engine, streaming from its committed shards."""

import logging
import time
from collections.abc import Iterator

import pyarrow as pa

from pipelines.embeddings import Embeddings, open_embeddings
from pipelines.progress import duration, show
from slq.engines import Collection, Engine
from slq.errors import ArtifactError

log = logging.getLogger(__name__)
_SHOW_EVERY_S = 2.0


def export(location: str, place: Engine, *, retry_s: float) -> int:
    """Write all rows of a data set into an engine; does nothing where they are there already.

    Args:
        location: Of the data set.
        place: Where they go.
        retry_s: How long failures of an object store are tried again.

    Returns:
        Rows that are there.

    Raises:
        ArtifactError: The data set is unfinished, damaged or empty.
        ConfigError: Something else is in that place, or a package is missing.
        StorageError: Something cannot be read or written.
    """
    return hand_over(open_embeddings(location, retry_s), place)


def hand_over(found: Embeddings, place: Engine) -> int:
    """As `export`, of a data set that is open."""
    source = found.state["sha256"]
    if place.holds(found.fingerprint, found.dimension, source):
        log.info("%s is up to date: nothing to do", place)
        return found.num_rows
    tables = found.shards.tables()
    first = next(tables, None)
    if first is None:
        raise ArtifactError(f"{found.shards.location} holds no rows")
    collection = Collection(
        _after(first, tables),
        first.schema,
        found.num_rows,
        found.dimension,
        found.fingerprint,
        source,
    )
    written, began, shown = 0, time.monotonic(), 0.0
    for written in place.write(collection):
        now = time.monotonic()
        if now - shown >= _SHOW_EVERY_S:
            shown, eta = now, (now - began) / written * (found.num_rows - written)
            show(f"export {written:,}/{found.num_rows:,} rows  ETA {duration(eta)}")
    return written


def _after(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest
