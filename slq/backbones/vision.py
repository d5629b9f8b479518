"""What a vision tower makes of one image: kept and reused, it spares the tower in every later prefix pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slq.tensor_store import TensorStore


@dataclass(frozen=True)
class VisionFeatures:
    """Projected features of one image, on memory of their own.

    Attributes:
        tokens: (num_tokens, hidden) in the type of the weights; each takes the place of one placeholder token.
        deepstack: One (num_tokens, hidden) tensor for each of the first layers of the language model that adds
            features at the image's places (Qwen3-VL); empty in other families.
    """

    tokens: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(tensor.nbytes for tensor in (self.tokens, *self.deepstack))

    def to(self, device: torch.device | str) -> "VisionFeatures":
        """The same tensors on a device; itself if they are there already."""
        return VisionFeatures(
            self.tokens.to(device), tuple(level.to(device) for level in self.deepstack)
        )


def split_features(output: Any) -> list[VisionFeatures]:
    """One `VisionFeatures` per image of what a model's `get_image_features` returned.

    Args:
        output: `pooler_output` holds a (num_tokens, hidden) tensor per image; `deepstack_features`, where there are
            any, hold one such list per level.
    """
    images: Iterable[Tensor] = output.pooler_output
    levels: Sequence[Sequence[Tensor]] = getattr(output, "deepstack_features", None) or ()
    return [
        # clones, because the rows are views of the batch, and one that is kept would keep them all
        VisionFeatures(tokens.clone(), tuple(level[number].clone() for level in levels))
        for number, tokens in enumerate(images)
    ]


def join_features(features: Sequence[VisionFeatures], *, stack: bool = False) -> Any:
    """What a model's forward takes as `mm_encoder_outputs["image"]`; the opposite of `split_features`.

    Args:
        features: At least one; all with equally many levels.
        stack: Whether the family wants one (images, num_tokens, hidden) tensor instead of a tensor per image.
    """
    images = [image.tokens for image in features]
    return SimpleNamespace(
        pooler_output=torch.stack(images) if stack else images,
        deepstack_features=list(zip(*(image.deepstack for image in features), strict=True)),
    )


class VisionStore(TensorStore[VisionFeatures]):
    """Features of images on disk, which outlive the run; they depend on `Backbone.vision_identity` and the type."""

    holds: ClassVar[str] = "vision features"
    setting: ClassVar[str] = "train.vision_cache"

    def packed(self, value: VisionFeatures) -> dict[str, Tensor]:
        """See `TensorStore`; the levels of deepstack are one (levels, num_tokens, hidden) tensor."""
        levels = {"deepstack": torch.stack(value.deepstack)} if value.deepstack else {}
        return {"tokens": value.tokens.contiguous(), **levels}

    def unpacked(self, tensors: dict[str, Tensor]) -> VisionFeatures:
        """See `TensorStore`."""
        levels = tensors.get("deepstack")
        return VisionFeatures(tensors["tokens"], () if levels is None else levels.unbind())
