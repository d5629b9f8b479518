"""Index tasks, the service's index and the benchmark ask for GPUs where the recipe does, with a recorder for Ray."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

import jobs.bench.index as bench
import pipelines.evaluate
import pipelines.index
from jobs.bench.index import build as bench_build
from jobs.bench.index import data as bench_data
from jobs.bench.index.curve import write_curve
from pipelines.index import each_in_tasks
from pipelines.recipe import Recipe
from pipelines.serve import application, check_before_start
from pipelines.serving.index_service import IndexSearch
from pipelines.serving.pinned import Pinned
from pipelines.tasks import require_gpus
from slq.errors import ConfigError, HardwareError
from slq.index import VectorIndex, write_version
from tests.gpus import FakeGpus, real_gpus
from tests.unit.test_index_devices import BUILT, QUERIES, content, files, on, rows_of

NO_GPUS = "resources.gpus_per_index_worker is 1, but the cluster has 0 GPUs; set "
LEARN, FILL, LOOK = "learn lists and codes", "put vectors into lists", "look for the GPU"


class Tasks:
    """Stands for `ray.remote`: calls at once what a task would call.

    Attributes:
        options: Of the tasks of each step, in their order.
    """

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Callable[[Any], "Tasks"]:
        self.options.append(options)
        return lambda _: self

    def remote(self, function: Callable[[Any], Any], argument: Any) -> Any:
        return function(argument)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    found = Tasks()

    def collected(starting: Iterator[Any], count: int, what: str, at_once: int) -> list[Any]:
        return list(starting)

    monkeypatch.setattr(ray, "remote", found)
    monkeypatch.setattr(pipelines.index, "collect_windowed", collected)
    return found


def recipe_with(index: dict[str, Any], **resources: Any) -> Recipe:
    return Recipe.model_validate({"index": index, "resources": resources})


def cluster_of(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 8.0, **({"GPU": gpus} if gpus else {})}
    )


@pytest.mark.parametrize(("device", "gpu"), [("cpu", 0.0), ("cuda", 0.25)])
def test_only_the_steps_that_work_on_a_gpu_hold_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: FakeGpus,
    tasks: Tasks,
    device: str,
    gpu: float,
) -> None:
    cluster_of(monkeypatch, 1)
    recipe = recipe_with({"device": device}, index_workers=4, gpus_per_index_worker=0.25)
    steps = []
    workers = pipelines.index._workers(recipe)

    def each(what: str, *arguments: Any, **options: Any) -> list[Any]:
        steps.append(what)
        return workers(what, *arguments, **options)

    write_version(tmp_path, content(), on(BUILT[0], device), each=each)
    asked = {
        name: options.pop("num_gpus", 0) for name, options in zip(steps, tasks.options, strict=True)
    }
    assert {name for name, count in asked.items() if count} == (
        {LOOK, LEARN, FILL} if gpu else set()
    )
    assert {LEARN, FILL, "read rows", "compare ids", "write partitions"} <= asked.keys()
    assert asked[LEARN] == asked[FILL] == gpu
    # Nothing of max_calls: Ray ends a process with a GPU after its task, and CUDA would stay where it began.
    plain = {"num_cpus": 1, "max_retries": 3, "scheduling_strategy": "SPREAD"}
    assert all(one == plain for one in tasks.options)
    assert len(gpus.moved) == (2 if gpu else 0)


def test_one_worker_builds_in_the_driver_on_any_gpu() -> None:
    recipe = recipe_with({"device": "cuda:3"})
    assert pipelines.index._workers(recipe) is pipelines.index.each_here


def test_tasks_cannot_choose_a_gpu_nor_wait_for_one_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = recipe_with({"device": "cuda:3"}, index_workers=4)
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "index.device is cuda:3, but with resources.index_workers 4 each task works on the GPU that Ray gives it; "
            "set index.device=cuda"
        ),
    ):
        pipelines.index._workers(named)
    cluster_of(monkeypatch, 0)
    asking = recipe_with({"device": "cuda"}, index_workers=4)
    with pytest.raises(HardwareError, match=re.escape(NO_GPUS + "index.device=cpu")):
        pipelines.index._workers(asking)
    cluster_of(monkeypatch, 2)
    assert pipelines.index._workers(asking).keywords == {"gpus": 1.0}  # type: ignore[attr-defined]
    assert each_in_tasks.__kwdefaults__ == {"device": "cpu", "gpus": 1.0}
    require_gpus("resources.gpus_per_worker", 2, "lower it")


@pytest.mark.parametrize("share", [0, -1, 1.5, 2])
def test_an_index_task_works_on_one_gpu_at_most(share: float) -> None:
    with pytest.raises(ValueError, match="gpus_per_index_worker"):
        recipe_with({}, gpus_per_index_worker=share)


def index_actor(recipe: Recipe) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Options of the index's replica, and what it is made with."""
    ingress = application(recipe, Pinned("3f2a", "v000001"))
    deployment = ingress._bound_deployment.init_args[3]._bound_deployment
    return deployment.ray_actor_options, deployment.init_args


def searched_on(arguments: tuple[Any, ...]) -> str:
    """The device that a replica made with these searches on."""
    return Recipe.model_validate(arguments[0]).index.search_device


def test_the_index_of_a_service_gets_a_gpu_where_it_is_searched_on_one() -> None:
    options, arguments = index_actor(recipe_with({"device": "cuda"}))
    assert "num_gpus" not in options  # it was built there, but is not searched there
    assert searched_on(arguments) == "cpu"
    asked = recipe_with({"search_device": "cuda"}, gpus_per_index_worker=0.5)
    options, arguments = index_actor(asked)
    assert (options["num_gpus"], options["num_cpus"]) == (0.5, 0)
    assert searched_on(arguments) == "cuda"


def test_a_service_refuses_a_gpu_that_it_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "index.search_device is cuda:1, but the service's index works on the GPU that Ray gives it; set "
            "index.search_device=cuda"
        ),
    ):
        check_before_start(recipe_with({"search_device": "cuda:1"}))
    cluster_of(monkeypatch, 0)
    with pytest.raises(HardwareError, match=re.escape(NO_GPUS + "index.search_device=cpu")):
        check_before_start(recipe_with({"search_device": "cuda"}))


def test_an_index_searched_where_the_service_says(tmp_path: Path, gpus: FakeGpus) -> None:
    recipe = Recipe.model_validate(
        {"storage": {"dir": tmp_path}, "index": {"search_device": "cuda"}}
    )
    folder = recipe.storage.index
    manifest = write_version(folder, content(), BUILT[0])
    pinned = Pinned(manifest.fingerprint, manifest.version)
    replica = IndexSearch(recipe.model_dump(mode="json"), pinned, object())  # type: ignore[arg-type]
    found = asyncio.run(replica.search(QUERIES[0], 5))
    assert found.version == manifest.version
    assert rows_of([found.hits]) == rows_of(VectorIndex(folder).search(QUERIES[:1], 5))
    assert gpus.searched == [(1, 5)]


def test_an_evaluation_searches_the_index_where_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: FakeGpus
) -> None:
    recipe = Recipe.model_validate(
        {"storage": {"dir": tmp_path}, "index": {"search_device": "cuda"}}
    )
    manifest = write_version(recipe.storage.index, content(), BUILT[0])
    adapter = SimpleNamespace(fingerprint=manifest.fingerprint)
    monkeypatch.setattr(pipelines.evaluate, "load_adapter_config", lambda _: adapter)
    with pipelines.evaluate.open_index(recipe) as index:
        index.search(QUERIES[:2], 5)
    assert gpus.searched == [(2, 5)]


# The benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(real_gpus() > 0, reason="asks for hardware that must be absent")
def test_a_benchmark_of_an_absent_gpu_is_an_error_before_anything_is_made() -> None:
    with pytest.raises(HardwareError, match=r"^--device is cuda, but .*set --device=cpu"):
        bench.run(["--device", "cuda"])
    with pytest.raises(ConfigError, match="compares a GPU with the CPU; add --device cuda"):
        bench.run(["--part", "device"])


@pytest.fixture
def small_benchmark(monkeypatch: pytest.MonkeyPatch, gpus: FakeGpus) -> FakeGpus:
    monkeypatch.setattr(bench, "hnswlib_points", lambda *_: [])  # a package of its own
    monkeypatch.setattr(bench, "_QUICK_S", 0.01)
    monkeypatch.setattr(bench, "_CODE_SHARE", 10)  # centroids weigh much among so few vectors
    for module in (bench_data, bench_build):
        monkeypatch.setattr(module, "BATCH_ROWS", 300)
    return gpus


def options(*others: str) -> list[str]:
    small = (
        "--rows 1000 --dimension 32 --queries 20 --lists 8 --threads 1 --repeats 1 --device cuda"
    )
    return [*small.split(), *others]


def test_a_gpu_is_a_side_of_the_benchmark(tmp_path: Path, small_benchmark: FakeGpus) -> None:
    found = bench.run(options("--part", "search", "--out", str(tmp_path)))
    measured = found["threads"]["1"]
    sides = {row["side"] for row in measured["points"]}
    assert sides == {
        *("flat", "pq4 opq", "rabitq random"),
        *("gpu flat", "gpu float16", "gpu int8"),
    }
    recalls = {row["side"]: row["recall"] for row in measured["points"]}
    assert recalls["gpu flat"] == recalls["flat"] == 1.0
    target = measured["targets"]["0.95"]
    assert target["gpu"]["side"].startswith("gpu ")
    assert {"ours_to_flat", "gpu_to_flat", "gpu_to_ours"} <= target.keys()
    assert (tmp_path / "index.png").read_bytes()[:4] == b"\x89PNG"
    assert write_curve(found, tmp_path / "again.png").exists()
    assert len(small_benchmark.searched) > 6


def test_steps_of_a_build_are_timed_on_both(small_benchmark: FakeGpus) -> None:
    found = bench.run(options("--part", "device"))["device"]
    assert found.keys() == {"rabitq random", "pq4 opq"}
    for steps in found.values():
        assert steps.keys() == {LEARN, FILL}
        for step in steps.values():
            ((on_cpu, on_gpu),) = step["seconds"]  # the round that warms up is left out
            assert on_cpu >= 0
            assert on_gpu >= 0
            assert step["cpu_to_gpu"] > 0
    assert small_benchmark.moved


def test_files_of_both_devices_are_the_same_for_every_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: FakeGpus, tasks: Tasks
) -> None:
    cluster_of(monkeypatch, 1)
    for workers in (1, 3):
        recipe = recipe_with({"device": "cuda"}, index_workers=workers)
        each = pipelines.index._workers(recipe)
        write_version(tmp_path / str(workers), content(), on(BUILT[4]), each=each)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert np.unique([number for number, _ in gpus.moved]).tolist() == [0]
