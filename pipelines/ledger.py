"""The commit ledger of an embedding data set: which shards are done, provably, and what the run was.

A shard's bytes go to a temporary name, are flushed and hashed, and take their final name; then a commit record is
linked into place, which only one attempt can do. Readers follow commit records, never a listing of files.
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slq.artifacts import file_sha256, read_json, write_json
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError

MANIFEST = "manifest.json"
RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Commit:
    """What one finished shard holds."""

    shard_id: int
    rows: int
    quarantined: int
    sha256: str
    bytes: int
    attempt: str


class Ledger:
    """The files of one embedding data set.

    Args:
        root: Its folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def shard_path(self, shard_id: int) -> Path:
        """The data file of a shard."""
        return self.root / "shards" / f"part-{shard_id:06d}.parquet"

    def errors_path(self, shard_id: int) -> Path:
        """The quarantined rows of a shard; there is none when all went well."""
        return self.root / "errors" / f"part-{shard_id:06d}.parquet"

    def _commit_path(self, shard_id: int) -> Path:
        return self.root / "commits" / f"{shard_id:06d}.json"

    def begin(self, identity: dict[str, Any]) -> None:
        """Open the data set for a run, or go on with it.

        Args:
            identity: What the content depends on: input, plan, fingerprint, output settings.

        Raises:
            ArtifactMismatchError: The folder was begun with another identity; the differences are named.
            StorageError: The folder cannot be written.
        """
        path = self.root / RUN
        try:
            for name in ("shards", "commits", "errors"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written: {error}; free space or choose another folder"
            ) from None
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

    def commits(self) -> dict[int, Commit]:
        """All commit records by shard id."""
        records = {}
        for path in sorted((self.root / "commits").glob("[0-9]*.json")):
            commit = Commit(**read_json(path))
            records[commit.shard_id] = commit
        return records

    def commit(self, commit: Commit) -> bool:
        """Record a finished shard; False if another attempt was first.

        Raises:
            StorageError: The record cannot be written.
        """
        path = self._commit_path(commit.shard_id)
        partial = path.with_name(f".{path.name}.{commit.attempt}")
        try:
            with partial.open("w") as file:
                json.dump(asdict(commit), file, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            os.link(partial, path)  # fails if the record exists: one winner
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error}; free space and run the same command again"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return True

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, the last file of all."""
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


def new_attempt() -> str:
    """A name for one attempt at a shard."""
    return uuid.uuid4().hex[:12]
