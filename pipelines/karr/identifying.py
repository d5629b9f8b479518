"""Whether a new caption finds its own image among that image's nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.fetching import fetch_images
from pipelines.karr.judges import Candidate
from pipelines.karr.neighbours import Neighbours
from pipelines.recipe import Recipe
from slq.errors import DataError
from slq.karr.reasons import RejectedError
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item

Lead = float | RejectedError | None
"""Score of the own image less that of the best neighbour; None where there is no other image, -inf where a score is no
number, an error, `unreadable_image`, where an image that it takes cannot be read."""


class Identifier(Protocol):
    """Says by how much captions find their own images."""

    def leads(self, candidates: Sequence[Candidate]) -> Sequence[Lead]:
        """One for each candidate."""
        ...


@dataclass(frozen=True)
class CosineIdentifier:
    """Compares a caption's vector with those of its image and that image's neighbours."""

    recipe: Recipe
    neighbours: Neighbours
    encode: Any

    def leads(self, candidates: Sequence[Candidate]) -> list[Lead]:
        """See `Identifier.leads`."""
        size = self.recipe.embed.batch_size
        found: list[Lead] = []
        for start in range(0, len(candidates), size):
            chunk = candidates[start : start + size]
            texts = self.encode([Item(text=one.rewriting.caption) for one in chunk]).cpu().numpy()
            for one, vector in zip(chunk, texts, strict=True):
                places = self.neighbours.around(one.item_id)
                found.append(
                    _lead(self.neighbours.vectors[places] @ vector)
                    if places
                    else _without_vector(one)
                )
        return found


@dataclass(frozen=True)
class FineIdentifier:
    """Compares the fine stage's margins of a caption with its image and with that image's neighbours."""

    recipe: Recipe
    neighbours: Neighbours
    reranker: Reranker
    uris: dict[str, str]

    def leads(self, candidates: Sequence[Candidate]) -> list[Lead]:
        """See `Identifier.leads`."""
        around = [self.neighbours.around(one.item_id) for one in candidates]
        ids = [[self.neighbours.ids[place] for place in places] for places in around]
        wanted = dict.fromkeys(self.uris[name] for names in ids for name in names)
        images = fetch_images(list(wanted), self.recipe.storage.retry_s)
        return [
            self._lead(one, {name: images[self.uris[name]] for name in names})
            for one, names in zip(candidates, ids, strict=True)
        ]

    def _lead(self, one: Candidate, images: dict[str, bytes | DataError | None]) -> Lead:
        if not images:
            return _without_vector(one)
        text, pairs = Item(text=one.rewriting.caption), []
        for name, data in images.items():
            try:
                if not isinstance(data, bytes):
                    raise data or DataError("there is no image in its place")
                pairs.append((text, Item(image=decode_image(data))))
            except DataError as error:
                return RejectedError("unreadable_image", f"image of {name}: {error}")
        return _lead(self.reranker.score(pairs).numpy())


def _lead(scores: NDArray[np.float32]) -> float | None:
    """First score less the best other; None without another, -inf where one is no number."""
    if not np.isfinite(scores).all():
        return -np.inf
    return float(scores[0] - scores[1:].max()) if len(scores) > 1 else None


def _without_vector(one: Candidate) -> RejectedError:
    return RejectedError(
        "unreadable_image", f"image of {one.item_id} could not be read when images were embedded"
    )
