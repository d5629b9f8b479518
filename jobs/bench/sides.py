"""The sides of the training benchmark: one loss, computed with ever more of the frozen prefix kept.

A side is a function that yields the losses of its steps, one after the other; whoever runs it backpropagates each
before asking for the next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.bench.shapes import CAPTIONS, CLOSING, NUM_LATENTS, OPENING, TEXT_TOKENS, Shape
from slq.backbones.base import Backbone, Prompts, prefix_of
from slq.latent_queries import LatentQueries
from slq.losses import info_nce
from slq.pooling import mean_pool, unit_norm
from slq.prefix import Prefix
from slq.schema import Item

Side = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Random inputs of steps in the shapes of training.

    Attributes:
        image_embeds: (batch, image tokens, hidden) input embeddings of image prompts, vision left out.
        image_positions: (axes, batch, image tokens).
        text_embeds: (captions, batch, text tokens, hidden).
        text_positions: (axes, batch, text tokens).
        prompts: Real prompts of images, with pixels.
    """

    image_embeds: Tensor
    image_positions: Tensor
    text_embeds: Tensor
    text_positions: Tensor
    prompts: Prompts


def make_inputs(backbone: Backbone, shape: Shape, batch: int) -> Inputs:
    """Inputs for steps of `batch` pairs."""
    generator = torch.Generator().manual_seed(1)

    def embeds(*lengths: int) -> Tensor:
        values = torch.randn(*lengths, backbone.hidden_size, generator=generator)
        return (values * backbone.embedding_std).to(backbone.device, backbone.dtype)

    axes = backbone.position_axes
    positions = image_positions(axes, shape.grid)
    return Inputs(
        image_embeds=embeds(batch, positions.shape[1]),
        image_positions=positions[:, None].expand(axes, batch, -1).to(backbone.device),
        text_embeds=embeds(CAPTIONS, batch, TEXT_TOKENS),
        text_positions=torch.arange(TEXT_TOKENS, device=backbone.device).expand(axes, batch, -1),
        prompts=backbone.prompts(pictures(batch, (shape.side, shape.side))),
    )


def image_positions(axes: int, grid: int) -> Tensor:
    """(axes, tokens) int64 positions of an image prefix with grid x grid visual tokens; M-RoPE with three axes."""
    if axes == 1:
        return torch.arange(OPENING + grid**2 + CLOSING)[None]
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).T + OPENING
    still = torch.full((1, grid**2), OPENING)
    opening = torch.arange(OPENING).expand(3, -1)
    closing = torch.arange(OPENING + grid, OPENING + grid + CLOSING).expand(3, -1)
    return torch.cat([opening, torch.cat([still, places]), closing], dim=1)


def pictures(count: int, size: tuple[int, int]) -> list[Item]:
    """Different random images of (width, height) pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Item(image=Image.fromarray(picture).resize(size)) for picture in pixels]


class Sides:
    """All sides on one backbone.

    Args:
        backbone: The frozen model.
        shape: Its shape.
        batch: Pairs per step.
    """

    def __init__(self, backbone: Backbone, shape: Shape, batch: int) -> None:
        self.backbone = backbone
        self.inputs = make_inputs(backbone, shape, batch)
        self.latents = LatentQueries(NUM_LATENTS, backbone.hidden_size, embedding_std=0.02)
        self.latents.to(backbone.device)
        self.kept_features = backbone.vision_features(self.inputs.prompts)
        self.kept_images = backbone.prefix(self.inputs.prompts, self.kept_features)
        self.kept_embeds = self._prefix(self.inputs.image_embeds, self.inputs.image_positions)
        self.kept_texts = [self._text_prefix(caption) for caption in range(CAPTIONS)]

    @property
    def five_captions(self) -> dict[str, Side]:
        """Vision and language model, five steps in which the same images meet five captions each."""
        return {
            "naive": self.naive,
            "latent_only": self.latent_only,
            "shared_image_prefix": self.shared_image_prefix,
            "cached_vision": self.cached_vision,
            "cached_keys_values": self.cached_keys_values,
        }

    @property
    def lm_step(self) -> dict[str, Side]:
        """The language model alone, one step."""
        return {
            "naive": self.lm_naive,
            "latent_only": self.lm_latent_only,
            "cached_keys_values": self.lm_cached_keys_values,
        }

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes that a side of `five_captions` or `lm_step` keeps from earlier epochs; 0 where it is not named."""
        images, texts = self.kept_images.num_bytes, sum(text.num_bytes for text in self.kept_texts)
        return {
            "five_captions": {
                "cached_vision": sum(image.num_bytes for image in self.kept_features),
                "cached_keys_values": images + texts,
            },
            "lm_step": {
                "cached_keys_values": self.kept_embeds.num_bytes + self.kept_texts[0].num_bytes
            },
        }

    def naive(self) -> Iterator[Tensor]:
        """Vision tower and whole sequences with gradient for each caption: the published way without its head."""
        for caption in range(CAPTIONS):
            yield self._loss(self._whole_prompts(), self._whole_text(caption))

    def latent_only(self) -> Iterator[Tensor]:
        """Prefixes without gradient for each caption, then the latents alone."""
        for caption in range(CAPTIONS):
            images = self.backbone.prefix(self.inputs.prompts)
            yield self._follow(images, self._text_prefix(caption))

    def shared_image_prefix(self) -> Iterator[Tensor]:
        """The image prefix once for all captions."""
        yield from self._all_captions(self.backbone.prefix(self.inputs.prompts))

    def cached_vision(self) -> Iterator[Tensor]:
        """As `shared_image_prefix`, with vision features kept from an earlier epoch."""
        inputs = self.inputs
        yield from self._all_captions(self.backbone.prefix(inputs.prompts, self.kept_features))

    def cached_keys_values(self) -> Iterator[Tensor]:
        """Keys and values of images and texts kept from an earlier epoch."""
        for texts in self.kept_texts:
            yield self._follow(self.kept_images, texts)

    def lm_naive(self) -> Iterator[Tensor]:
        """Whole sequences with gradient."""
        images = self._whole(self.inputs.image_embeds, self.inputs.image_positions)
        yield self._loss(images, self._whole_text(0))

    def lm_latent_only(self) -> Iterator[Tensor]:
        """Prefixes without gradient, then the latents alone."""
        images = self._prefix(self.inputs.image_embeds, self.inputs.image_positions)
        yield self._follow(images, self._text_prefix(0))

    def lm_cached_keys_values(self) -> Iterator[Tensor]:
        """The latents alone."""
        yield self._follow(self.kept_embeds, self.kept_texts[0])

    def gradient(self, side: Side) -> Tensor:
        """Gradient of all losses of a side in the latents, (num_latents, hidden)."""
        self.latents.zero_grad()
        backpropagate(side)
        gradient = self.latents.latents.grad
        assert gradient is not None
        self.latents.zero_grad()
        return gradient

    def _all_captions(self, images: Prefix) -> Iterator[Tensor]:
        for caption in range(CAPTIONS):
            yield self._follow(images, self._text_prefix(caption))

    def _whole_prompts(self) -> Tensor:
        prompts, backbone = self.inputs.prompts, self.backbone
        embeds, positions = self._appended(
            backbone.embed_tokens(prompts.input_ids), backbone.positions(prompts)
        )
        output = backbone.core(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, **prompts.vision
        )
        return unit_norm(mean_pool(output.last_hidden_state[:, -NUM_LATENTS:]))

    def _whole_text(self, caption: int) -> Tensor:
        return self._whole(self.inputs.text_embeds[caption], self.inputs.text_positions)

    def _whole(self, embeds: Tensor, positions: Tensor) -> Tensor:
        embeds, positions = self._appended(embeds, positions)
        output = self.backbone.decoder(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        )
        return unit_norm(mean_pool(output.last_hidden_state[:, -NUM_LATENTS:]))

    def _appended(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings with the latents behind them, and positions as the model takes them."""
        latents = self.latents.latents.to(embeds.dtype).expand(len(embeds), -1, -1)
        steps = torch.arange(1, NUM_LATENTS + 1, device=embeds.device)
        following = positions.amax((0, 2))[:, None] + steps
        positions = torch.cat([positions, following.expand(len(positions), -1, -1)], dim=2)
        return torch.cat([embeds, latents], dim=1), _for_model(positions)

    @torch.no_grad()
    def _prefix(self, embeds: Tensor, positions: Tensor) -> Prefix:
        output = self.backbone.decoder(
            inputs_embeds=embeds, position_ids=_for_model(positions), use_cache=True
        )
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        images = torch.zeros(
            len(mask), dtype=torch.bool, device=embeds.device
        )  # one set serves all
        return prefix_of(output, mask, positions, images)

    def _text_prefix(self, caption: int) -> Prefix:
        return self._prefix(self.inputs.text_embeds[caption], self.inputs.text_positions)

    def _follow(self, images: Prefix, texts: Prefix) -> Tensor:
        embed = self.latents.embed
        return self._loss(embed(self.backbone, images), embed(self.backbone, texts))

    def _loss(self, images: Tensor, texts: Tensor) -> Tensor:
        return info_nce(images, texts, self.latents.temperature)


def backpropagate(side: Side) -> Tensor:
    """Run all steps of a side; the sum of their losses, a scalar without gradient."""
    losses = []
    for loss in side():
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _for_model(positions: Tensor) -> Tensor:
    return positions[0] if len(positions) == 1 else positions
