"""Floating-point operations of a training step, by arithmetic: the limit of every ratio, and of images per second.

A multiply-add counts as two. Attention is counted in full, as `torch.utils.flop_counter` does, although a causal
kernel can skip half of it. The backward pass with frozen weights repeats each matrix once and each of the two products
of attention twice. There is no language-model head on either side.
"""

from dataclasses import dataclass

from slq.backbones.random_weights import Sizes


@dataclass(frozen=True)
class Tokens:
    """Lengths of the sequences of one pair.

    Attributes:
        visual: Visual tokens of an image; the vision tower sees four patches for each.
        image: All tokens of the image prefix.
        text: Tokens of the text prefix.
        latents: Latent queries.
    """

    visual: int
    image: int
    text: int
    latents: int


def vision(family: str, sizes: Sizes, visual: int) -> int:
    """Operations of the vision tower and its projectors on one image of `visual` tokens."""
    width, patches = sizes.vision_hidden, 4 * visual
    merged = 4 * width  # features of 2 x 2 patches side by side
    if family == "internvl":
        sequence, frames = patches + 1, 1  # with the class token
        projectors = visual * sizes.hidden * (merged + sizes.hidden)
    else:
        sequence, frames = patches, 2
        levels = (
            4 if sizes.vision_layers > 4 else 3
        )  # the last layer's, and one per DeepStack level
        projectors = levels * visual * merged * (merged + sizes.hidden)
    embedding = patches * 3 * frames * sizes.patch**2 * width
    layer = sequence * (4 * width**2 + 2 * width * sizes.vision_ffn) + 2 * sequence**2 * width
    return 2 * (embedding + sizes.vision_layers * layer + projectors)


def forward(sizes: Sizes, tokens: int, past: int = 0) -> int:
    """Operations of the language model on `tokens` that follow `past` cached ones."""
    return _matrices(sizes, tokens) + _attention(sizes, tokens, past)


def backward(sizes: Sizes, tokens: int, past: int = 0) -> int:
    """Operations of the backward pass into the inputs of `tokens`, the weights frozen."""
    return _matrices(sizes, tokens) + 2 * _attention(sizes, tokens, past)


def _matrices(sizes: Sizes, tokens: int) -> int:
    heads = (
        2 * sizes.head_dim * (sizes.heads + sizes.kv_heads)
    )  # queries and outputs, keys and values
    return 2 * tokens * sizes.layers * sizes.hidden * (heads + 3 * sizes.ffn)


def _attention(sizes: Sizes, tokens: int, past: int) -> int:
    return 4 * tokens * (past + tokens) * sizes.layers * sizes.heads * sizes.head_dim


@dataclass(frozen=True)
class Work:
    """Operations per pair, by part.

    Attributes:
        vision: Vision tower, forward.
        image: Image prefix in the language model, forward.
        text: Text prefix, forward.
        latents: Latent queries after both prefixes, forward and backward.
        naive: Both whole sequences in the language model, forward and backward.
    """

    vision: int
    image: int
    text: int
    latents: int
    naive: int


def work(family: str, sizes: Sizes, tokens: Tokens) -> Work:
    """Operations of one pair."""

    def both(new: int, past: int = 0) -> int:
        return forward(sizes, new, past) + backward(sizes, new, past)

    return Work(
        vision=vision(family, sizes, tokens.visual),
        image=forward(sizes, tokens.image),
        text=forward(sizes, tokens.text),
        latents=both(tokens.latents, tokens.image) + both(tokens.latents, tokens.text),
        naive=both(tokens.image + tokens.latents) + both(tokens.text + tokens.latents),
    )


def limits(pair: Work, captions: int) -> dict[str, float]:
    """The ratio of naive to ours that the arithmetic allows, by the names of the ratios.

    Args:
        pair: Operations of one pair.
        captions: Captions that share an image.
    """
    following = captions * (pair.text + pair.latents)
    whole = captions * (pair.vision + pair.naive)
    return {
        "step": pair.naive / (pair.image + pair.text + pair.latents),
        "step_cached_keys_values": pair.naive / pair.latents,
        "five_captions_latent_only": whole / (captions * (pair.vision + pair.image) + following),
        "five_captions_shared_image_prefix": whole / (pair.vision + pair.image + following),
        "five_captions_cached_vision": whole / (pair.image + following),
        "five_captions_cached_keys_values": whole / (captions * pair.latents),
    }
