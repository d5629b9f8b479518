"""Images of indexed items, handed out only after they decoded as such."""

import logging

from fastapi import Response
from fastapi.responses import JSONResponse

from pipelines.corpus import fetch_image
from pipelines.messages import error_body
from slq.errors import DataError, StorageError
from slq.media import decode_image

log = logging.getLogger(__name__)


def picture_of(item_id: str, uri: str | None) -> Response:
    """The image behind an item's uri; 404 where there is none, or none that can be read now."""
    try:
        data = read_image(uri) if uri else None
    except (DataError, StorageError) as error:
        log.warning("image of item %r: %s", item_id, error)
        data = None
    if data is None:
        message = f"item {item_id!r} has no image that can be read"
        return JSONResponse(error_body(message, "not_found"), 404)
    headers = {
        # Whoever has a key may keep it, but no cache that others are answered from.
        "cache-control": "private, max-age=3600",
        "vary": "authorization, x-api-key",
        "x-content-type-options": "nosniff",
    }
    return Response(data, media_type=content_type(data), headers=headers)


def read_image(uri: str) -> bytes | None:
    """The bytes of an indexed item's image, only after they decoded as one; None where the item has no image.

    Raises:
        DataError: The file is gone, or it is no image: its content is never handed out.
    """
    data = fetch_image(uri)
    if data is not None:
        decode_image(data)
    return data


def content_type(image: bytes) -> str:
    """Media type of bytes that `decode_image` accepts."""
    return {b"\x89PN": "image/png", b"RIF": "image/webp"}.get(image[:3], "image/jpeg")
