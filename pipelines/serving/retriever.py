"""The coarse stage as the HTTP face sees it: model and index behind two handles, in one embedding space."""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from pipelines.serving.adapters import Embedded
from pipelines.serving.asked import asked
from pipelines.serving.calls import ask
from pipelines.serving.index_service import Found, Moved
from pipelines.serving.pinned import Pinned
from pipelines.serving.telemetry import stage, told
from slq.errors import ArtifactMismatchError, UnavailableError, UnknownModelError
from slq.quantization import cut
from slq.schema import Item

_HEALTH_TIMEOUT_S = 10.0
_MOVES = 3  # to other embedding spaces that a query follows while it is answered


class Retriever:
    """Embeds and searches.

    Args:
        pinned: What the service was started with.
        backbone: Embeds.
        index: Searches.
        patience_s: How long a replica may be silent before another is asked.
    """

    def __init__(
        self,
        pinned: Pinned,
        backbone: DeploymentHandle,
        index: DeploymentHandle,
        patience_s: float | None = None,
    ) -> None:
        self._pinned = pinned
        self._backbone = backbone
        self._index = index
        self._patience_s = patience_s
        self._info: dict[str, Any] = {}

    async def describe(self) -> dict[str, Any]:
        """Ask both deployments; searches reuse what is said of them until an answer tells of something newer."""
        calls = (ask(self._backbone.describe), ask(self._index.describe))
        try:
            model, index = await asyncio.wait_for(asyncio.gather(*calls), _HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(
                f"model or index did not answer within {_HEALTH_TIMEOUT_S:g} s"
            ) from None
        self._pinned.require(model["fingerprint"], found_in="the loaded model")
        if index["fingerprint"] not in model["models"].values():
            self._pinned.require(index["fingerprint"], found_in="the loaded index")
        self._info = {**model, **index}
        return self._info

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        return await ask(method, *arguments, patience_s=self._patience_s, told=told())

    async def known(self) -> dict[str, Any]:
        """What was said last; versions and adapters may be others by now."""
        return self._info or await self.describe()

    async def embed(self, items: list[Item], model: str) -> Embedded:
        """Vectors of items by an adapter (its name or its fingerprint), as long as those of the index."""
        dimension = (await self.known())["dimension"]
        with stage("queue"):  # until its pass; how long that took comes with the answer
            made: Embedded = await self._ask(self._backbone.embed, items, asked().tenant, model)
        vectors = [v if len(v) == dimension else cut(v[None], dimension)[0] for v in made.vectors]
        return Embedded(vectors, made.fingerprint)

    async def fingerprint_of(self, model: str) -> str:
        """Of an adapter's embedding space.

        Raises:
            UnknownModelError: There is no such adapter.
        """
        models = (await self.known())["models"]
        if model not in models:
            models = (await self.describe())["models"]
        if model not in models:
            raise UnknownModelError(
                f"there is no model {model!r}; this service has {', '.join(models)}"
            )
        fingerprint: str = models[model]
        return fingerprint

    async def require_searched(self, model: str) -> None:
        """A search is by the adapter whose vectors the index holds.

        Raises:
            ArtifactMismatchError: The adapter has another embedding space.
            UnknownModelError: There is no such adapter.
        """
        searched = (await self.describe())["fingerprint"]
        found = await self.fingerprint_of(model)
        if found != searched:
            raise ArtifactMismatchError(
                f"model {model!r} has fingerprint {found}, but the index was built with {searched}; leave `model` out "
                "to search by the adapter of the index"
            )

    async def _search(self, *arguments: Any) -> Found | Moved:
        with stage("search"):
            found: Found | Moved = await self._ask(self._index.search, *arguments)
        return found

    async def search(
        self, item: Item | None, vector: NDArray[np.float32] | str | None, top_k: int
    ) -> Found:
        """Hits of a query, in the embedding space of the version that gives them.

        Args:
            item: What is searched for, where it must be embedded.
            vector: That of the query, or the id of an item that others are like.
            top_k: Hits at most.

        A service that moves to a version of another adapter tells so once: then the query is embedded anew.
        """
        for _ in range(_MOVES):
            space = (await self.known())["fingerprint"]
            if vector is None:
                assert item is not None
                with stage("embed"):
                    (embedded,) = (await self.embed([item], space)).vectors
                found = await self._search(embedded, top_k, space)
            else:
                found = await self._search(vector, top_k)
            moved_to = found.fingerprint if isinstance(found, Moved) else found.moved_to
            if moved_to != space:
                await self.describe()
            if isinstance(found, Found):
                return found
        raise UnavailableError("the index moves again and again; try again later")
