"""Inputs in the form of a chat, as clients of multimodal embeddings send them: one user's message is one input."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.contents import Content, Message, Text
from slq.errors import DataError


class TextPart(Message):
    """A text among the parts of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Message):
    """Where an image is."""

    url: str = Field(
        description="data:image/...;base64,... or, where this service fetches any, a link"
    )
    detail: Literal["auto", "low", "high"] | None = Field(
        default=None, description="of other services; the model sees each image in one way"
    )


class ImagePart(Message):
    """An image among the parts of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(Message):
    """A message of the user."""

    role: Literal["user"]
    content: (
        Text
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(min_length=1, fail_fast=True),
        ]
    )

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its parts; a text alone is one."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


def content_of(chat: list[ChatMessage]) -> Content:
    """One input of all that a chat holds: its texts, one a line, and its image.

    Raises:
        DataError: It holds several images; an item has one.
    """
    parts = [part for message in chat for part in message.parts]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if len(images) > 1:
        raise DataError(
            f"messages hold {len(images)} images; an item has one, so send several inputs"
        )
    return Content(text="\n".join(texts) or None, image=images[0] if images else None)
