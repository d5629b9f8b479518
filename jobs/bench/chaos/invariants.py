"""What must hold of an embedding data set after whatever happened to the runs that made it.

It reads the files themselves, with nothing of the ledger: it would share the ledger's mistakes.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from slq.errors import SlqError
from slq.files import file_sha256

_MAY_DIFFER = ("report.json", "run.lock")
"""Of one run and its time, and not of the data set; the first is absent where the last run had nothing to embed."""
_SHOWN = 5


class BrokenInvariantError(SlqError):
    """Something that must hold after every fault does not."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was committed at one moment.

    Attributes:
        shards: Their numbers.
        files: Names of commit records and of the files that they vouch for -> modification time in ns, sha256.
    """

    shards: frozenset[int]
    files: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, folder: Path) -> "Snapshot":
        """The state of a data set whose driver is not at work."""
        shards, files = set(), {}
        for name, record in records(folder):
            shards.add(int(record["shard_id"]))
            for one in [name, *vouched_for(record)]:
                path = folder / one
                if path.exists():  # a driver may have died before it gave the file its name
                    files[one] = (path.stat().st_mtime_ns, file_sha256(path))
        return cls(frozenset(shards), files)

    def touched(self, folder: Path) -> list[str]:
        """Names of files that were written again or are gone."""
        now = Snapshot.of(folder).files
        return sorted(name for name, state in self.files.items() if now.get(name) != state)


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and contents of the commit records of a data set."""
    for path in sorted((folder / "commits").glob("*.json")):
        yield f"commits/{path.name}", json.loads(path.read_text())


def vouched_for(record: dict[str, Any]) -> dict[str, str]:
    """Files of a commit record, and their sha256."""
    name = f"part-{record['shard_id']:06d}.parquet"
    files = {f"shards/{name}": record["sha256"]}
    return files | ({f"errors/{name}": record["errors_sha256"]} if record["errors_sha256"] else {})


def violations(folder: Path, clean: Path, ids: list[str]) -> list[str]:
    """What is wrong with a finished data set.

    Args:
        folder: The data set.
        clean: The same one, made without any fault.
        ids: Of the corpus.

    Returns:
        One sentence per finding; none if each id of the corpus came out exactly once or was quarantined, all files are
        what their commit records say, they have the bytes of the clean run's, and there is no other file.
    """
    found = [*_wrong_names(folder, clean)] or [*_wrong_bytes(folder)]
    if found:  # what is not there, or cannot be trusted, is not read
        return found
    return [*_wrong_ids(folder, ids), *_other_bytes(folder, clean)]


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _wrong_names(folder: Path, clean: Path) -> Iterator[str]:
    ours, theirs = _names(folder), _names(clean)
    for name in sorted(ours - theirs):
        yield f"{name} should not be there"
    for name in sorted(theirs - ours - set(_MAY_DIFFER)):
        yield f"{name} is missing"


def _wrong_bytes(folder: Path) -> Iterator[str]:
    for name, record in records(folder):
        for file, sha256 in vouched_for(record).items():
            if file_sha256(folder / file) != sha256:
                yield f"{file} is not what {name} says"


def _wrong_ids(folder: Path, ids: list[str]) -> Iterator[str]:
    files = [file for _, record in records(folder) for file in vouched_for(record)]
    columns = [pq.read_table(folder / file, columns=["id"])["id"] for file in files]
    found = Counter(one for column in columns for one in column.to_pylist())
    wanted = Counter(ids)
    for what, difference in (("missing", wanted - found), ("too many", found - wanted)):
        if difference:
            some = ", ".join(sorted(difference)[:_SHOWN])
            yield f"{difference.total()} rows are {what}: {some}"


def _other_bytes(folder: Path, clean: Path) -> Iterator[str]:
    for name in sorted(_names(clean) & _names(folder) - set(_MAY_DIFFER)):
        # a record names its attempt, which is random; what it says of the shard was checked
        if not name.startswith("commits/") and file_sha256(folder / name) != file_sha256(
            clean / name
        ):
            yield f"{name} has other bytes than in the clean run"


def require_sound(folder: Path, clean: Path, ids: list[str]) -> None:
    """Check a finished data set.

    Raises:
        BrokenInvariantError: Something is wrong with it; see `violations`.
    """
    found = violations(folder, clean, ids)
    if found:
        more = f" and {len(found) - _SHOWN} more findings" if len(found) > _SHOWN else ""
        raise BrokenInvariantError(f"{folder}: {'; '.join(found[:_SHOWN])}{more}")
