"""Loads what a recipe names: the frozen backbone, latent queries, and encoders of the systems under test."""

import ctypes
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipelines.recipe import VARIANT_MARK, BackboneConfig, Recipe
from slq.artifacts import Adapter, load_adapter, load_adapter_config
from slq.backbones import Backbone, PromptSettings, load_backbone
from slq.backbones.loading import backbone_hidden_size
from slq.encoder import Encoder
from slq.errors import ArtifactMismatchError, ConfigError
from slq.finetuning import TunedBackbone
from slq.latent_queries import LatentQueries
from slq.reranker import Reranker
from slq.reranking.calibration import Calibration
from slq.reranking.framings import framing_by_name

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT_BLOCK_BYTES = 2**25  # glibc takes no more
_KEPT_BYTES = 2**29  # at the end of the heap
_SCORING = ("instruction", "context_free", "enhancement")  # of `rerank`: a margin depends on them


def backbone_of(recipe: Recipe, *, weights: bool = True) -> Backbone:
    """The recipe's frozen backbone with the adapter's prompt settings; without weights it only builds prompts."""
    return _backbone(recipe, recipe.backbone, weights=weights)


def reranking_backbone(recipe: Recipe, *, weights: bool = True) -> Backbone:
    """The model that `slq rerank` scores with: `rerank.backbone`, or the one that embeds."""
    return _backbone(recipe, recipe.rerank.backbone or recipe.backbone, weights=weights)


def _backbone(recipe: Recipe, section: BackboneConfig, *, weights: bool = True) -> Backbone:
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
    """The frozen model of the fine stage: the encoder's own, unless a baseline changed that or another is asked for."""
    if recipe.rerank.backbone is not None or isinstance(encoder.adapter, TunedBackbone):
        return reranking_backbone(recipe)
    return encoder.backbone


def scorer_of(recipe: Recipe, backbone: Backbone) -> dict[str, Any]:
    """What a score depends on beside its pair; as plain JSON, and the same without weights.

    Args:
        recipe: The resolved recipe.
        backbone: That scores.
    """
    section, model = recipe.rerank, recipe.rerank.backbone or recipe.backbone
    framing = framing_by_name(section.question)
    return {
        "model": backbone.identity(),
        "dtype": model.dtype,
        "framing": asdict(framing),
        "opening": backbone.start_ids(framing.system),
        **{name: section.model_dump(mode="json")[name] for name in _SCORING},
    }


def calibration_of_scorer(recipe: Recipe, scorer: str) -> Calibration | None:
    """What the recipe calibrates with, if it does.

    Args:
        recipe: The resolved recipe.
        scorer: Digest of what scores.

    Raises:
        ArtifactError: It is missing or damaged.
        ArtifactMismatchError: It was fitted to the scores of another model or question.
    """
    path = recipe.rerank.calibration
    if path is None:
        return None
    found = Calibration.load(path)
    if found.scorer != scorer:
        raise ArtifactMismatchError(
            f"calibration {path} was fitted to scores of {found.scorer[:12]}, and this recipe scores as {scorer[:12]}: "
            "another model, type or question; run `slq rerank` on held-out queries with this recipe"
        )
    return found


def coarse_weight_of(recipe: Recipe, backbone: Backbone) -> float:
    """Nats of margin that one unit of coarse score is worth; 0 where the two are not fused. Errors as above.

    Args:
        recipe: The resolved recipe.
        backbone: That scores, with or without weights.
    """
    if not recipe.rerank.fuse:
        return 0.0
    found = calibration_of(recipe, backbone)
    assert found is not None  # recipes that fuse name one
    return found.coarse_weight


def calibration_of(recipe: Recipe, backbone: Backbone) -> Calibration | None:
    """As `calibration_of_scorer`, of the backbone that scores, with or without weights."""
    if recipe.rerank.calibration is None:
        return None
    return calibration_of_scorer(recipe, scorer_digest(scorer_of(recipe, backbone)))


def scorer_digest(scorer: dict[str, Any]) -> str:
    """sha256 of what `scorer_of` gives."""
    return hashlib.sha256(json.dumps(scorer, sort_keys=True).encode()).hexdigest()


def reranker_of(
    recipe: Recipe, backbone: Backbone, *, vision_bytes: int = 0, prefix_bytes: int = 0
) -> Reranker:
    """The recipe's fine stage on a frozen model; arguments as `Reranker`."""
    section = recipe.rerank
    return Reranker(
        backbone,
        profile=section.profile,
        framing=section.framing,
        instruction=section.instruction,
        context_free=section.context_free,
        batch_size=section.batch_size,
        enhancement=section.enhancement,
        coarse_weight=coarse_weight_of(recipe, backbone),
        calibration=calibration_of(recipe, backbone),
        deterministic=section.deterministic,
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


def use_deterministic_passes() -> None:
    """Prepare this process for passes with the same bits each time: one CPU thread, and one order of sums on a GPU."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # or cuBLAS refuses to be deterministic
    use_processors(1)
    torch.use_deterministic_algorithms(mode=True)


def keep_freed_memory() -> None:
    """Let what is freed stay with this process, where its C library is glibc.

    glibc gives blocks of more than 128 KiB back at once. A pass asks for its activations again and again, and each time
    the kernel fills new pages with zeros: 400 page faults for a text of the tiny backbone, a fifth of its time.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MALLOC_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK_BYTES)
        set_option(_MALLOC_TRIM_THRESHOLD, _KEPT_BYTES)
