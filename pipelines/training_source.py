"""What a training worker reads its pairs through, with the caches that the recipe asks for."""

from functools import partial

from pipelines.recipe import Recipe
from slq.artifacts import fingerprint, vision_fingerprint
from slq.backbones import Backbone
from slq.backbones.vision import VisionStore
from slq.prefix_store import PrefixStore
from slq.training import PairReader, PrefixSource, PromptSource


def training_source(
    recipe: Recipe,
    backbone: Backbone,
    pairs: PairReader,
    world: int,
    *,
    cache_bytes: int | None = None,
) -> PrefixSource | PromptSource:
    """A source for the recipe's method: prefixes of a frozen backbone, or prompts where its weights are trained.

    Args:
        recipe: The resolved recipe.
        backbone: As loaded.
        pairs: What to read.
        world: Workers, which share the caches on disk.
        cache_bytes: Of each cache in memory, in place of what the recipe says.
    """
    config = recipe.train
    if recipe.adapter.method != "slq":
        return PromptSource(backbone, pairs, chunk_rows=config.chunk_rows)
    source = partial(
        PrefixSource,
        backbone,
        pairs,
        frozen_rows=config.frozen_rows,
        chunk_rows=config.chunk_rows,
    )
    # ZeRO-3 gathers weights layer by layer, so all workers must make the same passes: none may skip one.
    if config.zero_stage == 3:
        return source(cache_bytes=0, text_cache_bytes=0)
    store = vision_store = None
    if config.disk_cache is not None:
        prefixes = fingerprint(backbone, None)  # of the backbone with its settings, and no adapter
        store = PrefixStore(config.disk_cache, prefixes, config.disk_cache_bytes, shared_by=world)
    if config.vision_cache is not None:
        vision_store = VisionStore(
            config.vision_cache,
            vision_fingerprint(backbone),
            config.vision_cache_bytes,
            shared_by=world,
        )
    return source(
        cache_bytes=cache_bytes or config.cache_bytes,
        text_cache_bytes=cache_bytes or config.text_cache_bytes,
        store=store,
        vision_store=vision_store,
    )
