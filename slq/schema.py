"""The record that stages pass on in memory; `slq.arrow` has the schemas of the files."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from slq.errors import DataError


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed or to search for: a text, an image, or both.

    Attributes:
        text: The text, or None.
        image: A decoded RGB image, or None.
        id: Unique id inside its data set; empty for an ad-hoc query.
        columns: User columns, carried unchanged.
    """

    text: str | None = None
    image: Image.Image | None = None
    id: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image is None and not (self.text or "").strip():
            raise DataError(
                f"item {self.id!r} has neither an image nor a text; give at least one of them"
            )

    @property
    def modality(self) -> str:
        """`image`, `text` or `image+text`."""
        has_text = bool((self.text or "").strip())
        if self.image is None:
            return "text"
        return "image+text" if has_text else "image"
