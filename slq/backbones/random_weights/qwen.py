"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of random weights."""

from typing import Any

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.loading import without_video
from slq.backbones.qwen_vl import QwenVLBackbone
from slq.backbones.random_weights.sizes import Draw, Sizes, drawn, text_config
from slq.backbones.random_weights.tokenizers import QWEN_TEMPLATE, QWEN_TOKENS, tokenizer

_CLASSES: dict[str, tuple[Any, type[PreTrainedModel], type[ProcessorMixin]]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}


def qwen(sizes: Sizes, draw: Draw, settings: PromptSettings | None, *, family: str) -> Backbone:
    """A backbone of one of the three generations."""
    tokens = tokenizer(QWEN_TOKENS, QWEN_TEMPLATE)
    config_class, model_class, processor_class = _CLASSES[family]
    text = text_config(tokens, sizes, draw)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(sizes.mrope_section),
    }
    if family == "qwen3_vl":
        text["head_dim"] = sizes.head_dim
        text["rope_parameters"]["mrope_interleaved"] = True
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = [int(tokens.convert_tokens_to_ids(token)) for token in QWEN_TOKENS[3:]]
    config = config_class(
        text_config=text,
        vision_config=_vision_config(sizes, draw, family),
        **dict(zip(names, ids, strict=True)),
    )
    processor = without_video(processor_class)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=sizes.patch,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": (2 * sizes.patch) ** 2, "longest_edge": sizes.side**2},
        ),
        tokenizer=tokens,
        chat_template=tokens.chat_template,
    )
    return QwenVLBackbone(
        drawn(model_class, config, draw),
        processor,
        name=f"random/{family}",
        revision=f"seed-{draw.seed}",
        settings=settings,
    )


def _vision_config(sizes: Sizes, draw: Draw, family: str) -> dict[str, Any]:
    vision: dict[str, Any] = {
        "depth": sizes.vision_layers,
        "num_heads": sizes.vision_heads,
        "patch_size": sizes.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": draw.std,
    }
    if family == "qwen2_vl":  # here `hidden_size` is the width that it hands out
        ratio = sizes.vision_ffn // sizes.vision_hidden
        return vision | {
            "embed_dim": sizes.vision_hidden,
            "mlp_ratio": max(1, ratio),
            "hidden_size": sizes.hidden,
        }
    vision |= {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_ffn,
        "out_hidden_size": sizes.hidden,
    }
    if family == "qwen2_5_vl":
        return vision | {"window_size": 4 * sizes.patch, "fullatt_block_indexes": [1]}
    quarters = (1, 2, 3) if sizes.vision_layers > 4 else (0, 2)
    return vision | {
        "num_position_embeddings": 48**2 if sizes.side > 128 else 36,
        "deepstack_visual_indexes": [sizes.vision_layers * part // 4 for part in quarters],
    }
