"""One search, over HTTP or in an index."""

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from pipelines.recipe import Recipe, load_recipe
from slq.engines import IndexPlace
from slq.errors import ConfigError, ServiceError

KEY_VARIABLE = "SLQ_API_KEY"


@dataclass(frozen=True)
class Place:
    """Where to search: exactly one of a service, an index folder, and what a recipe names.

    Attributes:
        url: Of a service.
        index_dir: An index folder.
        recipe: Of a run whose index, in files of ours or in another engine, is searched.
        adapter: Of the encoder; by default the recipe's, or the folder's neighbour.
    """

    url: str | None = None
    index_dir: Path | None = None
    recipe: Recipe | None = None
    adapter: Path | None = None

    @property
    def index(self) -> tuple[IndexPlace, Path] | None:
        """The index that is searched without a service, and the adapter; None where a service is.

        Raises:
            ConfigError: Not exactly one place is given.
        """
        if sum(one is not None for one in (self.url, self.index_dir, self.recipe)) != 1:
            raise ConfigError("give exactly one of --url, --index and --recipe")
        if self.index_dir is not None:
            adapter = self.adapter or self.index_dir.parent / "adapter"
            return IndexPlace.of_folder(self.index_dir), adapter
        if self.recipe is not None:
            return self.recipe.index_place, self.adapter or self.recipe.storage.adapter
        return None


@dataclass(frozen=True)
class Question:
    """What to look for: a text, an image, both, or items like the one of an id."""

    text: str | None = None
    image: Path | None = None
    like: str | None = None


def named_recipe(path: Path | None, overrides: list[str] | None) -> Recipe | None:
    """The recipe that a command line names, if any.

    Raises:
        ConfigError: It cannot be loaded, or there is none that keys could be set in.
    """
    if path is None:
        if overrides:
            raise ConfigError("--set changes keys of a recipe: give --recipe")
        return None
    return load_recipe(path, overrides)


def answer(
    place: Place, question: Question, *, top_k: int, mode: str, **options: Any
) -> dict[str, Any]:
    """Search where and as a command line asks.

    Args:
        place: Where.
        question: What for.
        top_k: Results.
        mode: `auto`, `coarse` or `fine`.
        options: Of `SearchIndex.search`; a service takes none.

    Raises:
        ConfigError: Options do not belong together.
        SlqError: As `search_url` and `search_index`.
    """
    if options.get("words") is not None and not question.text:
        raise ConfigError("--hybrid ranks by the words of a text: give one")
    index = place.index
    if index is not None:
        if mode == "fine":
            raise ConfigError(
                "--mode fine needs a service: use --url, or --mode coarse without one"
            )
        return search_index(*index, question, top_k=top_k, **options)
    if any(options.values()):
        raise ConfigError(
            "--where, --exclude, --distinct, --exact and --hybrid search an index: give --index or --recipe"
        )
    return search_url(str(place.url), question, top_k=top_k, mode=mode)


def hits_table(found: dict[str, Any]) -> Table:
    """Results with their scores, best first; the fine one is what the service's profile orders by."""
    is_joined = found.get("joined", False)
    table = Table("rank", "id", "joined" if is_joined else "cosine", "fine", box=None)
    for rank, result in enumerate(found["results"], start=1):
        fine = result.get("fine_score")
        table.add_row(
            str(rank),
            result["id"],
            f"{result['coarse_score']:.3f}",
            "" if fine is None else f"{fine:+.2f}",
        )
    return table


def _require_one(question: Question) -> None:
    if question.like is not None and (question.text or question.image):
        raise ConfigError("give --like, or a text and an image, not both")


def _bytes_of(image: Path | None) -> bytes | None:
    if image is None:
        return None
    if not image.is_file():
        raise ConfigError(f"image {image} does not exist")
    return image.read_bytes()


def search_url(url: str, question: Question, *, top_k: int, mode: str) -> dict[str, Any]:
    """POST /search on a running service, with the API key that the environment holds, if any.

    Raises:
        ConfigError: An item is given beside a text or an image.
        ServiceError: It cannot be reached, or it refused the query; its own message is passed on.
    """
    _require_one(question)
    data, key = _bytes_of(question.image), os.environ.get(KEY_VARIABLE)
    image = base64.b64encode(data).decode() if data else None
    query = {"text": question.text, "image": image, "like": question.like}
    try:
        reply = httpx.post(
            f"{url.rstrip('/')}/search",
            json={"query": query, "top_k": top_k, "mode": mode},
            headers={"authorization": f"Bearer {key}"} if key else None,
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


def search_index(
    place: IndexPlace, adapter: Path, question: Question, *, top_k: int, **options: Any
) -> dict[str, Any]:
    """Coarse search in an index, without any service.

    Args:
        place: Where the index is.
        adapter: Of the encoder; not asked for where an item is.
        question: What to look for.
        top_k: Results.
        options: Of `SearchIndex.search`.

    Raises:
        ArtifactMismatchError: Index and adapter belong to different embedding spaces.
        ConfigError: An item is given beside a text or an image.
        DataError: There is no such item, or an option cannot be used.
        StorageError: The engine that holds the index cannot be reached.
    """
    with place.open() as index:
        _require_one(question)
        if question.like is not None:
            hits = index.more_like(question.like, top_k, **options)
        else:
            vector = _encoded(place, index.fingerprint, adapter, question)
            hits = index.search(vector, top_k, **options)[0]
    return {
        "joined": options.get("words") is not None,  # then scores are no cosines
        "results": [{"id": hit.id, "coarse_score": hit.score, "score": hit.score} for hit in hits],
    }


def _encoded(place: IndexPlace, fingerprint: str, adapter: Path, question: Question) -> Any:
    """(1, dimension) vector of a text, an image, or both."""
    from slq.artifacts import require_same_fingerprint
    from slq.encoder import Encoder, as_item

    encoder = Encoder.from_pretrained(adapter)
    require_same_fingerprint(
        fingerprint,
        encoder.fingerprint,
        expected_in=f"index {place}",
        found_in=f"adapter {adapter}",
        remedy="pass the index's own adapter with --adapter",
    )
    data = _bytes_of(question.image)
    return encoder.encode([as_item({"text": question.text, "image": data})])
