"""The commit ledger of an embedding data set: which shards are done, provably, and what the run was.

A worker writes `.part-N.parquet.ATTEMPT`, flushes and hashes that file, and leaves it. The driver links the commit
record into place, which only one attempt can do; the winner's file then takes its final name and a loser's is removed.
So no late attempt can touch a committed shard. A driver killed in between leaves a record without a final file: the
next one completes it from the attempt it names, or drops the record. Readers follow commit records, never a listing.
"""

import fcntl
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from slq.artifacts import file_sha256, read_json, write_json
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError

MANIFEST = "manifest.json"
RUN = "run.json"
LOCK = "run.lock"
_ATTEMPT = re.compile(r"\.part-(\d+)\.parquet\.(\w+)")


@dataclass(frozen=True, slots=True)
class Commit:
    """What one finished shard holds.

    Attributes:
        attempt: Whose files these are.
        errors_sha256: Of the quarantine file; None where nothing was quarantined, or by an older version.
    """

    shard_id: int
    rows: int
    quarantined: int
    sha256: str
    bytes: int
    attempt: str
    errors_sha256: str | None = None


class Ledger:
    """The files of one embedding data set; as a context manager it lets its lock go at the end.

    Args:
        root: Its folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say that this driver is no longer at work; dying does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def shard_path(self, shard_id: int) -> Path:
        """The data file of a shard."""
        return self.root / "shards" / f"part-{shard_id:06d}.parquet"

    def errors_path(self, shard_id: int) -> Path:
        """The quarantined rows of a shard; there is none when all went well."""
        return self.root / "errors" / f"part-{shard_id:06d}.parquet"

    def _files(self, commit: Commit) -> list[tuple[Path, str]]:
        """The final files that a commit vouches for, and their sha256; the data file last."""
        errors, shard = self.errors_path(commit.shard_id), self.shard_path(commit.shard_id)
        found = [] if commit.errors_sha256 is None else [(errors, commit.errors_sha256)]
        return [*found, (shard, commit.sha256)]

    def _commit_path(self, shard_id: int) -> Path:
        return self.root / "commits" / f"{shard_id:06d}.json"

    def begin(self, identity: dict[str, Any]) -> None:
        """Open the data set for a run, or go on with it; what a killed driver left is completed or removed.

        Args:
            identity: What the content depends on: input, plan, fingerprint, output settings.

        Raises:
            ArtifactMismatchError: The folder was begun with another identity; the differences are named.
            StorageError: The folder cannot be written.
        """
        try:
            for name in ("shards", "commits", "errors"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written: {error}; free space or choose another folder"
            ) from None
        alone = self._take_lock()
        self._require_same(identity)
        try:
            self._recover(alone=alone)
        except OSError as error:
            raise StorageError(f"{self.root} cannot be put in order: {error}") from None
        finally:
            self._share_lock()

    def _require_same(self, identity: dict[str, Any]) -> None:
        path = self.root / RUN
        if path.is_file():
            before = read_json(path)
            changed = [
                f"{key}: {before.get(key)!r} -> {identity.get(key)!r}"
                for key in sorted(before.keys() | identity.keys())
                if before.get(key) != identity.get(key)
            ]
            if changed:
                raise ArtifactMismatchError(
                    f"{self.root} was begun with other settings ({'; '.join(changed)}); "
                    "use the old ones or another storage.dir"
                )
            return
        write_json(path, identity)

    def _take_lock(self) -> bool:
        """Note this driver as live; True if no other one is. Waits while another puts the folder in order.

        The kernel drops the lock with the process. Where a file system knows no locks nobody is ever alone, and
        nothing that a live driver may still need is removed.
        """
        try:
            if self._lock is None:
                self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._share_lock()  # not before it is done: it removes every partial file, also one begun just now
            return False
        except OSError:
            return False
        return True

    def _share_lock(self) -> None:
        """Let other drivers work too, but none of them be alone."""
        if self._lock is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            except OSError:
                self.close()

    def _recover(self, *, alone: bool) -> None:
        """Complete or drop commits that a killed driver left half done, then remove files nobody will use."""
        for commit in self.commits().values():
            if not self._publish(commit, check=True) and alone:
                self._commit_path(commit.shard_id).unlink(missing_ok=True)
        if alone:
            for path in [*(self.root / "commits").glob(".*"), *self.root.glob(".*.partial")]:
                path.unlink(missing_ok=True)
        self.sweep(alone=alone)

    def _publish(self, commit: Commit, *, check: bool = False) -> bool:
        """Give a commit's files their final names; False if one is lost. Two drivers may do it at once."""
        present, moved = True, False
        for final, sha256 in self._files(commit):
            mine = attempt_path(final, commit.attempt)
            if check and (final.is_file() or not mine.is_file() or file_sha256(mine) != sha256):
                present &= (
                    final.is_file()
                )  # looked at last: another driver may have moved it just now
                continue
            try:
                mine.replace(final)
                moved = True
            except FileNotFoundError:
                present &= final.is_file()
        if moved:
            for folder in ("errors", "shards"):
                sync_folder(self.root / folder)
        return present

    def sweep(self, *, alone: bool = False) -> None:
        """Remove attempt files that lost: those of committed shards, and with no other driver alive all of them.

        A worker that still writes one notices nothing, and its commit loses; see `commit`.
        """
        winners = {n: commit.attempt for n, commit in self.commits().items()}
        for path in [*(self.root / "shards").glob(".*"), *(self.root / "errors").glob(".*")]:
            name = _ATTEMPT.fullmatch(path.name)
            if name is None:
                continue
            winner = winners.get(int(name[1]))
            if winner != name[2] and (winner is not None or alone):
                path.unlink(missing_ok=True)

    def commits(self) -> dict[int, Commit]:
        """All commit records by shard id."""
        records = {}
        for path in sorted((self.root / "commits").glob("[0-9]*.json")):
            commit = Commit(**read_json(path))
            records[commit.shard_id] = commit
        return records

    def commit(self, commit: Commit) -> bool:
        """Record a finished shard and give its files their names; False, and they are gone, if another was first.

        Raises:
            StorageError: The record cannot be written, or the attempt's files are not there.
        """
        path = self._commit_path(commit.shard_id)
        try:
            won = self._link(commit, path)
            if won:
                sync_folder(path.parent)
                self._publish(commit)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error}; free space and run the same command again"
            ) from None
        if not won:
            for final, _ in self._files(commit):
                attempt_path(final, commit.attempt).unlink(missing_ok=True)
        return won

    def _link(self, commit: Commit, path: Path) -> bool:
        """Link the record into place; False if another attempt's is there, True if this attempt's is."""
        files = [attempt_path(final, commit.attempt) for final, _ in self._files(commit)]
        lost = [file for file in files if not file.is_file()]
        if path.exists():
            return bool(read_json(path)["attempt"] == commit.attempt)
        if lost:
            raise FileNotFoundError(f"attempt file {lost[0]} is gone")
        partial = path.with_name(f".{path.name}.{commit.attempt}")
        try:
            with partial.open("w") as file:
                json.dump(asdict(commit), file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)  # fails if the record exists: one winner
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        return True

    def require_complete(self, num_shards: int) -> dict[int, Commit]:
        """The commit records of a data set that has all its shards.

        A record whose files still wait for their names, because the driver that linked it is between the two steps, is
        helped along.

        Raises:
            ArtifactError: Commit records or their files are missing; the shards are named.
            StorageError: A file cannot be given its name.
        """
        commits = self.commits()
        missing = [n for n in range(num_shards) if n not in commits]
        try:
            missing += [n for n, commit in commits.items() if not self._publish(commit, check=True)]
        except OSError as error:
            raise StorageError(f"{self.root} cannot be completed: {error}") from None
        if missing or len(commits) != num_shards:
            raise ArtifactError(
                f"{self.root} has {len(commits)} commit records for {num_shards} shards, and shards "
                f"{missing[:10]} are missing; run the same command again while no other run is at work"
            )
        return commits

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, the last file of all.

        Raises:
            ArtifactError: It would claim shards that are not there.
        """
        self.require_complete(manifest["num_shards"])
        write_json(self.root / MANIFEST, manifest)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished data set, or None."""
        path = self.root / MANIFEST
        if not path.is_file():
            return None
        manifest: dict[str, Any] = read_json(path)
        return manifest

    def verified_shards(self) -> list[Path]:
        """Shard files in order, each checked against its commit record.

        Raises:
            ArtifactError: The data set is unfinished, or a shard is missing or damaged; the shard is named.
        """
        manifest = self.manifest()
        if manifest is None:
            raise ArtifactError(
                f"{self.root} is no finished embedding data set; run `slq embed` first"
            )
        commits = self.commits()
        if len(commits) != manifest["num_shards"]:
            raise ArtifactError(
                f"{self.root} has {len(commits)} commit records, but its manifest names "
                f"{manifest['num_shards']} shards; run `slq embed` again"
            )
        paths = []
        for shard_id, commit in commits.items():
            path = self.shard_path(shard_id)
            if not path.is_file() or file_sha256(path) != commit.sha256:
                raise ArtifactError(
                    f"shard {path} does not match its commit record; delete {path.name}'s commit record "
                    "and manifest.json, and run `slq embed` again"
                )
            paths.append(path)
        return paths


def attempt_path(final: Path, attempt: str) -> Path:
    """Where an attempt writes what may become `final`."""
    return final.with_name(f".{final.name}.{attempt}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a file's own fsync does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def new_attempt() -> str:
    """A name for one attempt at a shard."""
    return uuid.uuid4().hex[:12]
