"""The partitions of an index behind one router: all are asked at once, and what is lost or late is told."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.exceptions import BackPressureError

from pipelines.serving.calls import cause_of
from slq.errors import ArtifactError, UnavailableError
from slq.index.shares import Candidates

log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 0.05
_SILENCE_S = (
    60.0  # after which a version is not waited for any longer where a partition says nothing
)
_LONGEST_PAUSE_S = 30.0
Answer = list[Candidates | None]


@dataclass(frozen=True, slots=True)
class Holding:
    """What a partition has.

    Attributes:
        vectors: How many codes it holds of each version that is loaded.
        coming: Versions that are being loaded.
        refused: Why versions proved bad.
        failed: Why versions cannot be loaded now, which says nothing of them; they are tried again.
    """

    vectors: dict[str, int] = field(default_factory=dict)
    coming: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Fleet:
    """Handles of partitions.

    A partition that did not answer once is lost: it is not waited for again before it answers to `hold`, and if it was
    too late for a search, before a pause that grows with each time. One that never answered to `hold` yet may just be
    starting, so that alone does not make it lost.

    Args:
        partitions: Handles of `PartitionService`, in the order of their numbers.
        timeout_s: How long they have for an answer.
    """

    def __init__(self, partitions: Sequence[Any], timeout_s: float) -> None:
        self._partitions = partitions
        self._timeout_s = timeout_s
        self._lost: dict[int, str] = {}
        self._holding: dict[int, Holding] = {}
        self._pauses: dict[int, tuple[float, float]] = {}  # how long, and until when
        self._without: set[tuple[int, str]] = set()  # partitions that said that they lack a version

    def __len__(self) -> int:
        return len(self._partitions)

    def describe(self, version: str) -> list[dict[str, Any]]:
        """What `/info` says about them: which are not lost and hold the version, as far as is known."""
        found = []
        for number in range(len(self)):
            holding = self._holding.get(number)
            problem = self._lost.get(number)
            if problem is None and holding is not None and version not in holding.vectors:
                reasons = {version: f"version {version} is not loaded yet"}
                problem = {**reasons, **holding.failed, **holding.refused}[version]
            found.append(
                {
                    "number": number,
                    "ok": problem is None,
                    "problem": problem,
                    "num_vectors": {} if holding is None else holding.vectors,
                }
            )
        return found

    async def scan(
        self,
        version: str,
        queries: NDArray[np.float32],
        depths: Sequence[int],
        where: str | None,
    ) -> dict[int, Answer]:
        """What each partition finds; those that are lost, late, or do not hold the version are missing.

        Args:
            version: That all of them answer from.
            queries: As of `slq.index.shares.Scan`.
            depths: As of `Scan`.
            where: As of `Scan`.
        """
        asked = [number for number in range(len(self)) if number not in self._lost]
        answers: dict[int, Answer | None] = await self._ask(
            asked, lambda partition: partition.scan.remote(version, queries, depths, where)
        )
        for number in asked:
            if number in answers:
                self._pauses.pop(number, None)
                self._note(number, version, is_held=answers[number] is not None)
            elif number in self._lost:
                self._pause(number)
        return {number: answer for number, answer in answers.items() if answer is not None}

    def _note(self, number: int, version: str, *, is_held: bool) -> None:
        """Tell once that a partition lacks a version."""
        if is_held:
            self._without.discard((number, version))
        elif (number, version) not in self._without:
            self._without.add((number, version))
            log.warning("partition %d does not hold index version %s", number, version)

    def _pause(self, number: int) -> None:
        before, _ = self._pauses.get(number, (self._timeout_s / 4, 0.0))
        pause = min(2 * before, _LONGEST_PAUSE_S)
        self._pauses[number] = (pause, monotonic() + pause)

    async def hold(self, versions: Iterable[str], anew: str | None = None) -> dict[int, Holding]:
        """Tell all partitions which versions to hold, and learn which of them answer.

        Args:
            versions: Names; others are let go of after a while.
            anew: The one that is tried even if it was refused before.

        Returns:
            What those have that answer, by number.
        """
        names = sorted(versions)
        starting = {number for number in range(len(self)) if number not in self._holding}
        found: dict[int, Holding] = await self._ask(
            range(len(self)),
            lambda partition: partition.hold.remote(names, anew),
            patient_with=starting,
        )
        for number, holding in found.items():
            self._holding[number] = holding
            _, until = self._pauses.get(number, (0.0, 0.0))
            if number in self._lost and monotonic() >= until:
                del self._lost[number]
                log.info("partition %d of the index answers again", number)
        return found

    async def bring(self, version: str, others: Callable[[], Collection[str]]) -> None:
        """Wait until every partition that is not lost holds a version, those that are busy or starting too.

        Args:
            version: Its name.
            others: Names of versions that stay.

        Raises:
            ArtifactError: It proved bad at a partition.
            UnavailableError: A partition cannot load it now, or says nothing for a long time; or none answers.
        """
        anew: str | None = version
        heard = dict.fromkeys(range(len(self)), monotonic())
        while True:
            found = await self.hold({*others(), version}, anew)
            anew = None
            for number, holding in found.items():
                if version in holding.refused:
                    reason = holding.refused[version]
                    raise ArtifactError(f"partition {number} cannot load it: {reason}")
                if version in holding.failed:
                    reason = holding.failed[version]
                    raise UnavailableError(f"partition {number} cannot load it now: {reason}")
            heard.update(dict.fromkeys(found, monotonic()))
            present = [number for number in heard if number not in self._lost]
            if not present:
                raise UnavailableError("no partition of the index answers; try again later")
            if all(n in found and version in found[n].vectors for n in present):
                return
            silent = [n for n in present if monotonic() - heard[n] > _SILENCE_S]
            if silent:
                raise UnavailableError(f"partitions {silent} of the index are too busy to load it")
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _ask(
        self,
        numbers: Iterable[int],
        call: Callable[[Any], Awaitable[Any]],
        *,
        patient_with: Collection[int] = (),
    ) -> dict[int, Any]:
        """Answers by number.

        Whoever has none is lost from now on, but for those that only have too much to do, or that may have some time.
        """
        tasks = {
            number: asyncio.ensure_future(_awaited(call, self._partitions[number]))
            for number in numbers
        }
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self._timeout_s)
        answers: dict[int, Any] = {}
        for number, task in tasks.items():
            problem = self._problem(task)
            if problem is None:
                answers[number] = task.result()
            elif number not in patient_with and not _is_busy(task):
                self._lose(number, problem)
        return answers

    def _problem(self, task: asyncio.Task[Any]) -> str | None:
        """Why there is no answer, in a line; None where there is one."""
        if not task.done() or task.cancelled():
            task.cancel()
            return f"no answer within {self._timeout_s:g} s"
        error = task.exception()
        if error is None:
            return None
        return (str(cause_of(error)).strip().splitlines() or [type(error).__name__])[0]

    def _lose(self, number: int, reason: str) -> None:
        if number not in self._lost:
            log.warning("partition %d of the index is lost: %s", number, reason)
        self._lost[number] = reason


async def _awaited(call: Callable[[Any], Awaitable[Any]], partition: Any) -> Any:
    """A coroutine, as tasks want one; a call that fails at once fails here, too, and for its partition only."""
    return await call(partition)


def _is_busy(task: asyncio.Task[Any]) -> bool:
    """Whether a queue was full, which says nothing about whoever should have answered."""
    is_answered = task.done() and not task.cancelled()
    return is_answered and isinstance(task.exception(), BackPressureError)
