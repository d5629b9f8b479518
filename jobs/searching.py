"""One search, over HTTP or in an index folder."""

import base64
from pathlib import Path
from typing import Any

import httpx

from slq.errors import ConfigError, ServiceError


def _bytes_of(image: Path | None) -> bytes | None:
    if image is None:
        return None
    if not image.is_file():
        raise ConfigError(f"image {image} does not exist")
    return image.read_bytes()


def search_url(url: str, text: str, image: Path | None, *, top_k: int, mode: str) -> dict[str, Any]:
    """POST /search on a running service.

    Raises:
        ServiceError: It cannot be reached, or it refused the query; its own message is passed on.
    """
    data = _bytes_of(image)
    query = {"text": text or None, "image": base64.b64encode(data).decode() if data else None}
    try:
        answer = httpx.post(
            f"{url.rstrip('/')}/search",
            json={"query": query, "top_k": top_k, "mode": mode},
            timeout=60,
        )
    except httpx.HTTPError as error:
        raise ServiceError(f"{url} cannot be reached: {error}; is `slq serve` running?") from None
    if answer.status_code != 200:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError):
            message = answer.text
        raise ServiceError(f"{url} answered {answer.status_code}: {message}")
    found: dict[str, Any] = answer.json()
    return found


def search_folder(
    index_dir: Path, adapter: Path, query: dict[str, Any], *, top_k: int, **options: Any
) -> dict[str, Any]:
    """Coarse search in an index folder, without any service.

    Args:
        index_dir: The index folder.
        adapter: Of the encoder; not asked for where an item is.
        query: `text` and the file of an `image`, or the id of an item that is looked `like`.
        top_k: Results.
        options: Of `VectorIndex.search`.

    Raises:
        ArtifactMismatchError: Index and adapter belong to different embedding spaces.
        ConfigError: An item is given beside a text or an image.
        DataError: There is no such item, or an option cannot be used.
    """
    from slq.index import VectorIndex

    index = VectorIndex(index_dir)
    if query["like"] is not None:
        if query["text"] or query["image"]:
            raise ConfigError("give --like, or a text and an image, not both")
        hits = index.more_like(query["like"], top_k, **options)
    else:
        vector = _encoded(index_dir, index.fingerprint, adapter, query)
        hits = index.search(vector, top_k, **options)[0]
    return {
        "results": [{"id": hit.id, "coarse_score": hit.score, "score": hit.score} for hit in hits]
    }


def _encoded(index_dir: Path, fingerprint: str, adapter: Path, query: dict[str, Any]) -> Any:
    """(1, dimension) vector of a text, an image, or both."""
    from slq.artifacts import require_same_fingerprint
    from slq.encoder import Encoder, as_item

    encoder = Encoder.from_pretrained(adapter)
    require_same_fingerprint(
        fingerprint,
        encoder.fingerprint,
        expected_in=f"index {index_dir}",
        found_in=f"adapter {adapter}",
        remedy="pass the index's own adapter with --adapter",
    )
    return encoder.encode([as_item({"text": query["text"], "image": _bytes_of(query["image"])})])
