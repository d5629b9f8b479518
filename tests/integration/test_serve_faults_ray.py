"""Replicas and Serve's controller die or stand still while the service is asked: no request fails."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from tests.integration.runs import indexed_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BODIES: list[dict[str, Any]] = [
    {"query": {"text": "a red apple left of two dogs"}, "top_k": 5, "mode": "coarse"},
    {"query": {"text": "three blue cars"}, "top_k": 5, "mode": "fine", "rerank_k": 2},
]
KINDS = ["Ingress", "BackboneService", "IndexService"]
TWO = {"min_replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    run = tmp_path_factory.mktemp("faults") / "run"
    scaling = {"ingress": TWO, "backbone": TWO, "index": TWO}
    return indexed_scenes(scenes_dir, run, scaling=scaling)


@pytest.fixture(scope="module")
def url(recipe: Recipe) -> Iterator[str]:
    yield start(recipe)
    stop()


def replicas(kind: str) -> list[psutil.Process]:
    """Processes of a deployment that this session started, those that stand still left out."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            is_meant = f"ServeReplica:slq:{kind}" in " ".join(process.cmdline())
            if is_meant and process.status() != psutil.STATUS_STOPPED:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def controller() -> int | None:
    """The process of Serve's controller; None while there is none."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeController" in " ".join(process.cmdline()):
                return process.pid
        except psutil.NoSuchProcess:
            continue
    return None


class Clients:
    """Each asks again as soon as it is answered, and never asks twice for one answer."""

    def __init__(self, url: str, count: int) -> None:
        self.url = url
        self.failures: list[str] = []
        self.num_answers = 0
        self.expected = [self._ask(httpx.Client(base_url=url, timeout=120), b) for b in BODIES]
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> list[str]:
        answer = client.post("/search", json=body)
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.text}")
        found = answer.json()
        if found["degraded"]:
            raise ValueError(f"degraded: {found['degraded_reasons']}")
        return [one["id"] for one in found["results"]]

    def _run(self, number: int) -> None:
        which = number % len(BODIES)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._is_over.is_set():
                try:
                    ids = self._ask(client, BODIES[which])
                    if ids != self.expected[which]:
                        self.failures.append(f"other results: {ids}")
                except (ValueError, httpx.HTTPError) as error:
                    self.failures.append(repr(error))
                self.num_answers += 1

    def wait(self, answers: int) -> None:
        """Until so many more were given."""
        before = self.num_answers
        while self.num_answers < before + answers:
            time.sleep(0.02)

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def clients(url: str) -> Iterator[Clients]:
    with Clients(url, 4) as asking:
        asking.wait(12)
        yield asking
        asking.wait(12)
    assert not asking.failures


def until_two(kind: str, lost: psutil.Process) -> None:
    for _ in range(1200):
        if len([one for one in replicas(kind) if one.pid != lost.pid]) == 2:
            return
        time.sleep(0.1)
    raise AssertionError(f"{kind} does not come back")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_dies_or_stands_still_fails_no_request(
    url: str, kind: str, number: signal.Signals
) -> None:
    with clients(url) as asking:
        lost = replicas(kind)[0]
        lost.send_signal(number)
        until_two(kind, lost)
        asking.wait(12)
    if number is signal.SIGSTOP and lost.is_running():
        lost.kill()


def test_the_death_of_the_controller_fails_no_request(url: str) -> None:
    with clients(url) as asking:
        before = controller()
        assert before is not None
        os.kill(before, signal.SIGKILL)
        asking.wait(24)
        for _ in range(600):
            if controller() not in (None, before):
                break
            time.sleep(0.1)
        assert controller() not in (None, before)
