"""Loads what a recipe names: the frozen backbone, latent queries, and encoders of the systems under test."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.recipe import VARIANT_MARK, Recipe
from slq.artifacts import Adapter, load_adapter, load_adapter_config
from slq.backbones import Backbone, PromptSettings, load_backbone
from slq.backbones.loading import backbone_hidden_size
from slq.encoder import Encoder
from slq.errors import ConfigError
from slq.finetuning import TunedBackbone
from slq.latent_queries import LatentQueries
from slq.reranker import Reranker

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT_BLOCK_BYTES = 2**25  # glibc takes no more
_KEPT_BYTES = 2**29  # at the end of the heap


def backbone_of(recipe: Recipe, *, weights: bool = True) -> Backbone:
    """The recipe's frozen backbone with the adapter's prompt settings; without weights it only builds prompts."""
    section = recipe.backbone
    return load_backbone(
        section.name,
        revision=section.revision,
        device=section.device,
        dtype=section.dtype,
        max_pixels=section.max_pixels,
        settings=PromptSettings(
            prompt=recipe.adapter.prompt, max_text_tokens=recipe.adapter.max_text_tokens
        ),
        weights=weights,
    )


def untrained_latents(
    recipe: Recipe, backbone: Backbone, variant: str | None = None
) -> LatentQueries:
    """Latent queries as the recipe initialises them, or those of one of its variants."""
    settings = recipe.adapter if variant is None else recipe.adapter.variants[variant]
    return LatentQueries(
        settings.num_latents,
        backbone.hidden_size,
        init=settings.init,
        embedding_std=backbone.embedding_std,
        temperature=settings.temperature,
        pooling=settings.pooling,
        sets=settings.sets,
        seed=settings.seed,
    ).to(backbone.device)


def untrained_adapter(recipe: Recipe, backbone: Backbone) -> Adapter:
    """What the recipe trains, as it starts; a baseline changes the backbone in place."""
    settings = recipe.adapter
    if settings.method == "slq":
        return untrained_latents(recipe, backbone)
    return TunedBackbone(
        backbone,
        settings.method,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        temperature=settings.temperature,
        seed=settings.seed,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )


def adapter_folder(recipe: Recipe, system: str = "slq") -> Path:
    """Where the trained adapter of a system lies: the recipe's own, or with `slq:NAME` that of a variant."""
    _, separator, variant = system.partition(VARIANT_MARK)
    return recipe.storage.variant(variant) if separator else recipe.storage.adapter


def encoder_of(recipe: Recipe, system: str = "slq", backbone: Backbone | None = None) -> Encoder:
    """The encoder of a system: last token, untrained latents, or the trained adapter of the run folder.

    Args:
        recipe: The resolved recipe.
        system: Of `eval.systems`, or `slq:NAME` for a variant; `slq_fine` embeds as `slq` does.
        backbone: One that is loaded already.

    Raises:
        ArtifactError: The trained adapter is asked for and missing.
    """
    if system == "last_token":
        return Encoder(backbone or backbone_of(recipe))
    if system == "untrained":
        backbone = backbone or backbone_of(recipe)
        return Encoder(backbone, untrained_latents(recipe, backbone))
    folder = adapter_folder(recipe, system)
    if load_adapter_config(folder).slq_type != "SLQ":
        backbone = None  # a baseline changes its backbone, so it never gets a shared one
    backbone = backbone or backbone_of(recipe)
    return Encoder(backbone, load_adapter(folder, backbone))


def scoring_backbone(recipe: Recipe, encoder: Encoder) -> Backbone:
    """The frozen model of the fine stage: the encoder's own, unless a baseline changed that."""
    return backbone_of(recipe) if isinstance(encoder.adapter, TunedBackbone) else encoder.backbone


def reranker_of(
    recipe: Recipe, backbone: Backbone, *, vision_bytes: int = 0, prefix_bytes: int = 0
) -> Reranker:
    """The recipe's fine stage on a frozen model; arguments as `Reranker`."""
    section = recipe.rerank
    return Reranker(
        backbone,
        framing=section.framing,
        instruction=section.instruction,
        context_free=section.context_free,
        batch_size=section.batch_size,
        enhancement=section.enhancement,
        vision_bytes=vision_bytes,
        prefix_bytes=prefix_bytes,
    )


def require_shorter(recipe: Recipe, setting: str, lengths: Sequence[int]) -> None:
    """Check lengths to which vectors are to be cut, without loading any weights.

    Raises:
        ConfigError: One is not below the embedding's own, or stands there twice.
    """
    if not lengths:
        return
    hidden = backbone_hidden_size(recipe.backbone.name, recipe.backbone.revision)
    if max(lengths) >= hidden or len(set(lengths)) < len(lengths):
        raise ConfigError(f"{setting} {list(lengths)} must be different lengths below {hidden}")


def use_processors(num_threads: int) -> None:
    """Prepare this process for forward passes with `num_threads` CPU threads; 0 leaves torch its default."""
    keep_freed_memory()
    if num_threads:
        torch.set_num_threads(num_threads)


def keep_freed_memory() -> None:
    """Let what is freed stay with this process, where its C library is glibc.

    glibc gives blocks of more than 128 KiB back at once. A pass asks for its activations again and again, and each time
    the kernel fills new pages with zeros: 400 page faults for a text of the tiny backbone, a fifth of its time.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MALLOC_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK_BYTES)
        set_option(_MALLOC_TRIM_THRESHOLD, _KEPT_BYTES)
