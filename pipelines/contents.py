"""What bodies of the HTTP service hold: texts, images as bytes, and vectors."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from slq.errors import DataError, MediaError
from slq.media import decode_image, sanitise_text
from slq.schema import Item

_MAX_FIELDS = 32


def _well_formed(text: str) -> str:
    """Half a character outside the basic plane, which JSON can tell, cannot be answered in UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


Text = Annotated[str, AfterValidator(_well_formed)]
"""A text of a request, without lone surrogates."""


class Message(BaseModel):
    """Base of all bodies; unknown fields are errors, so a typo never passes in silence."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, values: Any) -> Any:
        """A million unknown fields would be a million errors to tell."""
        if isinstance(values, dict) and len(values) > _MAX_FIELDS:
            raise ValueError(f"{len(values)} fields are too many")
        return values


class Readable(Protocol):
    """What is not read yet."""

    def item(self) -> Item:
        """The item.

        Raises:
            DataError: It cannot be read; the message is for strangers, so it names no place.
        """


class Content(Message):
    """A text, an image, or both."""

    text: Text | None = None
    image: Text | None = Field(
        default=None,
        description="data:image/...;base64,... or plain base64; a URL where serve.links.enabled is set",
    )

    @property
    def link(self) -> str | None:
        """The URL that the image is named by, if it is."""
        return self.image if self.image and is_link(self.image) else None

    def item(self) -> Item:
        """The decoded item.

        Raises:
            DataError: Neither text nor image is there, or the image cannot be used.
        """
        image = decode_image(decode_base64(self.image)) if self.image else None
        return Item(text=_clean(self.text), image=image)


@dataclass(frozen=True, slots=True)
class FetchedContent:
    """A content whose image was named by a URL.

    Attributes:
        text: Its text, if it has one.
        image: What the URL gave, as it came, or why it gave nothing.
    """

    text: str | None
    image: bytes | DataError

    def item(self) -> Item:
        """The decoded item.

        Raises:
            DataError: The image was not fetched, or cannot be used.
        """
        if isinstance(self.image, DataError):
            raise self.image
        return Item(text=_clean(self.text), image=decode_image(self.image))


def items_of(contents: Sequence[Readable], max_pixels: int) -> list[Item]:
    """All read, one after the other, as long as their images are not too large together.

    Raises:
        DataError: One cannot be read, or they have more than `max_pixels`.
    """
    items, pixels = [], 0
    for content in contents:
        item = content.item()
        pixels += 0 if item.image is None else item.image.width * item.image.height
        if pixels > max_pixels:
            raise MediaError(
                "too_many_pixels",
                f"the images of the request have more than {max_pixels} pixels together, which is the limit",
            )
        items.append(item)
    return items


def _clean(text: str | None) -> str | None:
    """Refuse texts that the encoder would refuse, before they share a batch with other requests."""
    return sanitise_text(text, ()) if text and text.strip() else text


class SearchQuery(Content):
    """What to search for: text and image; an `embedding` in their place; or an indexed item that others are `like`."""

    embedding: Annotated[list[float], Field(fail_fast=True)] | None = None
    like: str | None = Field(
        default=None, description="id of an indexed item; it is left out of the results itself"
    )

    @model_validator(mode="after")
    def _one_query(self) -> "SearchQuery":
        others = [
            name for name in ("text", "image", "embedding") if getattr(self, name) is not None
        ]
        if self.like is not None and others:
            raise ValueError(f"like is a query of its own; leave out {' and '.join(others)}")
        return self


def as_content(value: str | Content) -> Content:
    """A text as the content that it is."""
    return Content(text=value) if isinstance(value, str) else value


def is_link(image: str) -> bool:
    """Whether an image is named by a URL, rather than sent."""
    scheme, colon, _ = image[:32].partition(":")
    return bool(colon) and scheme.lower() != "data"


def decode_base64(text: str) -> bytes:
    """Bytes of a data URI or plain base64.

    Raises:
        MediaError: It is neither; links are not fetched.
    """
    payload = text
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        if ";base64" not in header:
            raise MediaError("bad_data_uri", "the image's data URI must be base64")
    elif is_link(text):
        raise MediaError("url_refused", "image URLs are not fetched; send the bytes as a data URI")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("bad_base64", "the image is not valid base64") from None


def vector_of(query: SearchQuery, dimension: int) -> NDArray[np.float32] | None:
    """The query's own embedding as a (dimension,) float32 unit vector, or None.

    Raises:
        DataError: It has the wrong length, no direction, or a value that is not a finite float32.
    """
    if query.embedding is None:
        return None
    if len(query.embedding) != dimension:
        raise DataError(
            f"query.embedding has {len(query.embedding)} values; this index has {dimension}"
        )
    with np.errstate(over="ignore"):  # 1e39 becomes infinity, which is refused below
        vector = np.asarray(query.embedding, dtype=np.float64).astype(np.float32)
    if not np.isfinite(vector).all():
        raise DataError("query.embedding holds NaN, infinity or a value too large for float32")
    wide = vector.astype(np.float64)  # squares of large float32 values overflow float32
    norm = np.linalg.norm(wide)
    if not norm > 0:
        raise DataError("query.embedding has norm 0; it must point somewhere")
    unit: NDArray[np.float32] = (wide / norm).astype(np.float32)
    return unit
