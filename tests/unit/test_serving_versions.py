"""Moving between index versions, without Ray: what proved good answers, what proved bad leaves the old one in place."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event

import pytest

from pipelines.serving.course import Course, Record, Refusal
from pipelines.serving.following import Follower
from pipelines.serving.shelf import Shelf
from slq.errors import (
    ArtifactError,
    DataError,
    RefusedVersionError,
    StorageError,
    UnavailableError,
)
from slq.index import VectorIndex, roll_back
from slq.index.building import INDEX
from slq.index.versions import SEGMENTS, prune, read_manifest
from tests.unit.index_data import published, unit_vectors

A, B, C = "v000001", "v000002", "v000003"
QUERY = unit_vectors(1, seed=1)
Admit = Callable[[VectorIndex], Awaitable[None]]


async def good(_: VectorIndex) -> None:
    """Every version is."""


def damage(folder: Path, version: str) -> None:
    """Flip a bit of its codes."""
    segment = read_manifest(folder, version).segments[0].name
    path = folder / SEGMENTS / segment / "partitions" / "0000" / INDEX
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def follower(
    folder: Path,
    record: Record,
    *,
    admit: Admit = good,
    keep_previous: bool = True,
    follow: bool = False,
    load: Callable[[str], VectorIndex] | None = None,
) -> tuple[Follower[VectorIndex], Shelf[VectorIndex]]:
    shelf = Shelf(load or (lambda version: VectorIndex(folder, version)), admit)
    course = record.read()
    shelf.put(course.version, VectorIndex(folder, course.version))
    found = Follower(folder, record, course, shelf, keep_previous=keep_previous, follow=follow)
    return found, shelf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of one version."""
    published(tmp_path / "index")
    return tmp_path / "index"


def record_of(folder: Path, *, follows: bool = False, version: str = A) -> Record:
    return Record(folder.parent / "serve" / "course.json", Course(version, follows=follows))


# ---- the record ----


def test_a_service_is_where_it_started_until_it_moves(tmp_path: Path) -> None:
    record = Record(tmp_path / "serve" / "course.json", Course(A, follows=True))
    assert record.read() == Course(A, None, True, None)
    assert not (tmp_path / "serve").exists()
    record.change(lambda course: course.moved(B, follows=False))
    later = Record(tmp_path / "serve" / "course.json", Course(A, follows=True))
    assert later.read() == Course(B, A, False, None)
    later.change(lambda course: course.refusing(C, "a bit is wrong"))
    assert record.read() == Course(B, A, False, Refusal(C, "a bit is wrong"))
    record.remove()
    assert list((tmp_path / "serve").iterdir()) == []
    assert record.read().version == A


def test_a_course_does_not_refuse_what_the_service_is_on() -> None:
    course = Course(B, A)
    assert course.refusing(B, "only here") is course
    assert course.moved(B, follows=True) == Course(B, A, True)
    refusing = course.refusing(C, "bad")
    assert [refusing.is_new(version) for version in (A, B, C)] == [True, False, False]
    assert refusing.moved(A, follows=True) == Course(A, B, True)


def test_a_record_that_cannot_be_written_is_told_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "serve").write_text("no folder")
    record = Record(tmp_path / "serve" / "course.json", Course(A))
    with pytest.raises(StorageError, match=r"cannot be written.*index version, so it stays"):
        record.change(lambda course: course.moved(B, follows=False))
    assert record.read() == Course(A)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "course.json"

    async def scenario() -> None:
        def one_more(course: Course) -> Course:
            return course.moved(f"v{int(course.version[1:]) + 1:06d}", follows=False)

        records = [Record(path, Course("v000000")) for _ in range(8)]
        await asyncio.gather(*[asyncio.to_thread(record.change, one_more) for record in records])

    asyncio.run(scenario())
    assert Record(path, Course("v000000")).read() == Course("v000008", "v000007")


# ---- the shelf ----


def test_whoever_asks_for_a_version_that_is_coming_waits_for_the_same_one() -> None:
    loaded: list[str] = []

    async def scenario() -> None:
        go_on = Event()

        def load(version: str) -> str:
            loaded.append(version)
            assert go_on.wait(10)
            return version.upper()

        shelf = Shelf(load)
        first, second = (asyncio.create_task(shelf.bring("a")) for _ in range(2))
        await asyncio.sleep(0.05)
        assert (shelf.coming, shelf.get("a")) == (["a"], None)
        first.cancel()  # whoever gives up does not end it for the other
        go_on.set()
        await second
        assert (shelf.coming, shelf.get("a")) == ([], "A")
        await shelf.bring("a")

    asyncio.run(scenario())
    assert loaded == ["a"]


def test_what_is_not_good_does_not_come_to_the_shelf_and_can_be_tried_again() -> None:
    async def scenario() -> None:
        tried: list[str] = []

        async def admit(loaded: str) -> None:
            tried.append(loaded)
            if len(tried) == 1:
                raise ArtifactError("not this one")

        shelf = Shelf(str.upper, admit)
        with pytest.raises(ArtifactError, match="not this one"):
            await shelf.bring("a")
        assert (shelf.held, shelf.coming) == ([], [])
        await shelf.bring("a")
        assert shelf.get("a") == "A"

    asyncio.run(scenario())


# ---- moving ----


def test_a_new_version_is_followed_where_the_pointer_goes_and_back(folder: Path) -> None:
    async def scenario() -> None:
        one, shelf = follower(folder, record_of(folder, follows=True), follow=True)
        await one.tick()
        assert one.version == A
        published(folder, seed=2)
        await one.tick()
        assert (one.version, sorted(shelf.held)) == (B, [A, B])
        roll_back(folder)
        await one.tick()
        assert (one.version, sorted(shelf.held)) == (A, [A, B])

    asyncio.run(scenario())


def test_without_following_only_what_is_asked_for_moves_the_service(folder: Path) -> None:
    async def scenario() -> None:
        one, _ = follower(folder, record_of(folder))
        published(folder, seed=2)
        await one.tick()
        assert one.version == A
        assert await one.send("current") == Course(B, A)
        assert await one.send("previous") == Course(A, B)
        assert await one.send(B) == Course(B, A)

    asyncio.run(scenario())


def test_a_service_that_is_sent_elsewhere_follows_again_when_it_is_sent_to_current(
    folder: Path,
) -> None:
    async def scenario() -> None:
        published(folder, seed=2)
        one, _ = follower(folder, record_of(folder, follows=True, version=B), follow=True)
        assert await one.send("previous") == Course(A, B)  # the one before on disk
        await one.tick()
        assert one.version == A
        published(folder, seed=3)
        await one.tick()
        assert one.version == A
        assert await one.send("current") == Course(C, A, follows=True)

    asyncio.run(scenario())


def test_a_damaged_version_is_refused_once_and_the_old_one_stays(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loads: list[str] = []

    def load(version: str) -> VectorIndex:
        loads.append(version)
        return VectorIndex(folder, version)

    async def scenario() -> None:
        record = record_of(folder, follows=True)
        one, shelf = follower(folder, record, follow=True, load=load)
        published(folder, seed=2)
        damage(folder, B)
        for _ in range(3):
            await one.tick()
        assert (one.version, shelf.held, loads) == (A, [A], [B])
        refused = record.read().refused
        assert refused is not None
        assert refused.version == B
        assert "does not match the sha256 in its manifest" in refused.reason
        with pytest.raises(RefusedVersionError, match=rf"{B} is refused, {A} stays: .*sha256"):
            await one.send("current")
        assert (loads, record.read().version, record.read().follows) == ([B, B], A, True)
        published(folder, seed=3)
        await one.tick()
        assert record.read() == Course(C, A, follows=True)

    asyncio.run(scenario())
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2  # by itself once, and once on request
    assert all(f"index version {B} is refused, {A} stays" in message for message in warned)


def test_a_version_that_is_repaired_is_taken_on_request(folder: Path) -> None:
    async def scenario() -> None:
        one, _ = follower(folder, record_of(folder))
        published(folder, seed=2)
        damage(folder, B)
        with pytest.raises(RefusedVersionError):
            await one.send(B)
        damage(folder, B)  # flips the bit back
        assert await one.send(B) == Course(B, A)

    asyncio.run(scenario())


def test_what_cannot_be_said_now_is_tried_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        busy = True

        async def admit(_: VectorIndex) -> None:
            if busy:
                raise UnavailableError("too many requests are waiting; try again later")

        record = record_of(folder, follows=True)
        one, shelf = follower(folder, record, admit=admit, follow=True)
        published(folder, seed=2)
        for _ in range(3):
            await one.tick()
        assert (one.version, shelf.held, record.read()) == (A, [A], Course(A, follows=True))
        assert one.problem is not None
        busy = False
        await one.tick()
        assert (one.version, one.problem) == (B, None)

    asyncio.run(scenario())
    told = [r for r in caplog.records if "too many requests are waiting" in r.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize("wanted", ["v000007", "previous"])
def test_a_version_that_is_not_there_is_told(folder: Path, wanted: str) -> None:
    one, _ = follower(folder, record_of(folder))
    message = {
        "v000007": r"no version v000007; the index has v000001",
        "previous": r"no version before v000001 to go back to",
    }[wanted]
    with pytest.raises(DataError, match=message):
        asyncio.run(one.send(wanted))


async def coming(shelf: Shelf[VectorIndex], version: str) -> None:
    """Wait until a version is being loaded."""
    for _ in range(1000):
        if shelf.coming == [version]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{version} is never loaded, but {shelf.coming}")


def test_a_way_back_does_not_wait_for_a_version_that_is_being_loaded(folder: Path) -> None:
    async def scenario() -> None:
        go_on = Event()

        def load(version: str) -> VectorIndex:
            assert version != C or go_on.wait(10)
            return VectorIndex(folder, version)

        record = record_of(folder, follows=True)
        one, shelf = follower(folder, record, follow=True, load=load)
        published(folder, seed=2)
        await one.tick()
        published(folder, seed=3)
        loading = asyncio.create_task(one.tick())
        await coming(shelf, C)
        assert await asyncio.wait_for(one.send("previous"), 1) == Course(A, B)
        assert one.version == A
        go_on.set()
        await loading
        # whoever sent the service back does not want what the pointer says
        assert (one.version, record.read()) == (A, Course(A, B))

    asyncio.run(scenario())


def test_a_version_whose_pointer_is_taken_back_while_it_is_loaded_is_not_served(
    folder: Path,
) -> None:
    async def scenario() -> None:
        go_on = Event()

        def load(version: str) -> VectorIndex:
            assert go_on.wait(10)
            return VectorIndex(folder, version)

        record = record_of(folder, follows=True)
        one, shelf = follower(folder, record, follow=True, load=load)
        published(folder, seed=2)
        loading = asyncio.create_task(one.tick())
        await coming(shelf, B)
        roll_back(folder)
        go_on.set()
        await loading
        assert (one.version, record.read()) == (A, Course(A, follows=True))
        assert shelf.held == [A]

    asyncio.run(scenario())


def test_whoever_gives_up_leaves_nothing_loaded(folder: Path) -> None:
    async def scenario() -> None:
        go_on = Event()

        def load(version: str) -> VectorIndex:
            assert go_on.wait(10)
            return VectorIndex(folder, version)

        one, shelf = follower(folder, record_of(folder), load=load)
        published(folder, seed=2)
        sending = asyncio.create_task(one.send(B))
        await coming(shelf, B)
        sending.cancel()
        go_on.set()
        while shelf.coming:
            await asyncio.sleep(0.01)
        await one.tick()
        assert (one.version, shelf.held) == (A, [A])

    asyncio.run(scenario())


def test_moves_at_once_end_where_the_last_one_says(folder: Path) -> None:
    async def scenario() -> None:
        record = record_of(folder)
        one, shelf = follower(folder, record, keep_previous=False)
        published(folder, seed=2)
        published(folder, seed=3)
        for _ in range(5):
            await asyncio.gather(one.send(B), one.send(C), one.send(A))
            assert one.version == record.read().version
            assert shelf.held == [one.version]

    asyncio.run(scenario())


def test_a_call_that_is_cut_off_while_a_version_loads_is_told_and_nothing_ends(
    folder: Path,
) -> None:
    async def scenario() -> None:
        cut = True

        async def admit(_: VectorIndex) -> None:
            if cut:
                raise asyncio.CancelledError

        one, _ = follower(folder, record_of(folder, follows=True), admit=admit, follow=True)
        published(folder, seed=2)
        await one.tick()
        assert (one.version, "was cut off; try again" in str(one.problem)) == (A, True)
        cut = False
        await one.tick()
        assert one.version == B

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [OSError("stale file handle"), MemoryError()])
def test_what_this_machine_lacks_does_not_make_a_version_bad(
    folder: Path, error: Exception
) -> None:
    async def scenario() -> None:
        fails = True

        def load(version: str) -> VectorIndex:
            if fails:
                raise error
            return VectorIndex(folder, version)

        record = record_of(folder, follows=True)
        one, _ = follower(folder, record, follow=True, load=load)
        published(folder, seed=2)
        await one.tick()
        with pytest.raises(
            UnavailableError, match=rf"{B} cannot be loaded now: {type(error).__name__}"
        ):
            await one.send(B)
        assert record.read() == Course(A, follows=True)
        fails = False
        await one.tick()
        assert one.version == B

    asyncio.run(scenario())


def test_a_version_is_free_when_the_last_who_took_it_has_done_with_it(folder: Path) -> None:
    async def scenario() -> None:
        one, shelf = follower(folder, record_of(folder), keep_previous=False)
        taken = shelf.get(A)
        assert taken is not None
        left = weakref.ref(taken)
        before = taken.search(QUERY, 5)
        published(folder, seed=2)
        await one.send("current")
        assert shelf.held == [B]
        prune(folder, keep=1)  # its files may even be gone: they stay mapped
        assert taken.search(QUERY, 5) == before
        del taken
        gc.collect()
        assert left() is None

    asyncio.run(scenario())


def test_two_replicas_come_to_the_same_version_one_after_the_other(folder: Path) -> None:
    async def scenario() -> None:
        first, _ = follower(folder, record_of(folder, follows=True), follow=True)
        second, _ = follower(folder, record_of(folder, follows=True), follow=True)
        published(folder, seed=2)
        await first.tick()
        assert (first.version, second.version) == (B, A)
        await second.tick()
        assert second.version == B
        await second.send("previous")
        await first.tick()
        assert (first.version, second.version) == (A, A)
        record = record_of(folder, follows=True)
        assert record.read() == Course(A, B)
        late, shelf = follower(folder, record, follow=True)  # which Ray Serve starts now
        assert late.version == A
        await late.tick()  # the way back is there too
        assert sorted(shelf.held) == [A, B]

    asyncio.run(scenario())


def test_both_may_move_at_once(folder: Path) -> None:
    async def scenario() -> None:
        pairs = [follower(folder, record_of(folder, follows=True), follow=True) for _ in range(3)]
        published(folder, seed=2)
        await asyncio.gather(*[one.tick() for one, _ in pairs])
        assert {one.version for one, _ in pairs} == {B}
        assert record_of(folder).read() == Course(B, A, follows=True)

    asyncio.run(scenario())


def test_a_replica_that_cannot_go_where_the_service_is_stays_and_says_so(folder: Path) -> None:
    async def scenario() -> None:
        published(folder, seed=2)
        record = record_of(folder)

        def broken(version: str) -> VectorIndex:
            raise ArtifactError(f"{version} cannot be read on this machine")

        here, _ = follower(folder, record, load=broken)
        there, _ = follower(folder, record)
        await there.send("current")
        await here.tick()
        assert (here.version, record.read().version, record.read().refused) == (A, B, None)
        assert here.problem == f"{B} cannot be read on this machine"

    asyncio.run(scenario())


def test_a_way_back_that_is_gone_from_disk_is_only_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        published(folder, seed=2)
        record = record_of(folder)
        record.change(lambda course: course.moved(B, follows=False))
        prune(folder, keep=1)
        late, shelf = follower(folder, record)
        for _ in range(3):
            await late.tick()
        assert (late.version, shelf.held, late.problem) == (B, [B], None)

    asyncio.run(scenario())
    told = [r for r in caplog.records if f"{A} is no way back any more" in r.getMessage()]
    assert len(told) == 1


def test_a_pointer_that_cannot_be_read_changes_nothing(folder: Path) -> None:
    async def scenario() -> None:
        one, _ = follower(folder, record_of(folder, follows=True), follow=True)
        pointer = folder / "CURRENT"
        content = pointer.read_text()
        pointer.unlink()
        await one.tick()
        assert (one.version, "holds no index" in str(one.problem)) == (A, True)
        pointer.write_text(content)
        await one.tick()
        assert one.problem is None

    asyncio.run(scenario())
