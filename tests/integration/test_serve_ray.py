"""The service over real HTTP: answers equal encoder, index and fine stage; every refusal is in OpenAI's shape."""

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import serve
from ray.serve.exceptions import BackPressureError

from pipelines.contents import Content
from pipelines.embed import embed
from pipelines.index import index
from pipelines.loading import encoder_of
from pipelines.recipe import Recipe
from pipelines.serve import (
    APP_NAME,
    cause_in,
    check_before_start,
    running_endpoint,
    serve_until_stopped,
    start,
    stop,
)
from pipelines.serving.adapters import Embedded
from pipelines.serving.calls import ask
from pipelines.serving.embedding import Wanted, each_alone
from pipelines.serving.index_service import IndexSearch
from pipelines.serving.ingress import Ingress
from pipelines.serving.pinned import Pinned
from pipelines.serving.replicas import BackboneService
from slq.arrow import ITEMS, vector_column
from slq.artifacts import load_adapter_config
from slq.encoder import Encoder
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    DataError,
    ServiceError,
    UnavailableError,
)
from slq.index import Content as Vectors
from slq.index import IndexConfig, VectorIndex, write_version
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item
from tests.integration.runs import changed, free_port, with_untrained_adapter
from tests.unit.index_data import Given

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PATH_LIKE, TEXT_ONLY = "deep/er/scene 0.png", "only-a-text"
REPLACED = "replaced"  # its file holds a secret by the time the service runs
SECRET = b"root:x:0:0:a secret of the machine"
QUERY = "a red apple left of two dogs"
DEPTH = 5


def recipe_of(scenes_dir: Path, folder: Path) -> Recipe:
    """The gallery, with an id that looks like a path, a text, and an image in a file of its own."""
    rows = pq.read_table(scenes_dir / "gallery.parquet").to_pylist()
    rows[0]["id"] = PATH_LIKE
    rows.append({"id": TEXT_ONLY, "image": None, "text": QUERY})
    (folder / "replaced.png").write_bytes(rows[1]["image"])
    rows.append({"id": REPLACED, "image": None, "text": None, "uri": "replaced.png"})
    schema = ITEMS.append(pa.field("uri", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "corpus.parquet")
    return changed(
        Recipe(),
        data={"dir": scenes_dir, "corpus": str(folder / "corpus.parquet")},
        adapter={"num_latents": 4},
        embed={"shard_rows": 40},
        rerank={"depth": DEPTH},
        serve={
            "port": free_port(),
            "max_top_k": 50,
            "max_rerank": 10,
            "batch_wait_s": 0.2,  # so that concurrent requests surely share a pass
            "num_threads": 1,
            "max_body_bytes": 2**20,
            "max_inputs": 40,
            "max_queued_requests": 12,
        },
        storage={"dir": folder / "run"},
    )


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = with_untrained_adapter(recipe_of(scenes_dir, tmp_path_factory.mktemp("serve")))
    embed(recipe)
    index(recipe)
    (recipe.data.path("corpus").parent / "replaced.png").write_bytes(SECRET)
    return recipe


@pytest.fixture(scope="module")
def service(recipe: Recipe) -> Iterator[httpx.Client]:
    url = start(recipe)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
    stop()


@pytest.fixture(scope="module")
def encoder(recipe: Recipe) -> Encoder:
    return encoder_of(recipe)


@pytest.fixture(scope="module")
def corpus(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(recipe.data.path("corpus")).to_pylist()}


def search(service: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = service.post("/search", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refusal(answer: httpx.Response, status: int) -> str:
    """The message of an answer that must be an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# ---- before the start ----


def test_an_index_of_another_adapter_is_refused_and_both_fingerprints_are_named(
    recipe: Recipe, tmp_path: Path
) -> None:
    other = with_untrained_adapter(changed(recipe, storage={"dir": tmp_path / "other"}), seed=9)
    (tmp_path / "other" / "index").symlink_to(recipe.storage.index)
    mine, theirs = (load_adapter_config(r.storage.adapter).fingerprint for r in (recipe, other))
    with pytest.raises(
        ArtifactMismatchError, match=rf"{mine}.*{theirs}.*rebuild it with `slq embed`"
    ):
        start(other)


def test_a_port_in_use_is_a_service_error_that_names_it(recipe: Recipe) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"127\.0\.0\.1:{port}.*choose another serve\.port"):
            check_before_start(changed(recipe, serve={"port": port}))


def test_a_missing_adapter_or_index_says_what_to_run(recipe: Recipe, tmp_path: Path) -> None:
    empty = changed(recipe, storage={"dir": tmp_path})
    with pytest.raises(ArtifactError, match="run `slq train` first"):
        check_before_start(empty)
    with pytest.raises(ArtifactError, match="build one with `slq index`"):
        check_before_start(with_untrained_adapter(empty))


def pinned(recipe: Recipe) -> Pinned:
    current = VectorIndex(recipe.storage.index)
    return Pinned(fingerprint=current.fingerprint, index_version=current.version)


def with_foreign_weights(recipe: Recipe, folder: Path) -> Recipe:
    """The run, but with latent queries that its adapter's configuration does not speak of."""
    shutil.copytree(recipe.storage.dir, folder / "run")
    other = with_untrained_adapter(changed(recipe, storage={"dir": folder / "other"}), seed=9)
    weights = "adapter_model.safetensors"
    shutil.copy(other.storage.adapter / weights, folder / "run" / "adapter" / weights)
    return changed(recipe, storage={"dir": folder / "run"})


def test_a_replica_refuses_another_adapter_than_the_service_started_with(
    recipe: Recipe, tmp_path: Path
) -> None:
    foreign = with_foreign_weights(recipe, tmp_path)
    with pytest.raises(ArtifactMismatchError, match=pinned(recipe).fingerprint):
        BackboneService.func_or_class(foreign.model_dump(mode="json"), pinned(recipe))


def test_a_replica_finds_the_index_version_that_the_service_is_on(
    recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(recipe.storage.index, tmp_path / "index")
    moved = changed(recipe, storage={"dir": tmp_path})
    start_of_service = pinned(moved)
    vector = vector_column(np.eye(1, 64, dtype=np.float16))
    rows = pa.table({"id": ["x"], "embedding": vector, "text": ["x"], "content_hash": ["x"]})
    write_version(tmp_path / "index", Vectors([Given(rows)], 64, "other"), IndexConfig())
    replica = IndexSearch(moved.model_dump(mode="json"), start_of_service, Recorder("a"))
    assert asyncio.run(replica.describe())["index_version"] == "v000001"
    for wrong in (Pinned("0" * 64, "v000001"), Pinned(start_of_service.fingerprint, "v000002")):
        with pytest.raises(ArtifactMismatchError, match=wrong.fingerprint):
            IndexSearch(moved.model_dump(mode="json"), wrong, Recorder("a"))


def test_a_replica_whose_model_embeds_otherwise_refuses_to_start(
    recipe: Recipe, tmp_path: Path
) -> None:
    """Other weights under the same fingerprint, as it looks from the index: other vectors of the same items."""
    run = tmp_path / "run"
    shutil.copytree(recipe.storage.dir, run)
    moved = changed(recipe, storage={"dir": run})
    before = pinned(moved)
    BackboneService.func_or_class(moved.model_dump(mode="json"), before)
    canary = moved.storage.index / before.index_version / "canary.parquet"
    rows = pq.read_table(canary)
    others = rows["embedding"].take(list(reversed(range(rows.num_rows))))
    pq.write_table(
        rows.set_column(rows.column_names.index("embedding"), "embedding", others), canary
    )
    path = canary.with_name("manifest.json")
    digest = hashlib.sha256(canary.read_bytes()).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "canary_sha256": digest}))
    with pytest.raises(ArtifactMismatchError, match="its weights are others, though the fingerpr"):
        BackboneService.func_or_class(moved.model_dump(mode="json"), before)


class Recorder:
    """Stands where a deployment's handle stands; counts how often it was asked to describe itself."""

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint, self.asked = fingerprint, 0
        self.describe = self

    async def remote(self) -> dict[str, Any]:
        self.asked += 1
        models = {"slq": self.fingerprint}
        return {
            "fingerprint": self.fingerprint,
            "models": models,
            "shards_ok": 1,
            "shards_total": 2,
        }


def test_health_asks_model_and_index_every_time_and_refuses_a_foreign_one(recipe: Recipe) -> None:
    async def scenario() -> None:
        model, vectors = Recorder("a"), Recorder("a")
        plain = recipe.model_dump(mode="json")
        face = Ingress.func_or_class.__bases__[0]  # below what makes an ASGI app of it
        ingress = face(plain, Pinned("a", "v000001"), model, vectors)
        for _ in range(3):
            assert await ingress.readyz() == {"status": "ok"}
        assert (model.asked, vectors.asked) == (3, 3)
        strict = changed(recipe, serve={"on_lost_partition": "fail"}).model_dump(mode="json")
        with pytest.raises(UnavailableError, match="1 of 2 partitions of the index answer"):
            await face(strict, Pinned("a", "v000001"), model, vectors).readyz()
        model.fingerprint = "b"
        with pytest.raises(
            ArtifactMismatchError, match="fingerprint a, but the loaded model has b"
        ):
            await ingress.readyz()

    asyncio.run(scenario())


def test_a_service_over_cut_vectors_embeds_at_the_length_of_its_index(recipe: Recipe) -> None:
    whole = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)

    class Answers:
        """A handle whose methods answer what they are given."""

        def __init__(self, dimension: int) -> None:
            self.describe = SimpleNamespace(
                remote=lambda: given(
                    {"fingerprint": "a", "models": {"slq": "a"}, "dimension": dimension}
                )
            )
            self.embed = SimpleNamespace(remote=lambda *_, told: given(Embedded(list(whole), "a")))

    async def given(value: Any) -> Any:
        return value

    face = Ingress.func_or_class.__bases__[0]
    parts = Answers(64), Answers(24)  # the model and the index
    ingress = face(recipe.model_dump(mode="json"), Pinned("a", "v000001"), *parts)
    made = asyncio.run(ingress._retriever.embed([Item(text="x"), Item(text="y")], "slq"))
    found = np.stack(made.vectors)
    expected = whole[:, :24] / np.linalg.norm(whole[:, :24], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_overload_leaves_our_routes_as_an_error_of_ours() -> None:
    class Full:
        async def remote(self) -> None:
            raise BackPressureError(3, 3)

    with pytest.raises(UnavailableError, match="too many requests are waiting"):
        asyncio.run(ask(Full()))


def test_only_the_guilty_item_of_a_pass_fails() -> None:
    def roots(values: list[float]) -> list[float]:
        if min(values) < 0:
            raise ValueError("negative")
        return [value**0.5 for value in values]

    assert each_alone(roots, [4.0, 9.0]) == [2.0, 3.0]
    first, guilty, last = each_alone(roots, [4.0, -1.0, 9.0])
    assert (first, last) == (2.0, 3.0)
    assert isinstance(guilty, ValueError)


def wanted(service: Any, item: Item, tenant: str = "") -> Wanted:
    """What the own adapter of a service shall embed."""
    return Wanted(item, tenant, service._encoder.adapter)


def test_an_input_that_the_model_raises_for_fails_alone_in_its_pass(
    recipe: Recipe, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def embedded(wanted: list[Wanted], _: str | None) -> Any:
        passes.append(len(wanted))
        if any(one.item.text == "guilty" for one in wanted):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return encoder.encode([one.item for one in wanted])

    service = BackboneService.func_or_class(recipe.model_dump(mode="json"), pinned(recipe))
    monkeypatch.setattr(service._embedding, "_embedded", embedded)
    # below Ray's batching: used outside a replica it leaves the class impossible to send to one
    one_pass = type(service)._embed_batch.__wrapped__

    async def alone(wanted: Wanted) -> Any:
        return (await one_pass(service, [wanted]))[0]

    shared = [Item(text=text) for text in ("a cat", "guilty", "a dog")]
    passed = asyncio.run(one_pass(service, [wanted(service, item) for item in shared]))
    first, error, last = (one.value for one in passed)
    assert passes == [3, 1, 1, 1]
    np.testing.assert_allclose([first, last], encoder.encode(["a cat", "a dog"]), atol=1e-5)
    assert isinstance(error, ValueError)
    monkeypatch.setattr(service, "_embed_batch", alone)
    with pytest.raises(DataError, match="the model cannot take this input: absolute aspect ratio"):
        asyncio.run(service.embed([shared[1]]))


def test_what_is_kept_of_one_tenants_candidates_is_not_anothers(
    recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    keeping = changed(recipe, serve={"vision_cache_bytes": 2**24})
    service = BackboneService.func_or_class(keeping.model_dump(mode="json"), pinned(recipe))
    sent = [Content(image=base64.b64encode(corpus["test-00003"]["image"]).decode())]
    passes = []
    for tenant in ("a", "a", "b"):
        (ranked,) = asyncio.run(service.rank(Item(text=QUERY), sent, tenant=tenant))
        assert ranked.fine_score is not None
        passes.append(service._reranker.counts.vision_passes)
    assert passes == [1, 1, 2]


@pytest.mark.parametrize("cache", ["vision_cache_bytes", "prefix_cache_bytes"])
def test_the_image_of_a_query_is_seen_once_to_embed_and_to_score_it(
    recipe: Recipe, encoder: Encoder, corpus: dict[str, dict[str, Any]], cache: str
) -> None:
    keeping = changed(recipe, serve={cache: 2**26})
    service = BackboneService.func_or_class(keeping.model_dump(mode="json"), pinned(recipe))
    images = [decode_image(corpus[name]["image"]) for name in ("test-00003", "test-00004")]
    mixed = [Item(image=images[0]), Item(text=QUERY), Item(image=images[1]), Item(image=images[0])]
    vectors = service._embedding.encode([wanted(service, item, "a") for item in mixed])
    np.testing.assert_allclose(vectors, encoder.encode(mixed), atol=1e-5)
    assert service._reranker.counts.vision_passes == 2
    asyncio.run(service.rank(mixed[0], [Content(text="a cat"), Content(text=QUERY)], tenant="a"))
    assert service._reranker.counts.vision_passes == 2
    service._embedding.encode([wanted(service, mixed[0], "b")])
    assert service._reranker.counts.vision_passes == 3
    kept = service.describe()["kept_images"][cache.split("_")[0]]
    assert kept["hits"] > 0
    assert 0 < kept["bytes"] <= 2**26


@pytest.mark.parametrize(
    ("report", "cause"),
    [
        (
            "Deploying application slq failed: Failed to update the deployments.\n"
            'Traceback (most recent call last):\n  File "a.py", line 3, in f\n'
            "slq.errors.ArtifactMismatchError: index has a, model has b; rebuild it",
            "index has a, model has b; rebuild it",
        ),
        (
            "Error:\nTraceback\nRuntimeError: CUDA out of memory\n",
            "RuntimeError: CUDA out of memory",
        ),
        ("Deploying application slq failed", "Deploying application slq failed"),
    ],
)
def test_the_cause_of_a_failed_start_is_the_last_exception(report: str, cause: str) -> None:
    assert cause_in(report) == cause


# ---- starting and stopping; each of these starts Serve and takes it down ----


def on_a_new_port(recipe: Recipe) -> Recipe:
    """Serve's proxy frees its port a moment after it was shut down, so each start has its own."""
    return changed(recipe, serve={"port": free_port()})


def test_a_replica_that_cannot_start_is_a_service_error_with_its_reason(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match=r"cannot start: .*was built with fingerprint") as caught:
        start(on_a_new_port(with_foreign_weights(recipe, tmp_path)))
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).endswith("then start the service again")
    assert running_endpoint() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_ends_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def endless(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(300)

    handler = signal.getsignal(number)
    monkeypatch.setattr(serve, "run", endless)
    started = time.monotonic()
    serve_until_stopped(on_a_new_port(recipe))
    assert time.monotonic() - started < 120
    assert running_endpoint() is None
    assert signal.getsignal(number) is handler


@serve.deployment
class Neighbour:
    """An application of someone else on the same Serve."""

    def __call__(self) -> str:
        return "hello"


def test_stopping_leaves_a_serve_that_was_there_before(recipe: Recipe) -> None:
    recipe = on_a_new_port(recipe)
    serve.start(http_options={"host": recipe.serve.host, "port": recipe.serve.port})
    try:
        serve.run(Neighbour.bind(), name="neighbour", route_prefix="/neighbour")
        url = start(recipe)
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        with pytest.raises(ServiceError, match="already runs on this cluster"):
            start(recipe)
        assert set(serve.status().applications) == {"neighbour", APP_NAME}
        stop()
        assert set(serve.status().applications) == {"neighbour"}
    finally:
        serve.shutdown()


# ---- answers ----


def test_health_and_info_say_what_is_served(service: httpx.Client, recipe: Recipe) -> None:
    for path in ("/healthz", "/readyz"):
        assert service.get(path).json() == {"status": "ok"}
    info = service.get("/info").json()
    adapter = load_adapter_config(recipe.storage.adapter)
    assert info["fingerprint"] == adapter.fingerprint
    assert (info["num_vectors"], info["dimension"]) == (34, adapter.hidden_size)
    assert (info["index_version"], info["backbone"]) == ("v000001", "tiny")
    assert service.get("/v1/models").json()["data"][0]["id"] == "slq"


@pytest.mark.parametrize("kind", ["text", "image", "embedding"])
def test_coarse_search_equals_encoder_and_index(
    service: httpx.Client,
    encoder: Encoder,
    recipe: Recipe,
    corpus: dict[str, dict[str, Any]],
    kind: str,
) -> None:
    picture = corpus["test-00003"]["image"]
    vector = encoder.encode([QUERY if kind != "image" else {"image": picture}])
    query = {
        "text": {"text": QUERY},
        "image": {"image": f"data:image/png;base64,{base64.b64encode(picture).decode()}"},
        "embedding": {"embedding": vector[0].tolist()},
    }[kind]
    found = search(service, query=query, top_k=7, mode="coarse")
    truth = VectorIndex(recipe.storage.index).search(vector, 7)[0]
    assert [result["id"] for result in found["results"]] == [hit.id for hit in truth]
    scores = [result["score"] for result in found["results"]]
    np.testing.assert_allclose(scores, [hit.score for hit in truth], atol=1e-5)
    assert all(result["fine_score"] is None for result in found["results"])
    assert (found["reranked"], found["degraded"]) == (0, False)


def item_of(row: dict[str, Any]) -> Item:
    return Item(text=row["text"], image=row["image"] and decode_image(row["image"]))


def placed_by_hand(coarse: list[str], margins: dict[str, float]) -> list[str]:
    """Whoever has a margin takes, by margin, the places that those with one have; the others stay."""
    best_first = iter(sorted(margins, key=lambda name: -margins[name]))
    return [next(best_first) if name in margins else name for name in coarse]


@pytest.mark.parametrize("top_k", [3, 8])
def test_fine_search_orders_the_best_candidates_by_margin(
    service: httpx.Client,
    encoder: Encoder,
    recipe: Recipe,
    corpus: dict[str, dict[str, Any]],
    top_k: int,
) -> None:
    found = search(service, query={"text": QUERY}, top_k=top_k, mode="fine")
    hits = VectorIndex(recipe.storage.index).search(encoder.encode([QUERY]), max(top_k, DEPTH))[0]
    scored = [hit.id for hit in hits[:DEPTH] if hit.id != REPLACED]
    assert TEXT_ONLY in scored  # a text against a text
    reranker = Reranker(encoder.backbone, framing=recipe.rerank.framing)
    pairs = [(Item(text=QUERY), item_of(corpus[name])) for name in scored]
    margins = dict(zip(scored, reranker.score(pairs).tolist(), strict=True))
    expected = placed_by_hand([hit.id for hit in hits], margins)[:top_k]
    assert [result["id"] for result in found["results"]] == expected
    assert found["reranked"] == len(scored)
    coarse = {hit.id: hit.score for hit in hits}
    for result in found["results"]:
        assert result["coarse_score"] == pytest.approx(coarse[result["id"]], abs=1e-5)
        if result["id"] in margins:
            assert result["fine_score"] == pytest.approx(margins[result["id"]], abs=1e-3)
        else:
            assert result["fine_score"] is None
        assert result["explanation"] is None


def test_images_are_scored_against_images_and_texts_and_explained(
    service: httpx.Client, encoder: Encoder, recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    """The vector brings the text among the candidates; the fine stage sees the query's image and text."""
    picture = corpus["test-00003"]["image"]
    query = {
        "embedding": encoder.encode([QUERY])[0].tolist(),
        "image": base64.b64encode(picture).decode(),
        "text": QUERY,
    }
    found = search(service, query=query, top_k=6, rerank_k=6, mode="auto", explain=True)
    scored = {r["id"]: r for r in found["results"] if r["fine_score"] is not None}
    assert {TEXT_ONLY} < scored.keys() == {r["id"] for r in found["results"]} - {REPLACED}
    asked = Item(text=QUERY, image=decode_image(picture))
    pairs = [(asked, item_of(corpus[name])) for name in scored]
    readings = Reranker(encoder.backbone, framing=recipe.rerank.framing).read(pairs)
    for name, reading in zip(scored, readings, strict=True):
        told = scored[name]["explanation"]
        assert scored[name]["fine_score"] == told["margin"]
        assert told["margin"] == pytest.approx(reading.margin, abs=1e-3)
        assert told["probability"] == pytest.approx(1 / (1 + np.exp(-reading.margin)), abs=1e-3)
        assert told["label_mass"] == pytest.approx(reading.label_mass, abs=1e-4)
        assert told["entropy"] == pytest.approx(reading.entropy, abs=1e-3)
        assert told["is_doubtful"] is (told["label_mass"] < 0.5)
    assert len({told["fine_score"] for told in scored.values()}) > 1


def test_a_candidate_that_cannot_be_read_keeps_its_coarse_place_and_is_told(
    service: httpx.Client, encoder: Encoder, recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    twin = corpus["test-00001"]["image"]  # what the lost file held when it was indexed
    query = {"embedding": encoder.encode([{"image": twin}])[0].tolist(), "text": QUERY}
    coarse = [r["id"] for r in search(service, query=query, top_k=9, mode="coarse")["results"]]
    assert REPLACED in coarse[:2]
    found = search(service, query=query, top_k=9, rerank_k=6, mode="fine")
    assert (found["degraded"], found["degraded_reasons"]) == (True, ["candidates"])
    scored = [name for name in coarse[:6] if name != REPLACED]
    pairs = [(Item(text=QUERY), item_of(corpus[name])) for name in scored]
    reranker = Reranker(encoder.backbone, framing=recipe.rerank.framing)
    margins = dict(zip(scored, reranker.score(pairs).tolist(), strict=True))
    expected = placed_by_hand(coarse, margins)
    assert [r["id"] for r in found["results"]] == expected
    assert expected.index(REPLACED) == coarse.index(REPLACED)
    assert found["reranked"] == len(scored)
    problems = {r["id"]: r["problem"] for r in found["results"] if r["problem"] is not None}
    assert problems == {REPLACED: "the file is none of JPEG, PNG, WEBP"}


@pytest.mark.parametrize("mode", ["auto", "fine"])
def test_a_budget_of_nothing_gives_the_coarse_order_and_says_so(
    service: httpx.Client, mode: str
) -> None:
    coarse = search(service, query={"text": QUERY}, top_k=7, mode="coarse")
    found = search(service, query={"text": QUERY}, top_k=7, mode=mode, budget_ms=0)
    assert [r["id"] for r in found["results"]] == [r["id"] for r in coarse["results"]]
    assert all(r["fine_score"] is None and r["problem"] is None for r in found["results"])
    assert (found["reranked"], found["degraded_reasons"]) == (0, ["budget"])
    assert found["degraded"] is True
    assert (coarse["degraded"], coarse["degraded_reasons"]) == (False, [])


def test_a_budget_that_suffices_changes_nothing(service: httpx.Client) -> None:
    plain = search(service, query={"text": QUERY}, top_k=7, mode="fine")
    found = search(service, query={"text": QUERY}, top_k=7, mode="fine", budget_ms=3_600_000)
    assert [r["id"] for r in found["results"]] == [r["id"] for r in plain["results"]]
    assert found["reranked"] == plain["reranked"] > 0
    assert "budget" not in found["degraded_reasons"]


def test_the_fine_stage_scores_as_many_as_asked(service: httpx.Client) -> None:
    found = search(service, query={"text": QUERY}, top_k=10, rerank_k=9, mode="fine")
    assert found["reranked"] in (8, 9)  # the lost image may stand among the nine
    assert sum(result["fine_score"] is not None for result in found["results"]) == found["reranked"]


def test_documents_that_are_sent_are_reranked_as_other_services_do(
    service: httpx.Client, encoder: Encoder, recipe: Recipe, corpus: dict[str, dict[str, Any]]
) -> None:
    pictures = [base64.b64encode(corpus[f"test-0000{n}"]["image"]).decode() for n in (2, 3, 4)]
    body = {
        "model": "slq",
        "query": QUERY,
        "documents": [
            {"image": f"data:image/png;base64,{pictures[0]}"},
            QUERY,
            {"image": "http://127.0.0.1/a.png"},
            {"text": "two cats", "image": pictures[1]},
            {"image": pictures[2]},
        ],
    }
    answer = service.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "slq"
    results = answer.json()["results"]
    images = [decode_image(base64.b64decode(data)) for data in pictures]
    items = {
        0: Item(image=images[0]),
        1: Item(text=QUERY),
        3: Item(text="two cats", image=images[1]),
        4: Item(image=images[2]),
    }
    reranker = Reranker(encoder.backbone, framing=recipe.rerank.framing)
    scores = reranker.score([(Item(text=QUERY), item) for item in items.values()]).tolist()
    margins = dict(zip(items, scores, strict=True))
    assert [one["index"] for one in results] == [*sorted(margins, key=lambda n: -margins[n]), 2]
    for one in results[:4]:
        assert set(one) == {"index", "relevance_score"}
        expected = 1 / (1 + np.exp(-margins[one["index"]]))
        assert one["relevance_score"] == pytest.approx(expected, abs=1e-4)
    assert results[4]["relevance_score"] == 0
    assert "image URLs are not fetched" in results[4]["problem"]
    short = {**body, "top_n": 2, "return_documents": True}
    best = service.post("/v1/rerank", json=short).json()["results"]
    assert [one["index"] for one in best] == [one["index"] for one in results[:2]]
    for one in best:
        given = body["documents"][one["index"]]
        assert one["document"] == ({"text": given} if isinstance(given, str) else given)


def test_the_length_of_a_given_vector_changes_nothing(
    service: httpx.Client, encoder: Encoder
) -> None:
    vector = encoder.encode([QUERY])[0]
    unit, long = (
        search(service, query={"embedding": (scale * vector).tolist()}, mode="coarse")["results"]
        for scale in (1.0, 7.0)
    )
    assert [result["id"] for result in unit] == [result["id"] for result in long]
    np.testing.assert_allclose(
        [result["score"] for result in unit], [result["score"] for result in long], atol=1e-6
    )


def test_a_filter_leaves_only_items_for_which_it_holds(service: httpx.Client) -> None:
    found = search(service, query={"text": QUERY}, mode="coarse", filter="modality = 'text'")
    assert [one["id"] for one in found["results"]] == [TEXT_ONLY]
    found = search(service, query={"text": QUERY}, mode="fine", filter="id like 'test-0000%'")
    assert found["results"]
    assert all(one["id"].startswith("test-0000") for one in found["results"])
    assert search(service, query={"text": QUERY}, filter="id = 'absent'")["results"] == []


@pytest.mark.parametrize(
    "predicate",
    ["", "absent > 3", "id =", "1; drop table x", "exists (select * from read_csv('/etc/passwd'))"],
)
def test_a_filter_that_cannot_be_used_is_a_400(service: httpx.Client, predicate: str) -> None:
    body = {"query": {"text": QUERY}, "filter": predicate}
    assert "root:" not in refusal(service.post("/search", json=body), 400)


def test_more_results_than_items_gives_every_item_once(service: httpx.Client) -> None:
    found = search(service, query={"text": QUERY}, top_k=50, mode="coarse")
    assert len({result["id"] for result in found["results"]}) == 34


def test_the_index_version_and_the_fingerprint_come_with_every_answer(
    service: httpx.Client, recipe: Recipe
) -> None:
    answer = service.post("/search", json={"query": {"text": QUERY}})
    fingerprint = load_adapter_config(recipe.storage.adapter).fingerprint
    assert answer.headers["x-slq-fingerprint"] == answer.json()["fingerprint"] == fingerprint
    assert answer.json()["index_version"] == "v000001"
    assert set(answer.json()["timings_ms"]) == {"queue", "embed", "search", "fetch", "fine"}


def test_the_openai_client_gets_the_encoders_vectors(
    service: httpx.Client, encoder: Encoder
) -> None:
    import openai

    texts = [QUERY, "a cat", "three blue cars above a tree"]
    with openai.OpenAI(
        base_url=f"{service.base_url}/v1", api_key="unused", max_retries=0
    ) as client:
        answers = [
            client.embeddings.create(input=texts, model="slq", **options)
            for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"})
        ]
        with pytest.raises(openai.BadRequestError, match="dimensions must be"):
            client.embeddings.create(input=texts, model="slq", dimensions=7)
    direct = encoder.encode(texts)
    np.testing.assert_allclose([row.embedding for row in answers[0].data], direct, atol=1e-5)
    np.testing.assert_allclose([row.embedding for row in answers[1].data], direct, atol=1e-5)
    packed = [np.frombuffer(base64.b64decode(row.embedding), "<f4") for row in answers[2].data]
    np.testing.assert_allclose(packed, direct, atol=1e-5)


def test_embeddings_of_images_come_through_the_same_route(
    service: httpx.Client, encoder: Encoder, corpus: dict[str, dict[str, Any]]
) -> None:
    picture = corpus["test-00005"]["image"]
    body = {"input": [{"image": base64.b64encode(picture).decode()}, "a cat"]}
    found = service.post("/v1/embeddings", json=body).json()["data"]
    direct = encoder.encode([{"image": picture}, "a cat"])
    np.testing.assert_allclose([row["embedding"] for row in found], direct, atol=1e-5)


def test_a_chat_is_embedded_as_the_item_that_it_holds(
    service: httpx.Client, encoder: Encoder, corpus: dict[str, dict[str, Any]]
) -> None:
    picture = corpus["test-00005"]["image"]
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [{"type": "text", "text": "a cat"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": parts}], "model": "slq"}
    (found,) = service.post("/v1/embeddings", json=body).json()["data"]
    (direct,) = encoder.encode([{"text": "a cat", "image": picture}])
    np.testing.assert_allclose(found["embedding"], direct, atol=1e-5)


def test_the_gallery_page_needs_nothing_from_elsewhere(service: httpx.Client) -> None:
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<form" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text


@pytest.mark.parametrize("item_id", ["test-00003", PATH_LIKE])
@pytest.mark.parametrize("slashes", ["plain", "escaped"])
def test_images_come_back_as_they_were(
    service: httpx.Client, corpus: dict[str, dict[str, Any]], item_id: str, slashes: str
) -> None:
    from urllib.parse import quote

    name = quote(item_id, safe="/" if slashes == "plain" else "")
    answer = service.get(f"/items/{name}/image")
    assert answer.status_code == 200, answer.text
    assert (answer.content, answer.headers["content-type"]) == (
        corpus[item_id]["image"],
        "image/png",
    )


# ---- refusals ----


@pytest.mark.parametrize(
    "item_id",
    [TEXT_ONLY, "absent", "../../etc/passwd", "%2Fetc%2Fpasswd", "..%2f..%2fetc%2fpasswd"],
)
def test_an_id_without_an_image_is_not_found_however_it_looks(
    service: httpx.Client, item_id: str
) -> None:
    answer = service.get(f"/items/{item_id}/image")
    assert answer.status_code == 404
    assert b"root:" not in answer.content


def test_a_file_that_is_no_image_is_never_handed_out(service: httpx.Client) -> None:
    answer = service.get(f"/items/{REPLACED}/image")
    assert "has no image that can be read" in refusal(answer, 404)
    assert SECRET not in answer.content


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/absent", 404),
        ("POST", "/v1/absent", 404),
        ("GET", "/search", 405),
        ("DELETE", "/v1/embeddings", 405),
    ],
)
def test_unknown_routes_and_wrong_methods_have_the_error_shape(
    service: httpx.Client, method: str, path: str, status: int
) -> None:
    body = {"json": {}} if method == "POST" else {}
    answer = service.request(method, path, **body)
    assert path in refusal(answer, status)
    assert status == 404 or answer.headers["allow"] == "POST"


def test_another_endpoint_on_a_cluster_that_serves_already_is_refused(
    service: httpx.Client, recipe: Recipe
) -> None:
    other = free_port()
    with pytest.raises(ServiceError, match=rf":{recipe.serve.port} .*:{other};") as caught:
        start(changed(recipe, serve={"port": other}))
    assert "already listens" in str(caught.value)
    assert service.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": {}}, "neither an image nor a text"),
        ({"query": {"text": "  "}}, "neither an image nor a text"),
        ({"query": {"text": "\x00"}}, "empty"),
        ({"query": {"image": "no base64!"}}, "not valid base64"),
        ({"query": {"image": "bildñ"}}, "not valid base64"),
        ({"query": {"image": "aHRtbA=="}}, "none of JPEG, PNG, WEBP"),
        ({"query": {"image": "http://127.0.0.1/a.png"}}, "image URLs are not fetched"),
        ({"query": {"text": "x", "txt": "y"}}, "query.txt"),
        ({"query": {"text": "x"}, "topk": 5}, "topk"),
        ({"query": {"text": "x"}, "top_k": 0}, "top_k"),
        ({"query": {"text": "x"}, "top_k": 10**9}, "top_k is 1000000000; at most 50 is allowed"),
        ({"query": {"text": "x"}, "rerank_k": 11}, "rerank_k is 11; at most 10 is allowed"),
        ({"query": {"text": "x"}, "mode": "best"}, "mode"),
        ({"query": {"embedding": [1.0, 2.0]}}, "query.embedding has 2 values; this index has"),
        ({"query": {"text": "x" * 200_000}}, "at most 100000"),
        ({"query": {"text": "x"}, "budget_ms": -1}, "budget_ms"),
        ({"query": {"text": "x"}, "explain": "why"}, "explain"),
        ({}, "query"),
    ],
)
def test_a_query_that_cannot_be_answered_is_a_400_with_the_reason(
    service: httpx.Client, body: dict[str, Any], message: str
) -> None:
    assert message in refusal(service.post("/search", json=body), 400)


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": ""},
        {"input": ["a", ""]},
        {"input": [1, 2]},
        {"input": "a", "modle": "slq"},
        {"input": {"image": "no base64!"}},
        {"input": ["a"] * 41},
    ],
)
def test_embeddings_that_cannot_be_made_are_a_400(
    service: httpx.Client, body: dict[str, Any]
) -> None:
    assert refusal(service.post("/v1/embeddings", json=body), 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "x", "documents": []}, "documents has 0 entries; send at least one"),
        ({"query": "x", "documents": ["y"] * 11}, "at most 10"),
        ({"query": "", "documents": ["y"]}, "neither an image nor a text"),
        ({"query": {"image": "no base64!"}, "documents": ["y"]}, "not valid base64"),
        ({"query": "x", "documents": ["y"], "top_n": 0}, "top_n"),
        ({"query": "x", "documents": ["y"], "topn": 1}, "topn"),
        ({"query": "x"}, "documents"),
    ],
)
def test_documents_that_cannot_be_reranked_are_a_400(
    service: httpx.Client, body: dict[str, Any], message: str
) -> None:
    assert message in refusal(service.post("/v1/rerank", json=body), 400)


def test_a_fine_search_without_anything_to_score_is_refused_not_ignored(
    service: httpx.Client, encoder: Encoder, corpus: dict[str, dict[str, Any]]
) -> None:
    vector = encoder.encode([QUERY])[0].tolist()
    answer = service.post("/search", json={"query": {"embedding": vector}, "mode": "fine"})
    assert "fine stage" in refusal(answer, 400)
    found = search(service, query={"embedding": vector}, mode="auto")
    assert found["reranked"] == 0


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "1e39"])
def test_a_vector_that_is_not_finite_is_a_400(
    service: httpx.Client, encoder: Encoder, value: str
) -> None:
    values = ",".join([value] + ["0.1"] * (encoder.dimension - 1))
    answer = service.post(
        "/search",
        content=f'{{"query": {{"embedding": [{values}]}}, "mode": "coarse"}}',
        headers={"content-type": "application/json"},
    )
    assert refusal(answer, 400)


def test_a_vector_without_a_direction_is_a_400(service: httpx.Client, encoder: Encoder) -> None:
    body = {"query": {"embedding": [0.0] * encoder.dimension}}
    assert "norm 0" in refusal(service.post("/search", json=body), 400)


def test_a_body_that_is_no_json_or_too_large_is_refused(service: httpx.Client) -> None:
    kind = {"content-type": "application/json"}
    assert refusal(service.post("/search", content=b"{", headers=kind), 400)
    large = b'{"query": {"text": "' + b"x" * 2**20 + b'"}}'
    assert "exceeds 1048576 bytes" in refusal(
        service.post("/search", content=large, headers=kind), 413
    )
    # httpx sends an iterator in chunks, without a content-length
    answer = service.post("/search", content=iter([large[: 2**19], large[2**19 :]]), headers=kind)
    assert "exceeds 1048576 bytes" in refusal(answer, 413)
    pieces = [b'{"query": ', b'{"text": "a cat"}}']
    assert service.post("/search", content=iter(pieces), headers=kind).status_code == 200


def test_a_poisoned_query_does_not_harm_those_that_share_its_pass(
    service: httpx.Client, encoder: Encoder
) -> None:
    texts = [f"a dog and {n} cats" for n in range(6)]
    bodies = [{"input": text} for text in [*texts[:3], "\x00", "y" * 200_000, *texts[3:]]]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: service.post("/v1/embeddings", json=body), bodies))
    assert [answer.status_code for answer in answers] == [200] * 3 + [400] * 2 + [200] * 3
    good = [answer for answer in answers if answer.status_code == 200]
    vectors = [answer.json()["data"][0]["embedding"] for answer in good]
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_an_extreme_image_does_not_harm_those_that_share_its_pass(
    service: httpx.Client, encoder: Encoder, size: tuple[int, int]
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    strip = {"image": base64.b64encode(buffer.getvalue()).decode()}
    inputs = ["a cat", strip, "a dog"]
    with ThreadPoolExecutor(len(inputs)) as pool:
        answers = list(
            pool.map(lambda value: service.post("/v1/embeddings", json={"input": value}), inputs)
        )
    good = [answers[0], answers[2]]
    assert [answer.status_code for answer in good] == [200, 200]
    assert answers[1].status_code in (200, 400)  # families differ in what they take
    vectors = [answer.json()["data"][0]["embedding"] for answer in good]
    np.testing.assert_allclose(vectors, encoder.encode(["a cat", "a dog"]), atol=1e-5)


def test_overload_is_refused_at_once_with_a_time_to_retry(service: httpx.Client) -> None:
    body = {"input": [f"a dog and {n} cats" for n in range(40)]}
    with ThreadPoolExecutor(100) as pool:  # 64 run, 12 may wait
        answers = list(pool.map(lambda _: service.post("/v1/embeddings", json=body), range(100)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert "too many requests" in refusal(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
    assert service.get("/readyz").status_code == 200
