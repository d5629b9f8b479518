"""A shard's rows in windows of few images, each window's images read and decoded while the one before is scored."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipelines.fetching import fetch_images
from slq.errors import DataError
from slq.media import decode_image
from slq.reranking.planning import Images, windows
from slq.schema import Item

Row = dict[str, Any]
Picture = Image.Image | DataError
_READ_IMAGES = 256  # encoded ones in memory: a table's row group is walked through once for so many
_DECODERS = 4


@dataclass(frozen=True)
class Window:
    """Rows that are scored together.

    Attributes:
        number: Which one of the shard, from 0.
        rows: Of the plan; what is noted of them is noted there.
        pictures: Decoded images by uri, or what is wrong with one.
    """

    number: int
    rows: list[Row]
    pictures: dict[str, Picture]

    def pairs(self) -> dict[int, tuple[Item, Item]]:
        """Query and candidate of each row, by place; one that cannot be had has its problem noted."""
        found: dict[int, tuple[Item, Item]] = {}
        for place, row in enumerate(self.rows):
            try:
                found[place] = (self._item(row, "query"), self._item(row, "item"))
            except DataError as error:
                row["problem"] = str(error)
        return found

    def _item(self, row: Row, side: str) -> Item:
        uri = row[f"{side}_uri"]
        picture = None if uri is None else self.pictures[uri]
        if isinstance(picture, DataError):
            raise picture
        return Item(text=row[f"{side}_text"], image=picture)


def windows_of(rows: Sequence[Row], most_images: int, retry_s: float) -> Iterator[Window]:
    """The rows without a problem, in windows that depend on nothing but the rows.

    Args:
        rows: Of one shard, those of one image together.
        most_images: Decoded images of a window.
        retry_s: How long failures of an object store are tried again.

    Raises:
        StorageError: A store, or a file that holds many images, cannot be read.
    """
    good = [n for n, row in enumerate(rows) if row["problem"] is None]
    cuts = [
        [good[place] for place in window]
        for window in windows([shown(rows[n]) for n in good], most_images)
    ]
    reader = _Reader([_uris(rows, cut) for cut in cuts], retry_s)
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_DECODERS) as decoders:

        def pictures(number: int) -> dict[str, Picture]:
            images = reader.images(number)
            return dict(zip(images, decoders.map(_decoded, images.values()), strict=True))

        waiting: Future[dict[str, Picture]] | None = None
        for number, cut in enumerate(cuts):
            found = pictures(number) if waiting is None else waiting.result()
            is_last = number + 1 == len(cuts)
            waiting = None if is_last else ahead.submit(pictures, number + 1)
            yield Window(number, [rows[n] for n in cut], found)


def shown(row: Row) -> Images:
    """What a row shows, by uri; without an image all rows share one open turn."""
    uris = [uri for uri in (row["query_uri"], row["item_uri"]) if uri is not None]
    return Images(uris[0] if uris else None, tuple(uris[1:]))


def _uris(rows: Sequence[Row], cut: Sequence[int]) -> list[str]:
    found = (uri for n in cut for uri in (rows[n]["query_uri"], rows[n]["item_uri"]))
    return list(dict.fromkeys(uri for uri in found if uri is not None))


class _Reader:
    """Encoded images of windows, several windows' at a time.

    Args:
        wanted: Uris of each window.
        retry_s: As `windows_of`.
    """

    def __init__(self, wanted: Sequence[list[str]], retry_s: float) -> None:
        self._wanted, self._retry_s = wanted, retry_s
        self._read_to = 0
        self._images: dict[str, bytes | DataError | None] = {}

    def images(self, number: int) -> dict[str, bytes | DataError | None]:
        """Those of the next window; windows are asked for in order."""
        if number >= self._read_to:
            uris = dict.fromkeys(self._wanted[number])
            self._read_to = number + 1
            while self._read_to < len(self._wanted):
                more = uris | dict.fromkeys(self._wanted[self._read_to])
                if len(more) > _READ_IMAGES:
                    break
                uris, self._read_to = more, self._read_to + 1
            self._images = fetch_images(list(uris), self._retry_s)
        return {uri: self._images[uri] for uri in self._wanted[number]}


def _decoded(image: bytes | DataError | None) -> Picture:
    if image is None:
        return DataError("there is no image in its place")
    if isinstance(image, DataError):
        return image
    try:
        return decode_image(image)
    except DataError as error:
        return error
