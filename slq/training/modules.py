"""What the training engine wraps: the trained part, and the loss of one step over all workers."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slq.backbones import Backbone
from slq.collectives import gather_rows
from slq.objectives import matryoshka_info_nce
from slq.training.settings import TrainConfig

_MOST_WHOLE = 2_000_000  # latent queries are far fewer, a fine-tuned model far more


class Adapter(Protocol):
    """What is trained: `slq.latent_queries.LatentQueries` or `slq.finetuning.TunedBackbone`."""

    @property
    def temperature(self) -> Tensor:
        """Scalar that divides similarities."""

    def embed(self, backbone: Backbone, inputs: Any) -> Tensor:
        """(rows, hidden) unit vectors, differentiable in what is trained."""


class RetrievalModule(nn.Module):
    """Global InfoNCE loss of a step.

    Args:
        backbone: The model that the adapter works on.
        adapter: The trained part.
        shard_backbone: Register the backbone, so that ZeRO-3 shards its frozen weights too. Otherwise no engine sees
            or moves them.
        dimensions: Shorter lengths of the vectors that the loss counts as well (Matryoshka).
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: nn.Module,
        *,
        shard_backbone: bool = False,
        dimensions: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._dimensions = tuple(dimensions)
        self.adapter = adapter
        self._backbone = [backbone]
        if shard_backbone:
            self.frozen = backbone.model

    def forward(self, images: Sequence[Any], texts: Sequence[Any]) -> Tensor:
        """The loss of the rows of all workers, the same on each of them.

        Args:
            images: This worker's rows as the adapter takes them, in one chunk or several. With several, activations of
                one chunk are held at a time: the vectors are computed without keeping any, and each chunk again when
                its gradient is due (GradCache), so the loss and its gradient stay those of the whole batch.
            texts: The same rows' captions.
        """
        adapter: Any = self.adapter
        image_vectors, text_vectors = (gather_rows(self._vectors(side)) for side in (images, texts))
        return matryoshka_info_nce(
            image_vectors, text_vectors, adapter.temperature, self._dimensions
        )

    def _vectors(self, chunks: Sequence[Any]) -> Tensor:
        adapter: Any = self.adapter
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
    config: TrainConfig, world_size: int, *, bf16: bool = False, num_trained: int = 0
) -> dict[str, Any]:
    """The DeepSpeed configuration that a recipe means; `--dry-run` prints it.

    Args:
        config: The training section.
        world_size: Workers.
        bf16: Whether trained weights are bfloat16 with float32 master copies (`full` on a bfloat16 backbone). Latent
            queries and LoRA are float32 whatever the backbone's type.
        num_trained: Trained values. Under ZeRO-3 the few of latent queries stay whole on every worker: they are used
            outside of the modules that DeepSpeed watches.
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
        "gradient_clipping": config.clip_norm,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }


def finite(loss: Tensor) -> bool:
    """Whether a loss is a number."""
    return bool(torch.isfinite(loss.detach()).all())
