"""Settings of training: what is trained, and how."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from slq.config import Section

Positive = Annotated[int, Field(gt=0)]
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]


class LatentSettings(Section):
    """Latent queries and how they are read: whatever stands behind a prefix and does not change it."""

    num_latents: Positive = 20
    """How many latent queries; 20 in the paper."""
    init: Literal["embedding", "normal", "zeros"] = "embedding"
    """Initial scale: the backbone's embedding std, 1/sqrt(hidden), or zero."""
    pooling: Literal["mean", "last"] = "mean"
    """How the latents' states become one vector: their mean, as in the paper, or the last one."""
    sets: Literal["shared", "separate"] = "shared"
    """One set for images and texts, as in the paper, or one for each."""
    temperature: Annotated[float, Field(ge=0.01, le=1.0)] = 0.07
    """Where the learnable temperature starts."""
    seed: int = 0
    """Seed of the initial values."""


class AdapterSettings(LatentSettings):
    """What is trained."""

    method: Literal["slq", "lora", "full"] = "slq"
    """Latent queries on the frozen backbone, or the baselines: LoRA, or every weight; both read the last token."""
    prompt: str = ""
    """Instruction after the content; empty in the paper."""
    max_text_tokens: Positive = 128
    """Longest caption in tokens."""
    lora_rank: Positive = 8
    """Rank of LoRA on the seven linear maps of every language-model layer; 8 in the paper."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA's update is scaled by lora_alpha / lora_rank."""
    variants: dict[VariantName, LatentSettings] = Field(default_factory=dict)
    """Further latent queries by name, trained in the same run over the same prefixes, each as if it were alone (but a
    step that is not finite for one ends or skips for all); what one leaves out is as in this section. They come to lie
    in `variants/NAME` of the run folder."""

    @model_validator(mode="before")
    @classmethod
    def _complete_variants(cls, values: Any) -> Any:
        """Give each variant what it leaves out, before defaults would hide that it was left out."""
        variants = values.get("variants") if isinstance(values, dict) else None
        if not isinstance(variants, dict):
            return values
        common = {name: values[name] for name in LatentSettings.model_fields if name in values}
        complete = {
            name: {**common, **own} if isinstance(own, dict) else common if own is None else own
            for name, own in variants.items()
        }
        return {**values, "variants": complete}

    @model_validator(mode="after")
    def _latent_variants(self) -> "AdapterSettings":
        if self.variants and self.method != "slq":
            raise ValueError(
                f"variants share the prefixes of a frozen model, and method {self.method} has none; remove them"
            )
        return self


class TrainConfig(Section):
    """How it is trained."""

    num_steps: Positive = 120
    """Optimiser steps."""
    global_batch: Annotated[int, Field(ge=2)] = 128
    """Image-text pairs per step, over all workers."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate; large for latent queries, because so little is trained."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up; then linear decay to zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    matryoshka: tuple[Positive, ...] = ()
    """Shorter embedding lengths that are trained too, so that vectors cut to them still search well."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """Wrong images that each caption gets besides the batch's, from `data.negatives` as `slq mine` writes it."""
    distillation: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss that teaches the fine stage's margins, mined with them, over a caption's own image and
    negatives; 0 for none."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 2.0
    """Divides the margins, in nats; a small one trusts only the best image."""
    order: Literal["block", "uniform"] = "block"
    """`block` draws blocks of images and shows all captions of a block before the next, so that an image prefix is
    computed once per epoch; `uniform` shuffles all pairs."""
    block_batches: Positive = 4
    """Images of a block, in global batches; their prefixes should fit into cache_bytes of the workers together."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; 3 shards the frozen weights too."""
    chunk_rows: Annotated[int, Field(ge=0)] = 0
    """Rows whose activations are held at a time; the loss stays that of the whole batch. 0 holds all."""
    frozen_rows: Positive = 32
    """Rows per frozen forward pass."""
    gradient_checkpointing: bool = True
    """For lora and full: recompute layers in the backward pass instead of keeping their activations."""
    held_out: Annotated[int, Field(ge=0)] = 0
    """Images whose pairs are not trained on, to measure on instead; one pair of each is used."""
    eval_every: Positive = 50
    """Steps between measurements on the held-out pairs; the last step is measured too."""
    checkpoint_every: Positive = 40
    """Steps between checkpoints."""
    cache_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Image prefixes (keys and values) kept in host memory, per worker."""
    text_cache_bytes: Annotated[int, Field(ge=0)] = 2**29
    """Caption prefixes kept in host memory, per worker; they come again only in the next epoch."""
    disk_cache: Path | None = None
    """Folder that keeps image prefixes over runs; it belongs to one backbone and its settings."""
    disk_cache_bytes: Annotated[int, Field(ge=0)] = 100 * 2**30
    """Bound of each worker's use of disk_cache."""
    vision_cache: Path | None = None
    """Folder that keeps the vision tower's output for each image over epochs and runs, several times smaller than its
    prefix; another prompt or caption length may share it. Like all caches it is not used with zero_stage 3."""
    vision_cache_bytes: Annotated[int, Field(ge=0)] = 100 * 2**30
    """Bound of each worker's use of vision_cache."""
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of unusable pairs (broken image, empty caption) above which the run is refused."""
    non_finite: Literal["halt", "skip"] = "halt"
    """What all workers do when the loss or the gradient is not finite: end the run, or leave the step out."""
    max_skipped: Positive = 10
    """With `skip`: steps left out after which the run ends all the same."""
    num_threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each worker; 0 leaves torch's default."""
    seed: int = 0
    """Seed of the order of pairs."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Worker failures after which the run gives up."""

    @model_validator(mode="after")
    def _teacher_has_candidates(self) -> "TrainConfig":
        if self.distillation and not self.negatives:
            raise ValueError(
                "distillation compares an image with mined ones; set train.negatives too"
            )
        return self


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then linear decay to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return max(0.0, (config.num_steps - step) / max(1, config.num_steps - config.warmup_steps))
