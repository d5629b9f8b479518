"""Guards between the outside world and the model: image decoding with limits, and text sanitising.

Limits are checked on the file's header, before any pixel is decoded, so a decompression bomb costs nothing.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from slq.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What an input may be at most.

    Attributes:
        max_bytes: Encoded image size.
        max_pixels: Width times height, from the header.
        max_aspect: Longer side over shorter side; `smart_resize` of Qwen-VL raises ValueError above 200.
        max_text_chars: Length of a text.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_aspect: float = 200.0
    max_text_chars: int = 100_000


DEFAULT_LIMITS = MediaLimits()


def decode_image(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an upright RGB image; the first frame of an animation.

    Transparent pixels are composed on white, which is what a person would see on a page.

    Raises:
        MediaError: With reason `empty`, `too_many_bytes`, `unknown_format`, `too_many_pixels`, `too_elongated`
            or `corrupt`. A truncated file is corrupt: it never becomes a half-grey picture.
    """
    with _checked(data, limits) as opened:
        opened.load()
        return to_rgb(ImageOps.exif_transpose(opened))


def pixels_sha256(image: Image.Image) -> str:
    """Digest of what a decoded image shows, whatever file it came from."""
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def check_image(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> None:
    """Refuse what `decode_image` would refuse from the header alone; no pixel is decoded.

    Raises:
        MediaError: As `decode_image`; damage behind the header is not found here.
    """
    with _checked(data, limits):
        pass


@contextmanager
def _checked(data: bytes, limits: MediaLimits) -> Iterator[Image.Image]:
    """The opened image, within the limits; what Pillow raises meanwhile becomes a MediaError."""
    if not data:
        raise MediaError("empty", "the image has no bytes")
    if len(data) > limits.max_bytes:
        raise MediaError(
            "too_many_bytes",
            f"the image has {len(data)} bytes; at most {limits.max_bytes} are allowed",
        )
    try:
        with _open(data) as opened:
            _check_size(*opened.size, limits)
            yield opened
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("unknown_format", f"the file is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise MediaError(
            "too_many_pixels", "the image's header promises far too many pixels"
        ) from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise almost anything on damaged files
        raise MediaError("corrupt", f"the image cannot be decoded: {error}") from None


def _check_size(width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        raise MediaError(
            "too_many_pixels",
            f"the image is {width}x{height}; at most {limits.max_pixels} pixels are allowed",
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            "too_elongated",
            f"the image is {width}x{height}; its longer side may be at most {limits.max_aspect:g} times its shorter",
        )


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():  # the caller checks the size against its own, lower limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, with transparent parts composed on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.point(lambda value: value / 256.0).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def sanitise_text(
    text: str, special_tokens: tuple[str, ...], limits: MediaLimits = DEFAULT_LIMITS
) -> str:
    """Text as it may enter a prompt: no control token, no NUL, no lone surrogate, no outer white space.

    A literal such as `<|im_end|>` keeps its letters but loses its power: a space parts its first character from
    the rest, so the tokenizer cannot read it as the control token.

    Args:
        text: As given by the user or the corpus.
        special_tokens: Every control token of the backbone's tokenizer.
        limits: Texts above `max_text_chars` are refused.

    Raises:
        MediaError: With reason `empty` or `too_long`.
    """
    if len(text) > limits.max_text_chars:
        raise MediaError(
            "too_long",
            f"the text has {len(text)} characters; at most {limits.max_text_chars} are allowed",
        )
    clean = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", " ")
    while any(token in clean for token in special_tokens):
        for token in special_tokens:
            parted = f"{token[0]} {token[1:]}"
            clean = clean.replace(token, " " if token in parted else parted)  # one character: drop
    clean = clean.strip()
    if not clean:
        raise MediaError("empty", "the text is empty")
    return clean
