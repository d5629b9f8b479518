"""Moves a replica from one index version to another while it answers.

A new version is loaded beside the one that answers, and proves good before anything is asked of it. Whoever began with
a version ends with it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from pipelines.serving.course import Course, Record
from pipelines.serving.shelf import PASSING, Shelf
from slq.errors import (
    DataError,
    RefusedVersionError,
    ServiceError,
    SlqError,
    StorageError,
    UnavailableError,
)
from slq.index import current_version, versions

log = logging.getLogger(__name__)
T = TypeVar("T")
CURRENT, PREVIOUS = "current", "previous"


async def _at_once(_: str) -> None:
    """Nobody else has to hold a version."""


class Follower(Generic[T]):
    """Keeps a replica at the version that its service is on, and the service at the one it shall be on.

    Args:
        folder: The index folder.
        record: Where the service is.
        course: What the record said when the version that it names was put on the shelf.
        shelf: Loads versions, and says whether they are good.
        ready: Waits until whoever else has to hold a version does, and raises where they cannot.
        keep_previous: Whether the version before stays loaded, so that a way back takes no time.
        follow: Whether the service goes where the index's pointer goes, unless someone sent it elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        course: Course,
        shelf: Shelf[T],
        *,
        ready: Callable[[str], Awaitable[None]] = _at_once,
        keep_previous: bool = True,
        follow: bool = False,
    ) -> None:
        self._folder = folder
        self._record = record
        self._shelf = shelf
        self._ready = ready
        self._keep_previous = keep_previous
        self._follow = follow
        self._aims: Counter[str] = Counter()
        self.version = course.version
        self._previous = course.previous
        self._moving = asyncio.Lock()
        self.problem: str | None = None

    @property
    def wanted(self) -> set[str]:
        """Versions that are to be loaded wherever parts of an index are."""
        kept = {self._previous} if self._keep_previous and self._previous is not None else set()
        return {self.version, *kept, *self._shelf.coming, *self._aims}

    @contextmanager
    def _aiming_at(self, version: str) -> Iterator[None]:
        """Meanwhile nothing lets go of a version."""
        self._aims[version] += 1
        try:
            yield
        finally:
            self._aims -= Counter([version])
            self._shelf.drop_all_but(self.wanted)

    async def tick(self) -> None:
        """Look whether the service has moved, or should; what goes wrong is logged, once."""
        try:
            await self._tick()
            problem = None
        except Exception as error:  # noqa: BLE001 - whatever it is, the next tick may do better
            problem = _said(error)
            if problem != self.problem and not isinstance(error, RefusedVersionError):
                log.warning("index version %s stays: %s", self.version, problem)
        self.problem = problem

    async def _tick(self) -> None:
        course = await self._settled()
        if course.version != self.version:  # another replica went there, or was told to
            with self._aiming_at(course.version):
                await self._shelf.bring(course.version)
                await self._settled()
            return
        await self._bring_previous()
        if course.follows:
            newest = await self._pointed_at()
            if course.is_new(newest):
                await self._go(newest, follows=True, by_pointer=True)
        self._shelf.drop_all_but(self.wanted)  # what came for someone who did not wait for it

    async def _pointed_at(self) -> str:
        return await asyncio.to_thread(current_version, self._folder)

    async def _settled(self) -> Course:
        """Answer from the version that the service is on, if it is loaded."""
        async with self._moving:  # or a course that was read before a move would take it back
            course = await asyncio.to_thread(self._record.read)
            self._answer_from(course)
        return course

    async def _bring_previous(self) -> None:
        """After a restart the version before is not there yet."""
        version = self._previous
        if not self._keep_previous or version is None or self._shelf.get(version) is not None:
            return
        try:
            await self._shelf.bring(version)
        except PASSING:
            return  # the next tick may do better
        except Exception as error:  # noqa: BLE001 - it is only for a way back
            log.warning("index version %s is no way back any more: %s", version, error)
            self._previous = None

    async def send(self, wanted: str) -> Course:
        """Move the service to a version.

        Args:
            wanted: Its name; or `current`, where the index's pointer points (which is followed again then, if the
                service follows it at all); or `previous`, where it was before. The pointer is not followed from a name
                or from `previous` on.

        Returns:
            Where the service is afterwards.

        Raises:
            DataError: There is no such version.
            RefusedVersionError: It proved bad; the service stays where it is.
            SlqError: It cannot be tried now.
        """
        course = await asyncio.to_thread(self._record.read)
        version = await asyncio.to_thread(self._named, wanted, course)
        return await self._go(version, follows=wanted == CURRENT and self._follow)

    def _named(self, wanted: str, course: Course) -> str:
        if wanted == CURRENT:
            return current_version(self._folder)
        known = versions(self._folder)
        if wanted == PREVIOUS:
            older = [name for name in known if name < course.version]
            found = course.previous or (older[-1] if older else None)
            if found is None:
                raise DataError(f"there is no version before {course.version} to go back to")
            return found
        if wanted not in known and self._shelf.get(wanted) is None:
            raise DataError(f"there is no version {wanted}; the index has {', '.join(known)}")
        return wanted

    async def _go(self, version: str, *, follows: bool, by_pointer: bool = False) -> Course:
        with self._aiming_at(version):
            await self._require_good(version)

            def moved(course: Course) -> Course:
                if by_pointer and not course.follows:  # someone sent it elsewhere meanwhile
                    return course
                return course.moved(version, follows=follows)

            async with self._moving:
                # The pointer may have been taken back meanwhile.
                if by_pointer and await self._pointed_at() != version:
                    return await asyncio.to_thread(self._record.read)
                course = await asyncio.to_thread(self._record.change, moved)
                self._answer_from(course)
        return course

    async def _require_good(self, version: str) -> None:
        """Load a version here and wherever else it is needed, or refuse it."""
        try:
            await self._shelf.bring(version)
            await self._ready(version)
        except (ServiceError, StorageError):
            raise
        except PASSING as error:
            raise UnavailableError(
                f"index version {version} cannot be loaded now: {_said(error)}"
            ) from None
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the old one stays
            reason = _said(error)
        else:
            return
        message = f"index version {version} is refused, {self.version} stays: {reason}"
        log.warning(message)
        await asyncio.to_thread(
            self._record.change, lambda course: course.refusing(version, reason)
        )
        raise RefusedVersionError(message)

    def _answer_from(self, course: Course) -> None:
        if course.version == self.version or self._shelf.get(course.version) is None:
            return
        log.info("answering from index version %s instead of %s", course.version, self.version)
        self.version, self._previous = course.version, course.previous
        self._shelf.drop_all_but(self.wanted)


def _said(error: Exception) -> str:
    """An error in words; one that is not ours with its kind, as its words alone may say little."""
    return str(error) if isinstance(error, SlqError) else f"{type(error).__name__}: {error}"
