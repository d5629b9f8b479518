"""The HTTP face of the online service: routes and limits.

Handlers and middleware are there before the ingress class: Ray Serve freezes the app when it decorates that class.
"""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from pipelines.contents import vector_of
from pipelines.messages import (
    EmbeddingsRequest,
    IndexRequest,
    IndexResponse,
    RerankRequest,
    RerankResponse,
    SearchRequest,
    SearchResponse,
    embeddings_response,
)
from pipelines.recipe import Recipe
from pipelines.serving.asked import asked
from pipelines.serving.calls import answer_of
from pipelines.serving.config import ServeConfig
from pipelines.serving.explaining import ExplainRequest, ExplainResponse, explained
from pipelines.serving.faults import answer_in_error_shape
from pipelines.serving.fine import FineStage
from pipelines.serving.guard import Guard
from pipelines.serving.index_service import Found, Sent
from pipelines.serving.page import Page
from pipelines.serving.pictures import picture_of
from pipelines.serving.pinned import Pinned
from slq.errors import DataError, UnavailableError
from slq.quantization import cut
from slq.schema import Item

_HEALTH_TIMEOUT_S = 10.0
app = FastAPI(
    title="slq", description="Coarse-then-fine multimodal retrieval with one frozen backbone."
)
answer_in_error_shape(app)


def _settings() -> ServeConfig:
    replica: Any = serve.get_replica_context().servable_object
    settings: ServeConfig = replica.settings
    return settings


app.add_middleware(Guard, settings=_settings)


@serve.deployment
@serve.ingress(app)
class Ingress:
    """The HTTP face; it holds no model and no vectors."""

    def __init__(
        self,
        recipe: dict[str, Any],
        pinned: Pinned,
        backbone: DeploymentHandle,
        index: DeploymentHandle,
    ) -> None:
        self._recipe = Recipe.model_validate(recipe)
        self._pinned = pinned
        self._backbone = backbone
        self._index = index
        self.settings = self._recipe.serve
        self._info: dict[str, Any] = {}
        self._page = Page.shipped()

    async def _describe(self) -> dict[str, Any]:
        """Ask both deployments; embedding space and dimension are pinned, so searches reuse what is said of them."""
        calls = (
            answer_of(self._backbone.describe.remote()),
            answer_of(self._index.describe.remote()),
        )
        try:
            model, index = await asyncio.wait_for(asyncio.gather(*calls), _HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(
                f"model or index did not answer within {_HEALTH_TIMEOUT_S:g} s"
            ) from None
        self._pinned.require(model["fingerprint"], found_in="the loaded model")
        self._pinned.require(index["fingerprint"], found_in="the loaded index")
        self._info = {**model, **index}
        return self._info

    async def _known(self) -> dict[str, Any]:
        return self._info or await self._describe()

    async def _embed(self, items: list[Item]) -> list[NDArray[np.float32]]:
        """Vectors of items, as long as those of the index."""
        dimension = (await self._known())["dimension"]
        vectors: list[NDArray[np.float32]] = await answer_of(
            self._backbone.embed.remote(items, asked().tenant)
        )
        return [one if len(one) == dimension else cut(one[None], dimension)[0] for one in vectors]

    @app.post("/search")
    async def search(self, body: SearchRequest, response: Response) -> SearchResponse:
        """Coarse search, then the fine stage on the best candidates, for which the query needs a text or an image."""
        accepted = asked().accepted
        info = await self._known()
        self._check_limits(body)
        item, vector = await self._query(body, info["dimension"])
        embedded = time.perf_counter()
        depth = self._depth(body) if item is not None or isinstance(vector, str) else 0
        found: Found = await answer_of(self._index.search.remote(vector, max(body.top_k, depth)))
        searched = time.perf_counter()
        budget_s = None if body.budget_ms is None else body.budget_ms / 1000
        fine = FineStage(
            self._backbone,
            budget_s=None if budget_s is None else budget_s - (searched - accepted),
            explain=body.explain,
            adaptive=self._recipe.rerank.adaptive if body.mode == "auto" else None,
            tenant=asked().tenant,
        )
        outcome = await fine.search(item, found, depth)
        scored = time.perf_counter()
        response.headers["x-slq-fingerprint"] = info["fingerprint"]
        reasons = outcome.reasons
        if found.shards_ok < found.shards_total:
            reasons = ["partitions", *reasons]
        return SearchResponse(
            results=outcome.results[: body.top_k],
            timings_ms={
                "embed": 1000 * (embedded - accepted),
                "search": 1000 * (searched - embedded),
                "fine": 1000 * (scored - searched),
            },
            reranked=outcome.reranked,
            degraded=bool(reasons),
            degraded_reasons=reasons,
            shards_ok=found.shards_ok,
            shards_total=found.shards_total,
            index_version=found.version,
            fingerprint=info["fingerprint"],
        )

    async def _query(
        self, body: SearchRequest, dimension: int
    ) -> tuple[Item | None, NDArray[np.float32] | str]:
        """The query's text and image, if it has any, and its (dimension,) vector, or the id of what it is like."""
        if body.query.like is not None:
            return None, body.query.like
        vector = vector_of(body.query, dimension)
        if vector is not None and not (body.query.text or body.query.image):
            if body.mode == "fine":
                raise DataError(
                    "the fine stage needs the query's text or image, not only its embedding"
                )
            return None, vector
        item = await asyncio.to_thread(body.query.item)
        return item, vector if vector is not None else (await self._embed([item]))[0]

    def _depth(self, body: SearchRequest) -> int:
        """How many candidates the fine stage may score."""
        return 0 if body.mode == "coarse" else body.rerank_k or self._recipe.rerank.depth

    def _check_limits(self, body: SearchRequest) -> None:
        limits = self._recipe.serve
        if body.top_k > limits.max_top_k:
            raise DataError(f"top_k is {body.top_k}; at most {limits.max_top_k} is allowed")
        if (body.rerank_k or 0) > limits.max_rerank:
            raise DataError(f"rerank_k is {body.rerank_k}; at most {limits.max_rerank} is allowed")

    @app.post("/v1/embeddings")
    async def embeddings(self, body: EmbeddingsRequest, response: Response) -> dict[str, Any]:
        """Embeddings in OpenAI's shape."""
        info = await self._known()
        if body.dimensions not in (None, info["dimension"]):
            raise DataError(f"dimensions must be {info['dimension']} for this adapter")
        limit = self._recipe.serve.max_inputs
        if not 0 < body.num_inputs <= limit:
            raise DataError(
                f"input has {body.num_inputs} entries; send at least one text or image and at most {limit}"
            )
        items = await asyncio.to_thread(body.items)
        vectors = await self._embed(items)
        response.headers["x-slq-fingerprint"] = info["fingerprint"]
        words = sum(len((item.text or "").split()) for item in items)
        return await asyncio.to_thread(embeddings_response, vectors, body, words)

    @app.post("/v1/rerank", response_model_exclude_none=True)
    async def rerank(self, body: RerankRequest, response: Response) -> RerankResponse:
        """Documents by how well they match a query, in the shape of Jina and Cohere."""
        info = await self._known()
        count, limit = len(body.documents), self._recipe.serve.max_rerank
        if not 0 < count <= limit:
            raise DataError(f"documents has {count} entries; send at least one and at most {limit}")
        item = await asyncio.to_thread(body.item)
        results = await FineStage(self._backbone, tenant=asked().tenant).documents(item, body)
        response.headers["x-slq-fingerprint"] = info["fingerprint"]
        return RerankResponse(results=results, model=body.model)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The served adapter, in OpenAI's shape."""
        info = await self._known()
        return {
            "object": "list",
            "data": [{"id": "slq", "object": "model", "owned_by": info["backbone"]}],
        }

    @app.get("/info")
    async def info(self) -> dict[str, Any]:
        """Fingerprint, dimension, limits; the index version that answers, its size and partitions, versions beside it.

        What is wrong with a version or a partition is told only where versions can be changed: the words name paths.
        """
        info = await self._describe()
        limits = self._recipe.serve
        info["limits"] = {
            "max_top_k": limits.max_top_k,
            "max_rerank": limits.max_rerank,
            "rerank_depth": self._recipe.rerank.depth,
        }
        if not self._recipe.serve.has_admin:
            info["refused_reason"] = None
            for partition in info["partitions"]:
                partition["problem"] = None
        return info

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Answers when model and index answer now and belong together, and the index as far as it must."""
        info = await self._describe()
        alive, count = info["shards_ok"], info["shards_total"]
        if alive == 0 or (alive < count and self._recipe.serve.on_lost_partition == "fail"):
            raise UnavailableError(f"{alive} of {count} partitions of the index answer")
        return {"status": "ok"}

    @app.post("/admin/index")
    async def move(self, body: IndexRequest) -> IndexResponse:
        """Answer from another index version from now on, without a pause; it is loaded and checked before."""
        if not self._recipe.serve.has_admin:
            raise HTTPException(403, "this service does not let versions be changed (serve.admin)")
        started = time.perf_counter()
        sent: Sent = await answer_of(self._index.send.remote(body.version))
        return IndexResponse(
            index_version=sent.version,
            previous_version=sent.previous,
            seconds=time.perf_counter() - started,
        )

    @app.get("/items/{item_id:path}/image")
    async def image(self, item_id: str) -> Response:
        """The image of an indexed item."""
        uri = await answer_of(self._index.uri_of.remote(item_id))
        return await asyncio.to_thread(picture_of, item_id, uri)

    @app.post("/explain", response_model=ExplainResponse)
    async def explain(self, body: ExplainRequest) -> ExplainResponse | JSONResponse:
        """Where in the image of an indexed item the model looks, before its answer or as it embeds."""
        return await explained(body, self._backbone, self._index, tenant=asked().tenant)

    @app.get("/")
    async def page(self) -> Response:
        """A gallery to try searches in."""
        return self._page.response()
