"""The same service from a Serve config: as strict as Ray is, and changed under load without a failed request."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from pipelines.recipe import load_recipe
from pipelines.serving.app import APP_NAME
from tests.integration.runs import indexed_scenes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BODY = {"query": {"text": "a red apple left of two dogs"}, "top_k": 5, "mode": "coarse"}
TWO = {"min_replicas": 2, "max_replicas": 2}


@pytest.fixture(scope="module")
def recipe_file(
    ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("config")
    scaling = {"ingress": TWO, "backbone": TWO, "index": TWO}
    recipe = indexed_scenes(scenes_dir, folder / "run", scaling=scaling)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def config_of(recipe_file: Path, *overrides: str) -> dict[str, Any]:
    """As the command prints it."""
    options = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "jobs.cli", "serve", str(recipe_file), "--config", *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    config: dict[str, Any] = yaml.safe_load(printed)
    return config


def deploy(config: dict[str, Any]) -> None:
    """As `serve deploy` does, and until it runs."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    for _ in range(1200):
        found = serve.status().applications.get(APP_NAME)
        if found is not None and found.status == "RUNNING":
            return
        assert found is None or found.status != "DEPLOY_FAILED", found.message
        time.sleep(0.1)
    raise AssertionError(f"not running: {serve.status()}")


@pytest.fixture(scope="module")
def url(recipe_file: Path) -> Iterator[str]:
    config = config_of(recipe_file)
    options = config["http_options"]
    serve.start(http_options=options)
    deploy(config)
    yield f"http://{options['host']}:{options['port']}"
    serve.shutdown()


def test_the_config_is_one_of_rays(recipe_file: Path) -> None:
    config = config_of(recipe_file, "serve.max_top_k=7")
    parsed = ServeDeploySchema.model_validate(config)
    (application,) = parsed.applications
    arguments = application.args
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    assert load_recipe(Path(arguments["recipe"]), arguments["overrides"]).serve.max_top_k == 7


@pytest.mark.campaign
def test_a_rolling_update_and_the_way_back_fail_no_request(url: str, recipe_file: Path) -> None:
    failures: list[str] = []
    num_answers = 0
    is_over = threading.Event()

    def client() -> None:
        nonlocal num_answers
        with httpx.Client(base_url=url, timeout=120) as own:
            while not is_over.is_set():
                try:
                    answer = own.post("/search", json=BODY)
                    if answer.status_code != 200:
                        failures.append(answer.text)
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                num_answers += 1
                time.sleep(0.1)  # replicas start on the same two cores

    def limit() -> set[int]:
        """What the replicas that answer take at most; all of them are asked."""
        statuses = set()
        for _ in range(8):
            body = {**BODY, "top_k": 8}
            statuses.add(httpx.post(f"{url}/search", json=body, timeout=120).status_code)
        return statuses

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert limit() == {200}
    deploy(config_of(recipe_file, "serve.max_top_k=7"))
    assert limit() == {400}
    deploy(config_of(recipe_file))
    assert limit() == {200}
    is_over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert num_answers > 50


def test_what_could_not_answer_is_not_deployed_and_the_old_one_stays(
    url: str, recipe_file: Path
) -> None:
    broken = config_of(recipe_file)
    broken["applications"][0]["args"]["overrides"] = ["storage.dir=/nowhere"]
    with pytest.raises(AssertionError, match=r"slq train"):
        deploy(broken)
    assert httpx.post(f"{url}/search", json=BODY, timeout=120).status_code == 200
