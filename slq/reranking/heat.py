"""Heat maps: where in an image a frozen model looks, before it says whether a pair matches, or as it embeds an item.

A map is attention, averaged over heads and over the middle third of the layers, to the visual tokens of one image,
scaled to the sum 1. In the middle a model gathers what an image shows; before that it looks at neighbours, and after
it mostly at tokens in which it has put things away. On 120 scenes of two objects the shipped model's answer pays a cell
with an object 1.5 times as much attention in the middle third as one without, and in the last third 0.6 times; its
latent queries 3.3 and 2.9 times. A map says where the model reads, which is not always why it answers as it does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from slq.backbones import Backbone
from slq.backbones.watching import Watch, watching
from slq.errors import ConfigError, DataError
from slq.latent_queries import LatentQueries
from slq.reranking.reader import PairReader
from slq.reranking.turns import Head, View, prefix_of_turns
from slq.schema import Item


def layers_read(depth: int) -> range:
    """The layers that a map is the mean of, of so many: the middle third, and one at least."""
    first = round(depth / 3)
    return range(first, max(first + 1, round(2 * depth / 3)))


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where a model looks in an image.

    Attributes:
        values: (rows, columns) float32 with the sum 1; the visual tokens as they show the image.
        share: Of all attention, what the image gets; the rest goes to words, control tokens and other images.
        covers_square: Whether the rows and columns cover the square that the image was put in the middle of, instead of
            the image.
    """

    values: Tensor
    share: float
    covers_square: bool


@torch.no_grad()
def answer_heat(reader: PairReader, query: Item, candidate: Item, *, tenant: str = "") -> HeatMap:
    """Where the model looks in a candidate's image when it is about to say whether it matches.

    Args:
        reader: Puts the pair to the model as it does to score it.
        query: A text, an image or both.
        candidate: An item with an image.
        tenant: As of `PairReader.score`.

    Raises:
        ConfigError: The model's attention or its visual tokens cannot be read.
        DataError: The candidate has no image, or the pair cannot be put to the model.
    """
    picture = _picture_of(candidate)
    if picture is query.image:  # or the two could not be told apart
        picture = picture.copy()
    passes = reader.passes
    layout = reader.laid_out(query, replace(candidate, image=picture))
    shown = [one for one in (layout.shared, *layout.others) if one is not None]
    pictures = {passes.key(one, tenant): one for one in shown}
    seen = passes.view(pictures)
    views = [seen[passes.key(one, tenant)] for one in shown]
    head = Head(passes.key(layout.shared, tenant), layout.before, layout.system)
    opened = None if layout.shared is None else views[0]
    suffix = passes.suffix(layout, views[len(views) - len(layout.others) :])
    whole = passes.enhancement.needs_whole
    turns = [] if whole else list(passes.open([head], pictures, seen).values())
    with watching(1) as watch:
        passes.answer(prefix_of_turns(turns) if turns else None, [(head, opened)], [suffix])
    ids = [*passes.opening(head, opened).ids, *suffix.prompt.ids]
    number = next(n for n, one in enumerate(shown) if one is picture)
    return _map_of(reader.backbone, watch, ids, views[: number + 1])


@torch.no_grad()
def latent_heat(backbone: Backbone, latents: LatentQueries, item: Item) -> HeatMap:
    """Where the latent queries look in an item's image when it is embedded.

    Args:
        backbone: The frozen model.
        latents: Those that the embedding reads; of `pooling: last` the last one is watched alone.
        item: With an image.

    Raises:
        ConfigError: The model's attention or its visual tokens cannot be read.
        DataError: The item has no image.
    """
    _picture_of(item)
    (prompt,) = backbone.tokenised([item])
    prefix = backbone.prefix(backbone.collate([prompt]))
    with watching(latents.num_latents if latents.pooling == "mean" else 1) as watch:
        latents.states(backbone, prefix)
    places = [n for n, token in enumerate(prompt.ids) if token == backbone.image_token_id]
    return _map_at(backbone, watch, places, prompt.vision)


def _picture_of(item: Item) -> Image.Image:
    if item.image is None:
        raise DataError("there is no image in which the model could look")
    return item.image


def _map_of(backbone: Backbone, watch: Watch, ids: Sequence[int], views: Sequence[View]) -> HeatMap:
    """The map of the last one of some images, from the first in the sequence on."""
    places = [n for n, token in enumerate(ids) if token == backbone.image_token_id]
    end = sum(len(view.features) for view in views)
    last = views[-1]
    return _map_at(backbone, watch, places[end - len(last.features) : end], last.opening.vision)


def _map_at(
    backbone: Backbone, watch: Watch, places: Sequence[int], vision: Mapping[str, Tensor]
) -> HeatMap:
    """The map of an image whose tokens stand at these places."""
    if not watch.layers:
        raise ConfigError(
            f"the attention of {backbone.name} cannot be read: it was loaded with the kernel "
            f"{backbone.decoder.config._attn_implementation}; load it with sdpa"
        )
    read = [watch.layers[number] for number in layers_read(len(watch.layers))]
    weights = torch.stack(read).mean(0)[list(places)]
    rows, columns = backbone.visual_grid(vision)
    values = weights[: rows * columns].reshape(rows, columns)
    return HeatMap(
        values=(values / values.sum()).float().cpu(),
        share=float(weights.sum()),
        covers_square=backbone.pads_images,
    )
