"""What every replica of one service must agree on, whenever Ray Serve starts it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.serving.course import Course, Record


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a service was started with.

    Attributes:
        fingerprint: Of the embedding space of the own adapter.
        index_version: The version that was current when the service started.
        course_file: Where the service writes down the version that it moved to; None if it never moves.
        adapters: Fingerprints of the recipe's further adapters, by name.
    """

    fingerprint: str
    index_version: str
    course_file: Path | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    def require(self, found: str, *, found_in: str) -> None:
        """Refuse another embedding space.

        Raises:
            ArtifactMismatchError: The fingerprints differ; both are named.
        """
        if found == self.fingerprint:
            return
        # It brings torch, which a partition does without.
        from slq.artifacts import require_same_fingerprint

        require_same_fingerprint(
            self.fingerprint,
            found,
            expected_in=f"index version {self.index_version} of this service",
            found_in=found_in,
            remedy="rebuild it with `slq embed` and `slq index`, then start the service again",
        )

    def require_of(self, version: str, found: str, *, found_in: str) -> None:
        """Refuse another embedding space in the version that the service was started with.

        Later versions may have another one, if the service has an adapter for it: it is asked before it goes there.

        Raises:
            ArtifactMismatchError: The fingerprints differ; both are named.
        """
        if version == self.index_version:
            self.require(found, found_in=f"{found_in} version {version}")

    def record(self, *, follows: bool = False) -> Record:
        """Where the service is.

        Args:
            follows: Whether it follows the index's pointer until it is sent elsewhere.
        """
        return Record(self.course_file, Course(self.index_version, follows=follows))

    def version_now(self) -> str:
        """The version that the service is on.

        Raises:
            ArtifactError: The file is damaged.
        """
        return self.record().read().version
