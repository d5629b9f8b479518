"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: M-RoPE positions, and DeepStack features in Qwen3-VL's first layers."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from slq.backbones.base import Backbone, Prompts
from slq.backbones.levels import LevelImages, channels_first
from slq.errors import ConfigError
from slq.media import to_rgb


class QwenVLBackbone(LevelImages, Backbone):
    """The Qwen-VL family.

    An image of rows x columns visual tokens takes only max(rows, columns) positions, so what follows an image starts
    well before the cache length. `get_rope_index` of the model is the one source of positions.
    """

    position_axes = 3
    vision_inputs = ("pixel_values", "image_grid_thw")

    def image_limits(self) -> dict[str, int]:
        """Smallest and largest area, in pixels, to which an image is scaled."""
        size = self.processor.image_processor.size
        return {
            "min_pixels": int(size["shortest_edge"]),
            "max_pixels": int(size["longest_edge"]),
        }

    def fit_processor(self) -> None:
        """Set the largest area to `max_pixels`.

        Raises:
            ConfigError: It is below the smallest area.
        """
        if self.max_pixels is None:
            return
        smallest = self.image_limits()["min_pixels"]
        if self.max_pixels < smallest:
            raise ConfigError(
                f"max_pixels is {self.max_pixels}, but {self.name} scales every image to at least {smallest} pixels; "
                f"use {smallest} or more"
            )
        image_processor = self.processor.image_processor
        image_processor.size = {**dict(image_processor.size), "longest_edge": self.max_pixels}

    @property
    def probe_side(self) -> int:
        """See `LevelImages.probe_side`."""
        factor = self._factor
        return factor * math.ceil(max(16, math.sqrt(self.image_limits()["min_pixels"])) / factor)

    @property
    def _factor(self) -> int:
        """Pixels along one side of a visual token."""
        image_processor = self.processor.image_processor
        return int(image_processor.patch_size * image_processor.merge_size)

    def levels(self, image: Image.Image) -> tuple[Hashable, dict[str, Tensor]]:
        """See `LevelImages.levels`: (patches, 3 * frames * patch * patch), the patches of a visual token together."""
        image_processor, limits = self.processor.image_processor, self.image_limits()
        height, width = smart_resize(image.height, image.width, factor=self._factor, **limits)
        scaled = to_rgb(image).resize((width, height), image_processor.resample)
        patch, merge = image_processor.patch_size, image_processor.merge_size
        rows, columns = height // patch, width // patch
        cut = channels_first(scaled).reshape(
            3, rows // merge, merge, patch, columns // merge, merge, patch
        )
        cut = cut.transpose(
            1, 4, 2, 5, 0, 3, 6
        )  # (rows, columns, rows and columns in it, 3, patch, patch)
        frames = np.repeat(cut[:, :, :, :, :, None], image_processor.temporal_patch_size, axis=5)
        vision = {
            "pixel_values": torch.from_numpy(frames.reshape(rows * columns, -1)),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
        return (rows, columns), vision

    def visual_grid(self, vision: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Backbone.visual_grid`."""
        merge = int(self.processor.image_processor.merge_size)
        _, rows, columns = vision["image_grid_thw"][0].tolist()
        return rows // merge, columns // merge

    def positions(self, prompts: Prompts) -> Tensor:
        """(3, batch, seq): time, height and width."""
        core: Any = self.core
        positions, _ = core.get_rope_index(
            prompts.input_ids,
            mm_token_type_ids=self._token_types(prompts),
            image_grid_thw=prompts.vision.get("image_grid_thw"),
            attention_mask=prompts.mask.long(),
        )
        self._forget()
        result: Tensor = positions
        return result

    def _vision(self, prompts: Prompts) -> dict[str, Tensor]:
        if not prompts.vision:
            return {}
        return {**prompts.vision, "mm_token_type_ids": self._token_types(prompts)}

    def _token_types(self, prompts: Prompts) -> Tensor:
        return (prompts.input_ids == self.image_token_id).int()

    def _forget(self) -> None:
        core: Any = self.core
        core.rope_deltas = None  # left over from one call, it would shift the positions of the next
