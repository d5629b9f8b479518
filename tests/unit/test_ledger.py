"""The commit ledger, on a disk and in S3: one winner per shard, another run is refused, damage is found and named."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from pipelines.commits import (
    Commit,
    attempt_name,
    errors_name,
    new_attempt,
    record_name,
    shard_name,
)
from pipelines.failpoints import VARIABLE
from pipelines.ledger import LOCK, MANIFEST, RUN, Ledger
from pipelines.ledger_reader import LedgerReader, remake
from pipelines.storage import LocalStore, ObjectStore, Store, concurrently
from slq.errors import ArtifactError, ArtifactMismatchError, StorageError
from tests.faulty_store import faulty_store
from tests.ledger_driver import IDENTITY, contents, drive, written


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a data set may be, in a store of either kind."""
    if request.param == "disk":
        return str(tmp_path / "embeddings")
    return f"s3://{request.getfixturevalue('object_store')}/embeddings"


@pytest.fixture
def ledger(root: str) -> Iterator[Ledger]:
    with Ledger(root) as ledger:
        ledger.begin(IDENTITY)
        yield ledger


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger for what only a disk knows: being alone, and files that tear."""
    with Ledger(tmp_path / "embeddings") as ledger:
        ledger.begin(IDENTITY)
        yield ledger


def files(store: Store) -> dict[str, bytes]:
    """Every file but those of the run itself."""
    return {f.name: store.read(f.name) for f in store.files() if f.name not in (LOCK, RUN)}


def names(ledger: Ledger) -> set[str]:
    return files(ledger.store).keys()


def published(*shard_ids: int, generation: int = 0) -> set[str]:
    found = {name for n in shard_ids for name in contents(n, generation)}
    return found | {record_name(n, g) for n in shard_ids for g in range(generation + 1)}


def test_the_names_of_a_generation() -> None:
    assert shard_name(123) == "shards/part-000123.parquet"
    assert shard_name(123, 2) == "shards/part-000123.2.parquet"
    assert errors_name(123) == "errors/part-000123.parquet"
    assert errors_name(123, 1) == "errors/part-000123.1.parquet"
    assert record_name(123) == "commits/000123.json"
    assert record_name(123, 1) == "commits/000123.1.json"
    assert attempt_name(shard_name(1234567, 1), "abc") == "shards/.part-1234567.1.parquet.abc"


def test_a_shard_is_committed_once_and_the_first_attempt_stays(ledger: Ledger) -> None:
    first = written(ledger, 3)
    assert not ledger.store.exists(shard_name(3))
    assert ledger.commit(first)
    assert names(ledger) == published(3)
    before = files(ledger.store)
    zombie = written(ledger, 3, prefix=b"other ")
    assert not ledger.commit(zombie)
    assert files(ledger.store) == before
    assert ledger.commits() == {3: first}
    assert ledger.commit(first)  # told twice, done once
    assert not ledger.commit(zombie)
    assert files(ledger.store) == before


@pytest.mark.parametrize("name", [shard_name(0), errors_name(0)])
def test_an_attempt_whose_file_is_gone_leaves_no_record(ledger: Ledger, name: str) -> None:
    commit = written(ledger, 0)
    ledger.store.remove(attempt_name(name, commit.attempt))
    with pytest.raises(
        StorageError,
        match=rf"/embeddings/\w+/\.part-000000\.parquet\.{commit.attempt} is gone, so shard 0 cannot be committed; run",
    ):
        ledger.commit(commit)
    assert ledger.commits() == {}


def test_a_record_of_an_older_version_has_no_generation(ledger: Ledger) -> None:
    record = json.loads(written(ledger, 0).to_json())
    del record["generation"], record["errors_sha256"]
    ledger.store.write(record_name(0), json.dumps(record).encode())
    assert ledger.commits() == {0: Commit(**record)}
    assert ledger.commits()[0].generation == 0


def again(ledger: Ledger) -> Ledger:
    """The next driver, after the first one died: the kernel gave its lock back."""
    ledger.close()
    ledger.begin(IDENTITY)
    return ledger


# drivers that are killed


def kill_at(failpoint: str, root: str, num_shards: int, generation: int) -> None:
    """Let a driver run in a process of its own until it is killed there."""
    killed = subprocess.run(
        [sys.executable, "-m", "tests.ledger_driver", root, str(num_shards), str(generation)],
        env={**os.environ, VARIABLE: failpoint, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def require_every_shard_whole(ledger: Ledger, num_shards: int) -> None:
    """Each shard has a generation whose files can be read, or wait for their names."""
    found = files(ledger.store)
    for shard_id in range(num_shards):
        latest = ledger.commits()[shard_id]
        wanted = contents(shard_id, latest.generation)
        waiting = {name: attempt_name(name, latest.attempt) for name in wanted}
        got = {name: found.get(name, found.get(waiting[name])) for name in wanted}
        assert got == wanted


def require_finished(root: str, num_shards: int, generation: int) -> None:
    """The data set is what an undisturbed driver makes, to the file and to the byte."""
    with Ledger(root) as ledger:
        found = files(ledger.store)
        wanted = {k: v for n in range(num_shards) for k, v in contents(n, generation).items()}
        assert found.keys() == published(*range(num_shards), generation=generation) | {MANIFEST}
        assert wanted.items() <= found.items()
        assert ledger.manifest() == {"num_shards": num_shards, "generation": generation}
        shards = [shard_name(n, generation) for n in range(num_shards)]
        assert ledger.verified_shards() == LedgerReader(root).verified_shards() == shards


KILLS = [
    "commit_before:2",
    "commit_after:2",
    "publish_before:3",  # the errors file of the second shard
    "publish_after:3",
    "publish_before:4",  # its data file
    "publish_after:4",
    "manifest_before",
    "manifest_after",
]


@pytest.mark.parametrize("failpoint", KILLS)
def test_a_killed_driver_leaves_what_the_next_one_finishes(tmp_path: Path, failpoint: str) -> None:
    kill_and_finish(str(tmp_path / "embeddings"), failpoint)


@pytest.mark.parametrize("failpoint", ["commit_after:2", "publish_after:3", "manifest_before"])
def test_a_killed_driver_leaves_in_s3_what_the_next_one_finishes(
    object_store: str, failpoint: str
) -> None:
    kill_and_finish(f"s3://{object_store}/embeddings", failpoint)


def kill_and_finish(root: str, failpoint: str) -> None:
    kill_at(failpoint, root, 3, 0)
    with Ledger(root) as ledger:
        done = {n: files(ledger.store).get(shard_name(n)) for n in ledger.commits()}
    drive(root, 3)
    require_finished(root, 3, 0)
    with Ledger(root) as ledger:
        kept = {n: ledger.store.read(shard_name(n)) for n in done}
        assert all(before in (None, kept[n]) for n, before in done.items())


LATER_KILLS = [
    "commit_before:2",
    "commit_after:2",
    "publish_before:2",
    "publish_after:2",
    "sweep",
    "sweep:3",
    "sweep:6",
    "manifest_before",
    "manifest_after",
]


@pytest.mark.parametrize("failpoint", LATER_KILLS)
def test_a_driver_killed_in_a_later_generation_loses_no_shard(
    tmp_path: Path, failpoint: str
) -> None:
    kill_a_retry_and_finish(str(tmp_path / "embeddings"), failpoint)


@pytest.mark.parametrize("failpoint", ["commit_after:2", "publish_before:2", "sweep:3"])
def test_a_driver_killed_in_a_later_generation_loses_no_shard_in_s3(
    object_store: str, failpoint: str
) -> None:
    kill_a_retry_and_finish(f"s3://{object_store}/embeddings", failpoint)


def kill_a_retry_and_finish(root: str, failpoint: str) -> None:
    drive(root, 3)
    require_finished(root, 3, 0)
    kill_at(failpoint, root, 3, 1)
    with Ledger(root) as ledger:
        require_every_shard_whole(ledger, 3)
    drive(root, 3, 1)
    require_finished(root, 3, 1)


def test_a_move_cut_in_half_is_completed(object_store: str) -> None:
    """In an object store a move is a copy and a removal."""
    root = f"s3://{object_store}/embeddings"
    drive(root, 2)
    with Ledger(root) as ledger:
        attempt = ledger.commits()[1].attempt
        data = ledger.store.read(shard_name(1))
        ledger.store.write(attempt_name(shard_name(1), attempt), data)
    drive(root, 2)
    require_finished(root, 2, 0)


@pytest.mark.parametrize("damage", ["gone", "torn"])
@pytest.mark.parametrize("part", [shard_name(1), errors_name(1)])
def test_a_record_whose_attempt_is_lost_is_dropped(on_disk: Ledger, damage: str, part: str) -> None:
    kept, lost = written(on_disk, 0), written(on_disk, 1)
    on_disk.commit(kept)
    on_disk.commit(lost)
    for final in contents(1, 0):  # as if its driver had died before the renames
        on_disk.store.move(final, attempt_name(final, lost.attempt))
    waiting = attempt_name(part, lost.attempt)
    on_disk.store.remove(waiting) if damage == "gone" else on_disk.store.write(waiting, b"vec")
    again(on_disk)
    assert on_disk.commits() == {0: kept}
    assert not [name for name in names(on_disk) if "/." in name]
    assert on_disk.commit(written(on_disk, 1))
    assert names(on_disk) == published(0, 1)


def test_what_dead_attempts_left_is_removed_by_the_next_driver(on_disk: Ledger) -> None:
    on_disk.commit(written(on_disk, 0))
    written(on_disk, 0)
    written(on_disk, 0, 1)
    written(on_disk, 1)
    on_disk.store.write("pieces/run/000001-0.arrow", b"piece")
    assert isinstance(on_disk.store, LocalStore)
    partial = on_disk.store.path("commits/.000001.json.abc.partial")
    partial.write_text("{")
    assert names(again(on_disk)) == published(0)
    assert not partial.exists()


def test_finishing_removes_what_dead_attempts_left(ledger: Ledger) -> None:
    for shard_id in range(2):
        written(ledger, shard_id)
        ledger.commit(written(ledger, shard_id))
        ledger.store.write(f"pieces/run/{shard_id}", b"piece")
    ledger.finish({"num_shards": 2})
    assert names(ledger) == published(0, 1) | {MANIFEST}


# drivers beside each other


def test_a_second_driver_removes_nothing_that_the_first_may_still_commit(
    ledger: Ledger, root: str
) -> None:
    won, pending, retried = written(ledger, 0), written(ledger, 1), written(ledger, 0, 1)
    ledger.commit(won)
    late = written(ledger, 0, prefix=b"late ")
    ledger.store.write("pieces/run/1", b"piece")
    with Ledger(root) as second:
        second.begin(IDENTITY)
        assert not ledger.store.exists(attempt_name(shard_name(0), late.attempt))
        assert ledger.store.exists("pieces/run/1")
        assert not ledger.commit(late)
        assert ledger.commit(pending)
        assert ledger.commit(retried)
    ledger.finish({"num_shards": 2})
    wanted = published(0, generation=1) | published(1) | {MANIFEST}
    assert names(ledger) == wanted


def test_a_record_in_the_making_by_a_live_driver_is_not_dropped(ledger: Ledger, root: str) -> None:
    commit = written(ledger, 0)
    ledger.commit(commit)
    ledger.store.remove(shard_name(0))
    with Ledger(root) as second:
        second.begin(IDENTITY)
        assert second.commits() == {0: commit}
        with pytest.raises(
            ArtifactError,
            match=r"files of shards \[0\] are gone, though they were committed; while no other run is at work, "
            r"delete commits/000000\*\.json, shards/part-000000\*\.parquet, errors/part-000000\*\.parquet and "
            r"manifest\.json, and run `slq embed` again",
        ):
            second.finish({"num_shards": 1})


def test_a_record_of_another_driver_that_waits_for_its_files_is_helped_along(
    ledger: Ledger,
) -> None:
    commit = written(ledger, 0)
    ledger.commit(commit)
    for final in contents(0, 0):
        ledger.store.move(final, attempt_name(final, commit.attempt))  # not yet at the renames
    assert ledger.require_complete(1) == {0: commit}
    assert names(ledger) == published(0)


def test_a_file_that_another_driver_moved_after_the_listing_is_not_lost(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = written(ledger, 0)
    ledger.commit(commit)
    monkeypatch.setattr(ledger, "_listed", set)  # as it was before the renames
    assert ledger.require_complete(1) == {0: commit}


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
            touched.append(first.store.exists(RUN))
            genuine(identity)

        genuine = first._require_same
        monkeypatch.setattr(first, "_require_same", start_the_other)
        first.begin(IDENTITY)
        other.join()
        assert touched == [False]
        assert second.commits() == {}


def _race(root: str, commit: Commit, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put((commit.attempt, Ledger(root).commit(commit)))


def test_of_many_processes_that_commit_one_shard_exactly_one_wins(on_disk: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    for shard_id in range(5):
        barrier, results = context.Barrier(6), context.Queue()
        attempts = [written(on_disk, shard_id, prefix=b"%d " % n) for n in range(6)]
        workers = [
            context.Process(target=_race, args=(on_disk.store.location, attempt, barrier, results))
            for attempt in attempts
        ]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=30) for _ in workers]
        for worker in workers:
            worker.join()
        require_one_winner(on_disk, shard_id, dict(found))
    assert names(on_disk) == published(*range(5))


def require_one_winner(ledger: Ledger, shard_id: int, won: dict[str, bool]) -> None:
    assert sum(won.values()) == 1
    commit = ledger.commits()[shard_id]
    assert won[commit.attempt]
    assert {ledger.store.sha256(name) for name in contents(shard_id, commit.generation)} == {
        sha256 for _, sha256 in commit.files()
    }


def test_of_many_drivers_that_commit_one_shard_exactly_one_wins(ledger: Ledger, root: str) -> None:
    for generation in range(2):
        attempts = [written(ledger, 0, generation, prefix=b"%d " % n) for n in range(6)]
        barrier = threading.Barrier(len(attempts))

        def commit(attempt: Commit, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return Ledger(root).commit(attempt)

        won = dict(zip((a.attempt for a in attempts), concurrently(commit, attempts), strict=True))
        require_one_winner(ledger, 0, won)
    ledger.sweep()
    assert names(ledger) == published(0, generation=1)


def _drive_in_any_order(root: str, num_shards: int, seed: int, won: list[int]) -> None:
    order = random.Random(seed).sample(range(num_shards), num_shards)
    with Ledger(root, retry_s=60) as ledger:
        ledger.begin(IDENTITY)
        for shard_id in order:
            if ledger.commit(written(ledger, shard_id)):
                won.append(shard_id)
        ledger.finish({"num_shards": num_shards, "generation": 0})


def test_two_drivers_at_once_make_one_data_set(root: str) -> None:
    won: list[int] = []
    list(concurrently(lambda seed: _drive_in_any_order(root, 6, seed, won), range(2)))
    assert sorted(won) == list(range(6))
    require_finished(root, 6, 0)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_drivers_at_once_make_one_data_set_in_a_store_that_fails(seed: int) -> None:
    won: list[int] = []
    with faulty_store(share=0.2, seed=seed) as server:
        root = f"s3://{server.bucket}/embeddings"
        list(concurrently(lambda seed: _drive_in_any_order(root, 3, seed, won), range(2)))
        assert sorted(won) == list(range(3))
        require_finished(root, 3, 0)
        assert server.count.total() - server.count["none"] > 10


# generations


def test_a_later_generation_takes_the_place_of_the_one_before(ledger: Ledger) -> None:
    drive(ledger.store.location, 2)
    retried = written(ledger, 0, 1)
    assert ledger.commit(retried)
    assert ledger.commits()[0] == retried
    assert published(0, 1) < names(ledger)  # until nobody needs them
    ledger.finish({"num_shards": 2})
    assert names(ledger) == published(0, generation=1) | published(1) | {MANIFEST}
    assert ledger.verified_shards() == [shard_name(0, 1), shard_name(1)]


def test_a_shard_that_is_made_anew_leaves_no_file_of_its_later_generations(root: str) -> None:
    """Whoever reads `shards/*.parquet` would find its rows twice."""
    drive(root, 2)
    ledger = Ledger(root)
    assert ledger.commit(written(ledger, 0, 1))
    ledger.finish({"num_shards": 2})
    to_delete, _, _ = remake(0).removeprefix("delete ").partition(", and run")
    patterns = to_delete.replace(" and ", ", ").split(", ")
    for name in list(files(ledger.store)):
        if any(fnmatch(name, pattern) for pattern in patterns):
            ledger.store.remove(name)
    drive(root, 2)
    assert names(ledger) == published(0) | published(1) | {MANIFEST}


def test_a_later_generation_whose_records_alone_were_deleted_goes_too(tmp_path: Path) -> None:
    drive(str(tmp_path), 1)
    ledger = Ledger(tmp_path)
    assert ledger.commit(written(ledger, 0, 1))
    ledger.finish({"num_shards": 1})
    for generation in range(2):
        ledger.store.remove(record_name(0, generation))
    drive(str(tmp_path), 1)
    assert names(ledger) == published(0) | {MANIFEST}


def test_a_generation_is_committed_once_also_when_a_later_one_is_there(ledger: Ledger) -> None:
    late = written(ledger, 0, 1, prefix=b"late ")
    for generation in range(3):
        assert ledger.commit(written(ledger, 0, generation))
    assert not ledger.commit(late)
    ledger.sweep()
    assert names(ledger) == published(0, generation=2)
    assert not ledger.commit(written(ledger, 0, 1))
    assert names(ledger) == published(0, generation=2)


def test_a_generation_without_the_one_before_is_refused(ledger: Ledger) -> None:
    ledger.commit(written(ledger, 0))
    with pytest.raises(
        ArtifactError, match=r"shard 0 of .*embeddings has no generation 1, so generation 2 cannot"
    ):
        ledger.commit(written(ledger, 0, 2))
    assert ledger.commits()[0].generation == 0


def test_a_generation_whose_files_are_lost_gives_way_to_the_one_before(on_disk: Ledger) -> None:
    first, second = written(on_disk, 0), written(on_disk, 0, 1)
    on_disk.commit(first)
    on_disk.commit(second)
    on_disk.store.remove(shard_name(0, 1))
    again(on_disk)
    assert on_disk.commits() == {0: first}
    on_disk.finish({"num_shards": 1})
    assert on_disk.verified_shards() == [shard_name(0)]


def test_a_shard_whose_generations_are_all_lost_is_made_again(on_disk: Ledger) -> None:
    drive(on_disk.store.location, 2, 1)
    on_disk.store.remove(shard_name(0, 1))
    again(on_disk)
    assert on_disk.commits().keys() == {1}
    drive(on_disk.store.location, 2, 1)
    require_finished(on_disk.store.location, 2, 1)


def test_files_that_wait_for_their_names_keep_the_generation_before(ledger: Ledger) -> None:
    ledger.commit(written(ledger, 0))
    second = written(ledger, 0, 1)
    ledger.store.create(record_name(0, 1), second.to_json().encode())  # killed before the renames
    before = names(ledger)
    ledger.sweep()
    assert names(ledger) == before
    again(ledger)
    assert names(ledger) == published(0, generation=1)


# settings and manifests


def test_the_same_run_may_go_on_and_another_is_refused_with_the_difference(ledger: Ledger) -> None:
    ledger.begin(dict(IDENTITY))
    with pytest.raises(ArtifactMismatchError) as caught:
        ledger.begin({**IDENTITY, "fingerprint": "91bc", "batch_size": 4})
    text = str(caught.value)
    assert "fingerprint: '3f2a' -> '91bc'" in text
    assert "batch_size: None -> 4" in text
    assert "shard_rows" not in text
    assert "another folder" in text


def test_settings_are_compared_as_they_are_stored(root: str) -> None:
    for _ in range(2):
        with Ledger(root) as ledger:
            assert ledger.identity() in (None, {"limits": [1, 2], "columns": {"id": "key"}})
            ledger.begin({"limits": (1, 2), "columns": {"id": "key"}})
            assert ledger.identity() == {"limits": [1, 2], "columns": {"id": "key"}}


def test_of_two_drivers_that_begin_with_other_settings_one_is_refused(root: str) -> None:
    barrier = threading.Barrier(2)

    def begin(batch_size: int) -> str:
        with Ledger(root) as ledger:
            barrier.wait()
            try:
                ledger.begin({**IDENTITY, "batch_size": batch_size})
            except ArtifactMismatchError as error:
                return str(error)
        return ""

    errors = [error for error in concurrently(begin, [4, 8]) if error]
    assert len(errors) == 1
    assert "batch_size" in errors[0]


def test_a_store_that_lets_two_writers_win_is_refused(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignores_the_condition(self: ObjectStore, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(ObjectStore, "create", ignores_the_condition)
    ledger = Ledger(f"s3://{object_store}/embeddings")
    with pytest.raises(StorageError, match=r"lets two writers create the same file .*conditional"):
        ledger.begin(IDENTITY)
    assert names(ledger) == set()


def test_a_manifest_never_claims_shards_that_are_not_there(ledger: Ledger) -> None:
    for shard_id in (0, 2):
        ledger.commit(written(ledger, shard_id))
    with pytest.raises(ArtifactError, match=r"2 commit records for 3 shards, and shards \[1\]"):
        ledger.finish({"num_shards": 3})
    assert ledger.manifest() is None


def test_an_unfinished_data_set_is_refused(ledger: Ledger) -> None:
    ledger.commit(written(ledger, 0))
    assert ledger.manifest() is None
    with pytest.raises(ArtifactError, match=r"no finished data set of `slq embed`; run it first"):
        ledger.verified_shards()


def test_a_finished_data_set_gives_its_shards_in_order(ledger: Ledger) -> None:
    for shard_id in (2, 0, 1):
        ledger.commit(written(ledger, shard_id))
    ledger.store.write(shard_name(9), b"never committed")
    ledger.finish({"num_shards": 3})
    assert ledger.manifest() == {"num_shards": 3}
    assert ledger.verified_shards() == [shard_name(n) for n in range(3)]


# damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_named(ledger: Ledger, damage: str) -> None:
    drive(ledger.store.location, 2)
    data = ledger.store.read(shard_name(1))
    if damage == "remove":
        ledger.store.remove(shard_name(1))
    else:
        tail = bytes([data[-1] ^ 1]) if damage == "flip" else b""
        ledger.store.write(shard_name(1), data[:-1] + tail)
    with pytest.raises(
        ArtifactError,
        match=r"shard .*/part-000001\.parquet does not match its commit record; delete commits/000001\*\.json, "
        r"shards/part-000001\*\.parquet, errors/part-000001\*\.parquet and manifest\.json, and run `slq embed` again",
    ):
        ledger.verified_shards()


def test_what_the_message_says_repairs_a_damaged_shard(ledger: Ledger) -> None:
    drive(ledger.store.location, 2, 1)
    ledger.store.write(shard_name(1, 1), b"damaged")
    for name in (record_name(1), record_name(1, 1), MANIFEST):
        ledger.store.remove(name)
    drive(ledger.store.location, 2, 1)
    require_finished(ledger.store.location, 2, 1)


def test_a_commit_record_that_was_lost_is_noticed(ledger: Ledger) -> None:
    drive(ledger.store.location, 2)
    ledger.store.remove(record_name(1))
    with pytest.raises(ArtifactError, match=r"1 commit records for 2 shards, and shards \[1\]"):
        ledger.verified_shards()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (b'{"shard_id": 1, "ro', "Unterminated string"),
        (b"\xff", "can't decode byte"),
        (b"[1]", "must be a mapping"),
        (b'{"shard": 1}', "unexpected keyword argument 'shard'"),
        (Commit(7, 1, 0, "", 0, "abc").to_json().encode(), "it is of shard 7, generation 0"),
    ],
)
def test_a_damaged_record_is_named(ledger: Ledger, record: bytes, problem: str) -> None:
    ledger.store.write(record_name(1), record)
    with pytest.raises(
        ArtifactError,
        match=rf"commit record .*/embeddings/commits/000001\.json is damaged: .*{problem}.*; "
        r"delete commits/000001\*\.json, shards/part-000001\*\.parquet, errors/part-000001\*\.parquet and "
        r"manifest\.json, and run `slq embed` again",
    ):
        ledger.commits()


@pytest.mark.parametrize("text", [b"{", b"[1]"])
def test_a_damaged_manifest_is_named(ledger: Ledger, text: bytes) -> None:
    ledger.store.write(MANIFEST, text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: .*; delete it and run"):
        ledger.manifest()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_visible(
    on_disk: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = written(on_disk, 0)

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StorageError, match=r"No space left.*free space and run the same"):
            on_disk.commit(commit)
    assert on_disk.commits() == {}
    assert isinstance(on_disk.store, LocalStore)
    assert not list(on_disk.store.path("commits").iterdir())
    assert on_disk.commit(commit)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        Ledger(tmp_path / "file" / "embeddings").begin(IDENTITY)


def test_an_outage_is_a_storage_error_and_the_next_run_goes_on() -> None:
    with faulty_store(share=0) as server:
        root = f"s3://{server.bucket}/embeddings"
        with Ledger(root, retry_s=0.2) as ledger:
            ledger.begin(IDENTITY)
            ledger.commit(written(ledger, 0))
            pending = written(ledger, 1)
            server.share = 1
            with pytest.raises(StorageError, match="run the same command again"):
                ledger.commit(pending)
        server.share = 0
        drive(root, 3)
        require_finished(root, 3, 0)


def test_attempts_have_names_of_their_own() -> None:
    assert len({new_attempt() for _ in range(100)}) == 100
