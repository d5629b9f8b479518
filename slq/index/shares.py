"""An index that several processes hold together: each has a share of the codes, and one puts together what they find.

    share.scan(queries, depths, where)      in each process: candidates by the codes of its own partitions
    merged(answers, depths)                 the best candidates of all
    VectorIndex(folder, has_codes=False).search(..., scan=...)      asks for them, and does all the rest

What the last one finds is bit for bit what an index finds that holds all codes itself: a candidate has the same score
wherever it is computed, and the best of all are among the best of each.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slq.index.building import INDEX, PARTITIONS
from slq.index.exact import Rows, Scores, best
from slq.index.items import IDS, ITEMS
from slq.index.segment import Segment
from slq.index.versions import (
    Manifest,
    SegmentRecord,
    open_segments,
    read_manifest,
    require_whole,
)

Candidates = tuple[Scores, Rows]
"""(queries, n) scores by codes and rows of a segment, best first."""
_FIRST = 0  # the partition that has the centroids for all


class Scan(Protocol):
    """Who looks through the codes of an index."""

    def __call__(
        self, queries: NDArray[np.float32], depths: Sequence[int], where: str | None
    ) -> Sequence[Candidates | None]:
        """Candidates of each segment; None where none are asked for.

        Args:
            queries: (queries, dimension) float32 unit vectors.
            depths: Candidates per query, of each segment.
            where: A predicate that they must meet.
        """


def scanned(
    segments: Sequence[Segment],
    queries: NDArray[np.float32],
    depths: Sequence[int],
    where: str | None,
) -> list[Candidates | None]:
    """Candidates from the partitions that segments hold; as `Scan`."""
    return [
        segment.scan(queries, depth, where) if depth else None
        for segment, depth in zip(segments, depths, strict=True)
    ]


def merged(
    answers: Sequence[Sequence[Candidates | None]], depths: Sequence[int]
) -> list[Candidates | None]:
    """The best candidates among those that several shares found.

    Args:
        answers: Of each share, one at least: what `Scan` gives.
        depths: Candidates per query, of each segment.
    """
    joined: list[Candidates | None] = []
    for depth, of_shares in zip(depths, zip(*answers, strict=True), strict=True):
        found = [one for one in of_shares if one is not None]
        if not found:
            joined.append(None)
            continue
        scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        joined.append(best(scores, rows, depth))
    return joined


def dealt(sizes: Sequence[float], count: int) -> list[int]:
    """Deal things out so that shares are about as large: the largest first, each to the share that has least.

    Args:
        sizes: Of the things.
        count: Shares.

    Returns:
        The number of the share of each thing.
    """
    shares = [(0.0, number) for number in range(count)]
    dealt_to = [0] * len(sizes)
    for thing in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        held, number = heapq.heappop(shares)
        dealt_to[thing] = number
        heapq.heappush(shares, (held + sizes[thing], number))
    return dealt_to


def num_partitions(manifest: Manifest) -> int:
    """Files of codes of a version: more shares than these leave some empty."""
    return sum(len(_partitions_of(one)) for one in manifest.segments)


def _partitions_of(record: SegmentRecord) -> list[str]:
    """Names of the files of codes of a segment, in the order of their numbers."""
    names = [name for name in record.sha256 if name.startswith(f"{PARTITIONS}/")]
    return sorted(names, key=lambda name: int(name.split("/")[1]))


def held_by(manifest: Manifest, number: int, count: int) -> list[list[int]]:
    """Numbers of the partitions of each segment that belong to a share.

    The manifest alone decides, so that shares agree whenever and wherever they are opened, whatever became of a file.
    Partitions of a segment are about as large as one another.
    """
    files, sizes = [], []
    for place, one in enumerate(manifest.segments):
        names = _partitions_of(one)
        files += [(place, partition) for partition in range(len(names))]
        sizes += [one.num_rows / len(names)] * len(names)
    held: list[list[int]] = [[] for _ in manifest.segments]
    for (place, partition), share in zip(files, dealt(sizes, count), strict=True):
        if share == number:
            held[place].append(partition)
    return held


class IndexShare:
    """The codes of one share of a version; no other codes are kept in memory.

    Args:
        folder: The index folder.
        version: A version's name.
        number: Of the share, from 0 on.
        count: Shares that there are.

    Raises:
        ArtifactError: There is no such version, or a file that the share needs does not match its recorded sha256.
    """

    def __init__(self, folder: Path, version: str, number: int, count: int) -> None:
        self.version = version
        self.manifest = read_manifest(folder, version)
        held = held_by(self.manifest, number, count)
        by_name = dict(zip((one.name for one in self.manifest.segments), held, strict=True))
        require_whole(
            folder, self.manifest, wanted=lambda one, name: _is_needed(name, by_name[one.name])
        )
        self._segments = open_segments(folder, self.manifest, held=held)

    @property
    def fingerprint(self) -> str:
        """Of the embedding space that the vectors live in."""
        return self.manifest.fingerprint

    @property
    def num_vectors(self) -> int:
        """Whose codes are held, with deleted ones."""
        return sum(segment.num_held for segment in self._segments)

    def scan(
        self, queries: NDArray[np.float32], depths: Sequence[int], where: str | None
    ) -> list[Candidates | None]:
        """Candidates from the codes that are held; see `Scan`.

        Raises:
            DataError: `where` cannot be used.
        """
        return scanned(self._segments, queries, depths, where)


def _is_needed(name: str, held: Sequence[int]) -> bool:
    """Whether a share opens a file of a segment: what is stored of the items, for predicates, and its own codes."""
    folder, number, file = name.split("/", 2) if name.count("/") > 1 else ("", "0", name)
    if folder == PARTITIONS:
        return file == INDEX and (int(number) in held or (bool(held) and int(number) == _FIRST))
    return file in (ITEMS, IDS)
