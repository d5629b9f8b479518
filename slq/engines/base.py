"""What every engine is given, and what stands in a collection about itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from slq.engines.predicates import Kind
from slq.errors import ArtifactError, ConfigError, StorageError
from slq.index import SearchIndex


@dataclass(frozen=True)
class Collection:
    """What is handed over.

    Attributes:
        tables: Rows with `id`, `embedding` (float16 lists) and what else is stored of them, some thousand at a time.
        schema: Of the tables.
        num_rows: Of all of them.
        dimension: Length of a vector.
        fingerprint: Of the embedding space.
        source: Which state of a data set the rows are, as a digest.
    """

    tables: Iterator[pa.Table]
    schema: pa.Schema
    num_rows: int
    dimension: int
    fingerprint: str
    source: str


@dataclass(frozen=True)
class Mark:
    """What a collection says of itself.

    Attributes:
        fingerprint: Of the embedding space.
        source: Which state of a data set it holds.
        num_rows: Of that state.
        dimension: Length of a vector.
        columns: Kind of each stored column, in their order.
        is_complete: Whether all of its rows are there; false while they are written.
    """

    fingerprint: str
    source: str
    num_rows: int
    dimension: int
    columns: dict[str, Kind]
    is_complete: bool = False

    @property
    def version(self) -> str:
        """A short name of the state."""
        return self.source[:12]

    def completed(self) -> "Mark":
        """The same when all rows are there."""
        return replace(self, is_complete=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Engine(ABC):
    """A place in another engine.

    Args:
        target: Where: a folder, a file, or an address.
        name: Of the collection there.
    """

    package = ""
    """That must be installed."""
    credentials = ""
    """Environment variables that say who we are; an address never does."""

    def __init__(self, target: str, name: str) -> None:
        self.target, self.name = target, name

    def __str__(self) -> str:
        return f"collection {self.name} of {self.target}"

    @abstractmethod
    def write(self, collection: Collection) -> Iterator[int]:
        """Write all rows; the same command again gives the same rows.

        Yields:
            How many rows are written so far.

        Raises:
            ConfigError: Something else is there already.
            DataError: A vector is not finite or zero, or an id comes twice.
            StorageError: It cannot be written.
        """

    def holds(self, fingerprint: str, dimension: int, source: str) -> bool:  # noqa: ARG002 - for those that know
        """Whether all rows of this state of a data set are there already.

        Raises:
            ConfigError: Something else is there: of another embedding space, or not written by slq.
            StorageError: It cannot be read.
        """
        return False


class SearchEngine(Engine):
    """One that answers queries."""

    @property
    def is_exclusive(self) -> bool:
        """Whether only one process at a time can open it."""
        return False

    @abstractmethod
    def mark(self) -> Mark | None:
        """What is there; None where nothing is.

        Raises:
            ConfigError: It was not written by slq, or a package is not installed.
            StorageError: It cannot be read.
        """

    @abstractmethod
    def open(self, version: str | None = None) -> SearchIndex:
        """Open it for searches, until it is closed.

        Args:
            version: That must be there; whatever is there if None.

        Raises:
            ArtifactError: Nothing is there, it is unfinished, or it is another version.
            ConfigError: It was not written by slq, or a package is not installed.
            StorageError: It cannot be reached, or another process holds what only one can.
        """

    def holds(self, fingerprint: str, dimension: int, source: str) -> bool:
        """See `Engine.holds`."""
        found = self.mark()
        if found is None:
            return False
        self.require_same_space(found, fingerprint, dimension)
        return found.is_complete and found.source == source

    def require_same_space(self, found: Mark, fingerprint: str, dimension: int) -> None:
        """Refuse to write vectors of another embedding space.

        Raises:
            ConfigError: It is another one; both are named.
        """
        if (found.fingerprint, found.dimension) != (fingerprint, dimension):
            raise ConfigError(
                f"{self} is of fingerprint {found.fingerprint} with {found.dimension} values a vector, not of "
                f"{fingerprint} with {dimension}; choose another name (--name, or index.collection in a recipe), or "
                "remove it"
            )

    def require_ready(self, found: Mark | None, version: str | None, has: str) -> Mark:
        """The mark of what can be searched.

        Args:
            found: What is there.
            version: That is asked for; any if None.
            has: The version that is there.

        Raises:
            ArtifactError: Nothing is there, it is unfinished, or it is another version.
        """
        if found is None:
            raise ArtifactError(f"there is no {self}; write it with `slq index`")
        if not found.is_complete:
            raise ArtifactError(
                f"{self} is being written, or its writing was ended; run `slq index` again"
            )
        if version not in (None, has):
            raise ArtifactError(
                f"{self} is at version {has} now, and {version} is asked for; start again with what is there"
            )
        return found

    def not_ours(self) -> ConfigError:
        """The error for what something else has written."""
        return ConfigError(
            f"{self} was not written by slq, or by an older one: it does not say what it holds; choose another name "
            "(--name, or index.collection in a recipe), or remove it"
        )


@contextmanager
def told(where: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Errors of a client as ours.

    Args:
        where: What it reaches, for people.
        errors: What it raises where the place cannot be reached, or refuses.

    Raises:
        StorageError: One of these was raised.
    """
    try:
        yield
    except errors as error:
        raise StorageError(f"{where}: {error}") from None


@contextmanager
def opened(
    where: str,
    connect: Callable[[], Any],
    disconnect: Callable[[Any], None],
    errors: tuple[type[Exception], ...],
) -> Iterator[Any]:
    """A client that is closed in any case, and whose errors are ours, as `told` says.

    Args:
        where: What it reaches, for people.
        connect: Makes it.
        disconnect: Closes it.
        errors: What it raises where the place cannot be reached, or refuses.
    """
    with told(where, errors):
        client = connect()
        try:
            yield client
        finally:
            disconnect(client)


def missing(package: str, extra: str) -> ConfigError:
    """The error for an engine whose package is not installed."""
    return ConfigError(f"{package} is not installed: pip install 'slq[{extra}]'")
