"""Backbones with random weights on the real transformers classes, at any size: for tests and for benchmarks.

No file is read, so a machine without model hub or disk space can measure the shapes of a published model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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
from slq.errors import ConfigError

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_TOKENS = (
    PAD, TURN_START, TURN_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
INTERN_TOKENS = (PAD, TURN_START, TURN_END, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")

_WORDS = (
    "True true False false Yes yes No no A B the caption match image Does Answer True or False. "
    "Caption: a small red dog stands left of two blue cats on a white background. "
    "fully or only partly user assistant True False Yes No A B\n"
)
_TEMPLATE = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
QWEN_TEMPLATE = _TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>")
INTERN_TEMPLATE = _TEMPLATE.format(image="<IMG_CONTEXT>\n")


@dataclass(frozen=True)
class Sizes:
    """Shape of a backbone.

    Attributes:
        hidden: Width of the language model.
        ffn: Width of its feed-forward layers.
        layers: Its number of layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head; twice the sum of `mrope_section` in the Qwen-VL families.
        mrope_section: Rotary frequencies for time, height and width.
        vision_hidden: Width of the vision tower.
        vision_ffn: Width of its feed-forward layers.
        vision_layers: Its number of layers.
        vision_heads: Its heads.
        patch: Pixels along one side of a patch.
        side: Pixels along one side of InternVL's tile; of the largest square for Qwen-VL.
        vocab: Rows of the token embedding; 0 for just the tokenizer's.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]
    vision_hidden: int
    vision_ffn: int
    vision_layers: int
    vision_heads: int
    patch: int
    side: int
    vocab: int = 0


INTERNVL3_1B = Sizes(
    896, 4864, 24, 14, 2, 64, (16, 8, 8), 1024, 4096, 24, 16, patch=14, side=448, vocab=151_674
)
QWEN3_VL_2B = Sizes(
    2048, 6144, 28, 16, 8, 128, (24, 20, 20), 1024, 4096, 24, 16, patch=16, side=448, vocab=151_936
)
"""Shapes of the published models (spec: SLQ section 1)."""


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
    core.train_from_iterator([_WORDS, _WORDS.replace(" ", "\n")] * 20, trainer)
    return core


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen's control tokens and a chat template without a system prompt."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_core(QWEN_TOKENS),
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=list(QWEN_TOKENS[1:]),
        chat_template=QWEN_TEMPLATE,
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
        chat_template=INTERN_TEMPLATE,
    )


@dataclass(frozen=True)
class Draw:
    """How the weights are drawn and held.

    Attributes:
        seed: Of the weights.
        std: Standard deviation of the matrices.
        norm_std: Added to norms and biases, which start at one and zero and would hide mistakes.
        dtype: Type of the weights.
        device: Where they are made.
    """

    seed: int = 0
    std: float = 0.02
    norm_std: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def random_backbone(
    family: str, sizes: Sizes, draw: Draw | None = None, settings: PromptSettings | None = None
) -> Backbone:
    """A backbone of random weights.

    Args:
        family: `qwen3_vl`, `qwen2_5_vl` or `internvl`.
        sizes: Its shape.
        draw: How the weights are drawn.
        settings: How items become prompts.

    Raises:
        ConfigError: The family is unknown.
    """
    if family not in _BUILDERS:
        raise ConfigError(f"family {family!r} is unknown; choose one of {', '.join(_BUILDERS)}")
    return _BUILDERS[family](sizes, draw or Draw(), settings)


def _qwen(
    sizes: Sizes, draw: Draw, settings: PromptSettings | None, *, third_generation: bool
) -> Backbone:
    tokenizer = qwen_tokenizer()
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(sizes.mrope_section),
    }
    vision: dict[str, Any] = {
        "depth": sizes.vision_layers,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_ffn,
        "num_heads": sizes.vision_heads,
        "patch_size": sizes.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden,
        "initializer_range": draw.std,
    }
    text = _text_config(tokenizer, sizes, draw)
    if third_generation:
        vision["num_position_embeddings"] = 48**2 if sizes.side > 128 else 36
        vision["deepstack_visual_indexes"] = [
            sizes.vision_layers * part // 4 for part in ((1, 2, 3) if sizes.vision_layers > 4 else (0, 2))
        ]  # fmt: skip
        text |= {"head_dim": sizes.head_dim, "rope_parameters": {**rope, "mrope_interleaved": True}}
        config_class, model_class = Qwen3VLConfig, Qwen3VLForConditionalGeneration
        processor_class = Qwen3VLProcessor
    else:
        vision |= {"window_size": 4 * sizes.patch, "fullatt_block_indexes": [1]}
        text["rope_parameters"] = rope
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        processor_class = Qwen2_5_VLProcessor
    config = config_class(
        text_config=text,
        vision_config=vision,
        **{
            name: int(tokenizer.convert_tokens_to_ids(token))
            for name, token in zip(
                ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                QWEN_TOKENS[3:],
                strict=True,
            )
        },
    )  # fmt: skip
    processor = without_video(processor_class)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=sizes.patch,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": (2 * sizes.patch) ** 2, "longest_edge": sizes.side**2},
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    name = "random/qwen3_vl" if third_generation else "random/qwen2_5_vl"
    model = _draw(model_class, config, draw)
    return QwenVLBackbone(
        model, processor, name=name, revision=f"seed-{draw.seed}", settings=settings
    )


def _intern(sizes: Sizes, draw: Draw, settings: PromptSettings | None) -> Backbone:
    tokenizer = intern_tokenizer()
    tokens = (sizes.side // sizes.patch // 2) ** 2
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer, sizes, draw)},
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "intermediate_size": sizes.vision_ffn,
            "image_size": [sizes.side, sizes.side],
            "patch_size": [sizes.patch, sizes.patch],
            "initializer_range": draw.std,
        },
        image_token_id=int(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")),
        image_seq_length=tokens,
    )
    processor = without_video(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": sizes.side, "width": sizes.side}),
        tokenizer=tokenizer,
        image_seq_length=tokens,
        chat_template=tokenizer.chat_template,
    )
    model = _draw(InternVLForConditionalGeneration, config, draw)
    return InternVLBackbone(
        model, processor, name="random/internvl", revision=f"seed-{draw.seed}", settings=settings
    )


_BUILDERS: dict[str, Callable[[Sizes, Draw, PromptSettings | None], Backbone]] = {
    "qwen3_vl": partial(_qwen, third_generation=True),
    "qwen2_5_vl": partial(_qwen, third_generation=False),
    "internvl": _intern,
}


def _text_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": max(len(tokenizer), sizes.vocab),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": draw.std,
        "pad_token_id": int(tokenizer.pad_token_id),
        "eos_token_id": int(tokenizer.eos_token_id),
        "bos_token_id": None,
    }


def _draw(model_class: type[PreTrainedModel], config: Any, draw: Draw) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.device(draw.device):
        torch.manual_seed(draw.seed)
        model = model_class(config)
        if draw.norm_std:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += draw.norm_std * torch.randn_like(parameter)
    return model.to(draw.dtype)
