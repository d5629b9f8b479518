"""The commit ledger of a data set in shards, embeddings or scored pairs: what is done, provably, and what the run was.

A worker uploads `shards/.part-N.parquet.ATTEMPT`, whole, hashed and durable, and leaves it. The driver creates the
commit record, which only one attempt can do; the winner's file then takes its final name and a loser's is removed. So
no late attempt can touch a committed shard. A driver killed in between leaves a record without a final file: the next
one completes it from the attempt that it names. Readers follow commit records, never a listing.

The protocol is the same on a disk and in an object store, except that a disk tells a driver whether it is alone (see
`WriterLock`). Only one that is alone drops records whose files are lost, and removes files that others might still use.

A record is never replaced, and outlives its files: generation g + 1 of a shard is a record of its own, and the files of
older generations go once its own have their names. So a shard has one history, and at any point the latest generation
or the one before is whole.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.commits import (
    ERRORS,
    PIECES,
    SHARDS,
    Commit,
    attempt_name,
    new_attempt,
    record_name,
    stale_files,
)
from pipelines.failpoints import reach
from pipelines.ledger_reader import EMBED, MANIFEST, RUN, LedgerReader, remake
from pipelines.storage import RETRY_S, concurrently
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError

__all__ = ["LOCK", "MANIFEST", "RUN", "Ledger"]
LOCK = "run.lock"


class Ledger(LedgerReader):
    """A driver's side of one data set; as a context manager it lets its lock go at the end.

    Args:
        root: Its folder, or `scheme://bucket/prefix`.
        retry_s: How long failures of an object store are tried again.
        command: What makes such a data set, for messages.
    """

    def __init__(self, root: str | Path, retry_s: float = RETRY_S, *, command: str = EMBED) -> None:
        super().__init__(root, retry_s, command=command)
        self._lock = self.store.lock(LOCK)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say that this driver is no longer at work; dying does the same."""
        self._lock.close()

    def begin(self, identity: dict[str, Any]) -> None:
        """Open the data set for a run, or go on with it; what a killed driver left is completed or removed.

        Args:
            identity: What the content depends on: input, plan, fingerprint, output settings. Plain JSON.

        Raises:
            ArtifactMismatchError: The data set was begun with another identity; the differences are named.
            ArtifactError: A commit record is damaged; it is named.
            StorageError: The store cannot be written, or would let two drivers commit the same shard.
        """
        alone = self._lock.take()
        try:
            self._require_same(identity)
            self._recover(alone=alone)
        finally:
            self._lock.share()

    def _require_same(self, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, indent=2, sort_keys=True)
        before = self.identity()
        if before is None:
            self._require_exclusive_create()
            if self.store.create(RUN, text.encode()):
                return
            before = self.identity() or {}
        now = json.loads(text)  # as it would be read: no tuples
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ArtifactMismatchError(
                f"{self.store.location} was begun with other settings ({'; '.join(changed)}); "
                "use the old ones or another folder"
            )

    def _require_exclusive_create(self) -> None:
        """Some object stores take a conditional put and ignore the condition: a second attempt would win too."""
        name = f"{PIECES}/.probe-{new_attempt()}"
        self.store.create(name, b"first")
        second_won = self.store.create(name, b"second")
        self.store.remove(name)
        if second_won:
            raise StorageError(
                f"{self.store.location} lets two writers create the same file (it ignores If-None-Match), so shards "
                "could be committed twice; use a store with conditional writes"
            )

    def _recover(self, *, alone: bool) -> None:
        """Complete commits that a killed driver left half done, or drop them, then remove files nobody will use."""
        commits = self.commits()
        while (lost := self._lost(commits.values())) and alone:
            for commit in lost:
                self.store.remove(record_name(commit.shard_id, commit.generation))
            commits = self.commits()  # the generation before may be whole
        if alone:
            self.store.remove_partials()
            self.store.remove_folder(PIECES)
        self._sweep(commits, alone=alone)

    def _lost(self, commits: Iterable[Commit]) -> list[Commit]:
        """The commits whose files are not there; those whose files wait for their names are helped along."""
        listed = self._listed()
        waiting = [c for c in commits if not listed.issuperset(name for name, _ in c.files())]
        return [commit for commit in waiting if not self._publish(commit, check=True)]

    def _listed(self) -> set[str]:
        return {file.name for folder in (SHARDS, ERRORS) for file in self.store.files(folder)}

    def _publish(self, commit: Commit, *, check: bool = False) -> bool:
        """Give a commit's files their final names; False if one is lost. Two drivers may do it at once."""
        present = True
        for final, sha256 in commit.files():
            waiting = attempt_name(final, commit.attempt)
            reach("publish_before")
            moved = (not check or self._holds((waiting, sha256))) and self.store.move(
                waiting, final
            )
            reach("publish_after")
            # looked at last: another driver may have moved it just now
            present &= moved or self.store.exists(final)
        return present

    def sweep(self) -> None:
        """Remove what nobody will read any more: attempts that lost, and files of older generations.

        A worker that still writes an attempt notices nothing, and its commit loses; see `commit`. Attempts at shards,
        or at generations, that are not committed stay: another driver may be about to commit them.
        """
        self._sweep(self.commits(), alone=False)

    def _sweep(self, commits: Mapping[int, Commit], *, alone: bool) -> None:
        # listed after the commits were read: what came in between is of a later commit, and stays
        stale = stale_files(self._listed(), commits, alone=alone)
        for _ in concurrently(self._remove_swept, stale):
            pass

    def _remove_swept(self, name: str) -> None:
        reach("sweep")
        self.store.remove(name)

    def commit(self, commit: Commit) -> bool:
        """Record a finished shard and give its files their names; False, and they are gone, if another was first.

        Raises:
            ArtifactError: The generation before is not committed.
            StorageError: The store cannot be written, or the attempt's files are not there.
        """
        reach("commit_before")
        won = self._create_record(commit)
        reach("commit_after")
        if won:
            self._publish(commit)
        else:
            for name in commit.attempt_files():
                self.store.remove(name)
        return won

    def _create_record(self, commit: Commit) -> bool:
        """Create the record; False if another attempt's is there, True if this attempt's is."""
        shard = (commit.shard_id, commit.generation)
        lost = [name for name in commit.attempt_files() if not self.store.exists(name)]
        if lost:  # published before, or removed because another won
            before = self._commit_of(shard)
            if before is None:
                raise StorageError(
                    f"{self.store.url(lost[0])} is gone, so shard {commit.shard_id} cannot be committed; "
                    "run the same command again"
                )
            return before.attempt == commit.attempt
        if commit.generation and self._commit_of((shard[0], shard[1] - 1)) is None:
            raise ArtifactError(
                f"shard {shard[0]} of {self.store.location} has no generation {shard[1] - 1}, so generation {shard[1]} "
                "cannot be committed; run the same command again"
            )
        return self.store.create(record_name(*shard), commit.to_json().encode())

    def require_complete(self, num_shards: int) -> dict[int, Commit]:
        """The commit records of a data set that has all its shards.

        A record whose files still wait for their names, because the driver that made it is between the two steps, is
        helped along.

        Raises:
            ArtifactError: Commit records or their files are missing; the shards are named.
            StorageError: A file cannot be given its name.
        """
        commits = self._require_records(num_shards)
        lost = [commit.shard_id for commit in self._lost(commits.values())]
        if lost:
            raise ArtifactError(
                f"{self.store.location}: the files of shards {lost[:10]} are gone, though they were committed; while "
                f"no other run is at work, {remake(lost[0], self.command)}"
            )
        return commits

    def finish(self, manifest: dict[str, Any]) -> None:
        """Remove what nobody will read, then write the manifest, the last file of all.

        Args:
            manifest: What the data set is; `num_shards` at least.

        Raises:
            ArtifactError: It would claim shards that are not there.
            StorageError: The store cannot be written.
        """
        commits = self.require_complete(manifest["num_shards"])
        self._sweep(commits, alone=False)
        self.store.remove_folder(PIECES)
        reach("manifest_before")
        self.store.write(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
        reach("manifest_after")
