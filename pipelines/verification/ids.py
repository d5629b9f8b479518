"""Ids that stand twice in a data set, found in bounded memory.

Workers give 64-bit hashes of ids; the driver sorts them. Where there are too many for that, hashes are taken in several
passes, each with its own share of all values. Equal hashes are only a suspicion: the shards that hold them are asked
for the ids themselves.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.commits import Commit
from pipelines.storage import open_store
from pipelines.tasks import collect
from pipelines.verification.files import committed_files
from pipelines.verification.findings import Finding, first_few

IDS_AT_ONCE = 100_000_000
"""Whose hashes are in memory at once: 800 MB, and as much in Ray's object store, which spills to disk."""
_MOST_SUSPECTS = 1000  # more need not be named
Hashes = NDArray[np.uint64]
Place = tuple[str, int]  # file, row


def num_passes(num_ids: int) -> int:
    """How often ids must be gone through."""
    return max(1, -(-num_ids // IDS_AT_ONCE))


def hashes_of(ids: Any, number: int, passes: int) -> Hashes:
    """64-bit hashes of ids, those of one pass only.

    Args:
        ids: An Arrow string array, chunked or not; nulls are passed over.
        number: Which pass, from 0.
        passes: Of how many.
    """
    values = ids.drop_null().cast(pa.binary()).to_pylist()
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in values)
    hashes: Hashes = np.frombuffer(digests, dtype=np.uint64)
    return hashes if passes == 1 else hashes[hashes % np.uint64(passes) == number]


def repeated(hashes: Sequence[Hashes]) -> Hashes:
    """Values that are there more than once, ascending."""
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    every.sort()
    found: Hashes = np.unique(every[1:][every[1:] == every[:-1]])
    return found


def read_hashes(location: str, retry_s: float, commit: Commit, number: int, passes: int) -> Hashes:
    """Hashes of one pass of a shard's ids, quarantined ones included. Its files are known to be whole."""
    found = [hashes_of(ids, number, passes) for _, ids, _ in _ids(location, retry_s, commit)]
    return np.concatenate(found)


def occurrences(
    location: str, retry_s: float, commit: Commit, suspects: Hashes
) -> list[tuple[str, str, int]]:
    """Id, file and row of each row of a shard whose id has one of these hashes."""
    found = []
    for name, ids, rows in _ids(location, retry_s, commit):
        for position in np.flatnonzero(np.isin(hashes_of(ids, 0, 1), suspects)):
            found.append((ids[position].as_py(), name, rows[position].as_py()))
    return found


def _ids(location: str, retry_s: float, commit: Commit) -> Iterable[tuple[str, Any, Any]]:
    """Name, ids and rows of each file of a shard; rows without an id, which only quarantined ones can be, are not."""
    store = open_store(location, retry_s)
    for name in committed_files(commit):
        with store.open(name) as file:
            table = pq.read_table(file, columns=["id", "row_in_shard"])
        table = table.filter(pa.compute.is_valid(table["id"]))
        yield name, table["id"], table["row_in_shard"]


def find_duplicates(
    location: str,
    retry_s: float,
    commits: Sequence[Commit],
    first_pass: Sequence[Hashes],
    passes: int,
) -> list[Finding]:
    """Look for ids that stand more than once in the whole data set.

    Args:
        location: The data set.
        retry_s: How long failures of its store are tried again.
        commits: Shards whose files are whole.
        first_pass: Hashes of the first pass of each.
        passes: Of how many.

    Raises:
        StorageError: The store cannot be read.
    """
    import ray

    suspects = repeated(first_pass)
    task = ray.remote(read_hashes)
    for number in range(1, passes):
        tasks = [task.remote(location, retry_s, commit, number, passes) for commit in commits]
        suspects = np.concatenate(
            [
                suspects,
                repeated(collect(tasks, f"verify ids, pass {number + 1} of {passes}: shard")),
            ]
        )
    if not len(suspects):
        return []
    asked = suspects[:_MOST_SUSPECTS]
    ask = ray.remote(occurrences)
    tasks = [ask.remote(location, retry_s, commit, asked) for commit in commits]
    places: dict[str, list[Place]] = {}
    for found in collect(tasks, "verify suspected ids: shard"):
        for name, file, row in found:
            places.setdefault(name, []).append((file, row))
    return _findings(places, at_least=len(suspects) > len(asked))


def _findings(places: Mapping[str, list[Place]], *, at_least: bool) -> list[Finding]:
    twice = {name: found for name, found in places.items() if len(found) > 1}
    if not twice:
        return []  # different ids with one hash
    shown = [
        f"{name!r} in {first_few([f'row {row} of {file}' for file, row in found])}"
        for name, found in twice.items()
    ]
    count = f"at least {len(twice)}" if at_least else str(len(twice))
    noun = "id stands" if len(twice) == 1 else "ids stand"
    message = (
        f"{count} {noun} more than once: {first_few(shown)}; the corpus must not hold an id twice"
    )
    return [Finding("ids", next(iter(twice.values()))[0][0], message)]
