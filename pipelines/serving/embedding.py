"""Embeds what several requests want, by several adapters, in one pass of the frozen model."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from slq.encoder import Encoder, batches_by_length
from slq.latent_queries import LatentQueries, embed_each
from slq.reranker import Reranker
from slq.schema import Item

log = logging.getLogger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def each_alone(
    run: Callable[[list[_In]], Iterable[_Out]], items: list[_In]
) -> list[_Out | Exception]:
    """Run a pass over items; when it raises, run them one by one, so that only the guilty one fails.

    Args:
        run: Gives one result per item, in order.
        items: What strangers may have sent together.

    Returns:
        In order, each item's result, or the exception that it raises on its own.
    """
    try:
        return list(run(items))
    except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to its item
        if len(items) == 1:
            return [error]
        log.warning("a pass over %d items failed, running them one by one: %s", len(items), error)
        return [result for item in items for result in each_alone(run, [item])]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An item that shall be embedded.

    Attributes:
        item: What.
        tenant: Whose it is.
        adapter: By which; the rest of the model is the same for all.
    """

    item: Item
    tenant: str
    adapter: Any


class Embedding:
    """Passes of a model that embeds.

    Args:
        encoder: That of the own adapter.
        reranker: Scores with the same model, or another one.
        keeps_images: Whether the reranker keeps what it has seen, so that an image of both is seen once.
    """

    def __init__(self, encoder: Encoder, reranker: Reranker, *, keeps_images: bool) -> None:
        self._encoder = encoder
        self._reranker = reranker
        is_same = reranker.backbone is encoder.backbone and reranker.opens_as_embedded
        self._shares = keeps_images and is_same

    def encode(self, wanted: list[Wanted]) -> NDArray[np.float32]:
        """(n, dimension) float32: one pass of the frozen model over the items, whichever adapters they are for.

        An image that is kept for the fine stage is not seen again, and the reverse.
        """
        if not isinstance(self._encoder.adapter, LatentQueries):
            return self._encoder.encode([one.item for one in wanted])
        vectors = np.empty((len(wanted), self._encoder.dimension), dtype=np.float32)
        tenants = {one.tenant for one in wanted} if self._shares else {None}
        for tenant in tenants:
            mine = [n for n, one in enumerate(wanted) if tenant in (None, one.tenant)]
            for chunk in batches_by_length([wanted[number].item for number in mine], len(mine)):
                numbers = [mine[place] for place in chunk]
                vectors[numbers] = self._embedded([wanted[number] for number in numbers], tenant)
        return vectors

    def _embedded(self, wanted: list[Wanted], tenant: str | None) -> NDArray[np.float32]:
        """(n, dimension) float32 of items of one modality, and of one tenant where images are kept."""
        backbone, items = self._encoder.backbone, [one.item for one in wanted]
        with torch.no_grad():
            prefix = (
                backbone.prefix(backbone.prompts(items))
                if tenant is None
                else self._reranker.prefix(items, tenant=tenant)
            )
            found = embed_each(backbone, prefix, [one.adapter for one in wanted])
        vectors: NDArray[np.float32] = found.cpu().numpy()
        return vectors
