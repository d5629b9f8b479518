"""Builds index versions from the committed shards of embedding data sets, and changes what they hold."""

import hashlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import shard_name
from pipelines.ledger_reader import LedgerReader
from pipelines.recipe import Recipe
from slq.errors import ArtifactError
from slq.index import append, compact, current_version, delete, write_version
from slq.index.versions import Manifest, read_manifest, require_whole

log = logging.getLogger(__name__)
_BATCH_ROWS = 16_384
_OTHER_VECTORS = "embedding_"
_NOT_STORED = ("shard_id", "row_in_shard")


@dataclass(frozen=True)
class Embeddings:
    """A finished embedding data set whose shards are what was committed.

    Attributes:
        reader: Its files.
        shards: Names of its data files, in order.
        num_rows: Of all shards.
        dimension: Length of a vector.
        fingerprint: Of the embedding space.
    """

    reader: LedgerReader
    shards: list[str]
    num_rows: int
    dimension: int
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimension)."""
        return self.num_rows, self.dimension

    def tables(self) -> Iterator[pa.Table]:
        """Rows with `id`, `embedding` and what is stored of them, some thousand at a time."""
        for name in self.shards:
            with self.reader.store.open(name) as file:
                shard = pq.ParquetFile(file)
                kept = [
                    column
                    for column in shard.schema_arrow.names
                    if not column.startswith(_OTHER_VECTORS) and column not in _NOT_STORED
                ]
                for batch in shard.iter_batches(_BATCH_ROWS, columns=kept):
                    yield pa.table(batch)


def open_embeddings(location: str, retry_s: float) -> Embeddings:
    """A data set, each shard checked against its commit record.

    Raises:
        ArtifactError: It is unfinished, damaged or empty; the shard is named.
        StorageError: It cannot be read.
    """
    reader = LedgerReader(location, retry_s)
    shards = reader.verified_shards()
    manifest: dict[str, Any] = reader.manifest() or {}
    if not manifest["num_rows"]:
        raise ArtifactError(f"{location} holds no rows: every item was quarantined")
    return Embeddings(
        reader,
        shards,
        int(manifest["num_rows"]),
        int(manifest["dimension"]),
        str(manifest["fingerprint"]),
    )


def index(recipe: Recipe) -> Path:
    """Build and publish an index version; does nothing when the current one already holds these vectors.

    Returns:
        The index folder.

    Raises:
        ArtifactError: The data set is unfinished, damaged or empty; the shard is named.
        ConfigError: The settings do not fit to the number of vectors.
        StorageError: The index cannot be written; the old version stays in place.
    """
    folder, location = recipe.storage.index, recipe.storage.embeddings
    source = {"embeddings": [_state(LedgerReader(location, recipe.storage.retry_s))]}
    if _is_current(folder, recipe, source):
        log.info("%s is up to date: nothing to do", folder)
        return folder
    found = open_embeddings(location, recipe.storage.retry_s)
    manifest = write_version(
        folder,
        found.tables(),
        found.shape,
        fingerprint=found.fingerprint,
        config=recipe.index,
        source=source,
    )
    _tell(folder, manifest)
    return folder


def grow(recipe: Recipe, location: str) -> Path:
    """A new version with the rows of a further data set; items that were there already are replaced.

    Args:
        recipe: The resolved recipe.
        location: The further data set.

    Raises:
        ArtifactError: There is no index, or the data set is unfinished, damaged or empty.
        ArtifactMismatchError: It is of another embedding space.
    """
    found = open_embeddings(location, recipe.storage.retry_s)
    folder = recipe.storage.index
    _tell(
        folder,
        append(
            folder,
            found.tables(),
            found.shape,
            fingerprint=found.fingerprint,
            source={"embeddings": [_state(found.reader)]},
        ),
    )
    return folder


def shrink(recipe: Recipe, ids: Collection[str]) -> Path:
    """A new version without these items; ids that are not there are counted.

    Raises:
        ArtifactError: There is no index.
    """
    folder = recipe.storage.index
    manifest, gone = delete(folder, ids)
    if gone < len(ids):
        log.warning("%d of %d ids are not in the index", len(ids) - gone, len(ids))
    _tell(folder, manifest)
    return folder


def join(recipe: Recipe) -> Path:
    """A new version of one segment without deleted rows, built as the recipe says.

    Raises:
        ArtifactError: There is no index, or nothing is left of it.
    """
    folder = recipe.storage.index
    _tell(folder, compact(folder, recipe.index))
    return folder


def _tell(folder: Path, manifest: Manifest) -> None:
    log.info(
        "%s: version %s with %d vectors of dimension %d, segments: %d",
        folder,
        manifest.version,
        manifest.num_vectors,
        manifest.dimension,
        len(manifest.segments),
    )


def _state(reader: LedgerReader) -> dict[str, str]:
    """What a data set holds now, told by its commit records alone."""
    digest = hashlib.sha256()
    for shard_id, commit in sorted(reader.commits().items()):
        digest.update(f"{shard_name(shard_id, commit.generation)} {commit.sha256}\n".encode())
    return {"location": reader.store.location, "sha256": digest.hexdigest()}


def _is_current(folder: Path, recipe: Recipe, source: dict[str, Any]) -> bool:
    """Whether the current version is what would be built, and whole."""
    try:
        manifest = read_manifest(folder, current_version(folder))
        require_whole(folder, manifest)
    except ArtifactError:  # none yet, or a damaged one: both are built anew
        return False
    return (
        manifest.config == recipe.index.model_dump()
        and manifest.source.get("embeddings") == source["embeddings"]
        and not any(one.num_deleted for one in manifest.segments)
    )
