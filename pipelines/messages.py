"""Request and response bodies of the HTTP service."""

import base64
import binascii
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from slq.errors import DataError, MediaError
from slq.media import decode_image, sanitise_text
from slq.schema import Item


class Message(BaseModel):
    """Base of all bodies; unknown fields are errors, so a typo never passes in silence."""

    model_config = ConfigDict(extra="forbid")


class Content(Message):
    """A text, an image, or both."""

    text: str | None = None
    image: str | None = Field(default=None, description="data:image/...;base64,... or plain base64")

    def item(self) -> Item:
        """The decoded item.

        Raises:
            DataError: Neither text nor image is there, or the image cannot be used.
        """
        image = decode_image(decode_base64(self.image)) if self.image else None
        return Item(text=_clean(self.text), image=image)


def _clean(text: str | None) -> str | None:
    """Refuse texts that the encoder would refuse, before they share a batch with other requests."""
    return sanitise_text(text, ()) if text and text.strip() else text


class SearchQuery(Content):
    """What to search for; an `embedding` replaces text and image."""

    embedding: list[float] | None = None


class SearchRequest(Message):
    """Body of POST /search."""

    query: SearchQuery
    top_k: Annotated[int, Field(gt=0)] = 10
    mode: Literal["auto", "coarse", "fine"] = "auto"
    rerank_k: Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="candidates that the fine stage scores; the recipe's depth by default",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"query": {"text": "two dogs left of a tree"}, "top_k": 5, "mode": "fine"}
        }
    )


class SearchResult(Message):
    """One found item."""

    id: str
    score: float
    coarse_score: float
    fine_score: float | None = None
    uri: str | None = None
    text: str | None = None


class SearchResponse(Message):
    """Answer of POST /search."""

    results: list[SearchResult]
    timings_ms: dict[str, float]
    reranked: int = Field(description="candidates that the fine stage scored")
    degraded: bool = Field(
        description="a part of the index did not answer (see shards_ok), or some candidates could not be read or "
        "scored; those keep their coarse order, after the scored ones"
    )
    shards_ok: int = Field(description="partitions of the index that the results come from")
    shards_total: int = Field(description="partitions of the index")
    index_version: str
    fingerprint: str


class IndexRequest(Message):
    """Body of POST /admin/index."""

    version: Annotated[str, Field(pattern=r"^(v\d{6,}|current|previous)$")] = Field(
        description="a name; `current`: where the index's pointer points; `previous`: where the service was before"
    )


class IndexResponse(Message):
    """Answer of POST /admin/index."""

    index_version: str = Field(description="that the service answers from now")
    previous_version: str | None
    seconds: float


class EmbeddingsRequest(Message):
    """Body of POST /v1/embeddings, in OpenAI's shape; an input may also hold an image."""

    input: str | Content | list[str | Content]
    model: str = "slq"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    model_config = ConfigDict(
        json_schema_extra={"example": {"input": ["a red apple"], "model": "slq"}}
    )

    @property
    def num_inputs(self) -> int:
        """How many vectors are asked for; nothing is decoded to know it."""
        return len(self.input) if isinstance(self.input, list) else 1

    def items(self) -> list[Item]:
        """The decoded inputs."""
        inputs = self.input if isinstance(self.input, list) else [self.input]
        return [
            Item(text=_clean(value)) if isinstance(value, str) else value.item() for value in inputs
        ]


def embeddings_response(
    vectors: list[Any], request: EmbeddingsRequest, num_tokens: int
) -> dict[str, Any]:
    """Answer of POST /v1/embeddings from (dimension,) float32 arrays."""
    encoded = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode()
        if request.encoding_format == "base64"
        else vector.tolist()
        for vector in vectors
    ]
    data = [
        {"object": "embedding", "index": n, "embedding": value} for n, value in enumerate(encoded)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


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
    elif "://" in text[:12]:
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
