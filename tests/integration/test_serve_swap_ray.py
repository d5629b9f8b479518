"""A service of two partitions on Ray: moved between index versions under load, and with a partition lost."""

import itertools
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from pipelines.embed import embed
from pipelines.index import index
from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from slq.index import VectorIndex, compact, delete, roll_back
from slq.index.building import INDEX
from slq.index.versions import SEGMENTS, point_to, read_manifest
from tests.integration.runs import changed, free_port, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]
A, BETWEEN, B, DAMAGED = "v000001", "v000002", "v000003", "v000004"
TOP_K = 8
LEFT_OUT = range(0, 32, 3)
POLL_S = 0.2
SOON_S = 5.0  # a way back takes a fraction of a second where nothing else runs
Truth = dict[str, list[list[tuple[str, float]]]]


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An index of several partition files, in two versions: the second one lacks every third item.

    It was compacted: few items of which some are deleted are compared one by one, without any partition.
    """
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        adapter={"num_latents": 4},
        index={"partition_bytes": 8_000},
        serve={
            "port": free_port(),
            "num_threads": 1,
            "follow_index": True,
            "poll_s": POLL_S,
            "partition_timeout_s": 1.0,
        },
        resources={"index_partitions": 2},
        storage={"dir": tmp_path_factory.mktemp("swap") / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    index(recipe)
    folder = recipe.storage.index
    names = [VectorIndex(folder).row(number)["id"] for number in LEFT_OUT]
    delete(folder, names)
    assert compact(folder).version == B
    shutil.rmtree(folder / BETWEEN)
    point_to(folder, A)
    return recipe


@pytest.fixture(scope="module")
def service(recipe: Recipe) -> Iterator[httpx.Client]:
    url = start(recipe)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    stop()


@pytest.fixture(scope="module")
def queries(recipe: Recipe) -> NDArray[np.float32]:
    """Unit vectors near the items that the second version lacks, so that its answers are others."""
    whole = VectorIndex(recipe.storage.index, A)
    items = whole.vectors_of([whole.row(number)["id"] for number in LEFT_OUT])
    noise = np.random.default_rng(0).standard_normal(items.shape).astype(np.float32)
    mixed = items + 0.02 * noise
    unit: NDArray[np.float32] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return unit


@pytest.fixture(scope="module")
def truth(recipe: Recipe, queries: NDArray[np.float32]) -> Truth:
    """What the whole index finds, by version; the service normalises the vectors that it is sent once more."""
    wide = queries.astype(np.float64)
    sent = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    found = {}
    for version in (A, B):
        whole = VectorIndex(recipe.storage.index, version)
        answers = [whole.search(query[None], TOP_K)[0] for query in sent]
        found[version] = [[(hit.id, hit.score) for hit in hits] for hits in answers]
    assert all(one != other for one, other in zip(found[A], found[B], strict=True))
    return found


def ask(client: httpx.Client, query: NDArray[np.float32]) -> httpx.Response:
    body = {"query": {"embedding": query.tolist()}, "top_k": TOP_K, "mode": "coarse"}
    return client.post("/search", json=body)


def hits_of(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(result["id"], result["score"]) for result in answer["results"]]


class Load:
    """Threads that ask one query after the other; every answer, with the time it came."""

    def __init__(self, service: httpx.Client, queries: NDArray[np.float32]) -> None:
        self.answers: list[tuple[float, int, dict[str, Any]]] = []
        self.errors: list[str] = []
        self._url, self._queries = service.base_url, queries
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(3)]

    def _ask(self, first: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for turn in itertools.count(first):
                if self._stop.is_set():
                    return
                number = turn % len(self._queries)
                try:
                    answer = ask(client, self._queries[number])
                except httpx.HTTPError as error:
                    self.errors.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.answers.append((time.monotonic(), number, answer.json()))
                else:
                    self.errors.append(answer.text)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, holds: Callable[[dict[str, Any]], bool], within_s: float = 60) -> float:
        """Seconds until an answer, asked from now on, is as wanted."""
        started = time.monotonic()
        while time.monotonic() - started < within_s:
            for at, _, answer in self.answers[-20:]:
                if at > started and holds(answer):
                    return at - started
            time.sleep(0.005)
        raise AssertionError(f"no such answer within {within_s} s; errors: {self.errors[:3]}")

    def require_consistent(self, truth: Truth) -> set[str]:
        """Every answer is what one version gives; its versions."""
        assert self.errors == []
        for _, number, answer in self.answers:
            assert hits_of(answer) == truth[answer["index_version"]][number]
            assert (answer["shards_ok"], answer["shards_total"], answer["degraded"]) == (
                2,
                2,
                False,
            )
        return {answer["index_version"] for _, _, answer in self.answers}


def at(version: str) -> Callable[[dict[str, Any]], bool]:
    return lambda answer: bool(answer["index_version"] == version)


def move(service: httpx.Client, version: str) -> httpx.Response:
    return service.post("/admin/index", json={"version": version})


def process_of(replica: str) -> psutil.Process:
    """The process of a deployment's replica, among those that this session started."""
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:slq:{replica}" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no process of {replica}")


def wait_for(service: httpx.Client, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    info: dict[str, Any] = {}
    for _ in range(600):
        answer = service.get("/info")
        info = answer.json()
        if answer.status_code == 200 and holds(info):
            return info
        time.sleep(0.1)
    raise AssertionError(f"it never came to that: {info}")


# ---- moving ----


def test_two_partitions_answer_as_the_whole_index_does(
    service: httpx.Client, queries: NDArray[np.float32], truth: Truth
) -> None:
    for query, expected in zip(queries, truth[A], strict=True):
        answer = ask(service, query).json()
        assert hits_of(answer) == expected
        assert (answer["shards_ok"], answer["shards_total"], answer["degraded"]) == (2, 2, False)
    info = wait_for(service, lambda info: all(one["num_vectors"] for one in info["partitions"]))
    assert sum(one["num_vectors"][A] for one in info["partitions"]) == 32
    assert all(0 < one["num_vectors"][A] < 32 for one in info["partitions"])
    assert (info["index_version"], info["follows_index"]) == (A, True)


def test_to_another_version_and_back_under_load_every_answer_is_of_one_version(
    service: httpx.Client, recipe: Recipe, queries: NDArray[np.float32], truth: Truth
) -> None:
    with Load(service, queries) as load:
        load.until(at(A))
        point_to(recipe.storage.index, B)
        load.until(at(B))
        started = time.monotonic()
        roll_back(recipe.storage.index)
        load.until(at(A))
        followed_s = time.monotonic() - started
        forth = move(service, B)
        assert forth.status_code == 200, forth.text
        assert forth.json()["index_version"] == B
        load.until(at(B))
        started = time.monotonic()
        back = move(service, "previous")
        assert back.json()["index_version"] == A
        assert back.json()["previous_version"] == B
        load.until(at(A))
        sent_s = time.monotonic() - started
        load.until(lambda _: len(load.answers) > 50)
    print(f"back after {followed_s:.3f} s by the pointer, after {sent_s:.3f} s by a request")
    assert max(followed_s, sent_s) < SOON_S
    assert load.require_consistent(truth) == {A, B}


def test_a_damaged_version_is_refused_and_the_old_one_stays(
    service: httpx.Client, recipe: Recipe, queries: NDArray[np.float32], truth: Truth
) -> None:
    folder = recipe.storage.index
    assert move(service, A).json()["index_version"] == A  # and the pointer is not followed
    assert compact(folder).version == DAMAGED
    point_to(folder, A)
    segment = read_manifest(folder, DAMAGED).segments[0].name
    codes = folder / SEGMENTS / segment / "partitions" / "0000" / INDEX
    data = bytearray(codes.read_bytes())
    data[len(data) // 2] ^= 1
    codes.write_bytes(data)
    assert move(service, "current").json()["index_version"] == A
    with Load(service, queries) as load:
        load.until(at(A))
        point_to(folder, DAMAGED)
        info = wait_for(service, lambda info: info["refused_version"] == DAMAGED)
        assert f"{INDEX} does not match the sha256 in its manifest" in info["refused_reason"]
        assert (info["index_version"], info["follows_index"]) == (A, True)
        refused = move(service, DAMAGED)
        message = f"index version {DAMAGED} is refused, {A} stays: "
        assert message in refused.json()["error"]["message"]
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "version_refused")
        load.until(at(A))
    assert load.require_consistent(truth) == {A}
    point_to(folder, A)


@pytest.mark.parametrize(
    ("version", "status", "message"),
    [
        ("v000077", 400, f"there is no version v000077; the index has {A}, {B}"),
        ("../v000002", 400, "version"),
        ("newest", 400, "version"),
    ],
)
def test_a_version_that_is_not_there_is_a_400(
    service: httpx.Client, version: str, status: int, message: str
) -> None:
    answer = move(service, version)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# ---- lost partitions ----


def test_a_killed_partition_is_told_until_it_is_back_at_the_version_that_the_service_is_on(
    service: httpx.Client, queries: NDArray[np.float32], truth: Truth
) -> None:
    assert move(service, B).json()["index_version"] == B
    with Load(service, queries) as load:
        load.until(at(B))
        process_of("Partition1").kill()
        load.until(lambda answer: answer["shards_ok"] == 1)
        load.until(lambda answer: answer["shards_ok"] == 2)
    assert load.errors == []
    for _, number, answer in load.answers:
        assert (answer["shards_total"], answer["index_version"]) == (2, B)
        assert answer["degraded"] is (answer["shards_ok"] < 2)
        if answer["shards_ok"] == 2:
            assert hits_of(answer) == truth[B][number]
        else:  # fewer items were compared, so what both have keeps its order
            found, whole = hits_of(answer), truth[B][number]
            assert [hit for hit in found if hit in whole] == [hit for hit in whole if hit in found]
            assert len(found) == TOP_K
    assert service.get("/readyz").status_code == 200


def test_a_stopped_partition_is_told_and_not_waited_for(
    service: httpx.Client, queries: NDArray[np.float32], truth: Truth
) -> None:
    process = process_of("Partition0")
    with Load(service, queries) as load:
        load.until(at(B))
        process.send_signal(signal.SIGSTOP)
        try:
            load.until(lambda answer: answer["shards_ok"] == 1)
            info = service.get("/info").json()
            assert [one["ok"] for one in info["partitions"]] == [False, True]
            assert "no answer within 1 s" in info["partitions"][0]["problem"]
            slowest = 0.0
            for query in queries:
                started = time.monotonic()
                assert ask(service, query).json()["degraded"] is True
                slowest = max(slowest, time.monotonic() - started)
            assert slowest < 1  # which it would take to wait for the partition
        finally:
            process.send_signal(signal.SIGCONT)
        load.until(lambda answer: answer["shards_ok"] == 2)
    assert load.errors == []
    whole = [one for one in load.answers if one[2]["shards_ok"] == 2]
    assert all(hits_of(answer) == truth[B][number] for _, number, answer in whole)


def test_a_router_that_is_started_again_is_where_the_service_is(
    service: httpx.Client, queries: NDArray[np.float32], truth: Truth
) -> None:
    """Neither where the service started nor where the pointer is."""
    assert move(service, B).json()["index_version"] == B
    process_of("IndexService").send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = ask(service, queries[0])
        if answer.status_code == 200 and answer.json()["shards_ok"] == 2:
            break
        assert answer.status_code in (200, 503)
        time.sleep(0.2)
    for query, expected in zip(queries, truth[B], strict=True):
        assert hits_of(ask(service, query).json()) == expected
    info = service.get("/info").json()
    assert (info["index_version"], info["follows_index"]) == (B, False)
    back = move(service, "previous").json()
    assert (back["index_version"], back["seconds"] < SOON_S) == (A, True)


def test_by_policy_a_lost_partition_is_a_503_with_a_time_to_retry(
    service: httpx.Client, recipe: Recipe, queries: NDArray[np.float32]
) -> None:
    del service
    stop()
    assert not list((recipe.storage.dir / "serve").iterdir())  # nothing of the service is left
    strict = changed(
        recipe, serve={"port": free_port(), "on_lost_partition": "fail", "admin": False}
    )
    url = start(strict)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            assert ask(client, queries[0]).json()["index_version"] == A
            refused = move(client, B)
            assert refused.status_code == 403
            assert "serve.admin" in refused.json()["error"]["message"]
            process_of("Partition1").kill()
            answer = ask(client, queries[0])
            assert answer.status_code == 503, answer.text
            assert "1 of 2 partitions of the index answer" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0
            assert client.get("/readyz").status_code == 503
            deadline = time.monotonic() + 60
            while ask(client, queries[0]).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        stop()
