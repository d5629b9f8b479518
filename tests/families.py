"""Tiny random-weight models on the real transformers classes, wrapped as our families.

Weights are drawn wide, so that attention, positions and the image move the output far more than any
tolerance.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.intern_vl import InternVLBackbone
from slq.backbones.loading import without_video
from slq.backbones.qwen_vl import QwenVLBackbone

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TOKENS = (PAD, TURN_START, TURN_END, *QWEN_VISION)
INTERN_TOKENS = (PAD, TURN_START, TURN_END, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
HIDDEN = 32
QWEN_FACTOR = 16  # pixels per visual token along one side: patch 8, merge 2
INTERN_SIDE = 32  # pixels of the one tile: patch 8, pixel shuffle 0.5, so 2 x 2 visual tokens

_CORPUS = (
    "True true False false Yes yes No no A B the caption match image Does Answer True or False. "
    "Caption: a small red dog stands left of two blue cats on a white background. "
    "fully or only partly "
    "user assistant True False Yes No A B\n"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_core(special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE in which every framing's label words are single tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_CORPUS, _CORPUS.replace(" ", "\n")] * 20, trainer)
    return core


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen's control tokens and a chat template without a system prompt."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(QWEN_TOKENS),
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=list(QWEN_TOKENS[1:]),
        chat_template=_QWEN_TEMPLATE,
    )


def intern_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the named tokens that InternVL's processor asks for."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(INTERN_TOKENS),
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        model_specific_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        chat_template=_INTERN_TEMPLATE,
    )


def qwen3_vl(
    *, double: bool = False, settings: PromptSettings | None = None, seed: int = 0
) -> Backbone:
    """Qwen3-VL: M-RoPE, and DeepStack in the first two layers."""
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(
        text_config={**_text_sizes(tokenizer), "head_dim": 16, "rope_parameters": _mrope(True)},
        vision_config=vision,
        **_qwen_ids(tokenizer),
    )
    model = _random(Qwen3VLForConditionalGeneration, config, seed, double)
    processor = without_video(Qwen3VLProcessor)(
        image_processor=_qwen_image_processor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return QwenVLBackbone(
        model, processor, name="tests/qwen3_vl", revision=f"seed-{seed}", settings=settings
    )


def qwen2_5_vl(
    *, double: bool = False, settings: PromptSettings | None = None, seed: int = 0
) -> Backbone:
    """Qwen2.5-VL: M-RoPE in sections, a vision tower with window attention."""
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(
        text_config={**_text_sizes(tokenizer), "rope_parameters": _mrope(False)},
        vision_config=vision,
        **_qwen_ids(tokenizer),
    )
    model = _random(Qwen2_5_VLForConditionalGeneration, config, seed, double)
    processor = without_video(Qwen2_5_VLProcessor)(
        image_processor=_qwen_image_processor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return QwenVLBackbone(
        model, processor, name="tests/qwen2_5_vl", revision=f"seed-{seed}", settings=settings
    )


def intern_vl(
    *, double: bool = False, settings: PromptSettings | None = None, seed: int = 0
) -> Backbone:
    """Native InternVL with a small Qwen2 language model."""
    tokenizer = intern_tokenizer()
    text = _text_sizes(tokenizer)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [INTERN_SIDE, INTERN_SIDE],
            "patch_size": [8, 8],
            "initializer_range": 0.2,
        },
        image_token_id=int(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")),
        image_seq_length=4,
    )
    model = _random(InternVLForConditionalGeneration, config, seed, double)
    processor = without_video(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": INTERN_SIDE, "width": INTERN_SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return InternVLBackbone(
        model, processor, name="tests/intern_vl", revision=f"seed-{seed}", settings=settings
    )


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


def _text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": int(tokenizer.pad_token_id),
        "eos_token_id": int(tokenizer.eos_token_id),
        "bos_token_id": None,
    }


def _mrope(interleaved: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 2, 2]}
    return {**rope, "mrope_interleaved": True} if interleaved else rope


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in tokens.items()}


def _qwen_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": QWEN_FACTOR**2, "longest_edge": 96 * 96},
    )  # fmt: skip


def _random(
    model_class: type[PreTrainedModel], config: Any, seed: int, double: bool
) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for (
            parameter
        ) in model.parameters():  # norms and biases start at one and zero, which hides mistakes
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double() if double else model
