"""Commit records of a data set in shards, and the names of the files that they vouch for.

A shard may be made again, with fewer quarantined rows: each time is a generation with a record and files of its own.
Generation 0 has the plain names, `shards/part-000123.parquet`; later ones carry their number, `part-000123.1.parquet`.
"""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass

SHARDS, ERRORS, COMMITS, PIECES = "shards", "errors", "commits", "pieces"
_RECORD = re.compile(rf"{COMMITS}/(\d+)(?:\.(\d+))?\.json")
_FINAL = re.compile(rf"(?:{SHARDS}|{ERRORS})/part-(\d+)(?:\.(\d+))?\.parquet")
_ATTEMPT = re.compile(rf"(?:{SHARDS}|{ERRORS})/\.part-(\d+)(?:\.(\d+))?\.parquet\.(\w+)")


@dataclass(frozen=True, slots=True)
class Commit:
    """What one finished shard holds.

    Attributes:
        attempt: Whose files these are.
        errors_sha256: Of the quarantine file; None where nothing was quarantined, or by an older version.
        generation: How many times the shard was committed before.
    """

    shard_id: int
    rows: int
    quarantined: int
    sha256: str
    bytes: int
    attempt: str
    errors_sha256: str | None = None
    generation: int = 0

    def files(self) -> list[tuple[str, str]]:
        """Names of the final files that this commit vouches for, and their sha256; the data file last."""
        errors = errors_name(self.shard_id, self.generation)
        found = [] if self.errors_sha256 is None else [(errors, self.errors_sha256)]
        return [*found, (shard_name(self.shard_id, self.generation), self.sha256)]

    def attempt_files(self) -> list[str]:
        """Names of the same files while they wait for the commit."""
        return [attempt_name(final, self.attempt) for final, _ in self.files()]

    def to_json(self) -> str:
        """The record as it is stored; the same commit gives the same text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, shard_id: int, generation: int) -> "Commit":
        """Read the record that is stored under the name of a shard and a generation.

        Raises:
            ValueError: It is none, or another's.
        """
        try:
            commit = cls(**json.loads(text))
        except TypeError as error:  # no object, or one with other fields
            raise ValueError(str(error)) from None
        if (commit.shard_id, commit.generation) != (shard_id, generation):
            raise ValueError(f"it is of shard {commit.shard_id}, generation {commit.generation}")
        return commit


def shard_name(shard_id: int, generation: int = 0) -> str:
    """The data file of a shard."""
    return f"{SHARDS}/{_part(shard_id, generation)}"


def errors_name(shard_id: int, generation: int = 0) -> str:
    """The quarantined rows of a shard; there is none when all went well."""
    return f"{ERRORS}/{_part(shard_id, generation)}"


def record_name(shard_id: int, generation: int = 0) -> str:
    """The commit record of a shard."""
    return f"{COMMITS}/{shard_id:06d}{_suffix(generation)}.json"


def attempt_name(final: str, attempt: str) -> str:
    """Where an attempt writes what may become `final`."""
    folder, _, name = final.rpartition("/")
    return f"{folder}/.{name}.{attempt}"


def new_attempt() -> str:
    """A name for one attempt at a shard."""
    return uuid.uuid4().hex[:12]


def parse_record(name: str) -> tuple[int, int] | None:
    """Shard and generation that a commit record is named after; None of any other file."""
    return _parse(_RECORD, name)


def parse_final(name: str) -> tuple[int, int] | None:
    """Shard and generation of a file that has its final name; None of any other file."""
    return _parse(_FINAL, name)


def parse_attempt(name: str) -> tuple[int, int, str] | None:
    """Shard, generation and attempt of a file that waits for a commit; None of any other file."""
    found, numbers = _ATTEMPT.fullmatch(name), _parse(_ATTEMPT, name)
    return (*numbers, found[3]) if found and numbers else None


def stale_files(names: set[str], commits: Mapping[int, Commit], *, alone: bool) -> list[str]:
    """Files that nobody will read any more, and that no driver will give their final names.

    Args:
        names: All data and errors files, final or waiting for a commit, listed after the commits were read.
        commits: The latest commit of each shard.
        alone: Whether no other driver is at work, so that what is not committed is of the dead.
    """
    whole = {
        shard_id
        for shard_id, commit in commits.items()
        if names.issuperset(final for final, _ in commit.files())
    }
    finals = [(name, parse_final(name)) for name in names]
    attempts = [(name, parse_attempt(name)) for name in names]
    return sorted(
        {
            name
            for name, found in finals
            if found and _is_outdated(name, *found, commits, whole, alone)
        }
        | {name for name, found in attempts if found and _has_lost(*found, commits, whole, alone)}
    )


def _is_outdated(
    name: str,
    shard_id: int,
    generation: int,
    commits: Mapping[int, Commit],
    whole: set[int],
    alone: bool,
) -> bool:
    """Whether a final file is not of the latest generation and that one is whole, or its record is gone for good."""
    latest = commits.get(shard_id)
    if generation > (latest.generation if latest else 0):
        return alone
    return latest is not None and shard_id in whole and name not in dict(latest.files())


def _has_lost(
    shard_id: int,
    generation: int,
    attempt: str,
    commits: Mapping[int, Commit],
    whole: set[int],
    alone: bool,
) -> bool:
    """Whether an attempt's file waits in vain: another was committed, its content is final, or its driver is dead."""
    latest = commits.get(shard_id)
    if latest is None or generation > latest.generation:
        return alone
    return shard_id in whole or (generation == latest.generation and attempt != latest.attempt)


def _parse(pattern: re.Pattern[str], name: str) -> tuple[int, int] | None:
    found = pattern.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def _part(shard_id: int, generation: int) -> str:
    return f"part-{shard_id:06d}{_suffix(generation)}.parquet"


def _suffix(generation: int) -> str:
    return f".{generation}" if generation else ""
