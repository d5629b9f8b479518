"""New versions: built, grown, thinned out and made compact."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import ArtifactError, ArtifactMismatchError
from slq.index import codes
from slq.index.building import Each, build_segment, here, part_rows
from slq.index.config import CPU, PLACES, SEARCH_ONLY, IndexConfig
from slq.index.devices import device_of
from slq.index.exact import NO_ROW
from slq.index.parts import Source
from slq.index.segment import Segment
from slq.index.versions import (
    BuiltSegment,
    Deleted,
    Manifest,
    build_into,
    changing,
    current_version,
    open_segments,
    publish,
    read_manifest,
    require_whole,
)

_FEW_ROWS = 20_000
_IDS_AT_ONCE = 65_536
_NONE = np.zeros(0, np.int64)
SegmentOf = Callable[[IndexConfig], Segment]
"""The segment that was built, searched in another way."""
Settle = Callable[[SegmentOf, IndexConfig], IndexConfig]


def build(config: IndexConfig, vectors: NDArray[np.float32]) -> Any:
    """A faiss index in memory of (n, dimension) float32 unit vectors with explicit ids 0..n-1.

    It is learnt on `config.device`, and filled and searched by the CPU.

    Raises:
        ConfigError: `ivf` has more lists than vectors.
        HardwareError: `config.device` is not here.
    """
    count, dimension = vectors.shape
    config.require_room(count, dimension)
    index, device = codes.untrained(config, dimension), device_of(config.device)
    if config.kind != "flat":
        device.train(index, vectors)
    codes.fill(index, [(np.arange(count, dtype=np.int64), vectors)])
    return index


@dataclass(frozen=True)
class Content:
    """What an index is built from.

    Attributes:
        sources: The rows.
        dimension: Length of a vector.
        fingerprint: The embedding space's.
        origin: Where the vectors came from. If it is told, a build of the same that was ended goes on.
        canary: A Parquet file of items to try an encoder on, see `slq.index.canary`.
    """

    sources: Sequence[Source]
    dimension: int
    fingerprint: str
    origin: dict[str, Any] | None = None
    canary: bytes | None = None

    @property
    def num_rows(self) -> int:
        """Of all sources."""
        return sum(one.num_rows for one in self.sources)

    def key(self, config: IndexConfig) -> str | None:
        """Of what is built, and how; None where nobody told where it comes from."""
        if self.origin is None:
            return None
        built_by = config.model_dump(exclude={*SEARCH_ONLY, *PLACES})
        told = [self.origin, self.fingerprint, self.dimension, built_by]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def write_version(
    folder: Path,
    content: Content,
    config: IndexConfig,
    *,
    each: Each = here,
    settle: Settle | None = None,
) -> Manifest:
    """Index rows and publish them as a new version.

    Args:
        folder: The index folder; older versions stay.
        content: What is indexed.
        config: How it is built.
        each: Who does the work; all must reach `folder`.
        settle: Looks at what was built, before it is published, and says how it shall be searched.

    Raises:
        ConfigError: There are more lists than vectors.
        DataError: A vector is not finite or zero, or an id comes twice.
        HardwareError: `config.device` or `config.search_device` is not there.
        StorageError: It cannot be written, or another process changes the index; the old version stays in place.
    """
    with changing(folder):
        built = _segment(folder, content, config, each)
        if settle is not None:
            config = settle(lambda one: Segment(built.home, one, _NONE), config)
        record = replace(built.record, config=config.recorded())
        manifest = Manifest(
            "",
            content.fingerprint,
            content.dimension,
            config.recorded(),
            [record],
            content.origin or {},
        )
        return publish(folder, manifest, {}, built=built, canary=content.canary)


def _segment(folder: Path, content: Content, config: IndexConfig, each: Each) -> BuiltSegment:
    return build_into(
        folder,
        lambda home: build_segment(home, content.sources, content.dimension, config, each),
        config,
        content.num_rows,
        content.key(config),
    )


def append(folder: Path, content: Content, *, each: Each = here, device: str = CPU) -> Manifest:
    """A new version with further rows; an item that is there already is replaced.

    The rows become a segment of their own: `compact` joins it with the others.

    Args:
        folder: The index folder.
        content: The rows. Lists of its origin are joined with those of the version; its canary is left out.
        each: As of `write_version`.
        device: As of `IndexConfig`.

    Raises:
        ArtifactError: There is no index.
        ArtifactMismatchError: The new rows are of another embedding space or of another length.
        HardwareError: `device` is not there.
        StorageError: As of `write_version`.
    """
    with changing(folder):
        before = read_manifest(folder, current_version(folder))
        _require_same_space(folder, before, content.fingerprint, content.dimension)
        config = IndexConfig.model_validate({**before.config, "device": device})
        if content.num_rows < _FEW_ROWS:
            # Too few to learn lists and codes from, and fast to compare with.
            config = config.model_copy(update={"kind": "flat"})
        built = _segment(folder, content, config, each)
        fresh = Segment(built.home, config, _NONE)
        deleted = _with_deleted(folder, before, fresh.items.ids())
        joined = {
            name: [*before.source.get(name, []), *values]
            for name, values in (content.origin or {}).items()
        }
        changed = replace(
            before,
            segments=[*before.segments, built.record],
            source={**before.source, **joined},
        )
        return publish(folder, changed, deleted, built=built, onto=before.version)


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
    with changing(folder):
        before = read_manifest(folder, current_version(folder))
        deleted = _with_deleted(folder, before, ids)
        gone = sum(len(rows) for rows in deleted.values()) - sum(
            one.num_deleted for one in before.segments
        )
        if not gone:
            return before, 0
        return publish(folder, before, deleted, onto=before.version), gone


def _with_deleted(folder: Path, manifest: Manifest, ids: Iterable[str]) -> Deleted:
    """Deleted rows of all segments, with those of these items."""
    require_whole(folder, manifest)
    segments = open_segments(folder, manifest)
    found: list[list[NDArray[np.int64]]] = [[segment.deleted] for segment in segments]
    rest = iter(ids)
    while names := list(islice(rest, _IDS_AT_ONCE)):
        for segment, of_segment in zip(segments, found, strict=True):
            rows = segment.items.find(names)
            of_segment.append(rows[rows != NO_ROW])
    return {
        record.name: np.unique(np.concatenate(rows))
        for record, rows in zip(manifest.segments, found, strict=True)
    }


@dataclass(frozen=True)
class _Alive:
    """Rows of a segment that are not deleted, as a source; whoever reads them opens the segment.

    Attributes:
        folder: The index folder.
        version: Of the index.
        segment: Number of the segment in it.
        start: First row.
        stop: The row after the last one.
        num_rows: That are not deleted.
    """

    folder: Path
    version: str
    segment: int
    start: int
    stop: int
    num_rows: int

    def tables(self) -> Iterator[pa.Table]:
        """See `Source.tables`."""
        manifest = read_manifest(self.folder, self.version)
        return open_segments(self.folder, manifest)[self.segment].alive(self.start, self.stop)


def _alive(folder: Path, manifest: Manifest) -> Iterator[_Alive]:
    """What is left of all segments, cut into parts."""
    step = part_rows(manifest.num_vectors)
    for number, segment in enumerate(open_segments(folder, manifest)):
        count = len(segment.items)
        for start in range(0, count, step):
            stop = min(start + step, count)
            low, high = np.searchsorted(segment.deleted, [start, stop])
            left = stop - start - int(high - low)
            if left:
                yield _Alive(folder, manifest.version, number, start, stop, left)


def compact(
    folder: Path,
    config: IndexConfig | None = None,
    each: Each = here,
    *,
    device: str | None = None,
) -> Manifest:
    """A new version of one segment, without deleted rows, trained anew.

    Args:
        folder: The index folder.
        config: How it is built; as before by default.
        each: As of `write_version`.
        device: Where, as of `IndexConfig`; that of `config` by default.

    Raises:
        ArtifactError: There is no index, or every item of it is deleted.
        HardwareError: The device is not there.
    """
    with changing(folder):
        before = read_manifest(folder, current_version(folder))
        require_whole(folder, before)
        wanted = config or IndexConfig.model_validate(before.config)
        if device is not None:
            wanted = wanted.model_copy(update={"device": device})
        if not before.num_vectors:
            raise ArtifactError(
                f"index {folder} holds no items any more; build it anew with `slq index`"
            )
        alive = list(_alive(folder, before))
        left = Content(alive, before.dimension, before.fingerprint)
        built = _segment(folder, left, wanted, each)
        joined = replace(before, config=wanted.recorded(), segments=[built.record])
        return publish(folder, joined, {}, built=built, onto=before.version)
