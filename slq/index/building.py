"""How a segment is built, in steps that any number of processes share, on one machine or many.

1. Each part is written: vectors, items and the order of ids.
2. Ids are compared, a range of their digests at a time.
3. Lists and codes are learnt, once, from a sample of all vectors.
4. The vectors of each part are put into lists and coded.
5. Each partition, a range of lists, is put together from all parts.

What a step made stays, so a build that was ended goes on from there. Codes depend on nothing but the vectors of the
part and what was learnt, and come into a list in the order of rows: the result is bit for bit what one process builds
from the same parts, where as many threads learn, on the same device. (Their number, and that of the vectors that are
turned at once, decide how the last bit is rounded. The graph of an HNSW quantizer that several threads learn is another
one each time.)
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index import codes
from slq.index.arrays import read_array
from slq.index.checks import STAMPS, Digest, digested, stamp, stamped
from slq.index.config import CPU, IndexConfig
from slq.index.devices import Nearest, device_of
from slq.index.items import Items
from slq.index.parts import PARTIAL, Draft, Source, once, write_part
from slq.index.vectors import VECTORS, StoredVectors
from slq.index.words import WORDS, require_words, write_words

INDEX = "index.faiss"
PARTS = "parts"
PARTITIONS = "partitions"
_WORK = "work"
_TRAINED = "trained"
_CODES, _ROWS, _ENDS = "codes.npy", "rows.npy", "ends.npy"
_POINTS_PER_LIST = 256  # that training looks at; more change nothing that one could measure
_DIGEST_BITS = 64
_IDS_AT_ONCE = 2**22
_BLOCK_ROWS = 65_536
_MOST_THREADS = 8
_reading = threading.Lock()
_PARTS, _LEAST_PART_ROWS, _MOST_PART_ROWS = 64, 2**14, 2**20
A = TypeVar("A")
R = TypeVar("R")


class Each(Protocol):
    """Who calls a step's function for each argument, in any order and in any process."""

    def __call__(
        self, what: str, function: Callable[[A], R], arguments: Sequence[A], *, device: str = CPU
    ) -> list[R]:
        """The results, in the order of arguments.

        Args:
            what: What is done, for people.
            function: Can be pickled; may be called twice for an argument.
            arguments: Can be pickled too.
            device: What the function works on, as of `IndexConfig.device`.
        """


def here(
    what: str, function: Callable[[A], R], arguments: Sequence[A], *, device: str = CPU
) -> list[R]:
    """In threads of this process, one for each core, but not more than eight: each needs memory of its own."""
    del what, device
    pool = ThreadPoolExecutor(min(_MOST_THREADS, codes.num_cores()))
    try:
        return list(pool.map(function, arguments))
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Build:
    """What every step knows.

    Attributes:
        home: The folder of the segment.
        config: How it is built.
        starts: First row of each part, and the number of all rows.
    """

    home: Path
    config: IndexConfig
    starts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Of all parts."""
        return self.starts[-1]

    @property
    def num_parts(self) -> int:
        """As many as sources."""
        return len(self.starts) - 1

    def part(self, number: int) -> Path:
        """Folder of a part."""
        return self.home / PARTS / f"{number:05d}"

    @property
    def parts(self) -> list[Path]:
        """Folders of all parts."""
        return [self.part(number) for number in range(self.num_parts)]

    def partition(self, number: int) -> Path:
        """Folder of a partition."""
        return self.home / PARTITIONS / f"{number:04d}"

    @property
    def work(self) -> Path:
        """Folder of what the segment itself does not need."""
        return self.home / _WORK

    def coded(self, number: int) -> Path:
        """Folder of the codes of a part."""
        return self.work / f"codes-{number:05d}"

    def stored(self) -> StoredVectors:
        """The vectors of all parts."""
        return StoredVectors([folder / VECTORS for folder in self.parts])


def build_segment(
    home: Path,
    sources: Sequence[Source],
    dimension: int,
    config: IndexConfig,
    each: Each = here,
) -> dict[str, Digest]:
    """Write all files of a segment, or those that are not there yet.

    A worker, or a thread of `here`, needs memory for a partition, about three times `config.partition_bytes`, for the
    centroids of all lists, for the ids of a part, and for digests of four million ids; to learn, for 256 vectors a
    list, twice. More rows need no more of it, but for the words of their texts where those are asked for.

    Args:
        home: Its folder.
        sources: Its rows.
        dimension: Length of a vector.
        config: How it is built.
        each: Who does the work.

    Returns:
        Of each file, by its name below `home`.

    Raises:
        ConfigError: There are more lists than vectors.
        DataError: A vector is not finite or zero, an id comes twice, or there are no rows.
        HardwareError: `config.device` is not where the work is done.
        OSError: A file cannot be written.
    """
    written = stamped(home)
    if not written:
        written = _built(home, sources, dimension, config, each)
        stamp(home, written)
    _remove_leftovers(home)
    return written


def _built(
    home: Path, sources: Sequence[Source], dimension: int, config: IndexConfig, each: Each
) -> dict[str, Digest]:
    starts = np.cumsum([0, *(source.num_rows for source in sources)]).tolist()
    build = Build(home, config, tuple(starts))
    if not build.num_rows:
        raise DataError("there are no items to index")
    config.require_room(build.num_rows, dimension)
    if config.words:
        require_words()
    if config.device != CPU:  # told before all is read
        each("look for the GPU", _require_device, [config.device], device=config.device)
    drafts = [
        Draft(build.part(number), first, dimension, source)
        for number, (first, source) in enumerate(zip(starts, sources, strict=False))
    ]
    each("read rows", write_part, drafts)
    if config.words:
        Items(build.parts).require_texts()
    _require_unique(build, each)
    edges = _coded_edges(build, dimension, each) if config.kind == "ivf" else _row_edges(build)
    merge = _write_lists if config.kind == "ivf" else _write_flat
    partitions = list(enumerate(pairwise(edges)))
    each("write partitions", partial(_write_partition, build, merge), partitions)
    _require_complete(build, len(partitions))
    folders = [*build.parts, *(build.partition(number) for number, _ in partitions)]
    if config.words:
        each("index words", _write_words, [build])
        folders.append(build.home / WORDS)
    found = {}
    for folder in folders:
        of_folder = stamped(folder) or digested(folder, [path.name for path in folder.iterdir()])
        for name, digest in of_folder.items():
            found[f"{folder.relative_to(home)}/{name}"] = digest
    return found


def _require_device(name: str) -> None:
    device_of(name)


def _write_words(build: Build) -> None:
    texts = (text for batch in Items(build.parts).texts() for text in batch)
    once(build.home / WORDS, lambda folder: write_words(folder, texts))


def _remove_leftovers(home: Path) -> None:
    """What nobody needs once all is written, and what killed tasks left."""
    (home / WORDS / STAMPS).unlink(missing_ok=True)
    for folder in (home, home / PARTS, home / PARTITIONS):
        for path in folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
    for name in (PARTS, PARTITIONS):
        for path in (home / name).glob(f"*/{STAMPS}"):
            path.unlink()
    shutil.rmtree(home / _WORK, ignore_errors=True)


def part_rows(count: int) -> int:
    """Rows of a part that many rows are best cut into: some 64 parts, none very small and none very large."""
    return min(_MOST_PART_ROWS, max(_LEAST_PART_ROWS, -(-count // _PARTS)))


def _require_unique(build: Build, each: Each) -> None:
    number = max(1, -(-build.num_rows // _IDS_AT_ONCE))
    edges = [n * 2**_DIGEST_BITS // number for n in range(number + 1)]
    found = each("compare ids", partial(_twice, build), list(pairwise(edges)))
    several = [name for one in found for name in one]
    if several:
        raise DataError(
            f"{len(several)} ids come twice, first {min(several)!r}; an index needs unique ids"
        )


def _twice(build: Build, digest_range: tuple[int, int]) -> list[str]:
    return Items(build.parts).twice(*digest_range)


def _coded_edges(build: Build, dimension: int, each: Each) -> list[int]:
    """Train and code, then the first list of each partition, and the end."""
    device, numbers = build.config.device, range(build.num_parts)
    each("learn lists and codes", partial(_write_trained, build), [dimension], device=device)
    each("put vectors into lists", partial(_write_codes, build), numbers, device=device)
    ends = [read_array(build.coded(number) / _ENDS) for number in range(build.num_parts)]
    sizes = np.sum([np.diff(one, prepend=0) for one in ends], axis=0)
    return balanced(sizes, build.config.partition_rows(dimension))


def balanced(sizes: NDArray[np.int64], limit: int) -> list[int]:
    """Edges of ranges of lists: of about `limit` vectors each, unless one list has more.

    Args:
        sizes: (lists,) vectors of each list.
        limit: Vectors of a range.
    """
    edges, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + int(size) > limit:
            edges.append(number)
            held = 0
        held += int(size)
    return [*edges, len(sizes)]


def _row_edges(build: Build) -> list[int]:
    stored = build.stored()
    limit = build.config.partition_rows(stored.dimension)
    return [*range(0, len(stored), limit), len(stored)]


def training_rows(stored: StoredVectors, config: IndexConfig) -> NDArray[np.float32]:
    """(sample, dimension) unit vectors that lists and codes are learnt from, chosen by the seed."""
    count = min(len(stored), _POINTS_PER_LIST * config.num_lists)
    chosen = np.random.default_rng(config.seed).choice(len(stored), count, replace=False)
    return stored.rows(np.sort(chosen))


def _write_trained(build: Build, dimension: int) -> None:
    once(build.work / _TRAINED, lambda folder: _train(folder, build, dimension))


def _train(folder: Path, build: Build, dimension: int) -> None:
    index = codes.untrained(build.config, dimension)
    with codes.threads(codes.num_cores()):
        device_of(build.config.device).train(index, training_rows(build.stored(), build.config))
    codes.write(index, folder / INDEX)


def _trained(build: Build) -> tuple[Any, Nearest]:
    """The empty index, and what finds the list of a vector; a process codes many parts."""
    path = build.work / _TRAINED / INDEX
    state = path.stat()
    with _reading:  # or several threads would read a copy each
        return _read(path, (state.st_mtime_ns, state.st_ino), build.config.device)


@lru_cache(maxsize=1)
def _read(path: Path, state: tuple[int, int], device: str) -> tuple[Any, Nearest]:
    del state  # another file under the same name is another index
    index = codes.read(path, mapped=False)
    return index, device_of(device).nearest(index)


def _write_codes(build: Build, part: int) -> None:
    once(build.coded(part), lambda folder: _code(folder, build, part))


def _code(folder: Path, build: Build, part: int) -> None:
    """Write codes and rows of a part in the order of lists, and where each list ends."""
    (index, nearest), first = _trained(build), build.starts[part]
    numbers, rows, unordered = [], [], folder / "unordered"
    with unordered.open("wb") as file:
        for block_rows, vectors in StoredVectors([build.part(part) / VECTORS]).blocks():
            with codes.threads(1):  # how many turn a vector decides how its last bit is rounded
                turned = codes.turned(index, vectors)
                lists = nearest(turned)
                coded = codes.coded(index, turned, lists)
            numbers.append(lists)
            rows.append(block_rows + first)
            file.write(coded.data)
    lists = np.concatenate(numbers)
    order = np.argsort(lists, kind="stable")
    mapped = np.memmap(unordered, np.uint8, "r").reshape(len(lists), -1)
    with (folder / _CODES).open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": mapped.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(order), _BLOCK_ROWS):
            file.write(mapped[order[start : start + _BLOCK_ROWS]].data)
    unordered.unlink()
    np.save(folder / _ROWS, np.concatenate(rows)[order], allow_pickle=False)
    ends = np.cumsum(np.bincount(lists, minlength=codes.num_lists(index)))
    np.save(folder / _ENDS, ends, allow_pickle=False)


_Merge = Callable[[Path, Build, int, int], None]


def _write_partition(build: Build, merge: _Merge, place: tuple[int, tuple[int, int]]) -> None:
    number, (start, stop) = place
    once(build.partition(number), lambda folder: merge(folder, build, start, stop))


def _write_lists(folder: Path, build: Build, start: int, stop: int) -> None:
    """An index whose lists from `start` to `stop` hold what all parts have for them; the others stay empty.

    The first one has the centroids of all lists, for all.
    """
    found = [_coded_range(build.coded(number), start, stop) for number in range(build.num_parts)]
    lists, rows, coded = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(lists, kind="stable")
    ends = np.cumsum(np.bincount(lists[order] - start, minlength=stop - start))
    index = codes.read(build.work / _TRAINED / INDEX, mapped=False)
    for number, (low, high) in enumerate(pairwise([0, *ends.tolist()]), start):
        chosen = order[low:high]
        codes.fill_list(index, number, rows[chosen], coded[chosen])
    codes.write(index, folder / INDEX, with_centroids=start == 0)


def _coded_range(
    folder: Path, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Lists, rows and codes of a part, of the lists from `start` to `stop`."""
    ends = [0, *read_array(folder / _ENDS).tolist()]
    low, high = ends[start], ends[stop]
    sizes = np.diff(ends[start : stop + 1])
    rows, coded = (read_array(folder / name) for name in (_ROWS, _CODES))
    return np.repeat(np.arange(start, stop), sizes), rows[low:high], coded[low:high]


def _write_flat(folder: Path, build: Build, start: int, stop: int) -> None:
    """An index of the rows from `start` to `stop`."""
    stored = build.stored()
    index = codes.untrained(build.config, stored.dimension)
    codes.fill(index, stored.blocks(np.arange(start, stop, dtype=np.int64)))
    codes.write(index, folder / INDEX)


def _require_complete(build: Build, num_partitions: int) -> None:
    """Every row is in a partition.

    Raises:
        DataError: One is not: a disk lost what was written.
    """
    held = sum(
        codes.read(build.partition(number) / INDEX).ntotal for number in range(num_partitions)
    )
    if held != build.num_rows:
        raise DataError(f"partitions hold {held} of {build.num_rows} vectors; delete {build.home}")
