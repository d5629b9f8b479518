"""Committed shards of an embedding data set as what an index is built from."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit, shard_name
from pipelines.ledger_reader import LedgerReader
from slq.errors import ArtifactError
from slq.index import Content
from slq.index.building import part_rows
from slq.index.versions import CANARY

_BATCH_ROWS = 16_384
_OTHER_VECTORS = "embedding_"
_NOT_STORED = ("shard_id", "row_in_shard")


@dataclass(frozen=True)
class CommittedShards:
    """The rows of some shards, as a source of an index. Whoever reads them checks the files against their records.

    Attributes:
        location: Of the data set.
        commits: The shards' records, in order.
        retry_s: How long failures of an object store are tried again.
    """

    location: str
    commits: tuple[Commit, ...]
    retry_s: float

    @property
    def num_rows(self) -> int:
        """That were not quarantined."""
        return sum(commit.rows for commit in self.commits)

    def tables(self) -> Iterator[pa.Table]:
        """Rows with `id`, `embedding` and what is stored of them, some thousand at a time.

        Raises:
            ArtifactError: A file is missing or is not what was committed; it is named.
            StorageError: It cannot be read.
        """
        reader = LedgerReader(self.location, self.retry_s)
        for commit in self.commits:
            reader.require_shard(commit)
            name = shard_name(commit.shard_id, commit.generation)
            with reader.store.open(name) as file:
                shard = pq.ParquetFile(file)
                kept = [
                    column
                    for column in shard.schema_arrow.names
                    if not column.startswith(_OTHER_VECTORS) and column not in _NOT_STORED
                ]
                for batch in shard.iter_batches(_BATCH_ROWS, columns=kept):
                    yield pa.table(batch)


@dataclass(frozen=True)
class Embeddings:
    """A finished embedding data set.

    Attributes:
        shards: Those that hold rows, in order.
        dimension: Length of a vector.
        fingerprint: Of the embedding space.
        state: What it holds, for manifests.
        canary: Its file of items to try an encoder on, if there is one.
    """

    shards: CommittedShards
    dimension: int
    fingerprint: str
    state: dict[str, str]
    canary: bytes | None = None

    @property
    def num_rows(self) -> int:
        """Of all shards."""
        return self.shards.num_rows

    def content(self, **origin: Any) -> Content:
        """What an index is built from.

        Args:
            origin: What else its manifest tells of where the vectors came from.
        """
        told = {"embeddings": [self.state], **origin}
        return Content(self.sources(), self.dimension, self.fingerprint, told, self.canary)

    def sources(self) -> list[CommittedShards]:
        """The shards, joined to parts of an index."""
        found: list[CommittedShards] = []
        wanted = part_rows(self.num_rows)
        for commit in self.shards.commits:
            if found and found[-1].num_rows < wanted:
                found[-1] = replace(found[-1], commits=(*found[-1].commits, commit))
            else:
                found.append(replace(self.shards, commits=(commit,)))
        return found


def open_embeddings(location: str, retry_s: float) -> Embeddings:
    """A data set by its commit records; its files are checked where they are read.

    Raises:
        ArtifactError: It is unfinished or empty.
        StorageError: It cannot be read.
    """
    reader = LedgerReader(location, retry_s)
    commits = reader.required_commits()
    manifest: dict[str, Any] = reader.manifest() or {}
    if not manifest["num_rows"]:
        raise ArtifactError(f"{location} holds no rows: every item was quarantined")
    return Embeddings(
        CommittedShards(location, tuple(commit for commit in commits if commit.rows), retry_s),
        int(manifest["dimension"]),
        str(manifest["fingerprint"]),
        _state(reader.store.location, commits),
        _canary(reader),
    )


def _canary(reader: LedgerReader) -> bytes | None:
    try:
        return reader.store.read(CANARY)
    except FileNotFoundError:
        return None


def _state(location: str, commits: Sequence[Commit]) -> dict[str, str]:
    """What a data set holds now, told by its commit records alone."""
    digest = hashlib.sha256()
    for commit in commits:
        name = shard_name(commit.shard_id, commit.generation)
        digest.update(f"{name} {commit.sha256}\n".encode())
    return {"location": location, "sha256": digest.hexdigest()}
