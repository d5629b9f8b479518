"""Image prefixes on disk, which outlive the run."""

from typing import ClassVar

import torch
from torch import Tensor

from slq.prefix import Prefix
from slq.tensor_store import TensorStore


class PrefixStore(TensorStore[Prefix]):
    """Single-row prefixes by key; they depend on the backbone, its processor, the prompt and the type."""

    holds: ClassVar[str] = "prefixes"
    setting: ClassVar[str] = "train.disk_cache"

    def packed(self, value: Prefix) -> dict[str, Tensor]:
        """See `TensorStore`; the layers' keys are one tensor, and their values another."""
        return {
            "keys": torch.cat(value.keys).contiguous(),
            "values": torch.cat(value.values).contiguous(),
            "mask": value.mask.contiguous(),
            "next_position": value.next_position.contiguous(),
            "last_hidden": value.last_hidden.contiguous(),
            "shows_image": value.shows_image.contiguous(),
        }

    def unpacked(self, tensors: dict[str, Tensor]) -> Prefix:
        """See `TensorStore`."""
        return Prefix(
            keys=torch.split(tensors["keys"], 1),
            values=torch.split(tensors["values"], 1),
            mask=tensors["mask"],
            next_position=tensors["next_position"],
            last_hidden=tensors["last_hidden"],
            shows_image=tensors["shows_image"],
        )
