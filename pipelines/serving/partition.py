"""The deployment that holds one partition of an index; it has no model, and imports none."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ray import serve

from pipelines.serving.fleet import Answer, Holding
from pipelines.serving.pinned import Pinned
from pipelines.serving.shelf import PASSING, Shelf
from slq.errors import ServiceError, SlqError
from slq.index.shares import IndexShare

_FORGET_S = 30.0  # after nobody asked for a version any more; by then no router uses it
_PATIENCE_S = 0.1
_AGAIN_S = 10.0  # after a version could not be loaded; a disk may have come back


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a version could not be loaded, at which time of the monotonic clock (s), and whether that may pass."""

    reason: str
    at: float
    passing: bool


class Partition:
    """Shares of the versions of an index that a service needs.

    Args:
        folder: The index folder.
        number: Of the share, from 0 on.
        count: Shares that there are.
        pinned: What the service was started with.

    Raises:
        ArtifactError: The version that the service is on is gone or damaged.
        ArtifactMismatchError: It belongs to another embedding space.
    """

    def __init__(self, folder: str, number: int, count: int, pinned: Pinned) -> None:
        self._folder = Path(folder)
        self._number = number
        self._count = count
        self._pinned = pinned
        self._shelf = Shelf(self._load)
        self._asked: dict[str, float] = {}
        self._refusals: dict[str, _Refusal] = {}
        version = pinned.version_now()
        self._shelf.put(version, self._load(version))
        self._asked[version] = time.monotonic()

    def _load(self, version: str) -> IndexShare:
        share = IndexShare(self._folder, version, self._number, self._count)
        self._pinned.require_of(version, share.fingerprint, found_in=f"index {self._folder}")
        return share

    def scan(
        self,
        version: str,
        queries: NDArray[np.float32],
        depths: Sequence[int],
        where: str | None,
    ) -> Answer | None:
        """Candidates from this partition, see `slq.index.shares.Scan`; None where it does not hold the version."""
        share = self._shelf.get(version)
        return None if share is None else share.scan(queries, depths, where)

    async def hold(self, versions: Sequence[str], anew: str | None = None) -> Holding:
        """Load versions in the background, and let go of those that nobody asked for in a while.

        Args:
            versions: Names.
            anew: The one that is tried at once even if it was refused before; others are after a while.
        """
        now = time.monotonic()
        self._asked.update(dict.fromkeys(versions, now))
        if anew is not None:
            self._refusals.pop(anew, None)
        tried = [
            name
            for name in versions
            if name not in self._refusals or now - self._refusals[name].at >= _AGAIN_S
        ]
        if tried:
            loading = [asyncio.ensure_future(self._try(name)) for name in tried]
            await asyncio.wait(loading, timeout=_PATIENCE_S)
        self._asked = {name: at for name, at in self._asked.items() if now - at < _FORGET_S}
        self._refusals = {name: one for name, one in self._refusals.items() if name in self._asked}
        self._shelf.drop_all_but(self._asked)
        held = {name: self._shelf.get(name) for name in self._shelf.held}
        return Holding(
            vectors={name: one.num_vectors for name, one in held.items() if one is not None},
            coming=tuple(self._shelf.coming),
            refused=self._reasons(passing=False),
            failed=self._reasons(passing=True),
        )

    async def _try(self, version: str) -> None:
        try:
            await self._shelf.bring(version)
        except Exception as error:  # noqa: BLE001 - the router is told, whatever it is
            known = isinstance(error, SlqError) and not isinstance(error, ServiceError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            passing = isinstance(error, PASSING)
            self._refusals[version] = _Refusal(reason, time.monotonic(), passing)
        else:
            self._refusals.pop(version, None)

    def _reasons(self, *, passing: bool) -> dict[str, str]:
        return {n: one.reason for n, one in self._refusals.items() if one.passing is passing}


PartitionService = serve.deployment(Partition)
