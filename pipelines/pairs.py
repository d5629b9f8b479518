"""Training pairs: a Parquet file with its images in it, beside it or on S3."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.images import ImageReader
from slq.errors import DataError
from slq.media import decode_image
from slq.schema import Item
from slq.training.reading import SIDES, Side

_PARTS = {"image": pa.binary(), "uri": pa.string(), "text": pa.string()}
_COLUMNS = {
    "id": pa.string(),
    "image_key": pa.string(),
    **{f"{side}_{part}": kind for side in SIDES for part, kind in _PARTS.items()},
}
_IMAGE_TEXT = {"image": "query_image", "uri": "query_uri", "text": "positive_text"}
_OF_ITEMS = {name: name for name in ("query_text", "query_uri", "positive_text", "positive_uri")}

_CHECK_THREADS = 16  # they mostly wait for the store
# Headers of 2,000 images take seconds, where those of all of COCO take minutes. They tell the share of bad images to
# +-0.4 percentage points (95%, at the default limit of 1%), so a wrong prefix or a broken copy is refused at once; a
# single bad image is left to the training, which replaces it.
_CHECK_IMAGES = 2000
_CHECK_SEED = 0


class Pairs:
    """Training pairs of a Parquet file.

    Its columns are `id`, `text` and `image` (bytes) or `uri`; or, for pairs of items, `id`, `query_text`, `query_uri`,
    `positive_text` and `positive_uri`. A uri is a path in the table's own folder, or `s3://bucket/key` with region,
    endpoint and credentials from the environment. Texts and uris are held in memory; images only where they stand in
    the table.

    Attributes:
        image_keys: For each pair what identifies its image: the column `image_key`, or else a digest of the image
            bytes, the uri, or the text of a pair without image. Pairs with one key share the image.
        query_keys: For each pair what identifies its query, image and text together.

    Raises:
        DataError: A needed column is missing, or a pair lacks its image or caption.
    """

    def __init__(self, path: Path) -> None:
        self._table = _read_table(path)
        self._images = ImageReader(path.parent, absolute=True)
        self.image_keys = _image_keys(self._table)
        self.query_keys = _query_keys(self._table, self.image_keys)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def image_to_text(self) -> bool:
        """Whether every pair is one image and one text."""
        return self.positive_texts is not None and _is_null(self._table["query_text"])

    @property
    def ids(self) -> list[str | None]:
        """The id of each pair."""
        ids: list[str | None] = self._table["id"].to_pylist()
        return ids

    @property
    def positive_texts(self) -> list[str] | None:
        """The text of each positive; None if some of them have images."""
        if not all(_is_null(self._table[f"positive_{part}"]) for part in ("image", "uri")):
            return None
        texts: list[str] = self._table["positive_text"].to_pylist()
        return texts

    @property
    def queries_have_images(self) -> bool:
        """Whether every query has an image, alone or with a text."""
        return not pc.any(_absent(self._table, "query", "image", "uri")).as_py()

    def digest(self, number: int) -> str:
        """sha256 of the query's encoded image and text, whatever its uri says.

        Raises:
            DataError: The image cannot be read.
            StorageError: The store of the images cannot be reached.
        """
        digest = hashlib.sha256(self._image(number, "query") or b"")
        digest.update(b"\x00" + (self._value("query_text", number) or "").encode())
        return digest.hexdigest()

    def item(self, pair: int, side: Side) -> Item:
        """One side of a pair, its image decoded; threads may share this. An image with a caption is the query.

        Raises:
            DataError: The image cannot be read, or lies outside the table's folder, or a caption is empty.
            MediaError: The image cannot be decoded.
            StorageError: The store of the images cannot be reached: no pair's own fault.
        """
        stored = self._image(pair, side)
        image = None if stored is None else decode_image(stored)
        return Item(text=self._value(f"{side}_text", pair), image=image)

    def check(self, max_error_share: float) -> tuple[list[int], dict[str, str]]:
        """Look for unusable pairs before workers start.

        Every text is looked at, every image in the table is decoded, and of images behind a uri the headers of a
        fixed random sample are read. What this misses comes to light in `item`.

        Args:
            max_error_share: More unusable pairs than this share, found or to be expected by the sample, are an error.

        Returns:
            Positions of the usable pairs, and the reason of each id that is left out.

        Raises:
            DataError: Too many pairs are unusable; the first is named.
            StorageError: The store of the images cannot be reached.
        """
        images = self._image_names()
        tried = self._verdicts(images)
        reasons: dict[int, str] = {}
        for number, (names, no_text) in enumerate(zip(images, self._lacks_text(), strict=True)):
            bad = [reason for name in names if (reason := tried.get(name))]
            if no_text or bad:
                reasons[number] = bad[0] if bad else "the caption is empty"
        refused = {self._value("id", number): reason for number, reason in reasons.items()}
        untried = sum(any(name not in tried for name in names) for names in images)
        expected = len(reasons) + untried * sum(map(bool, tried.values())) / max(1, len(tried))
        if expected > max_error_share * len(self):
            name, reason = next(iter(refused.items()))
            judged = f" (judged by {len(tried)} images)" if untried else ""
            raise DataError(
                f"{expected:.0f} of {len(self)} training pairs cannot be used{judged}, first {name!r}: {reason}; "
                "mend them or raise train.max_error_share"
            )
        return [number for number in range(len(self)) if number not in reasons], refused

    def _image_names(self) -> list[list[str]]:
        """The images of each pair: their uris, or the key of one that stands in the table."""
        in_table = self._table["query_image"].is_valid().to_pylist()
        query, positive = (self._table[f"{side}_uri"].to_pylist() for side in SIDES)
        columns = zip(self.image_keys, in_table, query, positive, strict=True)
        return [
            [name for name in (key if stored else uri, other) if name]
            for key, stored, uri, other in columns
        ]

    def _lacks_text(self) -> list[bool]:
        """For each pair whether a side is nothing but white space."""
        empty = [
            pc.and_(_absent(self._table, side, "image", "uri"), _blank(self._table[f"{side}_text"]))
            for side in SIDES
        ]
        lacks: list[bool] = pc.or_(*empty).to_pylist()
        return lacks

    def _verdicts(self, images: list[list[str]]) -> dict[str, str | None]:
        """Why an image that was tried cannot be used, or None, by its name."""
        valid = self._table["query_image"].is_valid().to_pylist()
        stored = {key: n for n, key in enumerate(self.image_keys) if valid[n]}
        uris = sorted({name for names in images for name in names} - stored.keys())
        chosen = np.random.default_rng(_CHECK_SEED).permutation(len(uris))[:_CHECK_IMAGES]
        sample = [uris[n] for n in chosen]
        column = self._table["query_image"]
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            in_table = pool.map(
                lambda n: _refusal(decode_image, column[n].as_py()), stored.values()
            )
            outside = pool.map(lambda uri: _refusal(self._images.check, uri), sample)
            return {
                **dict(zip(stored, in_table, strict=True)),
                **dict(zip(sample, outside, strict=True)),
            }

    def _image(self, number: int, side: Side) -> bytes | None:
        stored: bytes | None = self._value(f"{side}_image", number)
        uri = self._value(f"{side}_uri", number)
        # bytes win, as in a corpus
        return self._images.read(uri) if stored is None and uri is not None else stored

    def _value(self, name: str, number: int) -> Any:
        return self._table[name][number].as_py()


def _read_table(path: Path) -> pa.Table:
    """The table with id, image_key and, of both sides, image, uri and text; columns that the file lacks are null."""
    try:
        present = pq.read_schema(path).names
        names = _OF_ITEMS if "query_text" in present else _IMAGE_TEXT
        wanted = {"id": "id", "image_key": "image_key", **names}
        read = pq.read_table(path, columns=[name for name in wanted if name in present])
        found = {
            wanted[name]: read[name].cast(_COLUMNS[wanted[name]]) for name in read.column_names
        }
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise _no_pairs(path, str(error)) from None
    required = {"id", *_OF_ITEMS} if names is _OF_ITEMS else {"id", "text"}
    if not required <= set(present) or not {"query_image", "query_uri"} & found.keys():
        raise _no_pairs(path, f"it has the columns {', '.join(present)}")
    null = {name: pa.nulls(read.num_rows, kind) for name, kind in _COLUMNS.items()}
    table = pa.table({**null, **found})
    shown = SIDES if names is _OF_ITEMS else ("image", "text")
    for side, name in zip(SIDES, shown, strict=True):
        count = pc.sum(_absent(table, side, *_PARTS)).as_py()
        if count:
            raise DataError(f"{path}: {count} pairs have no {name}; remove them")
    return table


def _no_pairs(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be read as pairs with id, image and text: {reason}; image may also be uri, and instead there "
        f"may be {', '.join(_OF_ITEMS)}"
    )


def _absent(table: pa.Table, side: str, *parts: str) -> pa.ChunkedArray:
    """(rows,) bool: none of these parts of a side is there."""
    # nulls first: the bytes of all images may not fit into one Arrow array
    return reduce(pc.and_, (table[f"{side}_{part}"].is_null() for part in parts))


def _is_null(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count == len(column))


def _blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.equal(pc.fill_null(trimmed, ""), "")


def _image_keys(table: pa.Table) -> list[str]:
    """One string object for each key, however many captions its image has."""
    images = table["query_image"]
    digests = pa.array([_digest(image) for image in images], pa.string())
    others = (table[name].combine_chunks() for name in ("query_uri", "positive_uri", "query_text"))
    keys = pc.coalesce(table["image_key"].combine_chunks().cast(pa.string()), digests, *others)
    coded = keys.dictionary_encode()
    names = coded.dictionary.to_pylist()
    return [names[code] for code in coded.indices.to_pylist()]


def _query_keys(table: pa.Table, image_keys: list[str]) -> list[str]:
    """The image's key where the query is an image alone, so that its captions share the object too."""
    texts, uris = table["query_text"].to_pylist(), table["query_uri"].to_pylist()
    return [
        key if text is None else f"{uri or ''}\n{text}"
        for key, text, uri in zip(image_keys, texts, uris, strict=True)
    ]


def _digest(image: pa.Scalar) -> str | None:
    return hashlib.sha256(image.as_buffer()).hexdigest() if image.is_valid else None


def _refusal(test: Callable[[Any], object], image: Any) -> str | None:
    try:
        test(image)
    except DataError as error:  # a MediaError is one too
        return str(error)
    return None
