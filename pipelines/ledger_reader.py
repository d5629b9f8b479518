"""The reader's side of a data set in shards: what is committed, and whether it is whole.

Readers follow commit records, never a listing: a folder may hold what lost, and what is not committed yet.
"""

import json
from pathlib import Path
from typing import Any

from pipelines.commits import (
    COMMITS,
    ERRORS,
    SHARDS,
    Commit,
    parse_record,
    record_name,
    shard_name,
)
from pipelines.storage import RETRY_S, concurrently, open_store
from slq.errors import ArtifactError

MANIFEST = "manifest.json"
RUN = "run.json"
EMBED = "slq embed"


class LedgerReader:
    """The committed files of one data set.

    Args:
        root: Its folder, or `scheme://bucket/prefix`.
        retry_s: How long failures of an object store are tried again.
        command: What makes such a data set, for messages.
    """

    def __init__(self, root: str | Path, retry_s: float = RETRY_S, *, command: str = EMBED) -> None:
        self.store = open_store(root, retry_s)
        self.retry_s = retry_s
        self.command = command

    def commits(self) -> dict[int, Commit]:
        """The commit of the highest generation of each shard, by shard id.

        Raises:
            ArtifactError: A record is damaged; it is named.
            StorageError: The store cannot be read.
        """
        latest: dict[int, int] = {}
        for file in self.store.files(COMMITS):
            found = parse_record(file.name)
            if found is not None:
                latest[found[0]] = max(found[1], latest.get(found[0], 0))
        records = concurrently(self._commit_of, sorted(latest.items()))
        return {record.shard_id: record for record in records if record is not None}

    def _commit_of(self, shard: tuple[int, int]) -> Commit | None:
        """The record of a shard and a generation; None where there is none, or no longer."""
        name = record_name(*shard)
        try:
            return Commit.from_json(self.store.read(name).decode(), *shard)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"commit record {self.store.url(name)} is damaged: {error}; {remake(shard[0], self.command)}"
            ) from None

    def identity(self) -> dict[str, Any] | None:
        """What the data set was begun with, or None.

        Raises:
            ArtifactError: It is damaged.
            StorageError: The store cannot be read.
        """
        return self._read_json(RUN)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished data set, or None.

        Raises:
            ArtifactError: It is damaged.
            StorageError: The store cannot be read.
        """
        return self._read_json(MANIFEST)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            found = dict(json.loads(self.store.read(name)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                f"{self.store.url(name)} is damaged: {error}; delete it and run `{self.command}` again"
            ) from None
        return found

    def verified_shards(self) -> list[str]:
        """Names of the data files in the order of the shards, each checked against its commit record.

        Raises:
            ArtifactError: The data set is unfinished, or a shard is missing or damaged; the shard is named.
            StorageError: The store cannot be read.
        """
        commits = self.required_commits()
        for _ in concurrently(self.require_shard, commits):
            pass  # each one is checked as it is asked for
        return [shard_name(commit.shard_id, commit.generation) for commit in commits]

    def required_commits(self) -> list[Commit]:
        """The records of all shards of a finished data set, in their order.

        Raises:
            ArtifactError: The data set is unfinished, or a record is missing or damaged.
            StorageError: The store cannot be read.
        """
        manifest = self.manifest()
        if manifest is None:
            raise ArtifactError(
                f"{self.store.location} is no finished data set of `{self.command}`; run it first"
            )
        commits = self._require_records(manifest["num_shards"])
        return [commits[shard_id] for shard_id in sorted(commits)]

    def require_shard(self, commit: Commit) -> None:
        """Check a data file against its commit record.

        Raises:
            ArtifactError: It is missing or damaged; it is named.
            StorageError: The store cannot be read.
        """
        name = shard_name(commit.shard_id, commit.generation)
        if not self._holds((name, commit.sha256)):
            raise ArtifactError(
                f"shard {self.store.url(name)} does not match its commit record; "
                f"{remake(commit.shard_id, self.command)}"
            )

    def _require_records(self, num_shards: int) -> dict[int, Commit]:
        commits = self.commits()
        if commits.keys() != set(range(num_shards)):
            missing = [n for n in range(num_shards) if n not in commits]
            raise ArtifactError(
                f"{self.store.location} has {len(commits)} commit records for {num_shards} shards, and shards "
                f"{missing[:10]} are missing; run `{self.command}` again while no other run is at work"
            )
        return commits

    def _holds(self, file: tuple[str, str]) -> bool:
        """Whether a file of this name and sha256 is there."""
        name, sha256 = file
        try:
            return self.store.sha256(name) == sha256
        except FileNotFoundError:
            return False


def remake(shard_id: int, command: str = EMBED) -> str:
    """The way out of a shard whose record or file is damaged: all its generations go, to be made anew."""
    files = ", ".join(f"{folder}/part-{shard_id:06d}*.parquet" for folder in (SHARDS, ERRORS))
    return (
        f"delete {COMMITS}/{shard_id:06d}*.json, {files} and {MANIFEST}, and run `{command}` again"
    )
