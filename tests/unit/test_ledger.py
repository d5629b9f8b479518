"""The commit ledger: one winner per shard, another run is refused, damage is found and named."""

import errno
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.ledger import Commit, Ledger, new_attempt
from slq.artifacts import file_sha256
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError

IDENTITY = {"fingerprint": "3f2a", "corpus": "c.parquet", "shard_rows": 8}


def written(ledger: Ledger, shard_id: int, content: bytes = b"vectors") -> Commit:
    path = ledger.shard_path(shard_id)
    path.write_bytes(content)
    return Commit(shard_id, 8, 0, file_sha256(path), len(content), new_attempt())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "embeddings")
    ledger.begin(IDENTITY)
    return ledger


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_shard_is_committed_once_and_the_first_attempt_stays(ledger: Ledger) -> None:
    first = written(ledger, 3)
    assert ledger.commit(first)
    before = files(ledger.root)
    assert not ledger.commit(replace(first, rows=1, attempt=new_attempt()))
    assert files(ledger.root) == before
    assert ledger.commits() == {3: first}


def _race(root: str, attempt: int, barrier: Any, results: Any) -> None:
    commit = Commit(0, attempt, 0, "sha", 1, f"attempt{attempt}")
    barrier.wait()
    results.put((attempt, Ledger(Path(root)).commit(commit)))


def test_of_many_processes_that_commit_one_shard_exactly_one_wins(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        for path in (ledger.root / "commits").iterdir():
            path.unlink()
        barrier, results = context.Barrier(6), context.Queue()
        workers = [
            context.Process(target=_race, args=(str(ledger.root), n, barrier, results))
            for n in range(6)
        ]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=30) for _ in workers]
        for worker in workers:
            worker.join()
        winners = [attempt for attempt, won in found if won]
        assert len(winners) == 1
        assert ledger.commits()[0].rows == winners[0]
        assert [path.name for path in (ledger.root / "commits").iterdir()] == ["000000.json"]


def test_the_same_run_may_go_on_and_another_is_refused_with_the_difference(ledger: Ledger) -> None:
    ledger.begin(dict(IDENTITY))
    with pytest.raises(ArtifactMismatchError) as caught:
        ledger.begin({**IDENTITY, "fingerprint": "91bc", "batch_size": 4})
    text = str(caught.value)
    assert "fingerprint: '3f2a' -> '91bc'" in text
    assert "batch_size: None -> 4" in text
    assert "shard_rows" not in text
    assert "another storage.dir" in text


def test_an_unfinished_data_set_is_refused(ledger: Ledger) -> None:
    ledger.commit(written(ledger, 0))
    assert ledger.manifest() is None
    with pytest.raises(ArtifactError, match=r"no finished embedding data set; run `slq embed`"):
        ledger.verified_shards()


def test_a_finished_data_set_gives_its_shards_in_order(ledger: Ledger) -> None:
    for shard_id in (2, 0, 1):
        ledger.commit(written(ledger, shard_id, bytes([shard_id])))
    (ledger.root / "shards" / "part-000009.parquet").write_bytes(b"never committed")
    ledger.finish({"num_shards": 3})
    assert ledger.manifest() == {"num_shards": 3}
    assert [path.read_bytes() for path in ledger.verified_shards()] == [b"\0", b"\1", b"\2"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_named(ledger: Ledger, damage: str) -> None:
    for shard_id in (0, 1):
        ledger.commit(written(ledger, shard_id))
    ledger.finish({"num_shards": 2})
    path = ledger.shard_path(1)
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "flip" else b""))
    with pytest.raises(ArtifactError, match=r"part-000001\.parquet does not match its commit"):
        ledger.verified_shards()


def test_a_commit_record_that_was_lost_is_noticed(ledger: Ledger) -> None:
    for shard_id in (0, 1):
        ledger.commit(written(ledger, shard_id))
    ledger.finish({"num_shards": 2})
    (ledger.root / "commits" / "000001.json").unlink()
    with pytest.raises(ArtifactError):
        ledger.verified_shards()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_visible(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = written(ledger, 0)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StorageError, match=r"No space left.*free space and run the same"):
            ledger.commit(commit)
    assert ledger.commits() == {}
    assert not list((ledger.root / "commits").iterdir())
    assert ledger.commit(commit)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        Ledger(tmp_path / "file" / "embeddings").begin(IDENTITY)


def test_attempts_have_names_of_their_own() -> None:
    assert len({new_attempt() for _ in range(100)}) == 100
