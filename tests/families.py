"""Tiny random-weight models on the real transformers classes, wrapped as our families.

Weights are drawn wide, so that attention, positions and the image move the output far more than any
tolerance.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.random_weights import Draw, Sizes, random_backbone

HIDDEN = 32
QWEN_FACTOR = 16  # pixels per visual token along one side: patch 8, merge 2
INTERN_SIDE = 32  # pixels of the one tile: patch 8, pixel shuffle 0.5, so 2 x 2 visual tokens


def _sizes(vision_layers: int, side: int) -> Sizes:
    return Sizes(
        HIDDEN, 64, 3, 2, 1, 16, (4, 2, 2), 32, 48, vision_layers, 2, patch=8, side=side
    )  # fmt: skip


SIZES = {"qwen3_vl": _sizes(3, 96), "qwen2_5_vl": _sizes(2, 96), "internvl": _sizes(2, INTERN_SIDE)}


def _build(
    family: str, *, double: bool = False, settings: PromptSettings | None = None, seed: int = 0
) -> Backbone:
    dtype = torch.float64 if double else torch.float32
    draw = Draw(seed=seed, std=0.2, norm_std=0.2, dtype=dtype)
    return random_backbone(family, SIZES[family], draw, settings)


qwen3_vl = partial(_build, "qwen3_vl")
qwen2_5_vl = partial(_build, "qwen2_5_vl")
intern_vl = partial(_build, "internvl")

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "qwen3_vl": qwen3_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "intern_vl": intern_vl,
}
"""Every family by name, for parametrised tests."""


def picture(columns: int, rows: int, seed: int = 0) -> Image.Image:
    """A smooth random picture that becomes columns x rows visual tokens in the Qwen-VL families."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (rows * 2, columns * 2, 3), dtype=np.uint8)
    size = (columns * QWEN_FACTOR, rows * QWEN_FACTOR)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
