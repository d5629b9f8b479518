"""A service of several adapters, and its way from one embedding space to another, while it is asked."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines.embed import embed
from pipelines.index import index
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from slq.artifacts import load_adapter_config
from slq.encoder import Encoder
from slq.index import VectorIndex
from tests.integration.runs import changed, indexed_scenes, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUERIES = ["a red apple left of two dogs", "three blue cars", "a cat above a tree"]
OTHER = "variants/other"


def other_of(recipe: Recipe) -> Recipe:
    """The same corpus by another adapter, whose index is a further version of the first one's."""
    run = recipe.storage.dir / OTHER
    mine = changed(recipe, storage={"dir": run, "embedding_dir": str(run / "embeddings")})
    mine = with_untrained_adapter(changed(mine, adapter={"num_latents": 7}), seed=9)
    (run / "adapter").rename(run.with_name("moved"))
    run.with_name("moved").rename(run / "adapter")
    (run / "index").symlink_to(recipe.storage.index)
    return mine


@pytest.fixture(scope="module")
def recipes(
    ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Recipe]:
    run = tmp_path_factory.mktemp("adapters") / "run"
    scaling = {"backbone": {"min_replicas": 2, "max_replicas": 2}}
    recipe = indexed_scenes(scenes_dir, run, depth=3, scaling=scaling)
    return recipe, other_of(recipe)


@pytest.fixture(scope="module")
def service(recipes: tuple[Recipe, Recipe]) -> Iterator[httpx.Client]:
    recipe, other = recipes
    url = start(recipe)
    embed(other)
    index(other)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    stop()


@pytest.fixture(scope="module")
def encoders(recipes: tuple[Recipe, Recipe]) -> tuple[Encoder, Encoder]:
    first, second = (encoder_of(recipe) for recipe in recipes)
    return first, second


def vectors(service: httpx.Client, texts: list[str], model: str) -> httpx.Response:
    return service.post("/v1/embeddings", json={"input": texts, "model": model})


def test_a_version_of_an_adapter_that_is_not_there_is_refused_and_both_are_named(
    service: httpx.Client, encoders: tuple[Encoder, Encoder]
) -> None:
    answer = service.post("/admin/index", json={"version": "current"})
    assert answer.status_code == 409, answer.text
    message = answer.json()["error"]["message"]
    assert encoders[0].fingerprint in message
    assert encoders[1].fingerprint in message
    assert "POST /admin/adapters" in message
    assert service.get("/info").json()["index_version"] == "v000001"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"name": "x", "folder": "../.."}, 400, "does not lie below"),
        ({"name": "x", "folder": "/etc"}, 400, "does not lie below"),
        ({"name": "x", "folder": "absent"}, 400, "there is no folder"),
        ({"name": "x", "folder": "index"}, 400, "holds no adapter"),
        ({"name": "slq", "folder": f"{OTHER}/adapter"}, 400, "give another name"),
        ({"name": "../x", "folder": "adapter"}, 400, "name"),
        ({"name": "x"}, 400, "folder"),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused_with_the_reason(
    service: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    answer = service.post("/admin/adapters", json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_adapters_are_added_chosen_and_removed_while_the_service_answers(
    service: httpx.Client, encoders: tuple[Encoder, Encoder]
) -> None:
    own, other = encoders
    unknown = vectors(service, QUERIES, "other")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "model_not_found")
    added = service.post("/admin/adapters", json={"name": "other", "folder": f"{OTHER}/adapter"})
    assert added.json() == {"name": "other", "fingerprint": other.fingerprint}
    models = {one["id"]: one for one in service.get("/v1/models").json()["data"]}
    assert {name: one["fingerprint"] for name, one in models.items()} == {
        "slq": own.fingerprint,
        "other": other.fingerprint,
    }
    assert {name: one["searches"] for name, one in models.items()} == {"slq": True, "other": False}
    wanted = [("slq", own), ("other", other)] * 8  # by both replicas, several in a pass
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda one: vectors(service, QUERIES, one[0]), wanted))
    for (_, encoder), answer in zip(wanted, answers, strict=True):
        found = [row["embedding"] for row in answer.json()["data"]]
        np.testing.assert_allclose(found, encoder.encode(QUERIES), atol=1e-5)
        assert answer.headers["x-slq-fingerprint"] == encoder.fingerprint
    body = {"query": {"text": QUERIES[0]}, "mode": "coarse", "model": "other"}
    refused = service.post("/search", json=body)
    assert refused.status_code == 409
    assert own.fingerprint in refused.json()["error"]["message"]
    assert service.post("/search", json={**body, "model": "slq"}).status_code == 200
    assert service.post("/search", json={**body, "model": "absent"}).status_code == 404
    kept = service.delete("/admin/adapters/slq")
    assert kept.status_code == 400
    assert service.delete("/admin/adapters/other").status_code == 200
    for _ in range(6):  # whichever replica is asked
        assert vectors(service, QUERIES, "other").status_code == 404
    assert service.delete("/admin/adapters/other").status_code == 404


def test_a_service_goes_to_another_adapter_and_back_without_a_failed_or_mixed_answer(
    service: httpx.Client, recipes: tuple[Recipe, Recipe], encoders: tuple[Encoder, Encoder]
) -> None:
    added = service.post("/admin/adapters", json={"name": "other", "folder": f"{OTHER}/adapter"})
    assert added.status_code == 200, added.text
    names = ("v000001", "v000002")
    expected = {
        (version, encoder.fingerprint): [
            [hit.id for hit in hits]
            for hits in VectorIndex(recipes[0].storage.index, version).search(
                encoder.encode(QUERIES), 10
            )
        ]
        for version, encoder in zip(names, encoders, strict=True)
    }
    assert len({str(ids) for ids in expected.values()}) == 2
    seen: Counter[tuple[str, str]] = Counter()
    wrong: list[Any] = []
    is_over = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=service.base_url, timeout=60) as own:
            while not is_over.is_set():
                body = {"query": {"text": QUERIES[number]}, "mode": "coarse", "top_k": 10}
                answer = own.post("/search", json=body)
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                found = answer.json()
                key = found["index_version"], found["fingerprint"]
                seen[key] += 1
                if [one["id"] for one in found["results"]] != expected[key][number]:
                    wrong.append(found)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(len(QUERIES))]
    for thread in threads:
        thread.start()
    for version in ("current", "previous", "current"):
        before = sum(seen.values())
        while sum(seen.values()) < before + 20 and not wrong:
            time.sleep(0.05)
        moved = service.post("/admin/index", json={"version": version})
        assert moved.status_code == 200, moved.text
    removed = service.delete("/admin/adapters/other")
    assert "was built with adapter 'other'; it stays" in removed.json()["error"]["message"]
    before = sum(seen.values())
    while sum(seen.values()) < before + 20 and not wrong:
        time.sleep(0.05)
    is_over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(seen) == set(expected)
    body = {"query": {"text": QUERIES[0]}, "mode": "coarse", "model": "other"}
    assert service.post("/search", json=body).status_code == 200
    assert service.post("/search", json={**body, "model": "slq"}).status_code == 409
    assert load_adapter_config(recipes[0].storage.adapter).fingerprint == encoders[0].fingerprint
