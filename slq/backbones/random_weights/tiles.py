"""The families that see one tile: InternVL, LLaVA-OneVision, SmolVLM and Idefics3, of random weights."""

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from slq.backbones.base import Backbone, PromptSettings
from slq.backbones.decoder_vlm import LlavaOnevisionBackbone, SmolVLMBackbone
from slq.backbones.intern_vl import InternVLBackbone
from slq.backbones.loading import without_video
from slq.backbones.random_weights.sizes import Draw, Sizes, drawn, text_config
from slq.backbones.random_weights.tokenizers import (
    LLAVA_TEMPLATE,
    LLAVA_TOKENS,
    SMOL_TEMPLATE,
    SMOL_TOKENS,
    intern_tokenizer,
    tokenizer,
)


def intern(sizes: Sizes, draw: Draw, settings: PromptSettings | None) -> Backbone:
    """A backbone of the InternVL family."""
    tokens = intern_tokenizer()
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokens, sizes, draw)},
        vision_config={
            **_vision_config(sizes, draw),
            "image_size": [sizes.side, sizes.side],
            "patch_size": [sizes.patch, sizes.patch],
        },
        image_token_id=int(tokens.convert_tokens_to_ids("<IMG_CONTEXT>")),
        image_seq_length=(sizes.side // sizes.patch // 2) ** 2,
    )
    processor = without_video(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(),
        tokenizer=tokens,
        chat_template=tokens.chat_template,
    )
    return InternVLBackbone(
        drawn(InternVLForConditionalGeneration, config, draw),
        processor,
        name="random/internvl",
        revision=f"seed-{draw.seed}",
        settings=settings,
    )


def llava_onevision(sizes: Sizes, draw: Draw, settings: PromptSettings | None) -> Backbone:
    """A backbone of LLaVA-OneVision."""
    tokens = tokenizer(LLAVA_TOKENS, LLAVA_TEMPLATE)
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokens, sizes, draw)},
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            **_vision_config(sizes, draw),
        },
        image_token_index=int(tokens.convert_tokens_to_ids("<image>")),
        video_token_index=int(tokens.convert_tokens_to_ids("<video>")),
    )
    processor = without_video(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(),
        tokenizer=tokens,
        chat_template=tokens.chat_template,
    )
    return LlavaOnevisionBackbone(
        drawn(LlavaOnevisionForConditionalGeneration, config, draw),
        processor,
        name="random/llava_onevision",
        revision=f"seed-{draw.seed}",
        settings=settings,
    )


def smolvlm(sizes: Sizes, draw: Draw, settings: PromptSettings | None, *, family: str) -> Backbone:
    """A backbone of SmolVLM or, almost the same, Idefics3."""
    tokens = tokenizer(SMOL_TOKENS, SMOL_TEMPLATE, turn_end="<end_of_utterance>")
    config_class, model_class, image_processor_class = {
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    }[family]
    config = config_class(
        text_config={"model_type": "llama", **text_config(tokens, sizes, draw)},
        vision_config=_vision_config(sizes, draw),
        image_token_id=int(tokens.convert_tokens_to_ids("<image>")),
        scale_factor=2,
    )
    processor = Idefics3Processor(
        image_processor=image_processor_class(),
        tokenizer=tokens,
        chat_template=tokens.chat_template,
    )
    return SmolVLMBackbone(
        drawn(model_class, config, draw),
        processor,
        name=f"random/{family}",
        revision=f"seed-{draw.seed}",
        settings=settings,
    )


def _vision_config(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "hidden_size": sizes.vision_hidden,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "intermediate_size": sizes.vision_ffn,
        "image_size": sizes.side,
        "patch_size": sizes.patch,
        "initializer_range": draw.std,
    }
