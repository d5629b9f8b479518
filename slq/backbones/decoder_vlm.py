"""Decoder VLMs that see an image as one square tile: LLaVA-OneVision, SmolVLM and Idefics3; InternVL builds on it."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from slq.backbones.base import Backbone
from slq.errors import ConfigError


class DecoderVLMBackbone(Backbone):
    """A vision tower with a fixed tile before a language model whose positions are a running index.

    Their processors would split an image into as many tiles as its size and aspect ask for. Ours is one tile that shows
    the whole image, so that every image costs the same and any images share a batch. The tile, and the tokens that it
    becomes, are taken from the model: the processors' defaults are those of one published size.
    """

    @property
    def tile(self) -> int:
        """Pixels along one side of the tile."""
        return _side(self.model.config.vision_config.image_size)

    @property
    def patches(self) -> int:
        """Patches of the vision tower in one tile."""
        return (self.tile // _side(self.model.config.vision_config.patch_size)) ** 2

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Placeholder tokens of one image, all markers around them left out."""

    def image_limits(self) -> dict[str, int]:
        """Always one tile of `tile` pixels a side."""
        return {"tiles": 1, "tile": self.tile, "tokens": self.tokens_per_image}

    def visual_grid(self, vision: Mapping[str, Tensor]) -> tuple[int, int]:  # noqa: ARG002 - the same of all images
        """See `Backbone.visual_grid`: the tile's."""
        side = math.isqrt(self.tokens_per_image)
        return side, side

    def fit_processor(self) -> None:
        """Let the processor cut the tile that the model has.

        Raises:
            ConfigError: `max_pixels` is set, which this family cannot follow.
        """
        if self.max_pixels is not None:
            raise ConfigError(
                f"max_pixels is {self.max_pixels}, but {self.name} sees every image as one tile of {self.tile} x "
                f"{self.tile} pixels; leave max_pixels out"
            )


class SmolVLMBackbone(DecoderVLMBackbone):
    """SmolVLM and Idefics3: the image is squeezed into the tile, as their own overview tile shows it."""

    vision_inputs = ("pixel_values", "pixel_attention_mask")
    image_settings: ClassVar[Mapping[str, Any]] = {"do_image_splitting": False}

    @property
    def tokens_per_image(self) -> int:
        """Patches that are left after the pixel shuffle."""
        return int(self.patches // self.model.config.scale_factor**2)

    def fit_processor(self) -> None:
        """See `DecoderVLMBackbone`."""
        super().fit_processor()
        self.processor.image_processor.max_image_size = {"longest_edge": self.tile}
        self.processor.image_seq_len = self.tokens_per_image


class LlavaOnevisionBackbone(DecoderVLMBackbone):
    """LLaVA-OneVision: the image is padded to a square, the way its model sees each of several images.

    Processor and model split the only image of a sample and no other. So both are told that there is one more.
    """

    vision_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    pads_images = True

    @property
    def _drops_first(self) -> bool:
        return bool(self.model.config.vision_feature_select_strategy == "default")

    @property
    def tokens_per_image(self) -> int:
        """The patches and the token that ends the image, less the first where the model drops it."""
        return self.patches + 1 - int(self._drops_first)

    def visual_grid(self, vision: Mapping[str, Tensor]) -> tuple[int, int]:
        """See `Backbone.visual_grid`: all patches; the token that ends the image follows them."""
        if self._drops_first:
            raise ConfigError(
                f"{self.name} drops the first patch of an image, so its tokens do not show it in rows and columns"
            )
        return super().visual_grid(vision)

    def fit_processor(self) -> None:
        """See `DecoderVLMBackbone`."""
        super().fit_processor()
        self.processor.image_processor.size = {"height": self.tile, "width": self.tile}
        self.processor.num_image_tokens = self.patches
        self.processor.vision_feature_select_strategy = (
            self.model.config.vision_feature_select_strategy
        )

    def image_arguments(
        self, images: Sequence[Any]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """See `Backbone.image_arguments`; `batch_num_images` is (1,) and says 2, as the class explains."""
        placeholder = self.processor.image_token
        ids = self.token_ids(
            self._opening[True].replace(placeholder, placeholder * self.tokens_per_image)
        )
        filler = Image.new("RGB", (1, 1))
        vision = []
        for image in images:
            encoded = self.processor.image_processor([[image, filler]], return_tensors="pt")
            vision.append({name: encoded[name][:1] for name in self.vision_inputs})
        return [list(ids) for _ in images], vision


def _side(size: Any) -> int:
    """Pixels along one side, of a number or a (height, width) pair."""
    return int(size[0]) if isinstance(size, Sequence) else int(size)
