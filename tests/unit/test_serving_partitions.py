"""Partitions behind one router, without Ray: real partitions, called as a handle calls them, in one process."""

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

import pipelines.serving.fleet
import pipelines.serving.partition
from pipelines.recipe import Recipe
from pipelines.serving.fleet import Fleet
from pipelines.serving.index_service import Found, IndexSearch, Moved
from pipelines.serving.partition import Partition
from pipelines.serving.pinned import Pinned
from pipelines.serving.shelf import Shelf
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    DataError,
    RefusedVersionError,
    ServiceError,
    UnavailableError,
)
from slq.index import Content, IndexConfig, VectorIndex, write_version
from slq.index.building import INDEX
from slq.index.shares import merged
from slq.index.versions import SEGMENTS, read_manifest
from tests.unit.index_data import (
    COUNT,
    IVF,
    Given,
    published,
    small_partitions,
    table,
    unit_vectors,
)

A, B, C = "v000001", "v000002", "v000003"
QUERIES = unit_vectors(4, seed=1)
SMALL = small_partitions(IVF.model_copy(update={"codes": "int8", "num_probes": 4}), 60)
TIMEOUT_S = 0.5


class Handle:
    """Calls an object as the handle of its deployment does; it can be killed, or stopped."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.state = "alive"

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": lambda _, *args: self._remote(name, args)})()

    def _remote(self, name: str, args: tuple[Any, ...]) -> Any:
        if self.state == "gone":
            raise RuntimeError("there is no such deployment")
        return self._call(name, args)

    async def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        if self.state == "dead":
            raise ConnectionError("the actor died\nand here is a long story")
        if self.state == "stopped":
            await asyncio.sleep(60)
        if self.state == "slow" and name == "scan":
            await asyncio.sleep(60)
        if self.state == "busy":
            raise BackPressureError(3, 3)
        method = getattr(self.target, name)
        if inspect.iscoroutinefunction(method):
            return await method(*args)
        return await asyncio.to_thread(method, *args)  # as Ray Serve does


class Model:
    """Stands for the backbone, of which only the canary is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.spaces = {"3f2a"}

    async def require_canary(self, version: str, fingerprint: str) -> None:
        self.asked.append(version)
        if self.error is not None:
            raise self.error
        await self.require_adapter(version, fingerprint)

    async def require_adapter(self, version: str, fingerprint: str) -> None:
        if fingerprint not in self.spaces:
            raise ArtifactMismatchError(f"no adapter has fingerprint {fingerprint}")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run with an index of one version of some partitions."""
    published(tmp_path / "index", SMALL)
    return recipe_of(tmp_path)


def recipe_of(folder: Path, **serve: Any) -> Recipe:
    settings = {"partition_timeout_s": TIMEOUT_S, "poll_s": 0.02, **serve}
    return Recipe.model_validate({"storage": {"dir": folder}, "serve": settings})


def pinned_of(recipe: Recipe) -> Pinned:
    return Pinned("3f2a", A, recipe.storage.dir / "serve" / "course.json")


class Service:
    """A router with its partitions and a model."""

    def __init__(self, recipe: Recipe, count: int = 3) -> None:
        self.recipe, self.count = recipe, count
        self.model = Model()
        self.handles = [Handle(self.partition(number)) for number in range(count)]
        self.router = self.new_router()

    def partition(self, number: int) -> Partition:
        folder = str(self.recipe.storage.index)
        return Partition(folder, number, self.count, pinned_of(self.recipe))

    def new_router(self) -> IndexSearch:
        plain = self.recipe.model_dump(mode="json")
        pinned = pinned_of(self.recipe)
        return IndexSearch(plain, pinned, Handle(self.model), *self.handles)  # type: ignore[arg-type]

    async def search(self, top_k: int = 10) -> list[Found]:
        return await asyncio.gather(*[self.router.search(one, top_k) for one in QUERIES])

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        for _ in range(500):
            if await holds():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it never came to that")

    async def until_whole(self) -> None:
        async def whole() -> bool:
            return bool((await self.router.describe())["shards_ok"] == self.count)

        await self.until(whole)


def expected(recipe: Recipe, version: str, top_k: int = 10) -> list[list[Any]]:
    whole = VectorIndex(recipe.storage.index, version)
    return [whole.search(query[None], top_k)[0] for query in QUERIES]


def run(scenario: Callable[[], Awaitable[None]], router: IndexSearch | None = None) -> None:
    """Run a scenario, beside what keeps a router up to date if one is given."""

    async def both() -> None:
        keeping = asyncio.create_task(router.keep_up()) if router is not None else None
        try:
            await scenario()
        finally:
            if keeping is not None:
                keeping.cancel()

    asyncio.run(both())


def damage(folder: Path, version: str, *, partition: int) -> None:
    """Flip a bit of the codes of a partition."""
    segment = read_manifest(folder, version).segments[0].name
    path = folder / SEGMENTS / segment / "partitions" / f"{partition:04d}" / INDEX
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@contextmanager
def forgetting_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.serving.partition, "_FORGET_S", 1e-9)
        yield


# ---- answers ----


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_router_answers_as_the_whole_index_does(recipe: Recipe, count: int) -> None:
    service = Service(recipe, count)

    async def scenario() -> None:
        for top_k in (1, 10, COUNT):
            found = await service.search(top_k)
            assert [one.hits for one in found] == expected(recipe, A, top_k)
            assert {(one.shards_ok, one.shards_total, one.version) for one in found} == {
                (count, count, A)
            }
            assert found[0].rows[0]["id"] == found[0].hits[0].id

    run(scenario)


def test_without_partitions_the_whole_index_is_one_shard(recipe: Recipe) -> None:
    service = Service(recipe, 0)

    async def scenario() -> None:
        found = await service.search()
        assert [one.hits for one in found] == expected(recipe, A)
        assert {(one.shards_ok, one.shards_total) for one in found} == {(1, 1)}
        told = await service.router.describe()
        assert (told["shards_ok"], told["shards_total"], told["partitions"]) == (1, 1, [])

    run(scenario)


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("dead", "the actor died"),
        ("gone", "there is no such deployment"),
        ("stopped", "no answer within 0.5 s"),
    ],
)
def test_a_lost_partition_is_told_and_not_waited_for_again(
    recipe: Recipe, state: str, problem: str
) -> None:
    service = Service(recipe)
    shares = [handle.target for handle in service.handles if handle is not service.handles[1]]

    async def scenario() -> None:
        await service.until_whole()
        service.handles[1].state = state
        loop = asyncio.get_running_loop()
        started = loop.time()
        found = await service.search()
        assert loop.time() - started < TIMEOUT_S + 1
        assert {(one.shards_ok, one.shards_total) for one in found} == {(2, 3)}
        head = VectorIndex(recipe.storage.index, A, has_codes=False)
        for one, query in zip(found, QUERIES, strict=True):
            left = head.search(
                query[None],
                10,
                scan=lambda *args: merged([s.scan(A, *args) for s in shares], args[1]),
            )
            assert one.hits == left[0]
        started = loop.time()
        again = await service.search()
        assert loop.time() - started < TIMEOUT_S
        assert again == found
        told = await service.router.describe()
        assert told["shards_ok"] == 2
        assert [(one["ok"], one["problem"]) for one in told["partitions"]] == [
            (True, None),
            (False, problem),
            (True, None),
        ]
        service.handles[1].state = "alive"
        await service.until_whole()
        assert [one.hits for one in await service.search()] == expected(recipe, A)

    run(scenario, service.router)


def test_by_policy_nothing_is_answered_where_a_partition_is_lost(tmp_path: Path) -> None:
    published(tmp_path / "index", SMALL)
    service = Service(recipe_of(tmp_path, on_lost_partition="fail"))

    async def scenario() -> None:
        assert [one.shards_ok for one in await service.search()] == [3] * len(QUERIES)
        service.handles[0].state = "dead"
        for _ in range(2):
            with pytest.raises(UnavailableError, match="2 of 3 partitions of the index answer"):
                await service.search()
        service.handles[0].state = "alive"
        await service.until_whole()
        assert [one.hits for one in await service.search()] == expected(service.recipe, A)

    run(scenario, service.router)


def test_nothing_is_answered_where_all_partitions_are_lost(recipe: Recipe) -> None:
    service = Service(recipe)

    async def scenario() -> None:
        for handle in service.handles:
            handle.state = "dead"
        for _ in range(2):
            with pytest.raises(UnavailableError, match="0 of 3 partitions of the index answer"):
                await service.search()

    run(scenario)


def test_a_partition_that_has_too_much_to_do_is_missing_but_not_lost(recipe: Recipe) -> None:
    service = Service(recipe)

    async def scenario() -> None:
        service.handles[2].state = "busy"
        assert {one.shards_ok for one in await service.search()} == {2}
        service.handles[2].state = "alive"
        assert {one.shards_ok for one in await service.search()} == {3}

    run(scenario)


def test_a_partition_that_is_still_starting_is_not_lost(recipe: Recipe) -> None:
    """Ray Serve starts the router and its partitions in any order."""
    service = Service(recipe)

    async def scenario() -> None:
        service.handles[1].state = "stopped"
        await asyncio.sleep(2 * TIMEOUT_S)  # it is asked what it holds, and does not answer
        assert (await service.router.describe())["shards_ok"] == 3
        service.handles[1].state = "alive"
        assert {one.shards_ok for one in await service.search()} == {3}

    run(scenario, service.router)


def test_a_fleet_without_partitions_finds_nothing() -> None:
    fleet = Fleet([], 1.0)
    assert asyncio.run(fleet.scan(A, QUERIES, [3], None)) == {}
    assert (len(fleet), fleet.describe(A)) == (0, [])


def test_a_partition_that_was_late_is_not_asked_again_before_a_pause_that_grows(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(recipe)
    now = 100.0
    monkeypatch.setattr(pipelines.serving.fleet, "monotonic", lambda: now)
    fleet = Fleet(service.handles, 0.1)

    async def scenario() -> None:
        nonlocal now
        for pause in (0.05, 0.1, 0.2):  # it answers `hold` all the time, and no search
            service.handles[1].state = "slow"
            assert set(await fleet.scan(A, QUERIES, [5], None)) == {0, 2}
            for early in (0.0, 0.9 * pause):
                now += early
                await fleet.hold([A])
                assert [one["ok"] for one in fleet.describe(A)] == [True, False, True]
            now += pause
            await fleet.hold([A])
            assert [one["ok"] for one in fleet.describe(A)] == [True] * 3
        service.handles[1].state = "alive"
        assert set(await fleet.scan(A, QUERIES, [5], None)) == {0, 1, 2}
        assert not fleet._pauses

    asyncio.run(scenario())


def test_a_partition_without_the_version_is_not_ok_though_it_answers(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(recipe)
    late = service.handles[1].target
    monkeypatch.setattr(late, "_load", _fails("stale file handle"))
    late._shelf = Shelf(late._load)

    async def scenario() -> None:
        async def told() -> bool:
            info = await service.router.describe()
            return "stale file handle" in str(info["partitions"][1]["problem"])

        await service.until(told)
        assert (await service.router.describe())["shards_ok"] == 2
        for _ in range(3):
            assert {one.shards_ok for one in await service.search()} == {2}
        monkeypatch.undo()  # the disk is back
        monkeypatch.setattr(pipelines.serving.partition, "_AGAIN_S", 0.05)
        late._shelf = Shelf(late._load)
        await service.until_whole()
        assert [one.hits for one in await service.search()] == expected(recipe, A)

    run(scenario, service.router)
    told = [r for r in caplog.records if f"does not hold index version {A}" in r.getMessage()]
    assert len(told) == 1


def _fails(reason: str) -> Callable[[str], Any]:
    def load(_: str) -> Any:
        raise OSError(reason)

    return load


# ---- moving ----


def test_a_move_waits_for_a_busy_partition(recipe: Recipe) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        service.handles[0].state = "busy"
        moving = asyncio.create_task(service.router.send("current"))
        await asyncio.sleep(3 * TIMEOUT_S)
        assert not moving.done()
        assert {one.version for one in await service.search()} == {A}
        service.handles[0].state = "alive"
        assert (await moving).version == B
        found = await service.search()
        assert {(one.version, one.shards_ok) for one in found} == {(B, 3)}

    run(scenario, service.router)


def test_a_partition_that_cannot_read_its_disk_now_does_not_make_a_version_bad(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)
    part = service.handles[1].target

    async def scenario() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(part._shelf, "_load", _fails("stale file handle"))
            with pytest.raises(
                UnavailableError, match="partition 1 cannot load it now: OSError: stale"
            ):
                await service.router.send("current")
        told = await service.router.describe()
        assert (told["index_version"], told["refused_version"]) == (A, None)
        assert (await service.router.send("current")).version == B

    run(scenario)


def test_a_way_back_waits_for_a_partition_that_was_started_again(recipe: Recipe) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        assert (await service.router.send("current")).version == B
        service.handles[1].target = service.partition(1)  # has B alone
        assert service.handles[1].target.scan(A, QUERIES, [5], None) is None
        assert (await service.router.send("previous")).version == A
        found = await service.search()
        assert {(one.version, one.shards_ok) for one in found} == {(A, 3)}
        assert [one.hits for one in found] == expected(recipe, A)

    run(scenario)


@pytest.mark.parametrize("count", [0, 3])
def test_every_answer_is_of_one_version_while_the_service_moves_to_and_fro(
    tmp_path: Path, count: int
) -> None:
    published(tmp_path / "index", SMALL)
    recipe = recipe_of(tmp_path, follow_index=True)
    service = Service(recipe, count)
    published(tmp_path / "index", small_partitions(IndexConfig(), 50), seed=2)
    truth = {version: expected(recipe, version) for version in (A, B)}
    seen: list[tuple[int, str]] = []
    clock = itertools.count()

    async def scenario() -> None:
        async def ask(stop: asyncio.Event) -> None:
            while not stop.is_set():
                for number, query in enumerate(QUERIES):
                    begun = next(clock)
                    found = await service.router.search(query, 10)
                    assert found.hits == truth[found.version][number]
                    assert found.shards_ok == max(1, count)
                    seen.append((begun, found.version))

        stop = asyncio.Event()
        asking = [asyncio.create_task(ask(stop)) for _ in range(4)]

        async def at_b() -> bool:
            return bool((await service.router.describe())["index_version"] == B)

        async def since(moment: int) -> set[str]:
            """Versions of answers to what was asked later, when there are some."""

            async def there() -> bool:
                return sum(begun > moment for begun, _ in seen) >= len(asking)

            await service.until(there)
            return {version for begun, version in seen if begun > moment}

        await service.until(at_b)  # it follows the pointer by itself
        for wanted, version in (("previous", A), ("current", B), (A, A), ("previous", B)):
            assert (await service.router.send(wanted)).version == version
            assert await since(next(clock)) == {version}
        stop.set()
        await asyncio.gather(*asking)

    run(scenario, service.router)
    assert {A, B} == {version for _, version in seen}


def test_a_version_that_one_partition_cannot_load_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        sick = service.handles[1].target
        monkeypatch.setattr(sick._shelf, "_load", _raise("its disk is broken"))
        with pytest.raises(RefusedVersionError, match="partition 1 cannot load it: its disk is"):
            await service.router.send("current")
        told = await service.router.describe()
        assert (told["index_version"], told["refused_version"]) == (A, B)
        assert told["refused_reason"] == "partition 1 cannot load it: its disk is broken"
        assert [one.hits for one in await service.search()] == expected(recipe, A)
        monkeypatch.setattr(sick._shelf, "_load", sick._load)
        assert (await service.router.send(B)).version == B
        assert [one.hits for one in await service.search()] == expected(recipe, B)

    run(scenario, service.router)


def _raise(message: str) -> Callable[[str], Any]:
    def load(_: str) -> Any:
        raise ArtifactError(message)

    return load


@pytest.mark.parametrize("count", [0, 3])
def test_a_bit_that_is_wrong_anywhere_keeps_the_service_where_it_is(
    recipe: Recipe, count: int
) -> None:
    service = Service(recipe, count)
    published(recipe.storage.index, SMALL, seed=2)
    damage(recipe.storage.index, B, partition=2)

    async def scenario() -> None:
        with pytest.raises(RefusedVersionError, match=r"partitions/0002/index.faiss does not mat"):
            await service.router.send("current")
        assert service.model.asked == []
        assert [one.hits for one in await service.search()] == expected(recipe, A)

    run(scenario, service.router)


@pytest.mark.parametrize(
    ("fingerprint", "dimension", "message"),
    [
        ("91bc", 32, "no adapter has fingerprint 91bc"),
        ("3f2a", 16, "its vectors have 16 values, and those of this service 32"),
    ],
)
def test_a_version_of_another_embedding_space_is_refused(
    recipe: Recipe, fingerprint: str, dimension: int, message: str
) -> None:
    service = Service(recipe)
    rows = table()
    if dimension != 32:
        from slq.arrow import vector_column

        short = vector_column(unit_vectors(COUNT, dimension=dimension).astype(np.float16))
        rows = rows.set_column(1, "embedding", short)
    write_version(
        recipe.storage.index, Content([Given(rows)], dimension, fingerprint), IndexConfig()
    )

    async def scenario() -> None:
        with pytest.raises(RefusedVersionError, match=message):
            await service.router.send("current")
        assert [one.hits for one in await service.search()] == expected(recipe, A)

    run(scenario, service.router)


@pytest.mark.parametrize("num_partitions", [0, 2])
def test_a_service_with_the_adapter_of_a_version_goes_there_and_ends_what_it_began(
    recipe: Recipe, num_partitions: int
) -> None:
    """Whoever embedded for the version before is answered from it, and told where the service is by now."""
    service = Service(recipe, num_partitions)
    service.model.spaces.add("91bc")
    write_version(recipe.storage.index, Content([Given(table())], 32, "91bc"), IndexConfig())
    query = QUERIES[0]

    async def scenario() -> None:
        before = await service.router.search(query, 10, "3f2a")
        assert (before.version, before.fingerprint, before.moved_to) == (A, "3f2a", "3f2a")
        await service.router.send("current")
        late = await service.router.search(query, 10, "3f2a")
        assert (late.version, late.fingerprint, late.moved_to) == (A, "3f2a", "91bc")
        assert late.hits == before.hits
        new = await service.router.search(query, 10, "91bc")
        assert (new.version, new.fingerprint, new.moved_to) == (B, "91bc", "91bc")
        assert (await service.router.search(query, 10)).version == B
        assert await service.router.search(query, 10, "0000") == Moved("91bc")
        await service.router.send("previous")
        service.model.spaces.remove("91bc")  # nobody needs it now
        with pytest.raises(RefusedVersionError, match="no adapter has fingerprint 91bc"):
            await service.router.send(B)  # though the version is still loaded
        assert (await service.router.search(query, 10)).version == A

    run(scenario, service.router)


def test_a_version_whose_items_the_model_embeds_otherwise_is_refused(recipe: Recipe) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        service.model.error = ArtifactMismatchError("the model embeds item 'x' otherwise")
        with pytest.raises(RefusedVersionError, match="embeds item 'x' otherwise"):
            await service.router.send("current")
        service.model.error = UnavailableError("too many requests are waiting")
        with pytest.raises(UnavailableError):
            await service.router.send("current")
        service.model.error = None
        assert (await service.router.send("current")).version == B
        assert (await service.router.send("previous")).version == A
        assert service.model.asked == [B, B, B]  # what proved good once is not tried again

    run(scenario, service.router)


def test_a_partition_that_does_not_hold_the_version_says_so_and_gets_it(recipe: Recipe) -> None:
    """It was lost while the service moved; Ray Serve started it anew, from before the move."""
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)
    late = service.partition(1)

    async def scenario() -> None:
        service.handles[1].state = "dead"
        await service.search()
        assert (await service.router.send("current")).version == B
        service.handles[1].target = late
        assert late.scan(B, QUERIES, [5], None) is None
        service.handles[1].state = "alive"
        found = await service.router.search(QUERIES[0], 10)
        assert (found.version, found.shards_ok) == (B, 2)

        async def whole() -> bool:
            return (await service.router.search(QUERIES[0], 10)).shards_ok == 3

        await service.until(whole)
        assert [one.hits for one in await service.search()] == expected(recipe, B)

    run(scenario, service.router)


def test_replicas_that_start_later_come_up_where_the_service_is(recipe: Recipe) -> None:
    service = Service(recipe)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        assert (await service.router.send("current")).version == B
        published(recipe.storage.index, SMALL, seed=3)
        late = service.partition(0)
        assert late.scan(B, QUERIES, [5], None) is not None
        assert late.scan(C, QUERIES, [5], None) is None
        service.router = service.new_router()
        assert [one.hits for one in await service.search()] == expected(recipe, B)

    run(scenario)


def test_a_partition_lets_go_of_what_nobody_asked_for_in_a_while(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(recipe.storage.index, SMALL, seed=2)
    part = Partition(str(recipe.storage.index), 0, 2, pinned_of(recipe))

    async def scenario() -> None:
        both = await part.hold([A, B])
        assert set(both.vectors) == {A, B}
        assert set((await part.hold([B])).vectors) == {A, B}  # someone may be at A still
        with forgetting_at_once(monkeypatch):
            await part.hold([B])
        gone = await part.hold(["v000009"])
        assert set(gone.vectors) == {B}
        assert "v000009" in gone.refused

    run(scenario)


def test_a_replica_that_cannot_go_where_the_service_is_is_not_healthy(recipe: Recipe) -> None:
    here = Service(recipe, 0)
    there = Service(recipe, 0)
    published(recipe.storage.index, SMALL, seed=2)

    async def scenario() -> None:
        here.model.error = ArtifactMismatchError("another model runs on this machine")
        await there.router.send("current")
        await here.router._follower.tick()
        with pytest.raises(ServiceError, match=rf"at index version {B}, and this replica cannot"):
            await here.router.check_health()
        await there.router.check_health()
        here.model.error = None
        await here.router._follower.tick()
        await here.router.check_health()
        assert [one.version for one in await here.search()] == [B] * len(QUERIES)

    run(scenario)


# ---- items like one ----


@pytest.mark.parametrize("count", [0, 2, 9])
def test_items_like_one_are_found_as_the_whole_index_finds_them(recipe: Recipe, count: int) -> None:
    service = Service(recipe, count)
    whole = VectorIndex(recipe.storage.index, A)

    async def scenario() -> None:
        for top_k in (1, 10, COUNT):
            found = await service.router.search("item-7", top_k)
            assert found.hits == whole.more_like("item-7", top_k)
            assert "item-7" not in {hit.id for hit in found.hits}
            assert found.like == whole.item("item-7")
            assert (found.shards_ok, found.version) == (max(1, count), A)
        assert (await service.router.search(QUERIES[0], 1)).like is None
        with pytest.raises(DataError, match="the index holds no item 'item-9999'"):
            await service.router.search("item-9999", 3)

    run(scenario)


def test_rows_are_told_by_id_with_the_version_that_holds_them(recipe: Recipe) -> None:
    service = Service(recipe, 0)

    async def scenario() -> None:
        rows, version = await service.router.rows_of(["item-3", "absent", "item-1"])
        assert [row and row["id"] for row in rows] == ["item-3", None, "item-1"]
        assert version == A

    run(scenario)
