"""The exceptions that slq raises on purpose.

Every message says what was wrong, which rule it broke, and the way out. Catch `SlqError` to catch them all.
"""


class SlqError(Exception):
    """Base of every error that slq raises on purpose."""


class ConfigError(SlqError):
    """A recipe or an argument is wrong: unknown key, bad value, missing file."""


class DataError(SlqError):
    """An input record or data set cannot be used as it is."""


class MediaError(DataError):
    """An image or a text was refused by the guards; `reason` is a stable short code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["MediaError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class UnknownModelError(DataError):
    """The service has no adapter of the name that a request asks for."""


class UnusablePairError(DataError):
    """A training pair turned out to be unusable when it was read; `pair` is its number."""

    def __init__(self, pair: int, message: str) -> None:
        super().__init__(message)
        self.pair = pair

    def __reduce__(self) -> tuple[type["UnusablePairError"], tuple[int, str]]:
        return type(self), (self.pair, str(self))


class ArtifactError(SlqError):
    """A stored artefact (adapter, data set, index) is missing, incomplete or damaged."""


class ArtifactMismatchError(ArtifactError):
    """Two artefacts that must belong together carry different fingerprints."""


class HardwareError(SlqError):
    """Asked-for hardware is absent, or too small for what was asked."""


class StorageError(SlqError):
    """The output cannot be written: no space, no permission, or the store failed."""


class RefusedReadError(StorageError):
    """A store will never give what was asked for: no permission, or no valid name."""


class ClusterError(SlqError):
    """Workers or nodes were lost, and Ray gave up."""


class InterruptedRunError(SlqError):
    """A signal ended a run that can go on later."""


class ServiceError(SlqError):
    """The online service cannot start or answer, for example because its port is in use."""


class UnavailableError(ServiceError):
    """The service cannot answer now: too many requests wait, or a part of it is down; try again."""


class DeadlineError(ServiceError):
    """A request could not be answered in the time that it has."""


class RefusedVersionError(ServiceError):
    """An index version cannot be served, so the service stays at the one that it is on."""


class TrainingError(SlqError):
    """Training cannot go on: a batch that cannot be formed, or a loss that is not finite."""
