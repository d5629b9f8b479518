"""SLQ training without any cluster: settings, the sampler, and one step's loss over cached prefixes.

`pipelines.train` drives these on Ray Train with DeepSpeed; a test drives them in one plain process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from slq.backbones import Backbone
from slq.collectives import gather_rows
from slq.config import Section
from slq.errors import ConfigError
from slq.latent_queries import LatentQueries
from slq.losses import info_nce
from slq.media import decode_image
from slq.prefix import Prefix, PrefixCache
from slq.schema import Item

Positive = Annotated[int, Field(gt=0)]


class AdapterSettings(Section):
    """The latent queries to be trained."""

    num_latents: Positive = 20
    """How many latent queries; 20 in the paper."""
    init: Literal["embedding", "normal", "zeros"] = "embedding"
    """Initial scale: the backbone's embedding std, 1/sqrt(hidden), or zero."""
    temperature: Annotated[float, Field(ge=0.01, le=1.0)] = 0.07
    """Where the learnable temperature starts."""
    prompt: str = ""
    """Instruction after the content; empty in the paper."""
    max_text_tokens: Positive = 128
    """Longest caption in tokens."""
    seed: int = 0
    """Seed of the initial latents."""


class TrainConfig(Section):
    """How the latent queries are trained."""

    num_steps: Positive = 120
    """Optimiser steps."""
    global_batch: Annotated[int, Field(ge=2)] = 128
    """Image-text pairs per step, over all workers."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate; large, because so little is trained."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps of linear warm-up; then linear decay to zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    checkpoint_every: Positive = 40
    """Steps between checkpoints."""
    cache_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30
    """Prefix keys and values kept in host memory, per worker."""
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of unusable pairs (broken image, empty caption) above which the run is refused."""
    num_threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each worker; 0 leaves torch's default."""
    seed: int = 0
    """Seed of the order of pairs."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Worker failures after which the run gives up."""


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then linear decay to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return max(0.0, (config.num_steps - step) / max(1, config.num_steps - config.warmup_steps))


@dataclass(frozen=True)
class PairSampler:
    """Which pairs form the global batch of a step; depends on nothing but the seed and the step.

    Pairs of an epoch are a seeded permutation. A pair whose image already stands in the batch is put off to a later
    batch, because a second caption of one image would be a false negative.

    Args:
        image_keys: For each pair, what identifies its image.
        global_batch: Pairs per step.
        seed: Seed of all permutations.

    Raises:
        ConfigError: There are fewer distinct images than pairs in a batch.
    """

    image_keys: Sequence[str]
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        distinct = len(set(self.image_keys))
        if distinct < self.global_batch:
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, but the data has only {distinct} distinct images; "
                "lower global_batch or add pairs"
            )

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """The batches of one epoch; pairs that fill no whole batch are left out of it."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.image_keys))
        batches: list[list[int]] = []
        waiting: list[int] = []
        current: list[int] = []
        used: set[str] = set()
        for pair in map(int, order):
            key = self.image_keys[pair]
            if key in used:
                waiting.append(pair)
                continue
            current.append(pair)
            used.add(key)
            if len(current) == self.global_batch:
                batches.append(current)
                current, used = [], set()
                waiting = self._fill(waiting, current, used)
        return [np.array(batch, dtype=np.int64) for batch in batches]

    def _fill(self, waiting: list[int], current: list[int], used: set[str]) -> list[int]:
        left = []
        for pair in waiting:
            if self.image_keys[pair] in used or len(current) == self.global_batch - 1:
                left.append(pair)
            else:
                current.append(pair)
                used.add(self.image_keys[pair])
        return left

    def batches(self, first_step: int, last_step: int) -> "_Steps":
        """(step, pair indices) for the steps from `first_step` to `last_step` - 1."""
        return _Steps(self, first_step, last_step)


@dataclass(frozen=True)
class _Steps:
    sampler: PairSampler
    first: int
    last: int

    def __iter__(self) -> Any:
        step, epoch = 0, 0
        while step < self.last:
            for batch in self.sampler.epoch(epoch):
                if step >= self.last:
                    return
                if step >= self.first:
                    yield step, batch
                step += 1
            epoch += 1


def rank_slice(batch: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's contiguous part of a global batch; parts differ by one pair at most."""
    return np.array_split(batch, world_size)[rank]


class RetrievalModule(nn.Module):
    """What the training engine wraps: its parameters are the latent queries and the temperature, nothing else.

    Args:
        backbone: Frozen; deliberately not registered as a submodule, so no engine can see or move its weights.
        latent_queries: The trained part.
    """

    def __init__(self, backbone: Backbone, latent_queries: LatentQueries) -> None:
        super().__init__()
        self.latent_queries = latent_queries
        self._backbone = [backbone]

    def forward(self, images: Prefix, texts: Prefix) -> Tensor:
        """Global InfoNCE loss of this rank's rows, gathered with gradient over all ranks."""
        backbone = self._backbone[0]
        image_vectors = gather_rows(self.latent_queries.embed(backbone, images))
        text_vectors = gather_rows(self.latent_queries.embed(backbone, texts))
        return info_nce(image_vectors, text_vectors, self.latent_queries.temperature)


class PrefixSource:
    """Prefixes of training pairs, computed once and kept.

    Args:
        backbone: The frozen model.
        read: Gives (image bytes, caption) of a pair.
        cache_bytes: Bound of the cache.
        chunk: Rows per frozen forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        read: Callable[[int], tuple[bytes, str]],
        *,
        cache_bytes: int,
        chunk: int = 32,
    ) -> None:
        self._backbone = backbone
        self._read = read
        self._chunk = chunk
        self.cache = PrefixCache(cache_bytes, backbone.device)

    def images(self, pairs: Sequence[int], image_keys: Sequence[str]) -> Prefix:
        """Image prefixes of pairs; captions of one image share one entry."""
        keys = [("image", image_keys[pair]) for pair in pairs]
        return self.cache.get(
            keys,
            lambda rows: self._encode(
                [Item(image=decode_image(self._read(pairs[r])[0])) for r in rows]
            ),
        )

    def texts(self, pairs: Sequence[int]) -> Prefix:
        """Caption prefixes of pairs."""
        keys = [("text", pair) for pair in pairs]
        return self.cache.get(
            keys, lambda rows: self._encode([Item(text=self._read(pairs[r])[1]) for r in rows])
        )

    def _encode(self, items: list[Item]) -> Prefix:
        parts = [
            self._backbone.prefix(self._backbone.prompts(items[start : start + self._chunk]))
            for start in range(0, len(items), self._chunk)
        ]
        return Prefix.stack(parts)


def deepspeed_config(config: TrainConfig, world_size: int, *, bf16: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration that a recipe means; `--dry-run` prints it."""
    return {
        "train_batch_size": world_size,  # one prepared batch per rank and step; DeepSpeed only counts
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }


def finite(loss: Tensor) -> bool:
    """Whether a loss is a number."""
    return bool(torch.isfinite(loss.detach()).all())
