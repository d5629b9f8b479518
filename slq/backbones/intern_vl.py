"""InternVL3 in its native transformers form: a running index for positions, 256 visual tokens per 448 px tile."""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slq.backbones.decoder_vlm import DecoderVLMBackbone
from slq.backbones.levels import LevelImages, channels_first
from slq.media import to_rgb

_PADDING_GREY = (127, 127, 127)


class InternVLBackbone(LevelImages, DecoderVLMBackbone):
    """The InternVL family, one tile per image: padded to a square with grey, as SLQ trains it."""

    image_settings: ClassVar[Mapping[str, Any]] = {"crop_to_patches": False}
    stacks_features = True
    pads_images = True

    @property
    def tokens_per_image(self) -> int:
        """Patches that are left after the pixel shuffle."""
        return int(self.patches * self.model.config.downsample_ratio**2)

    def fit_processor(self) -> None:
        """See `DecoderVLMBackbone`; the processor's own default is 256 tokens, whatever the tile."""
        super().fit_processor()
        self.processor.image_processor.size = {"height": self.tile, "width": self.tile}
        self.processor.image_seq_length = self.tokens_per_image

    @property
    def probe_side(self) -> int:
        """See `LevelImages.probe_side`."""
        return self.tile

    def levels(self, image: Image.Image) -> tuple[Hashable, dict[str, Tensor]]:
        """See `LevelImages.levels`: (1, 3, tile, tile)."""
        scaled = to_rgb(self.prepared(image)).resize(
            (self.tile, self.tile), self.processor.image_processor.resample
        )
        levels = np.ascontiguousarray(channels_first(scaled))[None]
        return None, {"pixel_values": torch.from_numpy(levels)}

    def prepared(self, image: Image.Image) -> Image.Image:
        """The image on its grey square."""
        return pad_to_square(image)


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image centred on a grey square with its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), _PADDING_GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
