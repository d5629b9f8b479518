"""What the fine stage of the service scores, read where it is scored, and only as far as there is time."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from pipelines.contents import Readable
from pipelines.corpus import fetch_image
from pipelines.serving.telemetry import stage
from slq.errors import DataError, StorageError
from slq.media import decode_image
from slq.schema import Item

log = logging.getLogger(__name__)
_GONE = "its image cannot be read any more"


@dataclass(frozen=True, slots=True)
class Stored:
    """An indexed item, as the columns of its row tell where it is.

    Attributes:
        uri: Where its image lies, if it has one.
        text: Its text, if it has one.
        modality: What was embedded: `image`, `text` or `image+text`.
    """

    uri: str | None
    text: str | None
    modality: str

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Stored":
        """From the stored columns of a hit."""
        return cls(row["uri"], row["text"], row["modality"])

    def item(self) -> Item:
        """The item as it was embedded, with all its parts.

        Half of it would be another candidate: a text whose image is gone is not scored alone.

        Raises:
            DataError: A part cannot be read any more, or there is none.
        """
        has_image = "image" in self.modality
        data = self._image() if has_image else None
        if has_image and data is None:
            raise DataError(_GONE)
        image = None if data is None else decode_image(data)
        if image is None and not (self.text or "").strip():
            raise DataError("the index holds neither a text nor an image of it")
        return Item(text=self.text, image=image)

    def _image(self) -> bytes | None:
        try:
            return fetch_image(self.uri) if self.uri else None
        except (DataError, StorageError) as error:
            log.warning("candidate %s cannot be read: %s", self.uri, error)
            raise DataError(_GONE) from None


class Candidates(Sequence[Item]):
    """Candidates that are read when they are asked for.

    Args:
        given: What tells how to read each.
    """

    def __init__(self, given: Sequence[Readable]) -> None:
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> "Candidates": ...
    def __getitem__(self, number: int | slice) -> "Item | Candidates":
        if isinstance(number, slice):
            return Candidates(self._given[number])
        with stage("fetch"):
            return self._given[number].item()
