"""The coarse stage as the HTTP face sees it: model and index behind two handles, in one embedding space."""

import asyncio
import contextvars
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from pipelines.serving.adapters import Embedded
from pipelines.serving.asked import asked
from pipelines.serving.calls import ask, cause_of
from pipelines.serving.index_service import Found, Moved
from pipelines.serving.pinned import Pinned
from pipelines.serving.telemetry import stage, told
from slq.errors import ArtifactMismatchError, UnavailableError, UnknownModelError
from slq.quantization import cut
from slq.schema import Item

_HEALTH_TIMEOUT_S = 10.0
_PROBE_PATIENCE_S = 2.0  # a description takes no pass
_KNOWN_S = 5.0
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
        self._told_at = 0.0
        self._asking: asyncio.Task[dict[str, Any]] | None = None

    async def describe(self) -> dict[str, Any]:
        """Ask both deployments; whoever asks meanwhile hears the same."""
        if self._asking is None:
            # Not in the context of whoever asks: calls of a request of Ray Serve end with its client.
            self._asking = asyncio.create_task(self._describe(), context=contextvars.Context())
            self._asking.add_done_callback(self._heard)
        return {**await asyncio.shield(self._asking)}

    def _heard(self, asking: asyncio.Task[dict[str, Any]]) -> None:
        self._asking = None
        if not asking.cancelled() and asking.exception() is None:
            self._info, self._told_at = asking.result(), time.monotonic()

    async def _describe(self) -> dict[str, Any]:
        calls = [
            ask(part.describe, patience_s=_PROBE_PATIENCE_S)
            for part in (self._backbone, self._index)
        ]
        try:
            model, index = await asyncio.wait_for(asyncio.gather(*calls), _HEALTH_TIMEOUT_S)
        except TimeoutError:
            raise UnavailableError(
                f"model or index did not answer within {_HEALTH_TIMEOUT_S:g} s"
            ) from None
        self._pinned.require(model["fingerprint"], found_in="the loaded model")
        if index["fingerprint"] not in model["models"].values():
            self._pinned.require(index["fingerprint"], found_in="the loaded index")
        return {**model, **index}

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        return await ask(method, *arguments, patience_s=self._patience_s, told=told())

    async def known(self) -> dict[str, Any]:
        """What was said last, at most some seconds ago; versions and adapters may be others by now."""
        if not self._info:
            return await self.describe()
        if time.monotonic() - self._told_at > _KNOWN_S:
            self._told_at = time.monotonic()
            asking = asyncio.create_task(self.describe(), context=contextvars.Context())
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._info

    def name_of(self, fingerprint: str) -> str:
        """The name of an adapter in logs; that of a fingerprint which is not known yet is empty."""
        models: dict[str, str] = self._info.get("models", {})
        return next((name for name, one in models.items() if one == fingerprint), "")

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

    async def require_searched(self, model: str, found: Found | None = None) -> None:
        """A search is by the adapter whose vectors the index holds.

        Args:
            model: That was asked for.
            found: The answer, where there is one.

        Raises:
            ArtifactMismatchError: The adapter has another embedding space.
            UnknownModelError: There is no such adapter.
        """
        searched = found.fingerprint if found else (await self.describe())["fingerprint"]
        wanted = await self.fingerprint_of(model)
        if wanted != searched:
            raise ArtifactMismatchError(
                f"model {model!r} has fingerprint {wanted}, but the index was built with {searched}; leave `model` out "
                "to search by the adapter of the index"
            )

    async def _search(self, *arguments: Any) -> Found | Moved:
        with stage("search"):
            found: Found | Moved = await self._ask(self._index.search, *arguments)
        return found

    async def search(
        self,
        item: Item | None,
        vector: NDArray[np.float32] | str | None,
        top_k: int,
        where: str | None = None,
    ) -> Found:
        """Hits of a query, in the embedding space of the version that gives them.

        Args:
            item: What is searched for, where it must be embedded.
            vector: That of the query, or the id of an item that others are like.
            top_k: Hits at most.

        A service that moves to a version of another adapter tells so: then the query is embedded anew.

        Args:
            item: What is searched for, where it must be embedded.
            vector: That of the query, or the id of an item that others are like.
            top_k: Hits at most.
            where: A predicate over the stored columns, in SQL.

        Raises:
            DataError: The query or the predicate cannot be used.
            UnavailableError: A deployment cannot answer now.
        """
        space = (await self.known())["fingerprint"]
        for _ in range(_MOVES):
            try:
                found = await self._once(item, vector, top_k, where, space)
            except Exception as error:
                if not isinstance(cause_of(error), UnknownModelError):
                    raise
                space = (await self.describe())[
                    "fingerprint"
                ]  # its adapter was removed after a move
                continue
            if isinstance(found, Found):
                self._info["fingerprint"] = found.moved_to
                return found
            space = found.fingerprint
        raise UnavailableError("the index moves again and again; try again later")

    async def _once(
        self,
        item: Item | None,
        vector: NDArray[np.float32] | str | None,
        top_k: int,
        where: str | None,
        space: str,
    ) -> Found | Moved:
        if vector is not None:
            return await self._search(vector, top_k, None, where)
        assert item is not None
        with stage("embed"):
            (embedded,) = (await self.embed([item], space)).vectors
        return await self._search(embedded, top_k, space, where)
