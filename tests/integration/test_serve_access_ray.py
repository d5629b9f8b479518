"""Keys, forms and slow clients over real HTTP, through Ray Serve's own proxy."""

import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from pipelines.embed import embed
from pipelines.index import index
from pipelines.recipe import Recipe
from pipelines.serve import start, stop
from pipelines.serving.keys import ApiKey, add_key, remove_key
from tests.integration.runs import changed, free_port, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def made(path: Path, name: str, **values: Any) -> str:
    return add_key(path, lambda digest: ApiKey(name=name, sha256=digest, **values))


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("access")
    made(folder / "keys.json", "first")
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        adapter={"num_latents": 4},
        serve={
            "port": free_port(),
            "num_threads": 1,
            "max_body_bytes": 2**20,
            "access": {"keys_file": folder / "keys.json", "docs": "off", "body_timeout_s": 1},
        },
        storage={"dir": folder / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    index(recipe)
    return recipe


@pytest.fixture(scope="module")
def service(recipe: Recipe) -> Iterator[httpx.Client]:
    url = start(recipe)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    stop()


def eventually(ask: Any, status: int) -> None:
    """Keys are looked at again within a second or two."""
    import time

    for _ in range(100):
        answer = ask()
        if answer.status_code == status:
            return
        time.sleep(0.1)
    raise AssertionError(f"still {answer.status_code}, not {status}")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys_are_asked_for_added_and_revoked_while_it_runs(
    service: httpx.Client, recipe: Recipe
) -> None:
    file = recipe.serve.access.keys_file
    assert file is not None
    body = {"query": {"text": "a cat"}}
    assert service.post("/search", json=body).status_code == 401
    assert service.get("/healthz").status_code == 200
    assert service.get("/docs").status_code == 404
    late = made(file, "late", scopes=("search", "admin"))

    def ask() -> httpx.Response:
        return service.post("/search", json=body, headers=bearer(late))

    eventually(ask, 200)
    moved = service.post("/admin/index", json={"version": "current"}, headers=bearer(late))
    assert moved.status_code == 200, moved.text
    remove_key(file, "late")
    eventually(ask, 401)


def test_the_openai_client_sends_its_key(service: httpx.Client, recipe: Recipe) -> None:
    file = recipe.serve.access.keys_file
    assert file is not None
    key = made(file, "openai")
    eventually(lambda: service.get("/info", headers=bearer(key)), 200)
    url = f"{service.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        assert len(client.embeddings.create(input="a cat", model="slq").data) == 1
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.embeddings.create(input="a cat", model="slq")


def test_a_form_is_answered_as_its_json(service: httpx.Client, recipe: Recipe) -> None:
    file = recipe.serve.access.keys_file
    assert file is not None
    key = made(file, "form")
    eventually(lambda: service.get("/info", headers=bearer(key)), 200)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    data = buffer.getvalue()
    query = {"image": base64.b64encode(data).decode(), "text": "a cat"}
    answers = [
        service.post("/search", headers=bearer(key), **options)
        for options in (
            {"json": {"query": query, "top_k": 3, "mode": "coarse"}},
            {
                "files": {"image": ("x.png", data)},
                "data": {"text": "a cat", "top_k": "3", "mode": "coarse"},
            },
        )
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
    by_json, by_form = (
        [(one["id"], pytest.approx(one["score"], abs=1e-6)) for one in answer.json()["results"]]
        for answer in answers
    )
    assert by_json == by_form


def test_a_client_that_stops_in_the_middle_is_cut_off(
    service: httpx.Client, recipe: Recipe
) -> None:
    file = recipe.serve.access.keys_file
    assert file is not None
    key = made(file, "slow")
    eventually(lambda: service.get("/info", headers=bearer(key)), 200)
    with socket.create_connection((recipe.serve.host, recipe.serve.port), timeout=60) as connection:
        head = (
            "POST /search HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {key}\r\ncontent-length: 1000\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"query"')
        told = b""
        while b"}}" not in told and (part := connection.recv(4096)):
            told += part
    assert told.startswith(b"HTTP/1.1 408 ")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout"
