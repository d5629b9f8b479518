"""Versions of an index: which segments belong to it and which of their rows are deleted.

    CURRENT                 names the current version
    v000001/manifest.json   fingerprint, settings, segments with the sha256 of every file
    v000001/SEGMENT.deleted.npy
    v000001/canary.parquet  a few items with inputs and vectors, to try an encoder on
    segments/SEGMENT/       files of `slq.index.segment`, shared by all versions that hold it
    segments/.begun-KEY/    a build that was ended

Nothing is changed in place: a version is complete before the pointer names it, so a reader never sees half of one.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from slq.errors import ArtifactError, ConfigError, DataError, HardwareError, StorageError
from slq.files import file_sha256, read_json, sync, write_json
from slq.index.arrays import read_array
from slq.index.building import PARTITIONS, PARTS
from slq.index.checks import Digest, require_file, require_files
from slq.index.config import CPU, IndexConfig
from slq.index.parts import PARTIAL
from slq.index.segment import Segment
from slq.index.words import WORDS

POINTER = "CURRENT"
MANIFEST = "manifest.json"
SEGMENTS = "segments"
CANARY = "canary.parquet"
_LOCK = ".lock"
_BEGUN = ".begun-"
Deleted = dict[str, NDArray[np.int64]]
"""Rows that are found no more, by segment."""


@dataclass(frozen=True)
class SegmentRecord:
    """A segment of a version.

    Attributes:
        name: Of its folder.
        num_rows: With deleted ones.
        config: How it was built.
        sha256: Of each of its files.
        deleted_sha256: Of the file of deleted rows; None where there are none.
        num_deleted: Rows that are deleted.
    """

    name: str
    num_rows: int
    config: dict[str, Any]
    sha256: dict[str, str]
    deleted_sha256: str | None = None
    num_deleted: int = 0


@dataclass(frozen=True)
class Manifest:
    """A version.

    Attributes:
        version: Its name.
        fingerprint: Of the embedding space.
        dimension: Length of a vector.
        config: How new segments are built.
        segments: In the order in which they came.
        source: Where the vectors came from.
        canary_sha256: Of the file of items to try an encoder on; None where there is none.
    """

    version: str
    fingerprint: str
    dimension: int
    config: dict[str, Any]
    segments: list[SegmentRecord]
    source: dict[str, Any] = field(default_factory=dict)
    canary_sha256: str | None = None

    @property
    def num_vectors(self) -> int:
        """That can be found."""
        return sum(one.num_rows - one.num_deleted for one in self.segments)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Manifest":
        """What `to_json` gave."""
        known = {name: value for name, value in values.items() if name != "num_vectors"}
        segments = [SegmentRecord(**one) for one in known.pop("segments")]
        return cls(**known, segments=segments)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "num_vectors": self.num_vectors}


@contextmanager
def words_for_full_disks(folder: Path) -> Iterator[None]:
    """Errors of the file system as one of ours.

    Raises:
        StorageError: Something below `folder` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"index {folder} cannot be written: {error}; free space or choose another folder"
        ) from None


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Be the only one who makes new versions. What others left that were killed is removed, but for begun builds.

    Raises:
        StorageError: Another process makes one, or nothing can be written.
    """
    with words_for_full_disks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"index {folder} is being changed by another process; wait until it has ended"
            ) from None
    try:
        with words_for_full_disks(folder):
            _remove_leftovers(folder)
        yield
    finally:
        _remove_leftovers(folder)
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Half versions, and segments that no version holds, unless a version does not tell what it holds."""
    left = [*folder.glob(f".*{PARTIAL}"), *folder.glob(f"{SEGMENTS}/.*{PARTIAL}")]
    with suppress(ArtifactError, OSError):
        held = _held(folder, versions(folder))
        left += [path for path in folder.glob(f"{SEGMENTS}/[!.]*") if path.name not in held]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class BuiltSegment:
    """A segment that no version holds yet.

    Attributes:
        home: Where it is until a version is published that holds it.
        record: What the manifest will say of it.
    """

    home: Path
    record: SegmentRecord


def build_into(
    folder: Path,
    build: Callable[[Path], dict[str, Digest]],
    config: IndexConfig,
    num_rows: int,
    key: str | None = None,
) -> BuiltSegment:
    """Build a segment, within `changing`.

    Args:
        folder: The index folder.
        build: Writes all files into the folder that it is given, or those that are missing there.
        config: How it does.
        num_rows: Of the segment.
        key: What is built; a build of the same that was ended goes on. Without one nothing is left of it.

    Raises:
        StorageError: It cannot be written.
    """
    name = uuid.uuid4().hex[:12]
    home = folder / SEGMENTS / (f".{name}{PARTIAL}" if key is None else f"{_BEGUN}{key}")
    with words_for_full_disks(folder):
        home.parent.mkdir(parents=True, exist_ok=True)
        for path in home.parent.glob(f"{_BEGUN}*"):
            if path != home:
                shutil.rmtree(path)
        home.mkdir(exist_ok=True)
        try:
            written = build(home)
        except DataError:  # it would end so again
            home.rename(home.with_name(f".{name}{PARTIAL}"))
            raise
        except (ConfigError, HardwareError):  # before anything was written, most often
            with suppress(OSError):
                home.rmdir()
            raise
    sha256 = {name: digest.sha256 for name, digest in written.items()}
    return BuiltSegment(home, SegmentRecord(name, num_rows, config.recorded(), sha256))


def publish(
    folder: Path,
    manifest: Manifest,
    deleted: Deleted,
    *,
    built: BuiltSegment | None = None,
    onto: str | None = None,
    canary: bytes | None = None,
) -> Manifest:
    """Write a new version and point to it; within `changing`.

    Args:
        folder: The index folder; older versions stay.
        manifest: Of the version, whose name is given here.
        deleted: Rows that are found no more, by segment; those that are not named have none.
        built: A segment of it that no version holds yet.
        onto: The version that it changes, which must still be the current one.
        canary: A Parquet file, see `slq.index.canary`; that of `onto` stays.

    Returns:
        The manifest as written.

    Raises:
        StorageError: It cannot be written, or was rolled back meanwhile; the old version stays in place.
    """
    if onto is not None and current_version(folder) != onto:
        raise StorageError(
            f"index {folder} was at {onto} when this change began and is at {current_version(folder)} now; "
            "run the same command again"
        )
    with words_for_full_disks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{uuid.uuid4().hex[:12]}{PARTIAL}"
        partial.mkdir()
        try:
            version = f"v{max(_numbers(folder), default=0) + 1:06d}"
            if onto is not None and manifest.canary_sha256 is not None:
                canary = (folder / onto / CANARY).read_bytes()
            whole = _written(partial, version, manifest, deleted, canary)
            if built is not None:
                built.home.rename(folder / SEGMENTS / built.record.name)
                sync(folder / SEGMENTS)
            partial.rename(folder / version)
            sync(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        point_to(folder, whole.version)
    return whole


def _written(
    home: Path, version: str, manifest: Manifest, deleted: Deleted, canary: bytes | None
) -> Manifest:
    if canary is not None:
        (home / CANARY).write_bytes(canary)
        manifest = replace(manifest, canary_sha256=file_sha256(home / CANARY))
    segments = []
    for one in manifest.segments:
        rows = deleted.get(one.name, np.zeros(0, np.int64))
        digest = None
        if len(rows):
            path = home / deleted_name(one.name)
            np.save(path, np.sort(rows), allow_pickle=False)
            digest = file_sha256(path)
        segments.append(replace(one, deleted_sha256=digest, num_deleted=len(rows)))
    whole = replace(manifest, version=version, segments=segments)
    write_json(home / MANIFEST, whole.to_json())
    return whole


def deleted_name(segment: str) -> str:
    """File of a version that holds the deleted rows of a segment."""
    return f"{segment}.deleted.npy"


def point_to(folder: Path, version: str) -> None:
    """Make a version the current one, atomically.

    Raises:
        OSError: It cannot be written.
    """
    pointer = folder / f".{POINTER}.{uuid.uuid4().hex[:12]}{PARTIAL}"
    try:
        pointer.write_text(version + "\n")
        sync(pointer)
        os.replace(pointer, folder / POINTER)  # noqa: PTH105 - the atomic step deserves its plain name
    finally:
        pointer.unlink(missing_ok=True)


def _numbers(folder: Path) -> list[int]:
    names = (path.name[1:] for path in folder.glob("v[0-9]*"))
    return [int(name) for name in names if name.isdigit()]


def versions(folder: Path) -> list[str]:
    """Names of all versions, oldest first."""
    return [f"v{number:06d}" for number in sorted(_numbers(folder))]


def current_version(folder: Path) -> str:
    """The version that the pointer names.

    Raises:
        ArtifactError: `folder` holds no index.
    """
    try:
        return (folder / POINTER).read_text().strip()
    except OSError:
        raise ArtifactError(f"{folder} holds no index; build one with `slq index`") from None


def read_manifest(folder: Path, version: str) -> Manifest:
    """What is written of a version.

    Raises:
        ArtifactError: It is missing, damaged, or of an older slq.
    """
    path = folder / version / MANIFEST
    values = read_json(path)
    with suppress(AttributeError, KeyError, TypeError):
        manifest = Manifest.from_json(values)
        names = [name for one in manifest.segments for name in one.sha256]
        if all(
            name.startswith(tuple(f"{one}/" for one in (PARTS, PARTITIONS, WORDS)))
            for name in names
        ):
            return manifest
    raise ArtifactError(f"{path} is not of this slq; rebuild with `slq index`")


def roll_back(folder: Path, version: str | None = None) -> str:
    """Make an older version the current one; by default the one before the current one.

    Returns:
        Its name.

    Raises:
        ArtifactError: There is no such version, or a file of it is damaged.
        StorageError: The pointer cannot be written.
    """
    current, known = current_version(folder), versions(folder)
    older = [name for name in known if name < current]
    wanted = version or (older[-1] if older else None)
    if wanted is None or wanted not in known:
        raise ArtifactError(
            f"{folder} has no {'version before ' + current if version is None else version}; it has "
            f"{', '.join(known)}"
        )
    require_whole(folder, read_manifest(folder, wanted))
    with words_for_full_disks(folder):
        point_to(folder, wanted)
    return wanted


def prune(folder: Path, keep: int) -> list[str]:
    """Remove all but the newest versions and the current one, with segments that only those held.

    A segment that no version ever held stays: it may be of a build that is about to publish it.

    Args:
        folder: The index folder.
        keep: Versions to keep, one at least.

    Returns:
        Names of removed versions.
    """
    current, known = current_version(folder), versions(folder)
    removed = [name for name in known[: -max(1, keep)] if name != current]
    unused = _held(folder, removed) - _held(folder, [name for name in known if name not in removed])
    for name in removed:
        shutil.rmtree(folder / name)
    for name in unused:
        shutil.rmtree(folder / SEGMENTS / name)
    return removed


def _held(folder: Path, names: Iterable[str]) -> set[str]:
    """Names of the segments of versions."""
    return {one.name for name in names for one in read_manifest(folder, name).segments}


def require_whole(
    folder: Path,
    manifest: Manifest,
    *,
    again: bool = False,
    wanted: Callable[[SegmentRecord, str], bool] = lambda *_: True,
) -> None:
    """Check every file of a version against its sha256.

    Args:
        folder: The index folder.
        manifest: Of the version.
        again: Read every file, whatever was checked before.
        wanted: Which files of a segment, by name; all by default.

    Raises:
        ArtifactError: A file is missing or is not what was written; it is named.
    """
    for one in manifest.segments:
        sha256 = {name: digest for name, digest in one.sha256.items() if wanted(one, name)}
        require_files(folder / SEGMENTS / one.name, sha256, again=again)
        if one.deleted_sha256 is not None:
            path = folder / manifest.version / deleted_name(one.name)
            require_file(path, one.deleted_sha256)


def open_segments(
    folder: Path,
    manifest: Manifest,
    *,
    num_probes: int | None = None,
    device: str = CPU,
    held: Sequence[Collection[int] | None] | None = None,
) -> list[Segment]:
    """The segments of a version, which stay on disk.

    Args:
        folder: The index folder.
        manifest: Of the version.
        num_probes: Lists that a search visits, instead of as many as each was built for.
        device: Where they are searched, as of `IndexConfig.search_device`.
        held: Of each segment, numbers of the partitions whose codes are searched here; all by default.

    Raises:
        ConfigError: A segment cannot be searched there.
        HardwareError: The device is not here, or has too little memory.
    """
    found = []
    for one, held_here in zip(
        manifest.segments, held or [None] * len(manifest.segments), strict=True
    ):
        config = IndexConfig.model_validate(one.config)
        config = config.model_copy(update={"search_device": device})
        if num_probes is not None:
            config = config.model_copy(update={"num_probes": num_probes})
        deleted: NDArray[np.int64] = np.zeros(0, np.int64)
        if one.deleted_sha256 is not None:
            path = folder / manifest.version / deleted_name(one.name)
            deleted = read_array(path, mapped=False)
        found.append(Segment(folder / SEGMENTS / one.name, config, deleted, held=held_here))
    return found
