"""Attention of a few tokens over a long cached prefix, without copies of its keys and values.

In grouped-query attention several query heads read one head of keys. Under a mask transformers repeats keys and values
until each query head has its own copy, which a backward pass then has to keep. Where few tokens follow a long prefix
the copies are most of what is moved and saved. Here the heads of a group become further *queries* of their shared key
head instead: the same products and the same softmax on the stock kernels, CPU and CUDA alike. (The `enable_gqa` of
torch is no way out: on CUDA a mask sends it to the slow math kernel.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slq.backbones.watching import current_watch

GROUPED = "slq_grouped_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; equal to its `sdpa`, to which all but a follow-up pass goes.

    Args:
        module: The attention layer, which says how many query heads share a key head.
        query: (batch, heads, n, dim).
        key: (batch, key_heads, length, dim).
        value: (batch, key_heads, length, dim).
        attention_mask: (batch, 1, n, length), bool or additive.
        dropout: Probability.
        scaling: Of the products; 1 / sqrt(dim) by default.
        options: What else `sdpa` takes.

    Returns:
        (batch, n, heads, dim), and None for the weights, which are never formed.
    """
    watch = current_watch()
    if watch is not None:
        watch.see(query, key, attention_mask, scaling)
    groups = int(getattr(module, "num_key_value_groups", 1))
    few = 1 < query.shape[2] < key.shape[2]
    of_heads = attention_mask is None or attention_mask.shape[1] != 1
    if groups == 1 or not few or of_heads or options.get("position_bias") is not None:
        states, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return states, None
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, heads // groups, groups * length, dim)
    assert attention_mask is not None
    mask = attention_mask.repeat(1, 1, groups, 1)
    attended = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use_grouped_attention(decoder: PreTrainedModel) -> None:
    """Let a language model attend by `grouped_attention`; one that was loaded with another kernel keeps it."""
    if decoder.config._attn_implementation == "sdpa":
        decoder.set_attn_implementation(GROUPED)
