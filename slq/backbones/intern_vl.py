"""InternVL3 in its native transformers form: a running index for positions, 256 visual tokens per 448 px tile."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from slq.backbones.base import Backbone

_PADDING_GREY = (127, 127, 127)


class InternVLBackbone(Backbone):
    """The InternVL family, one tile per image: padded to a square with grey, as SLQ trains it."""

    def image_arguments(
        self, images: Sequence[Any]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """One tile each; `crop_to_patches` would make the number of tokens depend on the aspect."""
        opening = self._opening[True]
        ids, vision = [], []
        for image in images:
            encoded = self.processor(
                text=[opening],
                images=[pad_to_square(image)],
                crop_to_patches=False,
                return_tensors="pt",
            )
            ids.append(encoded["input_ids"][0].tolist())
            vision.append({name: encoded[name] for name in self.vision_inputs})
        return ids, vision


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image centred on a grey square with its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), _PADDING_GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
