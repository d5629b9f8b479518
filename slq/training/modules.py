"""What the training engine wraps: the trained part, and the loss of one step over all workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slq.backbones import Backbone
from slq.collectives import gather_rows
from slq.objectives import HardNegatives, distillation_loss, matryoshka_info_nce
from slq.training.settings import TrainConfig

_MOST_WHOLE = 2_000_000  # latent queries are far fewer, a fine-tuned model far more


class Adapter(Protocol):
    """What is trained: `slq.latent_queries.LatentQueries` or `slq.finetuning.TunedBackbone`."""

    @property
    def temperature(self) -> Tensor:
        """Scalar that divides similarities."""

    def embed(self, backbone: Backbone, inputs: Any) -> Tensor:
        """(rows, hidden) unit vectors, differentiable in what is trained."""


@dataclass(frozen=True, slots=True, eq=False)
class MinedRows:
    """Mined wrong images of a worker's captions, and what the fine stage thinks of them.

    Attributes:
        images: (rows * num_negatives) inputs as the adapter takes them, caption by caption, in one chunk or several.
        present: (rows, num_negatives) bool; False where a caption has fewer, and any input stands in.
        margins: (rows, 1 + num_negatives) float32 in nats, the caption's own image first; None without a teacher.
    """

    images: Sequence[Any]
    present: Tensor
    margins: Tensor | None = None


class RetrievalModule(nn.Module):
    """Global InfoNCE loss of a step.

    Args:
        backbone: The model that the adapter works on.
        adapter: The trained part.
        variants: Further trained parts over the same inputs; each has a loss of its own.
        shard_backbone: Register the backbone, so that ZeRO-3 shards its frozen weights too. Otherwise no engine sees
            or moves them.
        dimensions: Shorter lengths of the vectors that the loss counts as well (Matryoshka).
        distillation: Weight of the fine stage's margins in the loss.
        teacher_temperature: Divides these margins.

    Attributes:
        losses: Of the last step, the adapter's first, (1 + variants,) without gradient.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: nn.Module,
        *,
        variants: Mapping[str, nn.Module] | None = None,
        shard_backbone: bool = False,
        dimensions: Sequence[int] = (),
        distillation: float = 0.0,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self._dimensions = tuple(dimensions)
        self._distillation = distillation
        self._teacher_temperature = teacher_temperature
        self.adapter = adapter
        self._variants = dict(variants or {})
        # by number: the name of a module may hold no dot
        self.variants = nn.ModuleList(self._variants.values())
        self.losses = torch.zeros(1 + len(self.variants))
        self._backbone = [backbone]
        if shard_backbone:
            self.frozen = backbone.model

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The trained parts by name; the adapter's is empty."""
        return {"": self.adapter, **self._variants}

    def forward(
        self, images: Sequence[Any], texts: Sequence[Any], mined: MinedRows | None = None
    ) -> Tensor:
        """The loss of the rows of all workers, the same on each of them; of all trained parts together.

        Args:
            images: This worker's rows as the adapter takes them, in one chunk or several. With several, activations of
                one chunk are held at a time: the vectors are computed without keeping any, and each chunk again when
                its gradient is due (GradCache), so the loss and its gradient stay those of the whole batch.
            texts: The same rows' captions.
            mined: The captions' mined negatives; None for those of the batch alone.
        """
        losses = torch.stack(
            [self._loss(part, images, texts, mined) for part in self.trained.values()]
        )
        self.losses = losses.detach()
        return losses.sum()

    def _loss(
        self, adapter: Any, images: Sequence[Any], texts: Sequence[Any], mined: MinedRows | None
    ) -> Tensor:
        image_vectors, text_vectors = (
            gather_rows(self._vectors(adapter, side)) for side in (images, texts)
        )
        negatives = None if mined is None else self._negatives(adapter, mined)
        loss = matryoshka_info_nce(
            image_vectors,
            text_vectors,
            adapter.temperature,
            self._dimensions,
            negative_images=negatives,
        )
        if negatives is None or mined is None or mined.margins is None or not self._distillation:
            return loss
        candidates = torch.cat([image_vectors[:, None], negatives.vectors], dim=1)
        own = torch.ones_like(negatives.present[:, :1])
        return loss + self._distillation * distillation_loss(
            torch.einsum("bh,bnh->bn", text_vectors, candidates),
            gather_rows(mined.margins),
            adapter.temperature,
            self._teacher_temperature,
            present=torch.cat([own, negatives.present], dim=1),
        )

    def _negatives(self, adapter: Any, mined: MinedRows) -> HardNegatives:
        vectors = self._vectors(adapter, mined.images)
        rows = vectors.view(*mined.present.shape, vectors.shape[1])
        present = gather_rows(mined.present.to(torch.uint8)).bool()  # no backend gathers bools
        return HardNegatives(gather_rows(rows), present)

    def _vectors(self, adapter: Any, chunks: Sequence[Any]) -> Tensor:
        backbone = self._backbone[0]
        if len(chunks) == 1:
            vectors: Tensor = adapter.embed(backbone, chunks[0])
            return vectors
        parts = [
            checkpoint(
                adapter.embed, backbone, chunk, use_reentrant=False, preserve_rng_state=False
            )
            for chunk in chunks
        ]
        return torch.cat(parts)


def deepspeed_config(
    config: TrainConfig,
    world_size: int,
    *,
    bf16: bool = False,
    num_trained: int = 0,
    clip: bool = True,
) -> dict[str, Any]:
    """The DeepSpeed configuration that a recipe means; `--dry-run` prints it.

    Args:
        config: The training section.
        world_size: Workers.
        bf16: Whether trained weights are bfloat16 with float32 master copies (`full` on a bfloat16 backbone). Latent
            queries and LoRA are float32 whatever the backbone's type.
        num_trained: Trained values. Under ZeRO-3 the few of latent queries stay whole on every worker: they are used
            outside of the modules that DeepSpeed watches.
        clip: Whether DeepSpeed clips, by the norm over all that is trained; several adapters are clipped one by one.
    """
    whole = 100_000  # DeepSpeed's default
    sharding: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        small = num_trained <= _MOST_WHOLE
        sharding["stage3_param_persistence_threshold"] = max(whole, num_trained if small else 0)
    return {
        "train_batch_size": world_size,  # one prepared batch per rank and step; DeepSpeed only counts
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm if clip else 0.0,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }


def finite(loss: Tensor) -> bool:
    """Whether a loss is a number."""
    return bool(torch.isfinite(loss.detach()).all())
