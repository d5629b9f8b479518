"""What every engine is given, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Collection:
    """What is handed over.

    Attributes:
        tables: Rows with `id`, `embedding` (float16 lists) and what else is stored of them, some thousand at a time.
        schema: Of the tables.
        num_rows: Of all of them.
        dimension: Length of a vector.
        fingerprint: Of the embedding space.
    """

    tables: Iterator[pa.Table]
    schema: pa.Schema
    num_rows: int
    dimension: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Found:
    """One search result."""

    id: str
    score: float


class Engine(ABC):
    """A place in another engine.

    Args:
        target: Where: a folder, a file, or an address.
        name: Of the collection there.
    """

    package = ""
    """That must be installed."""

    def __init__(self, target: str, name: str) -> None:
        self.target, self.name = target, name

    @abstractmethod
    def write(self, collection: Collection) -> Iterator[int]:
        """Write all rows; the same command again gives the same rows.

        Yields:
            How many rows are written so far.

        Raises:
            ConfigError: Something else is there already.
            StorageError: It cannot be written.
        """


class SearchEngine(Engine):
    """One that answers queries."""

    @abstractmethod
    def search(
        self, vectors: NDArray[Any], top_k: int, *, where: str | None = None
    ) -> list[list[Found]]:
        """The best items for each query vector, best first; scores are cosines.

        Args:
            vectors: (queries, dimension) float32 unit vectors.
            top_k: Results per query.
            where: A predicate over the stored columns, in the engine's own words.

        Raises:
            DataError: The engine cannot evaluate the predicate, or the place holds nothing of ours.
            StorageError: It cannot be reached.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the embedding space of what is there.

        Raises:
            DataError: The place was not written by slq.
        """


@contextmanager
def opened(
    where: str, connect: Callable[[], Any], errors: tuple[type[Exception], ...]
) -> Iterator[Any]:
    """A client that is closed in any case, and whose errors are ours.

    Args:
        where: What it reaches, for people.
        connect: Makes it.
        errors: What it raises where the place cannot be reached, or refuses.

    Raises:
        StorageError: One of these was raised.
    """
    client = None
    try:
        client = connect()
        yield client
    except errors as error:
        raise StorageError(f"{where}: {error}") from None
    finally:
        if client is not None:
            client.close()


def missing(package: str, extra: str) -> ConfigError:
    """The error for an engine whose package is not installed."""
    return ConfigError(f"{package} is not installed: pip install 'slq[{extra}]'")
