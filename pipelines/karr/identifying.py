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
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item


class Identifier(Protocol):
    """Says by how much captions find their own images."""

    def leads(self, candidates: Sequence[Candidate]) -> list[float]:
        """Score of the own image less that of the best neighbour, one for each; -inf where it cannot be told."""
        ...


@dataclass(frozen=True)
class CosineIdentifier:
    """Compares a caption's vector with those of its image and that image's neighbours."""

    recipe: Recipe
    neighbours: Neighbours
    encode: Any

    def leads(self, candidates: Sequence[Candidate]) -> list[float]:
        """See `Identifier.leads`."""
        size, found = self.recipe.embed.batch_size, []
        for start in range(0, len(candidates), size):
            chunk = candidates[start : start + size]
            texts = self.encode([Item(text=one.rewriting.caption) for one in chunk]).cpu().numpy()
            for one, vector in zip(chunk, texts, strict=True):
                places = self.neighbours.around(one.item_id)
                found.append(_lead(self.neighbours.vectors[places] @ vector if places else []))
        return found


@dataclass(frozen=True)
class FineIdentifier:
    """Compares the fine stage's margins of a caption with its image and with that image's neighbours."""

    recipe: Recipe
    neighbours: Neighbours
    reranker: Reranker
    uris: dict[str, str]

    def leads(self, candidates: Sequence[Candidate]) -> list[float]:
        """See `Identifier.leads`."""
        around = [self.neighbours.around(one.item_id) for one in candidates]
        ids = [[self.neighbours.ids[place] for place in places] for places in around]
        wanted = dict.fromkeys(self.uris[name] for names in ids for name in names)
        images = fetch_images(list(wanted), self.recipe.storage.retry_s)
        return [
            self._lead(one, [images[self.uris[name]] for name in names])
            for one, names in zip(candidates, ids, strict=True)
        ]

    def _lead(self, one: Candidate, images: Sequence[bytes | DataError | None]) -> float:
        text = Item(text=one.rewriting.caption)
        try:
            pairs = [
                (text, Item(image=decode_image(data))) for data in images if isinstance(data, bytes)
            ]
        except DataError:
            return -np.inf
        if len(pairs) < len(images) or not pairs:
            return -np.inf
        return _lead(self.reranker.score(pairs).numpy())


def _lead(scores: NDArray[np.float32] | list[float]) -> float:
    """First score less the best other; inf without another, -inf without any or where one is no number."""
    if not len(scores) or not np.isfinite(scores).all():
        return -np.inf
    return float(scores[0] - max(scores[1:])) if len(scores) > 1 else np.inf
