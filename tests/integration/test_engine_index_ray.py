"""A whole run on an index that another engine holds: embed, index, evaluate, serve and search on the command line."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.indexing import build
from jobs.results import results_table
from pipelines.embed import embed
from pipelines.evaluate import evaluate
from pipelines.index import fill
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from pipelines.serve import check_before_start, start, stop
from pipelines.serving.index_service import IndexSearch
from pipelines.serving.pinned import Pinned
from pipelines.serving.replicas import BackboneService
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError
from slq.index.canary import KEPT
from tests.integration.runs import changed, free_port, read_embeddings, with_untrained_adapter
from tests.unit.test_cli import refusal, slq

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUERY = "a red apple left of two dogs"


@pytest.fixture(scope="module")
def embedded(
    ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        adapter={"num_latents": 4},
        embed={"shard_rows": 12},
        rerank={"depth": 3},
        eval={"systems": ("slq", "slq_index"), "ks": (1, 5, 10)},
        serve={"num_threads": 1},
        storage={"dir": tmp_path_factory.mktemp("engines") / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    return recipe


@pytest.fixture(scope="module", params=["lance", "milvus"])
def recipe(request: pytest.FixtureRequest, embedded: Recipe) -> Recipe:
    return changed(embedded, index={"engine": request.param}, serve={"port": free_port()})


@pytest.fixture(scope="module")
def indexed(recipe: Recipe) -> Recipe:
    build(recipe)
    return recipe


@pytest.fixture(scope="module")
def service(indexed: Recipe) -> Iterator[httpx.Client]:
    url = start(indexed)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    stop()


def recipe_file(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def nearest(recipe: Recipe, text: str) -> tuple[list[str], Any]:
    """Ids of all items by exact search over the data set's vectors, and their cosines."""
    table, vectors, _ = read_embeddings(recipe.storage.embeddings)
    scores = vectors @ encoder_of(recipe).encode([text])[0]
    order = np.argsort(-scores, kind="stable")
    return [table["id"][int(n)].as_py() for n in order], scores[order]


# ---- before any service runs ----


def test_a_service_is_pinned_to_fingerprint_and_version(embedded: Recipe, tmp_path: Path) -> None:
    moved = changed(
        embedded,
        index={"engine": "lance", "target": str(tmp_path)},
        serve={"port": free_port()},
    )
    with pytest.raises(ArtifactError, match=r"there is no table .* write it with `slq index`"):
        check_before_start(moved)
    fill(moved)
    pinned = check_before_start(moved)

    def replica(with_pinned: Pinned) -> IndexSearch:
        plain = moved.model_dump(mode="json")
        return IndexSearch(plain, with_pinned, object())  # type: ignore[arg-type]

    said = asyncio.run(replica(pinned).describe())
    assert said["index_version"] == pinned.index_version
    with pytest.raises(ArtifactMismatchError, match=r"0{64}"):
        replica(Pinned("0" * 64, pinned.index_version))
    with pytest.raises(ArtifactError, match="has no version 99 any more"):
        replica(Pinned(pinned.fingerprint, "99"))
    other = changed(moved, storage={"dir": tmp_path / "other"})
    other = with_untrained_adapter(other, seed=9)
    with pytest.raises(ArtifactMismatchError, match="rebuild it with `slq embed` and `slq index`"):
        check_before_start(other)
    with pytest.raises(ArtifactMismatchError, match="rebuild it with `slq embed` and `slq index`"):
        evaluate(other)
    embed(other)
    with pytest.raises(ConfigError, match=r"is of fingerprint .*; choose another name"):
        fill(other)


def test_a_replica_tries_its_model_on_items_that_were_kept(
    embedded: Recipe, tmp_path: Path
) -> None:
    moved = changed(embedded, index={"engine": "lance", "target": str(tmp_path)})
    fill(moved)
    pinned = check_before_start(changed(moved, serve={"port": free_port()}))
    BackboneService.func_or_class(moved.model_dump(mode="json"), pinned)
    (kept,) = (embedded.storage.index / KEPT).glob("*.parquet")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="does not match the sha256"):
        BackboneService.func_or_class(moved.model_dump(mode="json"), pinned)
    kept.write_bytes(whole)


# ---- with one ----


def test_the_same_command_again_changes_nothing(
    indexed: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    place = indexed.index_place
    with place.open() as index:
        before = (index.version, len(index))
    with caplog.at_level("INFO"):
        assert build(indexed) == str(place)
    assert f"{place.engine} is up to date: nothing to do" in caplog.text
    with place.open() as index:
        assert (index.version, len(index)) == before == (before[0], 32)


def test_the_vectors_are_those_of_the_data_set(indexed: Recipe) -> None:
    table, vectors, fingerprint = read_embeddings(indexed.storage.embeddings)
    with indexed.index_place.open() as index:
        assert index.fingerprint == fingerprint
        np.testing.assert_allclose(index.vectors_of(table["id"].to_pylist()), vectors, atol=1e-6)
        rows = table.drop_columns(["shard_id", "row_in_shard"]).to_pylist()
        assert [index.item(row["id"]) for row in rows] == rows


def test_the_index_is_evaluated_beside_exact_search(indexed: Recipe) -> None:
    results = evaluate(indexed)
    exact, found = (results["systems"][name]["text_to_image"] for name in ("slq", "slq_index"))
    assert exact.keys() == found.keys()
    for subset, entry in exact.items():
        for k in (1, 5, 10):
            assert found[subset][f"hit@{k}"] == pytest.approx(entry[f"hit@{k}"], abs=0.05)
    told = results["index"]
    assert (told["engine"], told["num_vectors"]) == (indexed.index.engine, 32)
    assert told["kept@10"] > 0.97  # stored vectors are rounded to float16
    assert "image_to_text" in results["systems"]["slq"]
    assert "image_to_text" not in results["systems"]["slq_index"]
    run = pq.read_table(indexed.storage.evaluation / "run_slq_index.parquet").to_pylist()
    assert len(run) == 64 * 10
    assert [row["rank"] for row in run[:10]] == list(range(1, 11))
    names = [str(column.header) for column in results_table(results).columns]
    assert names[-1] == "SLQ through the index"
    alone = evaluate(changed(indexed, eval={"systems": ("slq_index",)}))
    assert alone["systems"]["slq_index"] == results["systems"]["slq_index"]


def test_the_service_answers_from_the_engine(indexed: Recipe, service: httpx.Client) -> None:
    ids, scores = nearest(indexed, QUERY)
    answer = service.post("/search", json={"query": {"text": QUERY}, "top_k": 5, "mode": "coarse"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    given = [result["id"] for result in found["results"]]
    np.testing.assert_allclose(
        [result["score"] for result in found["results"]], scores[:5], atol=2e-3
    )
    assert set(given) <= set(ids[:8])
    info = service.get("/info").json()
    assert info["num_vectors"] == 32
    assert info["index_version"] == found["index_version"]
    fine = service.post(
        "/search", json={"query": {"text": QUERY}, "top_k": 5, "mode": "fine"}
    ).json()
    assert (fine["reranked"], fine["degraded"]) == (3, False)  # images were read by their uris
    like = service.post("/search", json={"query": {"like": given[0]}, "top_k": 4}).json()
    assert (like["reranked"], like["degraded"]) == (3, False)
    assert given[0] not in {result["id"] for result in like["results"]}
    refused = service.post("/search", json={"query": {"like": "nothing"}})
    assert refused.status_code == 400
    assert "the index holds no item 'nothing'" in refused.text
    image = service.get(f"/items/{given[0]}/image")
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
    assert service.get("/items/nothing/image").status_code == 404


def test_the_command_line_searches_the_engine(
    indexed: Recipe, service: httpx.Client, tmp_path: Path
) -> None:
    path = recipe_file(indexed, tmp_path)
    if indexed.index.engine == "milvus":  # the replica has the file
        text = refusal("search", QUERY, "--recipe", path)
        assert "Only one process at a time can open a file of Milvus Lite" in text
        return
    result = slq("search", QUERY, "--recipe", path, "--top-k", "3", "--json")
    assert result.exit_code == 0, result.output
    ids, _ = nearest(indexed, QUERY)
    found = [one["id"] for one in json.loads(result.stdout)["results"]]
    assert set(found) <= set(ids[:5])
    like = slq(
        "search", "--recipe", path, "--like", ids[0], "--where", f"id <> '{ids[1]}'", "--json"
    )
    assert not {ids[0], ids[1]} & {one["id"] for one in json.loads(like.stdout)["results"]}


def test_an_index_of_files_is_evaluated_too(embedded: Recipe) -> None:
    with pytest.raises(ArtifactError, match="build one with `slq index`"):
        evaluate(embedded)
    build(embedded)
    results = evaluate(changed(embedded, eval={"systems": ("slq_index",)}))
    assert results["index"]["engine"] == "faiss"
    assert results["index"]["kept@10"] > 0.97
    ivf = changed(embedded, index={"kind": "ivf", "num_lists": 16, "num_probes": 1})
    build(ivf)
    assert evaluate(ivf)["index"]["kept@10"] < 0.9  # one list of sixteen: the loss shows
