"""InternVL3 in its native transformers form: a running index for positions, 256 visual tokens per 448 px tile."""

from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from slq.backbones.decoder_vlm import DecoderVLMBackbone

_PADDING_GREY = (127, 127, 127)


class InternVLBackbone(DecoderVLMBackbone):
    """The InternVL family, one tile per image: padded to a square with grey, as SLQ trains it."""

    image_settings: ClassVar[Mapping[str, Any]] = {"crop_to_patches": False}
    stacks_features = True

    @property
    def tokens_per_image(self) -> int:
        """Patches that are left after the pixel shuffle."""
        return int(self.patches * self.model.config.downsample_ratio**2)

    def fit_processor(self) -> None:
        """See `DecoderVLMBackbone`; the processor's own default is 256 tokens, whatever the tile."""
        super().fit_processor()
        self.processor.image_processor.size = {"height": self.tile, "width": self.tile}
        self.processor.image_seq_length = self.tokens_per_image

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
