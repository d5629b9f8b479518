"""The architecture of the tiny backbone: Qwen3-VL's own classes, with every size scaled down."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessor

from slq.pretraining.mixture import GRID, MERGE, PATCH
from slq.pretraining.packing import PackedBatch
from slq.pretraining.tokenizer import IMAGE, VIDEO, VISION_END, VISION_START
from slq.scenes.rendering import CANVAS

TEMPORAL = 2
_WAVES = 6  # the slowest cosines along one axis of the position table


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int,
    num_layers: int,
    vision_hidden: int,
    vision_depth: int,
) -> Qwen3VLConfig:
    """A Qwen3-VL configuration for 96 px pictures (36 visual tokens).

    Args:
        tokenizer: Gives the vocabulary and the ids of the special tokens.
        hidden: Width of the language model; a multiple of 32.
        num_layers: Layers of the language model.
        vision_hidden: Width of the vision tower; a multiple of 32.
        vision_depth: Layers of the vision tower.
    """
    ids = {
        token: int(tokenizer.convert_tokens_to_ids(token))
        for token in (IMAGE, VIDEO, VISION_START, VISION_END)
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": max(1, hidden // 64),
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],  # sums to head_dim / 2
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "pad_token_id": int(tokenizer.pad_token_id),
        "eos_token_id": int(tokenizer.eos_token_id),
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 3,
        "num_heads": vision_hidden // 32,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": hidden,
        "num_position_embeddings": (CANVAS // PATCH) ** 2,
        "deepstack_visual_indexes": [vision_depth // 2 - 1, vision_depth - 2],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def spread_positions(model: Qwen3VLForConditionalGeneration, scale: float, seed: int) -> None:
    """Start the vision tower's position table as smooth random functions of row and column, (144, vision_hidden).

    The usual start, white noise of std 0.02, is 2% of what the patch embedding grows to, and then nothing after it
    tells left from right: at that start `tiny` knew objects and counts after 2,400 steps and no direction at all.

    Args:
        model: Its table is overwritten.
        scale: Standard deviation of the new entries.
        seed: Of the random functions.
    """
    table = model.model.visual.pos_embed.weight
    side = CANVAS // PATCH
    generator = torch.Generator().manual_seed(seed)
    place = (torch.arange(side) + 0.5) * (math.pi / side)
    waves = torch.cos(torch.arange(1, _WAVES + 1) * place[:, None])  # (side, waves), orthogonal
    mix = torch.randn(2, _WAVES, table.shape[1], generator=generator)
    rows, columns = (waves @ part for part in mix)
    grid = rows[:, None] + columns[None]  # (side, side, vision_hidden)
    with torch.no_grad():
        table.copy_((grid * (scale / grid.std())).flatten(0, 1))


def image_processor() -> Qwen2VLImageProcessor:
    """The processor that ships with the backbone: resizes to the area of 96 x 96 px, keeps the aspect."""
    area = CANVAS * CANVAS
    return Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        size={"shortest_edge": area, "longest_edge": area},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def patchify(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """What the image processor gives for 96 px pictures, for a whole batch at once.

    Args:
        pixels: (n, 96, 96, 3) uint8.

    Returns:
        (n * patches, 3 * TEMPORAL * PATCH * PATCH) float32 in -1..1, patches ordered by merge window.
    """
    values = torch.as_tensor(pixels).float().div(127.5).sub(1.0)
    n, side = values.shape[0], GRID
    # axes: n, (row window, row in window, pixel row), (column window, column in window, pixel column), channel
    values = values.view(n, side, MERGE, PATCH, side, MERGE, PATCH, 3)
    values = values.permute(0, 1, 4, 2, 5, 7, 3, 6)  # n, rw, cw, r, c, channel, y, x
    values = values.reshape(n * side * side * MERGE * MERGE, 3, 1, PATCH, PATCH)
    return values.expand(-1, -1, TEMPORAL, -1, -1).reshape(values.shape[0], -1)


def packed_hidden(model: Qwen3VLForConditionalGeneration, batch: PackedBatch) -> Tensor:
    """Last hidden states (rows, seq, hidden) of a packed batch, after the final norm."""
    core = model.model
    embeds = core.language_model.embed_tokens(batch.input_ids)
    visual_mask = deepstack = None
    num_images = batch.pixels.shape[0]
    if num_images:
        side = CANVAS // PATCH
        grid = torch.tensor([[1, side, side]]).expand(num_images, 3)
        features = core.get_image_features(patchify(batch.pixels), grid)
        visual_mask = batch.input_ids == model.config.image_token_id
        visual = torch.cat(features.pooler_output)
        embeds = embeds.masked_scatter(visual_mask[..., None], visual.to(embeds.dtype))
        deepstack = [torch.cat(level) for level in features.deepstack_features]
    output = core.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask(),
        position_ids=batch.positions,
        visual_pos_masks=visual_mask,
        deepstack_visual_embeds=deepstack,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
