"""Which index version a service answers from: a small file that all its replicas read, and nothing else knows.

A replica that Ray Serve starts later, after a crash or to scale up, comes up at the version that the service is on, and
not at the one that it was started with. Until the first move there is no such file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slq.errors import StorageError
from slq.files import read_json, write_json

_PATIENCE_S = 10.0  # for another replica that writes; it takes milliseconds


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that proved bad.

    Attributes:
        version: Its name.
        reason: What is wrong with it.
    """

    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Course:
    """Where a service is.

    Attributes:
        version: That it answers from.
        previous: That it answered from before; None where it never moved.
        follows: Whether it goes where the index's pointer goes.
        refused: The last version that it should have moved to and did not; it is not tried again by itself.
        adapters: What changed since the start: folder and fingerprint of adapters by name, None where one was removed.
    """

    version: str
    previous: str | None = None
    follows: bool = False
    refused: Refusal | None = None
    adapters: dict[str, tuple[str, str] | None] = field(default_factory=dict)

    def moved(self, version: str, *, follows: bool) -> "Course":
        """After a move to a version that proved good."""
        if version == self.version:
            return replace(self, follows=follows)
        return replace(self, version=version, previous=self.version, follows=follows, refused=None)

    def refusing(self, version: str, reason: str) -> "Course":
        """After a version proved bad; one that others answer from already is not refused for them."""
        if version == self.version:
            return self
        return replace(self, refused=Refusal(version, reason))

    def is_new(self, version: str) -> bool:
        """Whether the pointer's version should be tried."""
        return version != self.version and (self.refused is None or self.refused.version != version)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Course":
        """What `asdict` gave."""
        refused = values["refused"]
        adapters = {name: one and tuple(one) for name, one in values["adapters"].items()}
        known = {"refused": None if refused is None else Refusal(**refused), "adapters": adapters}
        return cls(**{**values, **known})


class Record:
    """The file.

    Args:
        path: Where it is, or will be; None for a service of one replica that is never replaced, as in a test.
        start: Where the service is until it moves.
    """

    def __init__(self, path: Path | None, start: Course) -> None:
        self._path = path
        self._start = start

    def read(self) -> Course:
        """Where the service is.

        Raises:
            ArtifactError: The file is damaged.
        """
        if self._path is None or not self._path.exists():
            return self._start
        return Course.from_json(read_json(self._path))

    def change(self, by: Callable[[Course], Course]) -> Course:
        """Write where the service is now.

        Args:
            by: Gives the new course; no other replica writes meanwhile.

        Raises:
            StorageError: It cannot be written, so nothing changed.
        """
        if self._path is None:
            self._start = by(self._start)
            return self._start
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock"), timeout=_PATIENCE_S):
                before = self.read()
                course = by(before)
                if course != before:
                    write_json(self._path, asdict(course))
                return course
        except (OSError, Timeout) as error:
            raise StorageError(
                f"{self._path} cannot be written: {error}; replicas that start later would not know the index "
                "version, so it stays"
            ) from None

    def remove(self) -> None:
        """Forget the service."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path.with_suffix(".lock").unlink(missing_ok=True)
