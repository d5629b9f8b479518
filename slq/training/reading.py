"""Training pairs as a source reads them: decoded off the training thread, one batch ahead."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from slq.backbones.vision import VisionFeatures
from slq.errors import DataError, UnusablePairError
from slq.schema import Item

Side = Literal["query", "positive"]
SIDES: tuple[Side, Side] = ("query", "positive")
# Threads, not processes: Pillow decodes without holding the GIL, and a process has to copy every picture back. With
# 640x480 JPEGs on two cores, two threads decode 1,029 a second, two processes 308.
_DECODE_THREADS = 4


class PairReader(Protocol):
    """Training pairs, each of a query (usually an image) and a positive (its caption).

    Attributes:
        image_keys: For each pair, what identifies its image; no batch holds one twice.
        query_keys: For each pair, what identifies its query: captions of one image share one.
    """

    image_keys: list[str]
    query_keys: list[str]

    def item(self, pair: int, side: Side) -> Item:
        """One decoded side of a pair; called from several threads.

        Raises:
            DataError: It cannot be used.
        """

    def digest(self, pair: int) -> str:
        """sha256 of the query's content as stored, encoded image and text; called from several threads.

        Raises:
            DataError: It cannot be read.
        """


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is needed of a side of a pair.

    Attributes:
        item: Decoded; None for a query whose prefix is stored.
        digest: Of the query's content, where prefixes are stored.
        pixels: Digest of the image, where vision features are stored; empty without an image.
        features: Of the image, if they were stored when it was read.
    """

    item: Item | None
    digest: str = ""
    pixels: str = ""
    features: VisionFeatures | None = None

    @property
    def text_length(self) -> int:
        """Characters of the text; 0 without one."""
        return len((self.item and self.item.text) or "")


class Ahead:
    """Decodes items off the training thread, one batch ahead.

    Args:
        load: Gives a side of a pair; called from several threads.
    """

    def __init__(self, load: Callable[[int, Side], Loaded]) -> None:
        self._load = load
        self._pool = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="decode")
        self._begun: dict[tuple[int, Side], Future[Loaded]] = {}

    def begin(self, wanted: Sequence[tuple[int, Side]]) -> None:
        """Start on items; what was begun and is not among them is forgotten."""
        wanted = list(dict.fromkeys(wanted))
        still = set(wanted)
        kept = {key: future for key, future in self._begun.items() if key in still}
        for key, future in self._begun.items():
            if key not in kept:
                future.cancel()
        self._begun = kept | {
            key: self._pool.submit(self._load, *key) for key in wanted if key not in kept
        }

    def wait(self) -> None:
        """Wait for all that was begun.

        Raises:
            UnusablePairError: One of it cannot be read or decoded.
        """
        for pair, side in list(self._begun):
            self.take(pair, side)

    def take(self, pair: int, side: Side) -> Loaded:
        """A side of a pair, begun or not.

        Raises:
            UnusablePairError: It cannot be read or decoded.
        """
        try:
            future = self._begun.get((pair, side))
            return self._load(pair, side) if future is None else future.result()
        except DataError as error:
            raise UnusablePairError(pair, str(error)) from None
