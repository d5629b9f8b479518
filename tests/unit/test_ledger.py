"""The commit ledger: one winner per shard, another run is refused, damage is found and named."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.ledger import LOCK, RUN, Commit, Ledger, attempt_path, new_attempt
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from slq.files import file_sha256

IDENTITY = {"fingerprint": "3f2a", "corpus": "c.parquet", "shard_rows": 8}


def written(ledger: Ledger, shard_id: int, content: bytes = b"vectors") -> Commit:
    """An attempt as a worker leaves it: one quarantined row, nothing under a final name."""
    attempt, digests = new_attempt(), []
    for final in (ledger.shard_path(shard_id), ledger.errors_path(shard_id)):
        path = attempt_path(final, attempt)
        path.write_bytes(content)
        digests.append(file_sha256(path))
    return Commit(shard_id, 7, 1, digests[0], len(content), attempt, digests[1])


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "embeddings") as ledger:
        ledger.begin(IDENTITY)
        yield ledger


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def names(ledger: Ledger) -> set[str]:
    """Every file but those of the run itself."""
    return files(ledger.root).keys() - {LOCK, RUN}


def published(shard_id: int) -> set[str]:
    part = f"part-{shard_id:06d}.parquet"
    return {f"shards/{part}", f"errors/{part}", f"commits/{shard_id:06d}.json"}


def test_a_shard_is_committed_once_and_the_first_attempt_stays(ledger: Ledger) -> None:
    first = written(ledger, 3)
    assert not ledger.shard_path(3).exists()
    assert ledger.commit(first)
    assert names(ledger) == published(3)
    before = files(ledger.root)
    zombie = written(ledger, 3, b"other vectors")
    assert not ledger.commit(zombie)
    assert files(ledger.root) == before
    assert ledger.commits() == {3: first}
    assert ledger.commit(first)  # told twice, done once
    assert files(ledger.root) == before


def test_an_attempt_whose_file_is_gone_leaves_no_record(ledger: Ledger) -> None:
    commit = written(ledger, 0)
    attempt_path(ledger.shard_path(0), commit.attempt).unlink()
    with pytest.raises(StorageError, match=r"is gone; free space and run the same command again"):
        ledger.commit(commit)
    assert ledger.commits() == {}


def again(ledger: Ledger) -> Ledger:
    """The next driver, after the first one died: the kernel gave its lock back."""
    ledger.close()
    ledger.begin(IDENTITY)
    return ledger


def _die_before_the_file_gets_its_name(root: str, commit: Commit, final_renames: int) -> None:
    genuine, left = Path.replace, [final_renames]

    def replace_or_die(path: Path, target: Path) -> Path:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return genuine(path, target)

    Path.replace = replace_or_die  # type: ignore[method-assign]
    Ledger(Path(root)).commit(commit)


@pytest.mark.parametrize("final_renames", [0, 1])
def test_a_driver_killed_after_the_record_is_completed_by_the_next(
    ledger: Ledger, final_renames: int
) -> None:
    commit = written(ledger, 0)
    arguments = (str(ledger.root), commit, final_renames)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_die_before_the_file_gets_its_name, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert ledger.commits() == {0: commit}
    assert not ledger.shard_path(0).exists()
    again(ledger)
    assert names(ledger) == published(0)
    assert file_sha256(ledger.shard_path(0)) == commit.sha256
    assert file_sha256(ledger.errors_path(0)) == commit.errors_sha256


@pytest.mark.parametrize("damage", ["gone", "torn"])
@pytest.mark.parametrize("part", ["shard", "errors"])
def test_a_record_whose_attempt_is_lost_is_dropped(ledger: Ledger, damage: str, part: str) -> None:
    kept, lost = written(ledger, 0), written(ledger, 1)
    ledger.commit(kept)
    ledger.commit(lost)
    finals = {"shard": ledger.shard_path(1), "errors": ledger.errors_path(1)}
    for final in finals.values():  # as if its driver had died before the renames
        final.rename(attempt_path(final, lost.attempt))
    path = attempt_path(finals[part], lost.attempt)
    path.unlink() if damage == "gone" else path.write_bytes(b"vec")
    again(ledger)
    assert ledger.commits() == {0: kept}
    assert not [name for name in names(ledger) if "/." in name]
    assert ledger.commit(written(ledger, 1))
    assert names(ledger) == published(0) | published(1)


def test_what_dead_attempts_left_is_removed_by_the_next_driver(ledger: Ledger) -> None:
    ledger.commit(written(ledger, 0))
    written(ledger, 0)
    written(ledger, 1)
    (ledger.root / "commits" / ".000001.json.abc").write_text("{")
    assert names(again(ledger)) == published(0)


def test_a_second_driver_removes_nothing_that_the_first_may_still_commit(ledger: Ledger) -> None:
    won, pending = written(ledger, 0), written(ledger, 1)
    ledger.commit(won)
    late = written(ledger, 0, b"late")
    with Ledger(ledger.root) as second:
        second.begin(IDENTITY)
        assert not attempt_path(ledger.shard_path(0), late.attempt).exists()
        assert not ledger.commit(late)
        assert ledger.commit(pending)
    assert names(ledger) == published(0) | published(1)


def test_a_record_in_the_making_by_a_live_driver_is_not_dropped(ledger: Ledger) -> None:
    commit = written(ledger, 0)
    ledger.commit(commit)
    ledger.shard_path(0).unlink()
    with Ledger(ledger.root) as second:
        second.begin(IDENTITY)
        assert second.commits() == {0: commit}
        with pytest.raises(ArtifactError, match=r"shards \[0\] are missing; run the same command"):
            second.finish({"num_shards": 1})


def test_a_record_of_another_driver_that_waits_for_its_files_is_helped_along(
    ledger: Ledger,
) -> None:
    commit = written(ledger, 0)
    ledger.commit(commit)
    for final in (ledger.shard_path(0), ledger.errors_path(0)):
        final.rename(attempt_path(final, commit.attempt))  # linked, and not yet at the renames
    assert ledger.require_complete(1) == {0: commit}
    assert names(ledger) == published(0)


def test_a_driver_waits_while_another_puts_the_folder_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is alone removes every partial file: one that a second driver has begun would be among them."""
    with Ledger(tmp_path / "e") as first, Ledger(tmp_path / "e") as second:
        other = threading.Thread(target=second.begin, args=(IDENTITY,))
        touched: list[bool] = []

        def start_the_other(identity: dict[str, Any]) -> None:
            other.start()
            other.join(0.5)
            touched.append((first.root / RUN).exists())
            genuine(identity)

        genuine = first._require_same
        monkeypatch.setattr(first, "_require_same", start_the_other)
        first.begin(IDENTITY)
        other.join()
        assert touched == [False]
        assert second.commits() == {}


def test_a_manifest_never_claims_shards_that_are_not_there(ledger: Ledger) -> None:
    for shard_id in (0, 2):
        ledger.commit(written(ledger, shard_id))
    with pytest.raises(ArtifactError, match=r"2 commit records for 3 shards, and shards \[1\]"):
        ledger.finish({"num_shards": 3})
    assert ledger.manifest() is None


def _race(root: str, commit: Commit, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put((commit.attempt, Ledger(Path(root)).commit(commit)))


def test_of_many_processes_that_commit_one_shard_exactly_one_wins(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    for shard_id in range(5):
        barrier, results = context.Barrier(6), context.Queue()
        attempts = [written(ledger, shard_id, f"vectors {n}".encode()) for n in range(6)]
        workers = [
            context.Process(target=_race, args=(str(ledger.root), attempt, barrier, results))
            for attempt in attempts
        ]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=30) for _ in workers]
        for worker in workers:
            worker.join()
        winners = [attempt for attempt, won in found if won]
        assert len(winners) == 1
        commit = ledger.commits()[shard_id]
        assert commit.attempt == winners[0]
        assert file_sha256(ledger.shard_path(shard_id)) == commit.sha256
        assert file_sha256(ledger.errors_path(shard_id)) == commit.errors_sha256
    assert names(ledger) == set().union(*(published(n) for n in range(5)))


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
