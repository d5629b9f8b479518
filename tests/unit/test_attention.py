"""Grouped attention: equal to the stock kernel, in use in every family, and without copies of keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from jobs.bench.measure import SavedBytes
from slq.backbones.attention import GROUPED, grouped_attention, use_grouped_attention
from slq.backbones.loading import load_backbone
from slq.backbones.random_weights import Draw, random_backbone
from slq.latent_queries import LatentQueries
from slq.schema import Item
from tests.families import HIDDEN, SIZES, picture

BATCH, KEY_HEADS, GROUPS, FOLLOWING, LENGTH, DIM = 3, 2, 4, 5, 17, 8


class Layer(nn.Module):
    """What the attention functions of transformers ask of a layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def states(following: int, length: int, heads: int = KEY_HEADS * GROUPS) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, heads, following, DIM), *2 * [(BATCH, KEY_HEADS, length, DIM)]]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def causal(following: int, length: int) -> Tensor:
    """Bool mask of tokens at the end of `length`, the second row padded at its left."""
    mask = torch.ones(following, length, dtype=torch.bool).tril(length - following)
    mask = mask.expand(BATCH, 1, following, length).clone()
    mask[1, :, :, :3] = False
    return mask


def both(
    mask: Tensor | None, following: int = FOLLOWING, length: int = LENGTH, **options: Any
) -> Any:
    """Output and input gradients of ours and of the stock function."""
    results = []
    for function in (grouped_attention, sdpa_attention_forward):
        inputs = states(following, length, KEY_HEADS * options.get("groups", GROUPS))
        output, weights = function(
            Layer(options.get("groups", GROUPS)), *inputs, mask, scaling=options.get("scaling")
        )
        assert weights is None
        pull = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append([output, *torch.autograd.grad(output, inputs, pull)])
    return results


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("additive", [False, True])
def test_it_equals_the_stock_kernel_in_values_and_gradients(
    scaling: float | None, additive: bool
) -> None:
    mask = causal(FOLLOWING, LENGTH)
    if additive:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        mask += 0.1 * torch.arange(LENGTH)
    for ours, theirs in zip(*both(mask, scaling=scaling), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("following", "length", "masked", "groups"),
    [
        (LENGTH, LENGTH, False, GROUPS),
        (LENGTH, LENGTH, True, GROUPS),
        (1, LENGTH, True, GROUPS),
        (FOLLOWING, LENGTH, True, 1),
    ],
    ids=["whole", "whole masked", "one token", "no groups"],
)
def test_every_other_pass_is_the_stock_kernel_s(
    following: int, length: int, masked: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments))
        return sdpa_attention_forward(*arguments, **options)

    monkeypatch.setattr("slq.backbones.attention.sdpa_attention_forward", recorded)
    mask = causal(following, length) if masked else None
    ours, theirs = both(mask, following, length, groups=groups)
    assert calls == [7]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", sorted(SIZES))
def test_what_follows_a_prefix_saves_no_copy_of_its_keys(family: str) -> None:
    sizes = replace(SIZES[family], hidden=2 * HIDDEN, heads=4, kv_heads=2)
    backbone = random_backbone(family, sizes, Draw(seed=0, std=0.2, norm_std=0.2))
    assert backbone.decoder.config._attn_implementation == GROUPED
    latents = LatentQueries(3, 2 * HIDDEN, init="embedding", embedding_std=0.2, seed=0)
    prefix = backbone.prefix(backbone.prompts([Item(image=picture(3, 2)), Item(text="a dog")]))
    kept = {}
    for kernel in (GROUPED, "sdpa"):
        backbone.decoder.set_attn_implementation(kernel)
        with SavedBytes(backbone.model) as saved:
            vectors = latents.embed(backbone, prefix)
        (gradient,) = torch.autograd.grad(vectors.sum(), latents.latents)
        kept[kernel] = (saved.total, vectors, gradient)
    (ours, *values), (stock, *expected) = kept.values()
    torch.testing.assert_close(values, expected)
    # With two query heads to a key head the copies are as large again as all keys and values.
    assert stock - ours > 0.9 * 2 * sum(keys.nbytes for keys in prefix.keys)


def test_a_kernel_that_was_asked_for_is_kept() -> None:
    decoder = load_backbone().decoder
    decoder.set_attn_implementation("eager")
    use_grouped_attention(decoder)
    assert decoder.config._attn_implementation == "eager"
