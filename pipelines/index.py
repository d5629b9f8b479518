"""Builds an index version from the committed shards of an embedding data set."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.errors import ArtifactError
from slq.index import IndexConfig, VectorIndex, build, publish

log = logging.getLogger(__name__)
_STORED = ("id", "uri", "text", "modality", "content_hash")


def read_embeddings(location: str) -> tuple[pa.Table, NDArray[np.float32], str]:
    """Rows (without vectors), unit vectors and fingerprint of a finished embedding data set.

    Every shard is checked against its commit record first.

    Returns:
        The rows, (n, dimension) float32, and the fingerprint.

    Raises:
        ArtifactError: The data set is unfinished, damaged or empty; the shard is named.
    """
    ledger = Ledger(location)
    shards = []
    for name in ledger.verified_shards():
        with ledger.store.open(name) as file:
            shards.append(pq.read_table(file))
    table = pa.concat_tables(shards, promote_options="permissive")
    if table.num_rows == 0:
        raise ArtifactError(f"{location} holds no rows: every item was quarantined")
    manifest: dict[str, Any] = ledger.manifest() or {}
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = vectors.reshape(table.num_rows, -1)
    # float16 rounding moves norms off one; inner products are cosines only after this
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    others = [name for name in table.column_names if name.startswith("embedding")]
    return table.drop_columns(others), vectors, str(manifest["fingerprint"])


def index(recipe: Recipe) -> Path:
    """Build and publish an index version; does nothing when the current one already holds these vectors.

    Returns:
        The index folder.
    """
    rows, vectors, fingerprint = read_embeddings(recipe.storage.embeddings)
    folder = recipe.storage.index
    if _is_current(folder, recipe.index, rows, fingerprint):
        log.info("%s is up to date: nothing to do", folder)
        return folder
    built = build(recipe.index, vectors)
    kept = rows.select([name for name in _STORED if name in rows.column_names])
    version = publish(folder, built, kept, fingerprint=fingerprint, config=recipe.index)
    log.info(
        "%s: version %s with %d vectors of dimension %d",
        folder,
        version,
        len(vectors),
        vectors.shape[1],
    )
    return folder


def _is_current(folder: Path, config: IndexConfig, rows: pa.Table, fingerprint: str) -> bool:
    try:
        present = VectorIndex(folder)
    except ArtifactError:  # none yet, or a damaged one: both are built anew
        return False
    return (
        present.fingerprint == fingerprint
        and present.manifest["config"] == config.model_dump()
        and present.rows["id"].to_pylist() == rows["id"].to_pylist()
        and present.rows["content_hash"].to_pylist() == rows["content_hash"].to_pylist()
    )
