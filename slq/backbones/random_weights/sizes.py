"""Shapes of backbones, how their weights are drawn, and the drawing."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast


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
        side: Pixels along one side of the tile; of the largest square for Qwen-VL.
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


def text_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """What the language models of all families are told."""
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


def drawn(model_class: type[PreTrainedModel], config: Any, draw: Draw) -> PreTrainedModel:
    """A model of drawn weights."""
    with torch.random.fork_rng(), torch.device(draw.device):
        torch.manual_seed(draw.seed)
        model = model_class(config)
        if draw.norm_std:
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += draw.norm_std * torch.randn_like(parameter)
    return model.to(draw.dtype)
