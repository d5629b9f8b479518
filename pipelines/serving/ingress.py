"""The HTTP face of the online service: routes and limits.

Handlers and middleware are there before the ingress class: Ray Serve freezes the app when it decorates that class.
"""

import asyncio
import time
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.contents import Content, Readable, as_content, items_of, vector_of
from pipelines.links import Links
from pipelines.messages import (
    AdapterRequest,
    AdapterResponse,
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
from pipelines.serving import exposition, telemetry
from pipelines.serving.access import Access, require_admin
from pipelines.serving.asked import ADMIN, asked
from pipelines.serving.calls import ask
from pipelines.serving.described import ADMINISTERED, ASKED, FOUND, TOLD, DescribedApp
from pipelines.serving.explaining import ExplainRequest, ExplainResponse, explained
from pipelines.serving.faults import answer_in_error_shape
from pipelines.serving.fine import FineStage
from pipelines.serving.gate import Gate
from pipelines.serving.guard import Guard, Guarded
from pipelines.serving.here import Here
from pipelines.serving.index_service import IndexService, Sent
from pipelines.serving.page import Page
from pipelines.serving.pictures import picture_of
from pipelines.serving.pinned import Pinned
from pipelines.serving.rates import charge
from pipelines.serving.replicas import BackboneService
from pipelines.serving.retriever import Retriever
from pipelines.serving.telemetry import note, stage, timings_ms
from pipelines.serving.watch import Watch
from slq.errors import DataError, UnavailableError
from slq.schema import Item

FINGERPRINT = "x-slq-fingerprint"
app = DescribedApp(
    title="slq", description="Coarse-then-fine multimodal retrieval with one frozen backbone."
)
answer_in_error_shape(app)


def _replica() -> Guarded:
    replica: Guarded = serve.get_replica_context().servable_object
    return replica


app.add_middleware(Guard, guarded=_replica)
app.add_middleware(Gate, guarded=_replica)
app.add_middleware(Watch, guarded=_replica)  # the last one added is the first that is asked
app.include_router(exposition.router)


@serve.deployment
@serve.ingress(app)
class Ingress:
    """The HTTP face; it holds no model and no vectors, but where the service is together in one process.

    Args:
        recipe: The resolved recipe as plain values.
        pinned: What the service was started with.
        backbone: Embeds and scores; None where model and index are here.
        index: Searches; None where they are here.
        partitions: Of the index that is here.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        pinned: Pinned,
        backbone: DeploymentHandle | None,
        index: DeploymentHandle | None,
        *partitions: DeploymentHandle,
    ) -> None:
        self._recipe = Recipe.model_validate(recipe)
        self._parts: list[Any] = []  # those that are in this process, the model first
        if backbone is None or index is None:
            model = BackboneService.func_or_class(recipe, pinned)  # type: ignore[attr-defined]
            vectors = IndexService.func_or_class(recipe, pinned, Here(model), *partitions)  # type: ignore[attr-defined]
            self._parts = [model, vectors]
            backbone, index = Here(model), Here(vectors)
        self._backbone: Any = backbone
        self._index: Any = index
        self.settings = self._recipe.serve
        self._patience_s = None if self._parts else self.settings.patience_s
        self._retriever = Retriever(pinned, self._backbone, self._index, self._patience_s)
        self.access = Access(self.settings)
        self._links = Links(self.settings.links)
        telemetry.begin(self.settings.telemetry)
        self._page = Page.shipped()

    async def check_health(self) -> None:
        """Ray Serve replaces a replica of which a part that is in it is not healthy."""
        for part in self._parts:
            await part.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How busy the model is, where it is in this process; Ray Serve asks for it."""
        found: dict[str, float] = {}
        for model in self._parts[:1]:
            found = await model.record_autoscaling_stats()
        return found

    @app.post("/search", responses=ASKED)
    async def search(self, body: SearchRequest, response: Response) -> SearchResponse:
        """Coarse search, then the fine stage on the best candidates, for which the query needs a text or an image."""
        accepted = asked().accepted
        info = await self._retriever.known()
        self._check_limits(body)
        if body.model is not None:
            await self._retriever.require_searched(body.model)
        with stage("embed"):
            item, vector = await self._query(body, info["dimension"])
        depth = self._depth(body) if item is not None or isinstance(vector, str) else 0
        top_k = max(body.top_k, depth)
        found = await self._retriever.search(item, vector, top_k, body.filter)
        if body.model is not None:
            await self._retriever.require_searched(body.model, found)
        searched = time.perf_counter()
        budget_s = None if body.budget_ms is None else body.budget_ms / 1000
        fine = FineStage(
            self._backbone,
            budget_s=None if budget_s is None else budget_s - (searched - accepted),
            explain=body.explain,
            adaptive=self._recipe.rerank.adaptive if body.mode == "auto" else None,
            tenant=asked().tenant,
            patience_s=self._patience_s,
        )
        with stage("fine"):
            outcome = await fine.search(item, found, depth)
        response.headers[FINGERPRINT] = found.fingerprint
        reasons = outcome.reasons
        if found.shards_ok < found.shards_total:
            reasons = ["partitions", *reasons]
        note(
            reranked=outcome.reranked,
            degraded_reasons=reasons,
            index_version=found.version,
            model=self._retriever.name_of(found.fingerprint),
        )
        return SearchResponse(
            results=outcome.results[: body.top_k],
            timings_ms=timings_ms(),
            reranked=outcome.reranked,
            degraded=bool(reasons),
            degraded_reasons=reasons,
            shards_ok=found.shards_ok,
            shards_total=found.shards_total,
            index_version=found.version,
            fingerprint=found.fingerprint,
        )

    async def _query(
        self, body: SearchRequest, dimension: int
    ) -> tuple[Item | None, NDArray[np.float32] | str | None]:
        """The query's text and image, if it has any, and its own (dimension,) vector or the id of what it is like."""
        if body.query.like is not None:
            charge(1)
            return None, body.query.like
        vector = vector_of(body.query, dimension)
        if vector is not None and not (body.query.text or body.query.image):
            if body.mode == "fine":
                raise DataError(
                    "the fine stage needs the query's text or image, not only its embedding"
                )
            return None, vector
        (readable,) = await self._readable([body.query])
        return await asyncio.to_thread(readable.item), vector

    async def _readable(self, contents: list[Content]) -> list[Readable]:
        """Contents with the images that they name by URL, if this service fetches any; each counts as a request."""
        charge(1 + sum(content.link is not None for content in contents))
        return await self._links.readable(contents)

    def _depth(self, body: SearchRequest) -> int:
        """How many candidates the fine stage may score."""
        return 0 if body.mode == "coarse" else body.rerank_k or self._recipe.rerank.depth

    def _check_limits(self, body: SearchRequest) -> None:
        limits = self._recipe.serve
        if body.top_k > limits.max_top_k:
            raise DataError(f"top_k is {body.top_k}; at most {limits.max_top_k} is allowed")
        if (body.rerank_k or 0) > limits.max_rerank:
            raise DataError(f"rerank_k is {body.rerank_k}; at most {limits.max_rerank} is allowed")

    @app.post("/v1/embeddings", responses=ASKED)
    async def embeddings(self, body: EmbeddingsRequest, response: Response) -> dict[str, Any]:
        """Embeddings in OpenAI's shape."""
        info = await self._retriever.known()
        if body.dimensions not in (None, info["dimension"]):
            raise DataError(f"dimensions must be {info['dimension']} for this adapter")
        limit = self._recipe.serve.max_inputs
        if not 0 < body.num_inputs <= limit:
            raise DataError(
                f"input has {body.num_inputs} entries; send at least one text or image and at most {limit}"
            )
        charge(body.num_inputs)
        with stage("embed"):
            readable = await self._readable(body.contents())
            items = await asyncio.to_thread(items_of, readable, self.settings.max_pixels)
            made = await self._retriever.embed(items, body.model)
        note(model=body.model)  # now that it is known to be one
        response.headers[FINGERPRINT] = made.fingerprint
        words = sum(len((item.text or "").split()) for item in items)
        return await asyncio.to_thread(embeddings_response, made.vectors, body, words)

    @app.post("/v1/rerank", response_model_exclude_none=True, responses=ASKED)
    async def rerank(self, body: RerankRequest, response: Response) -> RerankResponse:
        """Documents by how well they match a query, in the shape of Jina and Cohere."""
        fingerprint = await self._retriever.fingerprint_of(body.model)
        count, limit = len(body.documents), self._recipe.serve.max_rerank
        if not 0 < count <= limit:
            raise DataError(f"documents has {count} entries; send at least one and at most {limit}")
        charge(count)
        with stage("fine"):
            query, *documents = await self._readable([as_content(body.query), *body.contents()])
            item = await asyncio.to_thread(query.item)
            fine = FineStage(self._backbone, tenant=asked().tenant, patience_s=self._patience_s)
            results = await fine.documents(item, body, documents)
        note(model=body.model, reranked=sum(one.problem is None for one in results))
        response.headers[FINGERPRINT] = fingerprint
        return RerankResponse(results=results, model=body.model)

    @app.get("/v1/models", responses=TOLD)
    async def models(self) -> dict[str, Any]:
        """The served adapters, in OpenAI's shape."""
        info = await self._retriever.describe()
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "owned_by": info["backbone"],
                    "fingerprint": fingerprint,
                    "searches": fingerprint == info["fingerprint"],
                }
                for name, fingerprint in info["models"].items()
            ],
        }

    @app.get("/info", responses=TOLD)
    async def info(self) -> dict[str, Any]:
        """Fingerprint, dimension, limits; the index version that answers, its size and partitions, versions beside it.

        What is wrong with a version or a partition is told only to whoever may change versions: the words name paths.
        """
        info = await self._retriever.describe()
        limits = self._recipe.serve
        info["limits"] = {
            "max_top_k": limits.max_top_k,
            "max_rerank": limits.max_rerank,
            "rerank_depth": self._recipe.rerank.depth,
        }
        if ADMIN not in asked().scopes:
            info["refused_reason"] = None
            for partition in info["partitions"]:
                partition["problem"] = None
        return info

    @app.get("/healthz", responses=TOLD)
    async def healthz(self) -> dict[str, str]:
        """Answers as long as this process does: what restarts it should ask here."""
        return {"status": "ok"}

    @app.get("/readyz", responses=TOLD)
    async def readyz(self) -> dict[str, str]:
        """Answers when model and index answer now and belong together, and the index as far as it must.

        What sends requests here should ask.
        """
        info = await self._retriever.describe()
        alive, count = info["shards_ok"], info["shards_total"]
        if alive == 0 or (alive < count and self._recipe.serve.on_lost_partition == "fail"):
            raise UnavailableError(f"{alive} of {count} partitions of the index answer")
        return {"status": "ok"}

    @app.post("/admin/index", responses=ADMINISTERED)
    async def move(self, body: IndexRequest) -> IndexResponse:
        """Answer from another index version from now on, without a pause; it is loaded and checked before."""
        require_admin()
        started = time.perf_counter()
        sent: Sent = await ask(self._index.send, body.version)
        await self._retriever.describe()
        return IndexResponse(
            index_version=sent.version,
            previous_version=sent.previous,
            seconds=time.perf_counter() - started,
        )

    @app.post("/admin/adapters", responses=ADMINISTERED)
    async def add_adapter(self, body: AdapterRequest) -> AdapterResponse:
        """Serve a further adapter from now on, or another one under a name; it is loaded and checked before."""
        require_admin()
        fingerprint = await ask(self._backbone.add_adapter, body.name, body.folder)
        await self._retriever.describe()
        return AdapterResponse(name=body.name, fingerprint=fingerprint)

    @app.delete("/admin/adapters/{name}", responses=ADMINISTERED)
    async def remove_adapter(self, name: str) -> AdapterResponse:
        """Serve an adapter no longer."""
        require_admin()
        await self._retriever.describe()
        fingerprint = await self._retriever.fingerprint_of(name)
        await ask(self._backbone.remove_adapter, name)
        await self._retriever.describe()
        return AdapterResponse(name=name, fingerprint=fingerprint)

    @app.get("/items/{item_id:path}/image", responses=FOUND, response_class=Response)
    async def image(self, item_id: str) -> Response:
        """The image of an indexed item."""
        uri = await ask(self._index.uri_of, item_id, patience_s=self._patience_s)
        return await asyncio.to_thread(picture_of, item_id, uri)

    @app.post("/explain", response_model=ExplainResponse, responses=ASKED)
    async def explain(self, body: ExplainRequest) -> ExplainResponse | JSONResponse:
        """Where in the image of an indexed item the model looks, before its answer or as it embeds."""
        readable = await self._readable(body.contents())
        return await explained(
            body,
            await asyncio.to_thread(items_of, readable, self.settings.max_pixels),
            self._backbone,
            self._index,
            tenant=asked().tenant,
            patience_s=self._patience_s,
        )

    @app.get("/", response_class=HTMLResponse)
    async def page(self) -> Response:
        """A gallery to try searches in."""
        return self._page.response()
