"""New versions: built, grown, thinned out and made compact."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import ArtifactError, ArtifactMismatchError
from slq.index import codes
from slq.index.config import IndexConfig
from slq.index.segment import Segment, row_of, write_segment
from slq.index.versions import (
    SEGMENTS,
    Deleted,
    Manifest,
    add_segment,
    current_version,
    open_segments,
    publish,
    read_manifest,
    require_whole,
)

_FEW_ROWS = 20_000


def build(config: IndexConfig, vectors: NDArray[np.float32]) -> Any:
    """A faiss index in memory of (n, dimension) float32 unit vectors with explicit ids 0..n-1.

    Raises:
        ConfigError: `ivf` has more lists than vectors.
    """
    count, dimension = vectors.shape
    config.require_room(count)
    index = codes.untrained(config, dimension)
    if config.kind != "flat":
        index.train(vectors)
    codes.fill(index, [(np.arange(count, dtype=np.int64), vectors)])
    return index


def write_version(
    folder: Path,
    tables: Iterable[pa.Table],
    shape: tuple[int, int],
    *,
    fingerprint: str,
    config: IndexConfig,
    source: dict[str, Any] | None = None,
) -> Manifest:
    """Index rows and publish them as a new version.

    Args:
        folder: The index folder; older versions stay.
        tables: Rows with `id`, `embedding` (float16 lists) and what else is stored of them.
        shape: (rows, dimension) of all tables together.
        fingerprint: The embedding space's.
        config: How it is built.
        source: Where the vectors came from.

    Raises:
        ConfigError: There are more lists than vectors.
        DataError: A vector is not finite or zero, or an id comes twice.
        StorageError: It cannot be written; the old version stays in place.
    """
    record = add_segment(folder, lambda home: write_segment(home, tables, shape, config), config)
    manifest = Manifest("", fingerprint, shape[1], config.model_dump(), [record], source or {})
    return publish(folder, manifest, {})


def append(
    folder: Path,
    tables: Iterable[pa.Table],
    shape: tuple[int, int],
    *,
    fingerprint: str,
    source: dict[str, Any] | None = None,
) -> Manifest:
    """A new version with further rows; an item that is there already is replaced.

    The rows become a segment of their own: `compact` joins it with the others.

    Args:
        folder: The index folder.
        tables: As of `write_version`.
        shape: (rows, dimension) of all tables together.
        fingerprint: Of the embedding space of the new rows.
        source: Where the new vectors came from; lists are joined with those of the version.

    Raises:
        ArtifactError: There is no index.
        ArtifactMismatchError: The new rows are of another embedding space or of another length.
    """
    before = read_manifest(folder, current_version(folder))
    _require_same_space(folder, before, fingerprint, shape[1])
    config = IndexConfig.model_validate(before.config)
    if shape[0] < _FEW_ROWS:  # too few to learn lists and codes from, and fast to compare with
        config = config.model_copy(update={"kind": "flat"})
    record = add_segment(folder, lambda home: write_segment(home, tables, shape, config), config)
    fresh = Segment(folder / SEGMENTS / record.name, config, np.zeros(0, np.int64))
    deleted = _with_deleted(folder, before, fresh.items.ids())
    sources = {
        name: [*before.source.get(name, []), *values] for name, values in (source or {}).items()
    }
    return publish(
        folder,
        replace(before, segments=[*before.segments, record], source={**before.source, **sources}),
        deleted,
    )


def _require_same_space(folder: Path, manifest: Manifest, fingerprint: str, dimension: int) -> None:
    if (manifest.fingerprint, manifest.dimension) != (fingerprint, dimension):
        raise ArtifactMismatchError(
            f"index {folder} holds vectors of {manifest.fingerprint} with {manifest.dimension} values, the new ones "
            f"are of {fingerprint} with {dimension}; embed them with the same adapter"
        )


def delete(folder: Path, ids: Collection[str]) -> tuple[Manifest, int]:
    """A new version without these items.

    Returns:
        Its manifest, and how many of the ids were there; where none was, the current one stays.

    Raises:
        ArtifactError: There is no index.
        StorageError: The version cannot be written.
    """
    before = read_manifest(folder, current_version(folder))
    deleted = _with_deleted(folder, before, ids)
    gone = sum(len(rows) for rows in deleted.values()) - sum(
        one.num_deleted for one in before.segments
    )
    return (publish(folder, before, deleted), gone) if gone else (before, 0)


def _with_deleted(folder: Path, manifest: Manifest, ids: Iterable[str]) -> Deleted:
    """Deleted rows of all segments, with those of these items."""
    require_whole(folder, manifest)
    segments = open_segments(folder, manifest)
    found: dict[int, list[int]] = {}
    for name in ids:
        place = row_of(segments, name)
        if place is not None:
            found.setdefault(place[0], []).append(place[1])
    return {
        record.name: np.union1d(segment.deleted, np.array(found.get(number, []), np.int64))
        for number, (record, segment) in enumerate(zip(manifest.segments, segments, strict=True))
    }


def compact(folder: Path, config: IndexConfig | None = None) -> Manifest:
    """A new version of one segment, without deleted rows, trained anew.

    Args:
        folder: The index folder.
        config: How it is built; as before by default.

    Raises:
        ArtifactError: There is no index, or every item of it is deleted.
    """
    before = read_manifest(folder, current_version(folder))
    require_whole(folder, before)
    wanted = config or IndexConfig.model_validate(before.config)
    if not before.num_vectors:
        raise ArtifactError(
            f"index {folder} holds no items any more; build it anew with `slq index`"
        )
    segments = open_segments(folder, before)
    return write_version(
        folder,
        (table for one in segments for table in one.alive()),
        (before.num_vectors, before.dimension),
        fingerprint=before.fingerprint,
        config=wanted,
        source=before.source,
    )
