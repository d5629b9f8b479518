"""The online service on Ray Serve: ingress -> backbone (embeds and scores) and index (searches).

One resident copy of the frozen weights embeds queries and scores candidates. The service refuses to start when index
and adapter carry different fingerprints.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from importlib import resources as package_files
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from pipelines.corpus import fetch_image
from pipelines.loading import encoder_of, use_threads
from pipelines.messages import (
    EmbeddingsRequest,
    SearchRequest,
    SearchResponse,
    SearchResult,
    embeddings_response,
    error_body,
    vector_of,
)
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.errors import ArtifactMismatchError, DataError, MediaError, ServiceError
from slq.index import Hit, VectorIndex
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item

log = logging.getLogger(__name__)
APP_NAME = "slq"
app = FastAPI(
    title="slq", description="Coarse-then-fine multimodal retrieval with one frozen backbone."
)


# Handlers and middleware stand before the ingress class: Serve freezes the app when it decorates it.


def _status_of(error: BaseException) -> tuple[int, str]:
    if isinstance(error, ArtifactMismatchError):
        return 409, "fingerprint_mismatch"
    if isinstance(error, MediaError) and error.reason == "too_many_bytes":
        return 413, "too_large"
    if isinstance(error, DataError):
        return 400, "invalid_request_error"
    return 500, "server_error"


@app.middleware("http")
async def _limit_body(request: Request, call_next: Any) -> Any:
    replica: Any = serve.get_replica_context().servable_object
    limit = replica.max_body_bytes
    length = request.headers.get("content-length")
    if length is None and request.method == "POST":
        message = "send a content-length; chunked bodies are not accepted"
        return JSONResponse(error_body(message, "length_required"), 411)
    if int(length or 0) > limit:
        return JSONResponse(error_body(f"the body exceeds {limit} bytes", "too_large"), 413)
    return await call_next(request)


@app.exception_handler(Exception)
async def _on_error(_: Request, error: Exception) -> JSONResponse:
    cause = error.cause if isinstance(error, RayTaskError) else error
    status, kind = _status_of(cause)
    message = str(cause) if status != 500 else "internal error; see the service's log"
    return JSONResponse(error_body(message, kind), status)


@app.exception_handler(DataError)
@app.exception_handler(ArtifactMismatchError)
@app.exception_handler(RayTaskError)
async def _on_known_error(request: Request, error: Exception) -> JSONResponse:
    return await _on_error(request, error)


@app.exception_handler(RequestValidationError)
async def _on_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
    parts = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
    return JSONResponse(error_body("; ".join(parts), "invalid_request_error"), 400)


@serve.deployment
class BackboneService:
    """The resident backbone: embeds queries, scores candidates."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self._recipe = Recipe.model_validate(recipe)
        use_threads(self._recipe.serve.num_threads)
        self._encoder = encoder_of(self._recipe)
        rerank = self._recipe.rerank
        self._reranker = Reranker(
            self._encoder.backbone, framing=rerank.framing, batch_size=rerank.batch_size
        )
        batch = self._recipe.serve
        self._embed_batch.set_max_batch_size(batch.max_batch)
        self._embed_batch.set_batch_wait_timeout_s(batch.batch_wait_s)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _embed_batch(self, items: list[Item]) -> list[np.ndarray[Any, Any]]:
        return list(await asyncio.to_thread(self._encoder.encode, items))

    async def embed(self, item: Item) -> np.ndarray[Any, Any]:
        """The (dimension,) float32 unit vector of one item; concurrent calls share a forward pass."""
        vector: np.ndarray[Any, Any] = await self._embed_batch(item)
        return vector

    async def score(
        self, query: Item, uris: list[str | None], texts: list[str | None]
    ) -> list[float]:
        """Margins of candidates, given where their images lie and what their texts are."""
        return await asyncio.to_thread(self._score, query, uris, texts)

    def _score(self, query: Item, uris: list[str | None], texts: list[str | None]) -> list[float]:
        candidates = [_candidate(uri, text) for uri, text in zip(uris, texts, strict=True)]
        return self._reranker.score([(query, candidate) for candidate in candidates]).tolist()

    def describe(self) -> dict[str, Any]:
        """What `/info` says about the model."""
        encoder = self._encoder
        return {
            "fingerprint": encoder.fingerprint,
            "dimension": encoder.dimension,
            "backbone": encoder.backbone.name,
            "framing": self._reranker.framing.name,
        }

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose model cannot embed a word any more."""
        if not np.isfinite(self._encoder.encode(["health"])).all():
            raise ServiceError("the backbone gives vectors that are not finite")


def _candidate(uri: str | None, text: str | None) -> Item:
    data = fetch_image(uri) if uri else None
    return Item(text=text, image=decode_image(data) if data is not None else None)


@serve.deployment
class IndexService:
    """One loaded index version."""

    def __init__(self, folder: str) -> None:
        self._index = VectorIndex(Path(folder))
        self._row_of = {
            item_id: row for row, item_id in enumerate(self._index.rows["id"].to_pylist())
        }

    def search(
        self, vector: np.ndarray[Any, Any], top_k: int
    ) -> tuple[list[Hit], list[dict[str, Any]], str]:
        """Hits of one query vector, their stored columns, and the version that answered."""
        found = self._index.search(vector[None, :], top_k)[0]
        return found, [self._index.row(hit.row) for hit in found], self._index.version

    def describe(self) -> dict[str, Any]:
        """What `/info` says about the index."""
        return {
            "index_version": self._index.version,
            "num_vectors": len(self._index),
            "fingerprint": self._index.fingerprint,
            "dimension": int(self._index.manifest["dimension"]),
        }

    def uri_of(self, item_id: str) -> str | None:
        """Where the item's image lies, or None when there is no such item."""
        row = self._row_of.get(item_id)
        return None if row is None else self._index.row(row)["uri"]


@serve.deployment
@serve.ingress(app)
class Ingress:
    """The HTTP face; it holds no model and no vectors."""

    def __init__(
        self, recipe: dict[str, Any], backbone: DeploymentHandle, index: DeploymentHandle
    ) -> None:
        self._recipe = Recipe.model_validate(recipe)
        self._backbone = backbone
        self._index = index
        self.max_body_bytes = self._recipe.serve.max_body_bytes
        self._info: dict[str, Any] = {}
        self._page = package_files.files("pipelines").joinpath("gallery.html").read_text()

    async def _describe(self) -> dict[str, Any]:
        if not self._info:
            model = await self._backbone.describe.remote()
            index = await self._index.describe.remote()
            require_same_fingerprint(
                index["fingerprint"],
                model["fingerprint"],
                expected_in="the index",
                found_in="the loaded model",
                remedy="rebuild the index with `slq embed` and `slq index`",
            )
            self._info = {**model, **index}
        return self._info

    @app.post("/search")
    async def search(self, body: SearchRequest, response: Response) -> SearchResponse:
        """Coarse search, then the fine stage on the best candidates (`auto` scores them when a pair has one image)."""
        info = await self._describe()
        self._check_limits(body)
        started = time.perf_counter()
        given = vector_of(body.query, info["dimension"])
        item = body.query.item() if given is None or body.query.text or body.query.image else None
        if given is not None:
            vector = np.asarray(given, dtype=np.float32)
        else:
            vector = await self._backbone.embed.remote(item)
        embedded = time.perf_counter()
        depth = (
            0
            if body.mode == "coarse"
            else min(body.rerank_k or self._recipe.rerank.depth, info["num_vectors"])
        )
        hits, rows, version = await self._index.search.remote(vector, max(body.top_k, depth))
        searched = time.perf_counter()
        results = [
            SearchResult(
                id=hit.id, score=hit.score, coarse_score=hit.score, uri=row["uri"], text=row["text"]
            )
            for hit, row in zip(hits, rows, strict=True)
        ]
        reranked = 0
        if item is None and body.mode == "fine":
            raise DataError(
                "the fine stage needs the query's text or image, not only its embedding"
            )
        if depth and item is not None:
            reranked = await self._rerank(item, results, rows, depth, required=body.mode == "fine")
        scored = time.perf_counter()
        response.headers["x-slq-fingerprint"] = info["fingerprint"]
        return SearchResponse(
            results=results[: body.top_k],
            timings_ms={
                "embed": 1000 * (embedded - started),
                "search": 1000 * (searched - embedded),
                "fine": 1000 * (scored - searched),
            },
            reranked=reranked,
            degraded=False,
            index_version=version,
            fingerprint=info["fingerprint"],
        )

    async def _rerank(
        self,
        item: Item,
        results: list[SearchResult],
        rows: list[dict[str, Any]],
        depth: int,
        *,
        required: bool,
    ) -> int:
        """Put the scored block in front, by margin, then coarse score; gives how many were scored."""
        query_has_image = item.image is not None
        scorable = [
            n
            for n in range(min(depth, len(results)))
            if ("image" in rows[n]["modality"]) != query_has_image
        ]
        if not scorable:
            if required:
                raise DataError(
                    "the fine stage needs one image in each pair; use mode `coarse` for this query"
                )
            return 0
        margins = await self._backbone.score.remote(
            item, [rows[n]["uri"] for n in scorable], [rows[n]["text"] for n in scorable]
        )
        for n, margin in zip(scorable, margins, strict=True):
            results[n].fine_score = results[n].score = margin
        block = sorted(
            (results[n] for n in scorable), key=lambda r: (-r.score, -r.coarse_score, r.id)
        )
        rest = [result for n, result in enumerate(results) if n not in set(scorable)]
        results[:] = block + rest
        return len(scorable)

    def _check_limits(self, body: SearchRequest) -> None:
        limits = self._recipe.serve
        if body.top_k > limits.max_top_k:
            raise DataError(f"top_k is {body.top_k}; at most {limits.max_top_k} is allowed")
        if (body.rerank_k or 0) > limits.max_rerank:
            raise DataError(f"rerank_k is {body.rerank_k}; at most {limits.max_rerank} is allowed")

    @app.post("/v1/embeddings")
    async def embeddings(self, body: EmbeddingsRequest, response: Response) -> dict[str, Any]:
        """Embeddings in OpenAI's shape."""
        info = await self._describe()
        if body.dimensions not in (None, info["dimension"]):
            raise DataError(f"dimensions must be {info['dimension']} for this adapter")
        items = body.items()
        if not items:
            raise DataError("input is empty; send at least one text or image")
        vectors = await asyncio.gather(*[self._backbone.embed.remote(item) for item in items])
        response.headers["x-slq-fingerprint"] = info["fingerprint"]
        words = sum(len((item.text or "").split()) for item in items)
        return embeddings_response(vectors, body, words)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The served adapter, in OpenAI's shape."""
        info = await self._describe()
        return {
            "object": "list",
            "data": [{"id": "slq", "object": "model", "owned_by": info["backbone"]}],
        }

    @app.get("/info")
    async def info(self) -> dict[str, Any]:
        """Fingerprint, dimension, index version and size."""
        return await self._describe()

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Answers when model and index answer and belong together."""
        await self._describe()
        return {"status": "ok"}

    @app.get("/items/{item_id:path}/image")
    async def image(self, item_id: str) -> Response:
        """The image of an indexed item."""
        uri = await self._index.uri_of.remote(item_id)
        data = await asyncio.to_thread(fetch_image, uri) if uri else None
        if data is None:
            return JSONResponse(error_body(f"item {item_id!r} has no image", "not_found"), 404)
        kind = {b"\x89PN": "image/png", b"RIF": "image/webp"}.get(data[:3], "image/jpeg")
        return Response(data, media_type=kind, headers={"cache-control": "max-age=3600"})

    @app.get("/")
    async def page(self) -> HTMLResponse:
        """A small gallery to try searches in."""
        return HTMLResponse(self._page)


def application(recipe: Recipe) -> Any:
    """The Serve application graph of a recipe."""
    plain = recipe.model_dump(mode="json")
    gpus = recipe.resources.gpus_per_worker
    scaling = {
        "min_replicas": recipe.resources.serve_replicas,
        "max_replicas": max(recipe.resources.serve_max_replicas, recipe.resources.serve_replicas),
        "target_ongoing_requests": 8,
    }
    backbone = BackboneService.options(  # type: ignore[attr-defined]
        autoscaling_config=scaling,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": 0 if gpus else 1, "num_gpus": gpus},
    ).bind(plain)
    folder = str(recipe.storage.index.resolve())
    index = IndexService.options(ray_actor_options={"num_cpus": 0}).bind(folder)  # type: ignore[attr-defined]
    ingress = Ingress.options(ray_actor_options={"num_cpus": 0})  # type: ignore[attr-defined]
    return ingress.bind(plain, backbone, index)


def check_before_start(recipe: Recipe) -> None:
    """Refuse to start what could not answer.

    Raises:
        ArtifactError: Adapter or index is missing or damaged.
        ArtifactMismatchError: They belong to different embedding spaces; both fingerprints are named.
        ServiceError: The port is in use.
    """
    adapter = load_adapter_config(recipe.storage.adapter)
    index = VectorIndex(recipe.storage.index)
    require_same_fingerprint(
        index.fingerprint,
        adapter.fingerprint,
        expected_in=f"index {recipe.storage.index}",
        found_in=f"adapter {recipe.storage.adapter}",
        remedy="rebuild it with `slq embed` and `slq index`",
    )
    require_free_port(recipe.serve.host, recipe.serve.port)


def require_free_port(host: str, port: int) -> None:
    """Check that the service can listen.

    Raises:
        ServiceError: Something else already does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it or choose another serve.port"
            ) from None


def start(recipe: Recipe) -> str:
    """Start the service in the connected Ray and wait until it answers; gives its URL."""
    check_before_start(recipe)
    serve.start(http_options={"host": recipe.serve.host, "port": recipe.serve.port})
    serve.run(application(recipe), name=APP_NAME, route_prefix="/")
    url = f"http://{recipe.serve.host}:{recipe.serve.port}"
    log.info("serving %s (%s, docs at /docs)", url, recipe.storage.index)
    return url


def stop() -> None:
    """Drain and stop the service."""
    serve.shutdown()


def serve_until_stopped(recipe: Recipe) -> None:
    """Start the service and keep it until SIGINT or SIGTERM, then drain it."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    start(recipe)
    try:
        ended.wait()
    finally:
        stop()
