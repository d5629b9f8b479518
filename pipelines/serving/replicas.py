"""The resident backbone behind the HTTP face: one copy of the frozen weights embeds queries and scores candidates.

It is told at the start which embedding space it serves. A replica that Ray Serve starts later, after a crash or to
scale up, finds the same, or refuses to start.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve

from pipelines.contents import Content
from pipelines.loading import encoder_of, reranker_of, scoring_backbone, use_processors
from pipelines.recipe import Recipe
from pipelines.serving.candidates import Candidates, Stored
from pipelines.serving.pinned import Pinned
from slq.encoder import batches_by_length
from slq.errors import ConfigError, DataError, ServiceError
from slq.latent_queries import LatentQueries
from slq.reranker import Ranked
from slq.reranking.heat import HeatMap, answer_heat, latent_heat
from slq.schema import Item

log = logging.getLogger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def each_alone(
    run: Callable[[list[_In]], Iterable[_Out]], items: list[_In]
) -> list[_Out | Exception]:
    """Run a pass over items; when it raises, run them one by one, so that only the guilty one fails.

    Args:
        run: Gives one result per item, in order.
        items: What strangers may have sent together.

    Returns:
        In order, each item's result, or the exception that it raises on its own.
    """
    try:
        return list(run(items))
    except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to its item
        if len(items) == 1:
            return [error]
        log.warning("a pass over %d items failed, running them one by one: %s", len(items), error)
        return [result for item in items for result in each_alone(run, [item])]


def _read(query: Item | Stored) -> Item:
    """A query, which may be an indexed item.

    Raises:
        DataError: It cannot be read any more.
    """
    if isinstance(query, Item):
        return query
    try:
        return query.item()
    except DataError as error:
        raise DataError(
            f"the item that others should be like cannot be scored: {error}; mode coarse needs its vector alone"
        ) from None


@serve.deployment
class BackboneService:
    """The resident backbone: embeds queries, scores candidates.

    Args:
        recipe: The resolved recipe as plain values.
        pinned: What the service was started with.

    Raises:
        ArtifactMismatchError: Another adapter lies in the run folder by now, or the model embeds the index's items
            otherwise than it did.
    """

    def __init__(self, recipe: dict[str, Any], pinned: Pinned) -> None:
        self._recipe = Recipe.model_validate(recipe)
        use_processors(self._recipe.serve.num_threads)
        self._encoder = encoder_of(self._recipe)
        adapter = self._recipe.storage.adapter
        pinned.require(self._encoder.fingerprint, found_in=f"the model with adapter {adapter}")
        self._require_canary(pinned.version_now())
        self._reranker = reranker_of(
            self._recipe,
            scoring_backbone(self._recipe, self._encoder),
            vision_bytes=self._recipe.serve.vision_cache_bytes,
            prefix_bytes=self._recipe.serve.prefix_cache_bytes,
        )
        batch = self._recipe.serve
        self._embed_batch.set_max_batch_size(batch.max_batch)
        self._embed_batch.set_batch_wait_timeout_s(batch.batch_wait_s)

    def _require_canary(self, version: str) -> None:
        place, fingerprint = self._recipe.index_place, self._encoder.fingerprint
        place.require_canary(version, fingerprint, self._encoder)

    async def require_canary(self, version: str) -> None:
        """Check that the model embeds the items of an index version as it holds them.

        Raises:
            ArtifactError: Its canary is damaged.
            ArtifactMismatchError: The model gives other vectors.
        """
        await asyncio.to_thread(self._require_canary, version)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _embed_batch(
        self, asked: list[tuple[Item, str]]
    ) -> list[NDArray[np.float32] | Exception]:
        """Exceptions travel as data: a raised one would fail every request in the pass."""
        return await asyncio.to_thread(each_alone, self._encode, asked)

    def _encode(self, asked: list[tuple[Item, str]]) -> NDArray[np.float32]:
        """(n, dimension) float32 of items and their tenants.

        An image that is kept for the fine stage is not seen again, and the reverse.
        """
        items = [item for item, _ in asked]
        if not self._shares_images:
            return self._encoder.encode(items)
        vectors = np.empty((len(items), self._encoder.dimension), dtype=np.float32)
        for tenant in {tenant for _, tenant in asked}:
            mine = [number for number, (_, whose) in enumerate(asked) if whose == tenant]
            for chunk in batches_by_length([items[number] for number in mine], len(mine)):
                numbers = [mine[place] for place in chunk]
                prefix = self._reranker.prefix([items[n] for n in numbers], tenant=tenant)
                vectors[numbers] = self._encoder.encode_prefix(prefix).cpu().numpy()
        return vectors

    @property
    def _shares_images(self) -> bool:
        """Whether one frozen model embeds and scores, and keeps what it has seen."""
        section = self._recipe.serve
        return (
            section.vision_cache_bytes + section.prefix_cache_bytes > 0
            and self._reranker.backbone is self._encoder.backbone
            and self._reranker.opens_as_embedded
        )

    async def embed(self, items: list[Item], tenant: str = "") -> list[NDArray[np.float32]]:
        """The (dimension,) float32 unit vector of each item; concurrent calls share forward passes.

        Args:
            items: What is embedded.
            tenant: Whose they are; what is kept of one tenant's images another does not find.

        Raises:
            DataError: The model cannot take one of the items.
        """
        results = await asyncio.gather(*[self._embed_batch((item, tenant)) for item in items])
        for result in results:
            if isinstance(result, ValueError):  # processors refuse shapes of images this way
                raise DataError(f"the model cannot take this input: {result}")
            if isinstance(result, Exception):
                raise result
        return results

    async def rank(
        self,
        query: Item | Stored,
        candidates: list[Stored | Content],
        coarse_scores: list[float] | None = None,
        *,
        budget_s: float | None = None,
        details: bool = False,
        tenant: str = "",
    ) -> list[Ranked]:
        """The candidates in the order of the fine stage; arguments as `Reranker.rank`.

        Candidates are read here, each just before its pass, and what cannot be read or scored is flagged and keeps its
        coarse place. Time that the call waits for a free thread counts.

        Raises:
            DataError: The query is an indexed item that cannot be read any more.
        """
        called = time.monotonic()

        def run() -> list[Ranked]:
            left = None if budget_s is None else budget_s - (time.monotonic() - called)
            return self._reranker.rank(
                _read(query),
                Candidates(candidates),
                coarse_scores,
                budget_s=left,
                details=details,
                tenant=tenant,
            )

        return await asyncio.to_thread(run)

    async def heat(
        self, query: Item | Stored | None, candidate: Stored, *, tenant: str = ""
    ) -> HeatMap:
        """Where the model looks in the image of an indexed item.

        Args:
            query: Before the model says whether the item matches it; None where the item is embedded.
            candidate: The item.
            tenant: Whose request it is.

        Raises:
            DataError: One of them cannot be read, or the model cannot take them or show where it looks.
        """
        return await asyncio.to_thread(self._heat, query, candidate, tenant)

    def _heat(self, query: Item | Stored | None, candidate: Stored, tenant: str) -> HeatMap:
        item = candidate.item()
        try:
            if query is not None:
                return answer_heat(self._reranker, _read(query), item, tenant=tenant)
            latents = self._encoder.adapter
            if not isinstance(latents, LatentQueries):
                raise DataError(
                    "this model embeds without latent queries; ask where it looks `of` the answer"
                )
            return latent_heat(self._encoder.backbone, latents, item)
        except (ConfigError, ValueError) as error:
            raise DataError(f"the model cannot show where it looks: {error}") from None

    def describe(self) -> dict[str, Any]:
        """What `/info` says about the model."""
        encoder = self._encoder
        return {
            "fingerprint": encoder.fingerprint,
            "dimension": encoder.dimension,
            "backbone": encoder.backbone.name,
            "profile": self._reranker.profile.name,
            "framing": self._reranker.framing.name,
            "kept_images": {
                "vision": self._reranker.passes.views.counters(),
                "prefix": self._reranker.passes.prefixes.counters(),
            },
        }

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose model cannot embed a word any more."""
        if not np.isfinite(self._encoder.encode(["health"])).all():
            raise ServiceError("the backbone gives vectors that are not finite")
