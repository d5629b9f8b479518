"""The models that are measured: published shapes for GPUs, the same proportions at a quarter for CPUs, and `tiny`."""

from dataclasses import dataclass, replace

import torch

from jobs.bench.flops import Tokens
from slq.backbones import load_backbone
from slq.backbones.base import Backbone
from slq.backbones.random_weights import (
    INTERNVL3_1B,
    QWEN3_VL_2B,
    Draw,
    Sizes,
    random_backbone,
)

OPENING, CLOSING = 5, 5  # tokens around the image: 266 in all with 256 visual ones
TEXT_TOKENS, NUM_LATENTS, CAPTIONS = 20, 20, 5


@dataclass(frozen=True)
class Shape:
    """One model to measure.

    Attributes:
        family: Of `slq.backbones.random_weights`.
        sizes: Of the weights.
        grid: Visual tokens along one side of a square image.
        shipped: Whether it is the backbone that the package brings, and not random weights.
    """

    family: str
    sizes: Sizes
    grid: int = 16
    shipped: bool = False

    @property
    def tokens(self) -> Tokens:
        """Lengths of the sequences of one pair."""
        visual = self.grid**2
        return Tokens(visual, OPENING + visual + CLOSING, TEXT_TOKENS, NUM_LATENTS)

    @property
    def side(self) -> int:
        """Pixels along one side of a square image."""
        return self.grid * 2 * self.sizes.patch

    def load(self, dtype: torch.dtype, device: str) -> Backbone:
        """The backbone on a device."""
        if self.shipped:
            backbone = load_backbone("tiny", device=device)
            backbone.model.to(dtype)
            return backbone
        return random_backbone(self.family, self.sizes, Draw(dtype=dtype, device=device))


@dataclass(frozen=True)
class Published:
    """A published model, and what its paper and the arithmetic say of it.

    Attributes:
        name: As the paper calls it.
        shape: Its widths and depths.
        training_pixels: (width, height) of an image of COCO as the model's processor leaves it.
        paper_h800_hours: GPU hours of five epochs of COCO in the paper.
        limit_images_per_s: At 790 TFLOP/s and 448 x 448 px, as the project's table of measures has it; None where it
            has none, and the arithmetic of `jobs.bench.flops` is taken.
    """

    name: str
    shape: Shape
    training_pixels: tuple[int, int]
    paper_h800_hours: float
    limit_images_per_s: float | None = None


_INTERN = Shape("internvl", INTERNVL3_1B)
_QWEN = Shape("qwen3_vl", replace(QWEN3_VL_2B, side=640))  # an area that takes 640 x 480 as it is
PUBLISHED = {
    "internvl": Published("InternVL3-1B", _INTERN, (448, 448), 3.9, 833.0),
    "qwen3_vl": Published("Qwen3-VL-2B", _QWEN, (640, 480), 6.7, 619.0),
    "qwen3_vl_4b": Published(
        "Qwen3-VL-4B",
        replace(_QWEN, sizes=replace(_QWEN.sizes, hidden=2560, ffn=9728, layers=36, heads=32)),
        (640, 480),
        13.5,
    ),
    "internvl_8b": Published(
        "InternVL3-8B",
        replace(
            _INTERN,
            sizes=replace(
                INTERNVL3_1B, hidden=3584, ffn=18_944, layers=28, heads=28, kv_heads=4, head_dim=128
            ),
        ),
        (448, 448),
        38.9,
    ),
}

TINY = Shape("qwen3_vl", Sizes(192, 576, 6, 6, 3, 32, (6, 5, 5), 128, 384, 4, 4, 8, 96), 6, True)

# A quarter of the widths and depths of the language models, the same number of tokens. Attention shrinks with the width
# and a matrix with its square, and the four projectors of Qwen3-VL stand before a quarter of the layers; so a quarter
# of the vision tower's width (256) would weigh too much. GFLOP per image, vision / image prefix (`jobs.bench.flops`):
#   InternVL3-1B 725.9 / 196.4 = 3.70    here, 256 wide: 16.6 / 3.4 = 4.94    208 wide: 12.0 / 3.4 = 3.58
#   Qwen3-VL-2B  776.3 / 766.0 = 1.01    here, 256 wide: 20.1 / 12.7 = 1.58   192 wide: 12.9 / 12.7 = 1.01
ON_CPU = {
    "tiny": TINY,
    "internvl": Shape(
        "internvl",
        replace(
            INTERNVL3_1B,
            hidden=224,
            ffn=1216,
            layers=6,
            head_dim=16,
            vision_hidden=208,
            vision_ffn=832,
            vision_layers=6,
            vision_heads=13,
            vocab=0,
        ),
    ),
    "qwen3_vl": Shape(
        "qwen3_vl",
        replace(
            QWEN3_VL_2B,
            hidden=512,
            ffn=1536,
            layers=7,
            head_dim=32,
            mrope_section=(6, 5, 5),
            vision_hidden=192,
            vision_ffn=768,
            vision_layers=6,
            vision_heads=12,
            side=512,
            vocab=0,
        ),
    ),
}
