"""One search, over HTTP or in an index folder."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from slq.errors import ConfigError, ServiceError


@dataclass(frozen=True)
class Place:
    """Where to search: exactly one of a service and an index folder.

    Attributes:
        url: Of a service.
        index_dir: An index folder.
        adapter: Of the encoder for a folder; its neighbour by default.
    """

    url: str | None = None
    index_dir: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Question:
    """What to look for: a text, an image, both, or items like the one of an id."""

    text: str | None = None
    image: Path | None = None
    like: str | None = None


def answer(
    place: Place, question: Question, *, top_k: int, mode: str, **options: Any
) -> dict[str, Any]:
    """Search where and as a command line asks.

    Args:
        place: Where.
        question: What for.
        top_k: Results.
        mode: `auto`, `coarse` or `fine`.
        options: Of `VectorIndex.search`; a service takes none.

    Raises:
        ConfigError: Options do not belong together.
        SlqError: As `search_url` and `search_folder`.
    """
    if options.get("words") is not None and not question.text:
        raise ConfigError("--hybrid ranks by the words of a text: give one")
    if place.index_dir is not None and place.url is None:
        if mode == "fine":
            raise ConfigError(
                "--mode fine needs a service: use --url, or --mode coarse with --index"
            )
        adapter = place.adapter or place.index_dir.parent / "adapter"
        return search_folder(place.index_dir, adapter, question, top_k=top_k, **options)
    if place.url is None or place.index_dir is not None:
        raise ConfigError("give exactly one of --url and --index")
    if question.like is not None or any(options.values()):
        raise ConfigError(
            "--where, --like, --exclude, --distinct, --exact and --hybrid search an index folder: give --index"
        )
    return search_url(place.url, question, top_k=top_k, mode=mode)


def hits_table(found: dict[str, Any]) -> Table:
    """Results with their scores, best first."""
    is_joined = found.get("joined", False)
    table = Table("rank", "id", "joined" if is_joined else "cosine", "margin", box=None)
    for rank, result in enumerate(found["results"], start=1):
        margin = result.get("fine_score")
        table.add_row(
            str(rank),
            result["id"],
            f"{result['coarse_score']:.3f}",
            "" if margin is None else f"{margin:+.2f}",
        )
    return table


def _bytes_of(image: Path | None) -> bytes | None:
    if image is None:
        return None
    if not image.is_file():
        raise ConfigError(f"image {image} does not exist")
    return image.read_bytes()


def search_url(url: str, question: Question, *, top_k: int, mode: str) -> dict[str, Any]:
    """POST /search on a running service.

    Raises:
        ServiceError: It cannot be reached, or it refused the query; its own message is passed on.
    """
    data = _bytes_of(question.image)
    query = {"text": question.text, "image": base64.b64encode(data).decode() if data else None}
    try:
        reply = httpx.post(
            f"{url.rstrip('/')}/search",
            json={"query": query, "top_k": top_k, "mode": mode},
            timeout=60,
        )
    except httpx.HTTPError as error:
        raise ServiceError(f"{url} cannot be reached: {error}; is `slq serve` running?") from None
    if reply.status_code != 200:
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError):
            message = reply.text
        raise ServiceError(f"{url} answered {reply.status_code}: {message}")
    found: dict[str, Any] = reply.json()
    return found


def search_folder(
    index_dir: Path, adapter: Path, question: Question, *, top_k: int, **options: Any
) -> dict[str, Any]:
    """Coarse search in an index folder, without any service.

    Args:
        index_dir: The index folder.
        adapter: Of the encoder; not asked for where an item is.
        question: What to look for.
        top_k: Results.
        options: Of `VectorIndex.search`.

    Raises:
        ArtifactMismatchError: Index and adapter belong to different embedding spaces.
        ConfigError: An item is given beside a text or an image.
        DataError: There is no such item, or an option cannot be used.
    """
    from slq.index import VectorIndex

    index = VectorIndex(index_dir)
    if question.like is not None:
        if question.text or question.image:
            raise ConfigError("give --like, or a text and an image, not both")
        hits = index.more_like(question.like, top_k, **options)
    else:
        vector = _encoded(index_dir, index.fingerprint, adapter, question)
        hits = index.search(vector, top_k, **options)[0]
    return {
        "joined": options.get("words") is not None,  # then scores are no cosines
        "results": [{"id": hit.id, "coarse_score": hit.score, "score": hit.score} for hit in hits],
    }


def _encoded(index_dir: Path, fingerprint: str, adapter: Path, question: Question) -> Any:
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
    data = _bytes_of(question.image)
    return encoder.encode([as_item({"text": question.text, "image": data})])
