"""The deployment that searches the index: all of it in one replica, or as the router of several partitions.

Each answer comes from one version, whatever happens meanwhile: a search takes the version that the service is on when
it begins, and its partitions are asked for that one.
"""

import asyncio
import contextvars
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from pipelines.recipe import Recipe
from pipelines.serving import telemetry
from pipelines.serving.calls import ask, cause_of
from pipelines.serving.fleet import Answer, Fleet
from pipelines.serving.following import Follower
from pipelines.serving.metrics import VersionMeter
from pipelines.serving.pinned import Pinned
from pipelines.serving.recall import RecallMeter
from pipelines.serving.shelf import Shelf
from pipelines.serving.telemetry import replying
from slq.engines import FAISS
from slq.errors import ArtifactMismatchError, DataError, ServiceError, UnavailableError
from slq.index import Hit, SearchIndex
from slq.index.shares import merged

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to one query.

    Attributes:
        hits: Best first.
        rows: The stored columns of each.
        version: That they come from.
        shards_ok: Partitions whose items are among those that were compared.
        shards_total: All partitions; 1 where one replica holds the whole index.
        fingerprint: Of the embedding space of the version.
        moved_to: Of that of the version that answers by now.
        like: The stored columns of the item that others are like, where one was asked for.
    """

    hits: list[Hit]
    rows: list[dict[str, Any]]
    version: str
    shards_ok: int
    shards_total: int
    fingerprint: str
    moved_to: str
    like: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """No answer: the service has gone to another embedding space.

    Attributes:
        fingerprint: Of that.
    """

    fingerprint: str


@dataclass(frozen=True, slots=True)
class Sent:
    """Where a service went.

    Attributes:
        version: That it answers from now.
        previous: That it answered from before.
    """

    version: str
    previous: str | None


class IndexSearch:
    """The index versions of a service, of which one answers.

    Args:
        recipe: The resolved recipe as plain values.
        pinned: What the service was started with.
        backbone: Embeds the queries, so it must embed the canary of a new version.
        partitions: Hold the codes; without any they are held here.

    Raises:
        ArtifactError: The version that the service is on is gone or damaged.
        ArtifactMismatchError: It belongs to another embedding space.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        pinned: Pinned,
        backbone: DeploymentHandle,
        *partitions: DeploymentHandle,
    ) -> None:
        settings = Recipe.model_validate(recipe)
        self._serve = settings.serve
        self._place = settings.index_place
        self._device = settings.index.search_device
        self._pinned = pinned
        self._backbone = backbone
        self._fleet = Fleet(partitions, self._serve.partition_timeout_s)
        self._shelf = Shelf(self._load, self._admit)
        self._record = pinned.record(follows=self._serve.follow_index)
        course = self._record.read()
        first = self._load(course.version)
        self._shelf.put(course.version, first)
        self._dimension = first.dimension
        self._follower = Follower(
            self._place.folder,
            self._record,
            course,
            self._shelf,
            ready=self._held_by_all,
            keep_previous=self._serve.keep_previous,
            follow=self._serve.follow_index,
        )
        self._threads = ThreadPoolExecutor(self._serve.scaling.index.max_ongoing_requests)
        watching = self._serve.telemetry
        self._recall = RecallMeter(watching.recall_share, watching.recall_k)
        self._version_meter = VersionMeter()

    def _load(self, version: str) -> SearchIndex:
        """Every file is checked against its sha256, those of partitions too."""
        index = self._place.open(version, device=self._device, has_codes=not len(self._fleet))
        self._pinned.require_of(version, index.fingerprint, found_in=f"index {self._place}")
        return index

    async def _admit(self, index: SearchIndex) -> None:
        """Whether a version that was loaded beside the one that answers can take its place.

        Raises:
            ArtifactError: It cannot.
            UnavailableError: The model cannot say it now.
        """
        if index.dimension != self._dimension:
            raise ArtifactMismatchError(
                f"its vectors have {index.dimension} values, and those of this service {self._dimension}; start the "
                "service again to serve it"
            )
        await self._ask_model("require_canary", index)

    async def _ask_model(self, check: str, index: SearchIndex) -> None:
        try:
            await ask(getattr(self._backbone, check), index.version, index.fingerprint)
        except RayTaskError as error:
            raise cause_of(error) from None

    async def _held_by_all(self, version: str) -> None:
        """Wait for the partitions, and ask the model again: its adapter may be gone since the version was loaded."""
        held = self._shelf.get(version)
        if held is not None:
            await self._ask_model("require_adapter", held)
        if len(self._fleet):
            await self._fleet.bring(version, lambda: self._follower.wanted)

    async def keep_up(self) -> None:
        """Follow the service and its partitions for ever."""
        await asyncio.gather(self._keep_version(), self._keep_partitions())

    async def _keep_version(self) -> None:
        while True:
            await self._follower.tick()
            self._version_meter.show(self._follower.version)
            await asyncio.sleep(self._serve.poll_s)

    async def _keep_partitions(self) -> None:
        while len(self._fleet):
            await self._fleet.hold(self._follower.wanted)
            await asyncio.sleep(self._serve.poll_s)

    def _current(self) -> SearchIndex:
        index = self._shelf.get(self._follower.version)
        assert index is not None  # the follower never lets go of it
        return index

    @replying
    async def search(
        self,
        query: NDArray[np.float32] | str,
        top_k: int,
        fingerprint: str | None = None,
        where: str | None = None,
    ) -> "Found | Moved":
        """Hits of one query, with their stored columns.

        Args:
            query: (dimension,) float32, of unit norm; or the id of an item, which is left out itself.
            top_k: Hits at most.
            fingerprint: Of the vector's embedding space; None takes it for that of the version that answers.
            where: A predicate over the stored columns, in SQL.

        Returns:
            `Moved` where no version of that embedding space is here any more.

        Raises:
            DataError: There is no such item, or the predicate cannot be used.
            UnavailableError: Too many partitions are lost.
        """
        index, loop = self._current(), asyncio.get_running_loop()
        if fingerprint not in (None, index.fingerprint):
            held = [self._shelf.get(version) for version in sorted(self._shelf.held)]
            older = [one for one in held if one is not None and one.fingerprint == fingerprint]
            if not older:
                return Moved(index.fingerprint)
            index = older[-1]
        asked = contextvars.copy_context()  # so that what is logged there names the request
        return await loop.run_in_executor(
            self._threads, asked.run, self._search, loop, index, query, top_k, where
        )

    def _search(
        self,
        loop: asyncio.AbstractEventLoop,
        index: SearchIndex,
        query: NDArray[np.float32] | str,
        top_k: int,
        where: str | None,
    ) -> Found:
        count = max(1, len(self._fleet))
        answered = set(range(count))

        def scan(queries: NDArray[np.float32], depths: Sequence[int], of: str | None) -> Answer:
            asking = self._fleet.scan(index.version, queries, depths, of)
            answers = asyncio.run_coroutine_threadsafe(asking, loop).result()
            answered.intersection_update(answers)
            self._require_enough(len(answered), count)
            return merged(list(answers.values()), depths)

        # other engines have no partitions of ours
        options: dict[str, Any] = {"scan": scan} if len(self._fleet) else {}
        if where is not None:
            options["where"] = where
        like = None
        if isinstance(query, str):
            hits = index.more_like(query, top_k, **options)
            like = index.item(query)
        else:
            (hits,) = index.search(query[None, :], top_k, **options)
            if len(answered) == count and where is None:
                self._recall.consider(index, query, hits, top_k)
        return Found(
            hits,
            index.columns_of(hits),
            index.version,
            len(answered),
            count,
            index.fingerprint,
            self._current().fingerprint,
            like,
        )

    def _require_enough(self, num_ok: int, count: int) -> None:
        if num_ok == 0 or (num_ok < count and self._serve.on_lost_partition == "fail"):
            raise UnavailableError(
                f"{num_ok} of {count} partitions of the index answer; try again later"
            )

    async def send(self, wanted: str) -> Sent:
        """Move the service to another version: a name, `current` or `previous`; see `Follower.send`.

        Raises:
            DataError: There is no such version.
            RefusedVersionError: It proved bad; the service stays where it is.
            UnavailableError: It cannot be tried now.
        """
        if self._place.kind != FAISS:
            raise DataError(
                f"index.engine is {self._place.kind}: its collection has one version; start the service again after a "
                "change"
            )
        course = await self._follower.send(wanted)
        return Sent(course.version, course.previous)

    async def describe(self) -> dict[str, Any]:
        """What `/info` says about the index."""
        index, course = self._current(), await asyncio.to_thread(self._record.read)
        refused = course.refused
        partitions = self._fleet.describe(index.version)
        count = max(1, len(self._fleet))
        return {
            "index_version": index.version,
            "previous_version": course.previous,
            "loading_versions": self._shelf.coming,
            "loaded_versions": sorted(self._shelf.held),
            "refused_version": None if refused is None else refused.version,
            "refused_reason": None if refused is None else refused.reason,
            "follows_index": course.follows,
            "num_vectors": len(index),
            "fingerprint": index.fingerprint,
            "dimension": index.dimension,
            "shards_ok": sum(one["ok"] for one in partitions) if partitions else count,
            "shards_total": count,
            "partitions": partitions,
        }

    async def rows_of(self, item_ids: Sequence[str]) -> tuple[list[dict[str, Any] | None], str]:
        """The stored columns of items, None for those that there are not, and the version that says so."""
        index = self._current()
        rows = await asyncio.to_thread(lambda: [index.item(name) for name in item_ids])
        return rows, index.version

    async def uri_of(self, item_id: str) -> str | None:
        """Where the item's image lies, or None when there is no such item."""
        item = await asyncio.to_thread(self._current().item, item_id)
        return None if item is None else item["uri"]

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that cannot search, or cannot go where the service is.

        Raises:
            ServiceError: It cannot.
        """
        await self._require_searches()
        course = self._record.read()
        if course.version != self._follower.version and self._follower.problem is not None:
            raise ServiceError(
                f"the service is at index version {course.version}, and this replica cannot go there: "
                f"{self._follower.problem}"
            )

    async def _require_searches(self) -> None:
        """Search for some direction; that partitions are lost is told by `/readyz`, and mended by their own health."""
        direction = np.eye(1, self._dimension, dtype=np.float32)[0]
        try:
            found = await self.search(direction, 1)
        except UnavailableError:
            return
        if isinstance(found, Found) and len(self._current()) and not found.hits:
            raise ServiceError("a search of the index finds nothing any more")


@serve.deployment
class IndexService(IndexSearch):
    """A replica of `IndexSearch`, made with its arguments, which follows its service."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        telemetry.begin(self._serve.telemetry)
        self._task = asyncio.get_running_loop().create_task(self.keep_up())

    async def check_health(self) -> None:
        """See `IndexSearch.check_health`; a replica that follows no more is replaced too."""
        await super().check_health()
        if self._task.done():
            raise ServiceError("this replica does not follow its service any more")
