"""Colours and image encodings that the report's parts share."""

import base64
import io

from slq.media import decode_image

# Okabe and Ito's colours: distinct for the colour-blind, and in grey
COLOURS = {
    "last_token": "#999999",
    "untrained": "#56B4E9",
    "slq": "#0072B2",
    "slq_fine": "#D55E00",
    "slq_index": "#009E73",
}
INK, MUTED, LINE, RIGHT = "#1c2430", "#5b6675", "#dde3ea", "#0b7a45"
_THUMBNAIL_PIXELS = 192


def data_uri(data: bytes, kind: str) -> str:
    """Bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes) -> bytes:
    """An encoded image as a small PNG."""
    image = decode_image(data)
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
