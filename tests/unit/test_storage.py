"""Stores: the same behaviour on a disk, in memory, in S3, and in an S3 that fails one request in five."""

import errno
import hashlib
import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from pipelines.storage import (
    LocalStore,
    ObjectStore,
    Store,
    StoredFile,
    concurrently,
    multipart,
    objects,
    open_store,
    split_location,
)
from slq.errors import ConfigError, InterruptedRunError, RefusedReadError, StorageError
from tests.faulty_store import FAULTS, LOST, RESET, UNAVAILABLE, faulty_store


@pytest.fixture(params=["disk", "memory", "s3", "faulty s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield open_store(tmp_path / "root")
    elif request.param == "memory":
        yield open_store(f"memory://{tmp_path.name}/store")
    else:
        with faulty_store(share=0 if request.param == "s3" else 0.2) as server:
            yield open_store(f"s3://{server.bucket}/store", retry_s=30)


def test_an_error_of_ours_inside_of_a_call_ends_it_and_is_never_tried_again() -> None:
    """A signal raises one wherever the driver is, which with an object store is in some call for the most part."""
    calls = 0

    def stopped() -> bytes:
        nonlocal calls
        calls += 1
        raise InterruptedRunError("stopped by SIGTERM")

    store = objects.ObjectStore("memory://bucket/x", retry_s=20)
    with pytest.raises(InterruptedRunError, match=r"^stopped by SIGTERM$"):
        store._try("name", "read", stopped)
    assert calls == 1


def test_a_name_that_a_store_refuses_to_read_is_told_apart_from_a_failure() -> None:
    store = objects.ObjectStore("memory://bucket/x", retry_s=0.01)
    for error, kind in (
        (PermissionError("Forbidden"), RefusedReadError),
        (OSError("reset"), StorageError),
    ):

        def call(error: Exception = error) -> bytes:
            raise error

        with pytest.raises(StorageError) as caught:
            store._try("name", "read", call)
        assert type(caught.value) is kind


def names(store: Store, folder: str = "") -> list[str]:
    return [file.name for file in store.files(folder)]


def test_what_was_written_is_read_whole_and_in_parts(store: Store) -> None:
    data = bytes(range(256)) * 20
    store.write("a/b.bin", data)
    assert store.read("a/b.bin") == data
    for start, stop in [
        (0, 10),
        (7, 7),
        (9, 3),
        (100, 300),
        (5000, 9000),
        (5120, None),
        (9000, 9999),
    ]:
        assert store.read("a/b.bin", start, stop) == data[start:stop]
    assert store.size("a/b.bin") == len(data)
    assert store.sha256("a/b.bin") == hashlib.sha256(data).hexdigest()
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"


def test_an_empty_file_is_a_file(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == store.read("empty", 0, 10) == b""
    assert store.size("empty") == 0
    assert store.exists("empty")
    with store.open("empty") as file:
        assert file.read() == b""


def test_a_file_looks_alone_as_it_does_in_a_listing(store: Store) -> None:
    for name in ("a", "deep/b c", "deep/er/ü"):
        store.write(name, name.encode())
    listed = {file.name: file for file in store.files()}
    assert {name: store.stat(name) for name in listed} == listed
    assert [store.stat(name) for name in ("deep", "gone", "deep/gone", "a/b")] == [None] * 4
    store.write("a", b"b")
    assert store.stat("a") != listed["a"]


def test_what_is_not_there_is_told_by_every_method(store: Store) -> None:
    store.write("folder/file", b"x")
    for name in ("gone", "folder", "folder/file/below"):
        assert store.size(name) is None
        assert not store.exists(name)
    for read in (store.read, store.open, store.sha256):
        with pytest.raises(FileNotFoundError):
            read("gone")
    assert not store.move("gone", "target")
    store.remove("gone")
    store.remove_folder("gone")
    assert names(store, "gone") == []
    assert names(store) == ["folder/file"]


def test_an_open_file_is_read_from_any_place(store: Store) -> None:
    table = pa.table({"n": list(range(10_000)), "text": [f"row {n}" for n in range(10_000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=1000)
    data = sink.getvalue().to_pybytes()
    store.write("t.parquet", data)
    with store.open("t.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(7).equals(table.slice(7000, 1000))
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
        file.seek(10)
        file.seek(5, os.SEEK_CUR)
        assert (file.tell(), file.read(3)) == (15, data[15:18])


def test_only_the_first_writer_creates_a_file(store: Store) -> None:
    assert store.create("records/1.json", b"mine")
    assert not store.create("records/1.json", b"other")
    assert store.create("records/1.json", b"mine")  # told twice, done once
    assert store.read("records/1.json") == b"mine"
    store.remove("records/1.json")
    assert store.create("records/1.json", b"other")


def test_of_many_writers_at_once_exactly_one_creates_the_file(store: Store) -> None:
    if store.location.startswith("memory"):
        pytest.skip("fsspec's memory is for one thread")
    for round_ in range(3):
        barrier = threading.Barrier(8)

        def write(
            number: int, name: str = f"record-{round_}", barrier: threading.Barrier = barrier
        ) -> bool:
            barrier.wait()
            return store.create(name, b"%d" % number)

        won = list(concurrently(write, range(8)))
        assert sum(won) == 1
        assert store.read(f"record-{round_}") == b"%d" % won.index(True)


def test_an_uploaded_file_is_there_whole(store: Store, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    for name in ("a/x.bin", "a/x.bin", "y.bin"):
        (tmp_path / "local.bin").write_bytes(data)
        store.upload(tmp_path / "local.bin", name)
        assert store.read(name) == data
    assert names(store) == ["a/x.bin", "y.bin"]


def test_a_file_moves_over_another(store: Store) -> None:
    store.write("from", b"new")
    store.write("folder/to", b"old")
    assert store.move("from", "folder/to")
    assert not store.exists("from")
    assert store.read("folder/to") == b"new"
    assert not store.move("from", "folder/to")
    assert store.read("folder/to") == b"new"


def test_a_listing_is_sorted_and_tells_what_changed(store: Store) -> None:
    wanted = ["a/1", "a/b/2", "a/b/3", "c"]
    for name in reversed(wanted):
        store.write(name, name.encode())
    store.write("ab/4", b"a folder whose name begins alike")
    assert names(store) == ["a/1", "a/b/2", "a/b/3", "ab/4", "c"]
    assert names(store, "a") == wanted[:3]
    assert names(store, "a/b") == wanted[1:3]
    before = {file.name: file for file in store.files()}
    assert before["a/b/2"].size == 5
    time.sleep(0.01)
    store.write("a/b/2", b"A/B/2")
    changed = {file.name for file in store.files() if before[file.name] != file}
    assert changed == {"a/b/2"}


def test_a_folder_is_removed_with_all_that_is_below_it(store: Store) -> None:
    for number in range(20):
        store.write(f"pieces/run/{number}", b"x")
    store.write("pieces.txt", b"stays")
    store.remove_folder("pieces")
    assert names(store) == ["pieces.txt"]


def test_a_store_may_go_to_another_process(store: Store) -> None:
    store.write("a", b"x")
    if not store.location.startswith("memory"):
        assert pickle.loads(pickle.dumps(store)).read("a") == b"x"


def test_urls_are_what_other_tools_take(store: Store) -> None:
    assert store.url() == store.location
    assert store.url("a/b") == f"{store.location}/a/b"


def test_a_store_is_opened_by_its_scheme(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore)
    assert open_store(f"file://{tmp_path}").location == str(tmp_path)
    assert isinstance(open_store("memory://a/"), ObjectStore)
    assert open_store("memory://a/").location == "memory://a"
    with pytest.raises(ConfigError, match=r"^nowhere://a cannot be used: .*nowhere"):
        open_store("nowhere://a")


def test_a_location_is_split_into_folder_and_name() -> None:
    assert split_location("a/b/c.parquet") == ("a/b", "c.parquet")
    assert split_location("c.parquet") == (".", "c.parquet")
    assert split_location("s3://bucket/a/c.parquet") == ("s3://bucket/a", "c.parquet")


# S3 that fails


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_survived_and_did_happen(fault: str, tmp_path: Path) -> None:
    with faulty_store(share=0.5, faults=(fault,), seed=1) as server:
        store = open_store(f"s3://{server.bucket}/store", retry_s=60)
        data = os.urandom(50_000)
        for number in range(3):
            assert store.create(f"r/{number}", b"mine")
            assert not store.create(f"r/{number}", b"other")
            (tmp_path / "f").write_bytes(data)
            store.upload(tmp_path / "f", f"x/{number}")
            assert store.move(f"x/{number}", f"y/{number}")
            assert store.sha256(f"y/{number}") == hashlib.sha256(data).hexdigest()
        assert len(names(store)) == 6
        assert server.count[fault] > 3


def test_a_large_file_is_uploaded_part_by_part_through_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (multipart, objects):
        monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    data = os.urandom(23 * 2**20)
    (tmp_path / "f").write_bytes(data)
    with faulty_store(share=0.4, seed=2) as server:
        store = open_store(f"s3://{server.bucket}/store", retry_s=30)
        store.upload(tmp_path / "f", "large")
        assert store.sha256("large") == hashlib.sha256(data).hexdigest()
        assert server.count.total() - server.count["none"] > 2
        server.share = 0
        assert next(store.files()).state.endswith("-5")  # so S3 marks what came in five parts


def test_an_upload_whose_last_answer_is_lost_is_whole(object_store: str, tmp_path: Path) -> None:
    """S3 forgets an upload that is complete, so trying to complete it again finds none."""
    (tmp_path / "f").write_bytes(b"content")
    client = s3fs.S3FileSystem()

    def twice(operation: str, **arguments: object) -> object:
        answer = client.call_s3(operation, **arguments)
        if operation == "complete_multipart_upload":
            return client.call_s3(operation, **arguments)
        return answer

    multipart.upload_parts(client.call_s3, twice, tmp_path / "f", object_store, "store/large")
    assert open_store(f"s3://{object_store}/store").read("large") == b"content"


def test_an_upload_that_fails_leaves_no_parts(object_store: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    client = s3fs.S3FileSystem()

    def broken(operation: str, **arguments: object) -> object:
        if operation == "upload_part":
            raise StorageError("out of service")
        return client.call_s3(operation, **arguments)

    with pytest.raises(StorageError, match="out of service"):
        multipart.upload_parts(client.call_s3, broken, tmp_path / "f", object_store, "store/large")
    assert client.list_multipart_uploads(object_store) == []
    assert names(open_store(f"s3://{object_store}/store")) == []


@pytest.mark.parametrize("lost", [1, 3])
def test_a_put_whose_answer_is_lost_still_wins(lost: int) -> None:
    with faulty_store(share=1, faults=(LOST,), most=lost) as server:
        store = open_store(f"s3://{server.bucket}/store", retry_s=30)
        assert store.create("record", b"mine")
        assert server.count[LOST] == lost
        assert not store.create("record", b"other")
        assert store.read("record") == b"mine"


@pytest.mark.parametrize("fault", [UNAVAILABLE, RESET])
def test_an_outage_is_a_storage_error_in_bounded_time(fault: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with faulty_store(share=0, faults=(fault,)) as server:
        store = open_store(f"s3://{server.bucket}/store", retry_s=0.2)
        store.write("a", b"x")
        opened = store.open("a")
        server.share = 1
        calls = {
            "read": [
                lambda: store.read("a"),
                lambda: store.open("a"),
                opened.read,
                lambda: store.size("a"),
                lambda: store.sha256("a"),
            ],
            "written": [
                lambda: store.write("a", b"y"),
                lambda: store.create("b", b"y"),
                lambda: store.upload(tmp_path / "f", "c"),
                lambda: store.move("a", "d"),
            ],
            "removed": [lambda: store.remove("a")],
            "listed": [lambda: list(store.files("folder"))],
        }
        for verb, group in calls.items():
            for call in group:
                started = time.monotonic()
                with pytest.raises(
                    StorageError,
                    match=rf"/store/\w+ cannot be {verb}: .*check the store, its endpoint",
                ):
                    call()
                assert 0.15 < time.monotonic() - started < 4
        server.share = 0
        assert names(store) == ["a"]


def test_a_server_that_never_answers_is_a_storage_error(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        started = time.monotonic()
        with pytest.raises(StorageError, match="Read timeout"):
            open_store(f"s3://{object_store}/store", retry_s=1).read("a")
        assert time.monotonic() - started < 10


def test_a_bucket_that_is_not_there_is_told_at_once() -> None:
    with faulty_store(share=0) as server:
        store = open_store(f"s3://{server.bucket}-other/store", retry_s=60)
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot be written"):
            store.write("a", b"x")
        with pytest.raises(StorageError, match=r"cannot be listed: .*bucket"):
            list(store.files())
        with pytest.raises(FileNotFoundError):
            store.read("a")
        assert time.monotonic() - started < 5


def test_missing_credentials_are_told_at_once(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(StorageError, match="credentials"):
        open_store(f"s3://{object_store}/store").read("a")
    assert time.monotonic() - started < 5


def test_a_listing_of_several_pages_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    with faulty_store(share=0) as server:
        store = open_store(f"s3://{server.bucket}/store")
        wanted = [f"{number:02d}" for number in range(10)]
        for name in wanted:
            store.write(name, b"")
        before = server.count.total()
        assert names(store) == wanted
        assert server.count.total() - before == 4


def test_a_file_that_shrinks_while_it_is_read_is_told(object_store: str) -> None:
    store = open_store(f"s3://{object_store}/store")
    store.write("a", bytes(9 * 2**20))
    with store.open("a") as file:
        file.read(10)
        store.write("a", b"short")
        with pytest.raises(StorageError, match="became shorter while it was read"):
            file.read()


# disks


def test_a_full_disk_is_told_and_leaves_no_part(small_disk: Path, tmp_path: Path) -> None:
    store = LocalStore(small_disk)
    store.write("a", b"before")
    (tmp_path / "large").write_bytes(bytes(200_000))
    for write in (
        lambda: store.write("a", bytes(200_000)),
        lambda: store.create("b", bytes(200_000)),
        lambda: store.upload(tmp_path / "large", "c"),
    ):
        with pytest.raises(
            StorageError, match=r"cannot be written: .*No space left.*free space and run"
        ):
            write()
    assert [path.name for path in small_disk.iterdir()] == ["a"]
    assert store.read("a") == b"before"


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("folder", b"in the way")
    (tmp_path / "f").write_bytes(b"x")
    for write in (
        lambda: store.write("folder/a", b"x"),
        lambda: store.create("folder/a", b"x"),
        lambda: store.upload(tmp_path / "f", "folder/a"),
        lambda: store.move("f", "folder/a"),
    ):
        with pytest.raises(StorageError, match="folder/a cannot be written"):
            write()
    assert names(store) == ["f", "folder"]


def test_a_disk_that_fails_to_read_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store = LocalStore(tmp_path)
    store.write("a", b"x")
    monkeypatch.setattr(Path, "open", broken)
    monkeypatch.setattr(Path, "stat", broken)
    for read in (store.read, store.open, store.size):
        with pytest.raises(StorageError, match=r"a cannot be read: Input/output error"):
            read("a")


def test_a_file_from_another_disk_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if path.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return genuine(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    (tmp_path / "f").write_bytes(b"content")
    store = LocalStore(tmp_path / "root")
    store.upload(tmp_path / "f", "a/b")
    assert store.read("a/b") == b"content"
    assert names(store) == ["a/b"]


def test_what_a_killed_writer_left_is_neither_listed_nor_kept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a/b", b"x")
    partial = tmp_path / "a" / ".c.0123456789ab.partial"
    partial.write_bytes(b"half")
    assert names(store) == ["a/b"]
    store.remove_partials()
    assert not partial.exists()
    assert names(store) == ["a/b"]


def test_links_to_files_are_listed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"12345")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(tmp_path / "gone")
    found = list(LocalStore(root).files())
    assert [file.name for file in found] == ["file", "nowhere"]
    assert found[0].size == 5
    assert found[1] == StoredFile("nowhere", 0, "unreadable")
    assert [LocalStore(root).stat(file.name) for file in found] == found


def test_a_lock_tells_who_is_alone(tmp_path: Path) -> None:
    first, second = (LocalStore(tmp_path / "root").lock("run.lock") for _ in range(2))
    assert first.take()
    first.share()
    assert not second.take()
    assert not first.take()
    first.close()
    assert second.take()
    second.close()


def test_in_an_object_store_nobody_is_alone() -> None:
    lock = open_store("memory://locks").lock("run.lock")
    assert not lock.take()
    lock.share()
    lock.close()


def test_a_folder_that_goes_away_while_a_file_is_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another driver finishes, and removes all pieces."""
    store, left = LocalStore(tmp_path), [2]
    genuine = os.fsync

    def removed_meanwhile(handle: int) -> None:
        genuine(handle)
        if left[0]:
            left[0] -= 1
            shutil.rmtree(tmp_path / "pieces")

    monkeypatch.setattr(os, "fsync", removed_meanwhile)
    store.write("pieces/run/a", b"content")
    assert left == [0]
    assert store.read("pieces/run/a") == b"content"
    assert [file.name for file in store.files()] == ["pieces/run/a"]
