"""The resident backbone behind the HTTP face: one copy of the frozen weights embeds queries and scores candidates.

It is told at the start which embedding space it serves. A replica that Ray Serve starts later, after a crash or to
scale up, finds the same, or refuses to start.
"""

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve

from pipelines.contents import Readable
from pipelines.loading import encoder_of, reranker_of, scoring_backbone, use_processors
from pipelines.recipe import Recipe
from pipelines.serving import telemetry
from pipelines.serving.adapters import OWN, Adapters, Embedded
from pipelines.serving.candidates import Candidates, Stored
from pipelines.serving.embedding import Embedding, Wanted, each_alone
from pipelines.serving.load import BUSY, Busy
from pipelines.serving.metrics import CacheMeter
from pipelines.serving.pinned import Pinned
from pipelines.serving.telemetry import (
    Passed,
    in_thread,
    replying,
    results_of,
    shared_pass,
    stage,
)
from slq.encoder import Encoder
from slq.engines import FAISS
from slq.errors import (
    ArtifactMismatchError,
    ConfigError,
    DataError,
    ServiceError,
    UnknownModelError,
)
from slq.index.versions import read_manifest
from slq.latent_queries import LatentQueries
from slq.reranker import Ranked
from slq.reranking.heat import HeatMap, answer_heat, latent_heat
from slq.schema import Item

_FRESH_S = 2.0  # how long a pass that went well speaks for a replica


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
        self._pinned = pinned
        telemetry.begin(self._recipe.serve.telemetry)
        self._cache_meter = CacheMeter()
        use_processors(self._recipe.serve.num_threads)
        self._encoder = encoder_of(self._recipe)
        adapter = self._recipe.storage.adapter
        pinned.require(self._encoder.fingerprint, found_in=f"the model with adapter {adapter}")
        section = self._recipe.serve
        root = section.adapters_dir or self._recipe.storage.dir
        given = {
            name: (str(folder), pinned.adapters[name]) for name, folder in section.adapters.items()
        }
        self._adapters = Adapters(self._encoder, given, root, pinned.record())
        version = pinned.version_now()
        self._require_canary(version, self._fingerprint_of(version))
        self._reranker = reranker_of(
            self._recipe,
            scoring_backbone(self._recipe, self._encoder),
            vision_bytes=self._recipe.serve.vision_cache_bytes,
            prefix_bytes=self._recipe.serve.prefix_cache_bytes,
        )
        keeps = self._recipe.serve.vision_cache_bytes + self._recipe.serve.prefix_cache_bytes > 0
        self._embedding = Embedding(self._encoder, self._reranker, keeps_images=keeps)
        # A thread to embed and one to score: whoever searches waits for no fine stage, and of those that score the one
        # that came first ends first, where all at once would end late together.
        self._embeds, self._scores = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._embedded_at = self._pass_began = -math.inf
        self._busy = Busy()
        batch = self._recipe.serve
        self._embed_batch.set_max_batch_size(batch.max_batch)
        self._embed_batch.set_batch_wait_timeout_s(batch.batch_wait_s)

    def _fingerprint_of(self, version: str) -> str:
        """Of the embedding space of an index version; another engine has one version, and that is the own one."""
        place = self._recipe.index_place
        if place.kind != FAISS:
            return self._encoder.fingerprint
        return read_manifest(Path(place.target), version).fingerprint

    def _adapter_of(self, version: str, fingerprint: str) -> Encoder:
        try:
            return self._adapters.encoder(fingerprint)
        except UnknownModelError:
            known = ", ".join(f"{name} ({one})" for name, one in self._adapters.models().items())
            raise ArtifactMismatchError(
                f"index version {version} was built with fingerprint {fingerprint}, but this service has {known}; add "
                "the adapter of that version (`POST /admin/adapters`), or start the service again"
            ) from None

    def _require_canary(self, version: str, fingerprint: str) -> None:
        encoder = self._adapter_of(version, fingerprint)
        self._recipe.index_place.require_canary(version, fingerprint, encoder)

    async def require_adapter(self, version: str, fingerprint: str) -> None:
        """Check that there still is an adapter for an index version that proved good before.

        Raises:
            ArtifactMismatchError: There is none any more.
        """
        await asyncio.to_thread(self._adapter_of, version, fingerprint)

    async def require_canary(self, version: str, fingerprint: str) -> None:
        """Check that the model embeds the items of an index version as it holds them.

        Args:
            version: Of the index.
            fingerprint: Of its embedding space, for which there must be an adapter.

        Raises:
            ArtifactError: Its canary is damaged.
            ArtifactMismatchError: There is no such adapter, or the model gives other vectors with it.
        """
        await asyncio.to_thread(self._require_canary, version, fingerprint)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _embed_batch(
        self, wanted: list[Wanted]
    ) -> list[Passed[NDArray[np.float32] | Exception]]:
        """Exceptions travel as data: a raised one would fail every request in the pass."""
        return await shared_pass(self._embeds, self._timed_pass, wanted, size=len(wanted))

    def _timed_pass(self, wanted: list[Wanted]) -> list[NDArray[np.float32] | Exception]:
        self._pass_began = time.monotonic()
        try:
            with self._busy.passing():
                return each_alone(self._embedding.encode, wanted)
        finally:
            self._pass_began = -math.inf

    @replying
    async def embed(self, items: list[Item], tenant: str = "", model: str = OWN) -> Embedded:
        """The vector of each item; concurrent calls share forward passes, whichever adapters they are for.

        Args:
            items: What is embedded.
            tenant: Whose they are; what is kept of one tenant's images another does not find.
            model: The name of an adapter, or the fingerprint of its embedding space.

        Raises:
            DataError: The model cannot take one of the items.
            UnknownModelError: There is no such adapter.
        """
        encoder = self._encoder
        if not self._adapters.is_own(model):  # it may have to be loaded
            encoder = await asyncio.to_thread(self._adapters.encoder, model)
        calls = [self._embed_batch(Wanted(item, tenant, encoder.adapter)) for item in items]
        passed = await asyncio.gather(*calls)
        self._cache_meter.tell(self._kept_images())
        results = results_of("embed", passed)
        for result in results:
            if isinstance(result, ValueError):  # processors refuse shapes of images this way
                raise DataError(f"the model cannot take this input: {result}")
            if isinstance(result, Exception):
                raise result
        self._embedded_at = time.monotonic()
        return Embedded(results, encoder.fingerprint)

    @replying
    async def rank(
        self,
        query: Item | Stored,
        candidates: list[Readable],
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
            with stage("fine"), self._busy.passing():
                return self._reranker.rank(
                    _read(query),
                    Candidates(candidates),
                    coarse_scores,
                    budget_s=left,
                    details=details,
                    tenant=tenant,
                )

        ranked: list[Ranked] = await in_thread(self._scores, run)
        self._cache_meter.tell(self._kept_images())
        return ranked

    def _kept_images(self) -> dict[str, dict[str, int]]:
        """Counters of what is kept of images."""
        passes = self._reranker.passes
        return {"vision": passes.views.counters(), "prefix": passes.prefixes.counters()}

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
        return await in_thread(self._scores, self._heat, query, candidate, tenant)

    def _heat(self, query: Item | Stored | None, candidate: Stored, tenant: str) -> HeatMap:
        with self._busy.passing():
            return self._heat_of(query, candidate.item(), tenant)

    def _heat_of(self, query: Item | Stored | None, item: Item, tenant: str) -> HeatMap:
        try:
            if query is not None:
                return answer_heat(self._reranker, _read(query), item, tenant=tenant)
            latents = self._adapters.encoder(self._searched()).adapter
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
            "models": self._adapters.models(),
            "dimension": encoder.dimension,
            "backbone": encoder.backbone.name,
            "profile": self._reranker.profile.name,
            "framing": self._reranker.framing.name,
            "kept_images": self._kept_images(),
        }

    def _searched(self) -> str:
        """Fingerprint of the embedding space that the service is in."""
        return self._fingerprint_of(self._pinned.version_now())

    async def add_adapter(self, name: str, folder: str) -> str:
        """Serve a further adapter; see `Adapters.add`."""
        return await asyncio.to_thread(
            lambda: self._adapters.add(name, folder, needed=self._searched())
        )

    async def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer; see `Adapters.remove`."""
        await asyncio.to_thread(lambda: self._adapters.remove(name, needed=self._searched()))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `load.ByLoad` scales by; Ray Serve asks for it."""
        return {BUSY: self._busy.share()}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose model cannot embed a word any more.

        One that embeds at this moment, or just did, need not prove it: a long pass is no sickness, unless no request
        would wait for it.
        """
        now = time.monotonic()
        if now - self._embedded_at < _FRESH_S:
            return
        if now - self._pass_began < self._recipe.serve.timeout_s:
            return
        word = Wanted(Item(text="health"), "", self._encoder.adapter)
        (vector,) = await in_thread(self._embeds, self._timed_pass, [word])  # no request's pass
        if isinstance(vector, Exception):
            raise vector
        self._embedded_at = time.monotonic()
        if not np.isfinite(vector).all():
            raise ServiceError("the backbone gives vectors that are not finite")
