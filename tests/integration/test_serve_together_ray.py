"""The whole service in one process, by the command: it answers as its parts do, and drains when it is stopped."""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from slq.encoder import Encoder
from slq.index import VectorIndex
from slq.reranker import Reranker
from slq.schema import Item
from tests.integration.runs import indexed_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUERY = "a red apple left of two dogs"


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    run = tmp_path_factory.mktemp("together") / "run"
    return indexed_scenes(scenes_dir, run, depth=4, is_together=True)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe) -> Encoder:
    return encoder_of(recipe)


@pytest.fixture(scope="module")
def command(recipe: Recipe) -> Iterator[subprocess.Popen[bytes]]:
    """`slq serve` in a Ray of its own; it is ready when it answers."""
    path = recipe.storage.dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    running = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield running
    running.kill()
    running.wait()


@pytest.fixture(scope="module")
def service(recipe: Recipe, command: subprocess.Popen[bytes]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{recipe.serve.port}", timeout=120) as client:
        for _ in range(1200):
            assert command.poll() is None, "the command has ended"
            try:
                if client.get("/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield client


def test_it_answers_as_encoder_index_and_fine_stage_do(
    service: httpx.Client, recipe: Recipe, encoder: Encoder
) -> None:
    body = {"query": {"text": QUERY}, "top_k": 6, "mode": "fine"}
    answer = service.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    (hits,) = VectorIndex(recipe.storage.index).search(encoder.encode([QUERY]), 6)
    rows = {row["id"]: row for row in pq.read_table(recipe.data.path("corpus")).to_pylist()}
    reranker = Reranker(encoder.backbone)
    scored = [hit.id for hit in hits[:4]]
    pairs = [(Item(text=QUERY), encoder_item(rows[name]["image"])) for name in scored]
    margins = dict(zip(scored, reranker.score(pairs).tolist(), strict=True))
    best_first = sorted(scored, key=lambda name: -margins[name])
    assert [one["id"] for one in found["results"]] == best_first + [h.id for h in hits[4:]]
    for one in found["results"][:4]:
        assert one["fine_score"] == pytest.approx(margins[one["id"]], abs=1e-3)
    assert found["fingerprint"] == encoder.fingerprint == answer.headers["x-slq-fingerprint"]


def encoder_item(image: bytes) -> Item:
    from slq.media import decode_image

    return Item(image=decode_image(image))


def test_the_openai_client_gets_the_encoders_vectors(
    service: httpx.Client, encoder: Encoder
) -> None:
    texts = [QUERY, "three blue cars"]
    with openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="none") as client:
        answer = client.embeddings.create(input=texts, model="slq")
    found = [one.embedding for one in answer.data]
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


def test_health_metrics_and_request_ids_are_there(service: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/info", "/metrics", "/"):
        answer = service.get(path, headers={"x-request-id": "r-1"})
        assert answer.status_code == 200, answer.text
        assert answer.headers.get_list("x-request-id") == ["r-1"]
    made_up = service.get("/healthz", headers={"x-request-id": "no id"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made_up)


def test_a_sigterm_lets_what_is_being_answered_be_answered(
    service: httpx.Client, recipe: Recipe, command: subprocess.Popen[bytes]
) -> None:
    """The last test here: the service is gone afterwards."""
    rows = pq.read_table(recipe.data.path("corpus")).to_pylist()
    picture = base64.b64encode(rows[0]["image"]).decode()
    documents = [{"image": picture, "text": f"{n}"} for n in range(50)]

    def ask(number: int) -> int:
        body = {"query": f"{QUERY} {number}", "documents": documents}
        return service.post("/v1/rerank", json=body).status_code

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, number) for number in range(6)]
        time.sleep(
            1.0
        )  # they are all there by now, also where other work is done, and take seconds
        assert not all(answer.done() for answer in answers)
        command.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == [200] * 6
    assert command.wait(timeout=120) == 0
    with pytest.raises(httpx.TransportError):
        service.get("/healthz")
