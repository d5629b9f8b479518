"""Tiny random-weight models on the real transformers classes, wrapped as our families.

Weights are drawn wide, so that attention, positions and the image move the output far more than any
tolerance.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.random_weights import Draw, Sizes, random_backbone

HIDDEN = 32
QWEN_FACTOR = 16  # pixels per visual token along one side: patch 8, merge 2
TILE_SIDE = 32  # pixels of the one tile: patch 8, and 2 x 2 tokens after a pixel shuffle


def _sizes(vision_layers: int, side: int) -> Sizes:
    return Sizes(
        HIDDEN, 64, 3, 2, 1, 16, (4, 2, 2), 32, 48, vision_layers, 2, patch=8, side=side
    )  # fmt: skip


SIZES = {
    "qwen3_vl": _sizes(3, 96),
    "qwen2_5_vl": _sizes(2, 96),
    "qwen2_vl": _sizes(2, 96),
    **{
        family: _sizes(2, TILE_SIDE)
        for family in ("internvl", "llava_onevision", "smolvlm", "idefics3")
    },
}


def _build(
    family: str, *, double: bool = False, settings: PromptSettings | None = None, seed: int = 0
) -> Backbone:
    dtype = torch.float64 if double else torch.float32
    draw = Draw(seed=seed, std=0.2, norm_std=0.2, dtype=dtype)
    return random_backbone(family, SIZES[family], draw, settings)


qwen3_vl = partial(_build, "qwen3_vl")

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "intern_vl" if family == "internvl" else family: partial(_build, family) for family in SIZES
}
"""Every family by name, for parametrised tests."""


def picture(columns: int, rows: int, seed: int = 0) -> Image.Image:
    """A smooth random picture that becomes columns x rows visual tokens in the Qwen-VL families."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (rows * 2, columns * 2, 3), dtype=np.uint8)
    size = (columns * QWEN_FACTOR, rows * QWEN_FACTOR)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(backbone: Backbone, folder: Path, *, as_processor: bool = True) -> Path:
    """A Hugging Face folder, its processor saved as a whole or in parts."""
    processor = backbone.processor
    parts = [processor] if as_processor else [backbone.tokenizer, processor.image_processor]
    for part in (backbone.model, *parts):
        part.save_pretrained(folder)
    return folder
