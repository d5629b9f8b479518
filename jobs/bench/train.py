"""What the frozen prefix saves in training: naive full passes against latent-only passes (spec: SLQ section 3).

The naive side is the published way without its waste: whole sequences with gradient, but no LM head. All sides
compute the same loss, and their gradients in the latents are compared.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.bench.measure import SavedBytes, hardware, interleaved, medians
from slq.backbones.base import Backbone, Prompts, prefix_of
from slq.backbones.random_weights import (
    INTERNVL3_1B,
    QWEN3_VL_2B,
    Draw,
    Sizes,
    random_backbone,
)
from slq.errors import HardwareError
from slq.latent_queries import LatentQueries
from slq.losses import info_nce
from slq.pooling import mean_pool, unit_norm
from slq.prefix import Prefix
from slq.schema import Item

GRID = 16  # visual tokens along one side, 256 in all
OPENING, CLOSING = 5, 5  # tokens around the image: 266 in all
TEXT_TOKENS, NUM_LATENTS, CAPTIONS = 20, 20, 5
_FULL = {"internvl": INTERNVL3_1B, "qwen3_vl": QWEN3_VL_2B}
_ON_CPU = {  # widths and depths a quarter of the published models, the same number of tokens
    "internvl": replace(
        INTERNVL3_1B,
        hidden=224,
        ffn=1216,
        layers=6,
        head_dim=16,
        vision_hidden=256,
        vision_ffn=1024,
        vision_layers=6,
        vocab=0,
    ),
    "qwen3_vl": replace(
        QWEN3_VL_2B,
        hidden=512,
        ffn=1536,
        layers=7,
        head_dim=32,
        mrope_section=(6, 5, 5),
        vision_hidden=256,
        vision_ffn=1024,
        vision_layers=6,
        side=512,
        vocab=0,
    ),
}


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one step, in the shapes of a training step.

    Attributes:
        image_embeds: (batch, 266, hidden) input embeddings of image prompts, vision left out.
        image_positions: (axes, batch, 266).
        text_embeds: (batch, 20, hidden).
        text_positions: (axes, batch, 20).
        prompts: Real prompts of images, with pixels.
    """

    image_embeds: Tensor
    image_positions: Tensor
    text_embeds: Tensor
    text_positions: Tensor
    prompts: Prompts


def make_inputs(backbone: Backbone, batch: int) -> Inputs:
    """Inputs for a step of `batch` pairs."""
    generator = torch.Generator().manual_seed(1)

    def embeds(tokens: int) -> Tensor:
        values = torch.randn(batch, tokens, backbone.hidden_size, generator=generator)
        return (values * backbone.embedding_std).to(backbone.device, backbone.dtype)

    axes = backbone.position_axes
    if axes == 1:
        image = torch.arange(OPENING + GRID * GRID + CLOSING)[None]
    else:
        grid = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).T + OPENING
        still = torch.full((1, GRID * GRID), OPENING)
        opening = torch.arange(OPENING).expand(3, -1)
        closing = torch.arange(OPENING + GRID, OPENING + GRID + CLOSING).expand(3, -1)
        image = torch.cat([opening, torch.cat([still, grid]), closing], dim=1)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    side = GRID * 2 * int(backbone.model.config.vision_config.patch_size[0]) if axes == 1 else (
        GRID * 2 * int(backbone.model.config.vision_config.patch_size)
    )  # fmt: skip
    pictures = [Image.fromarray(picture).resize((side, side)) for picture in pixels]
    return Inputs(
        image_embeds=embeds(image.shape[1]),
        image_positions=image[:, None].expand(axes, batch, -1).to(backbone.device),
        text_embeds=embeds(TEXT_TOKENS),
        text_positions=torch.arange(TEXT_TOKENS, device=backbone.device).expand(axes, batch, -1),
        prompts=backbone.prompts([Item(image=picture) for picture in pictures]),
    )


class Step:
    """The sides of the comparison on one backbone, as functions from nothing to a loss.

    Args:
        backbone: The frozen model.
        batch: Pairs per step.
    """

    def __init__(self, backbone: Backbone, batch: int) -> None:
        self.backbone = backbone
        self.inputs = make_inputs(backbone, batch)
        self.latents = LatentQueries(NUM_LATENTS, backbone.hidden_size, embedding_std=0.02)
        self.latents.to(backbone.device)
        self.kept = (self._image_prefix(), self._text_prefix())
        self.kept_vision = self._prompt_prefix()

    def naive(self) -> Tensor:
        """Whole sequences through the language model with gradient."""
        i = self.inputs
        images = self._naive(i.image_embeds, i.image_positions)
        return self._loss(images, self._naive(i.text_embeds, i.text_positions))

    def latent_only(self) -> Tensor:
        """Prefixes without gradient, then the latents alone."""
        return self._follow(self._image_prefix(), self._text_prefix())

    def cached(self) -> Tensor:
        """The latents alone, on keys and values that were kept."""
        return self._follow(*self.kept)

    def naive_five_captions(self) -> Tensor:
        """Vision and language model once per caption, as five steps of the published way."""
        total = torch.zeros((), device=self.backbone.device)
        for _ in range(CAPTIONS):
            images = self._naive_prompts()
            texts = self._naive(self.inputs.text_embeds, self.inputs.text_positions)
            total = total + _backward(self._loss(images, texts))
        return total

    def shared_five_captions(self) -> Tensor:
        """The image prefix once for the five steps."""
        return self._five_steps(self._prompt_prefix(), self._text_prefix)

    def cached_five_captions(self) -> Tensor:
        """All keys and values kept from an earlier epoch."""
        return self._five_steps(self.kept_vision, lambda: self.kept[1])

    def _five_steps(self, images: Prefix, texts: Callable[[], Prefix]) -> Tensor:
        total = torch.zeros((), device=self.backbone.device)
        for _ in range(CAPTIONS):
            total = total + _backward(self._follow(images, texts()))
        return total

    def _naive(self, embeds: Tensor, positions: Tensor) -> Tensor:
        batch = len(embeds)
        latents = self.latents.latents.to(embeds.dtype).expand(batch, -1, -1)
        following = (
            positions.amax((0, 2))[:, None] + 1 + torch.arange(NUM_LATENTS, device=embeds.device)
        )
        positions = torch.cat([positions, following.expand(len(positions), -1, -1)], dim=2)
        output = self.backbone.decoder(
            inputs_embeds=torch.cat([embeds, latents], dim=1),
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=False,
        )
        return unit_norm(mean_pool(output.last_hidden_state[:, -NUM_LATENTS:]))

    def _naive_prompts(self) -> Tensor:
        prompts, backbone = self.inputs.prompts, self.backbone
        positions = backbone.positions(prompts)
        embeds = backbone.embed_tokens(prompts.input_ids)
        latents = self.latents.latents.to(embeds.dtype).expand(len(embeds), -1, -1)
        following = (
            positions.amax((0, 2))[:, None] + 1 + torch.arange(NUM_LATENTS, device=embeds.device)
        )
        positions = torch.cat([positions, following.expand(len(positions), -1, -1)], dim=2)
        output = backbone.core(
            inputs_embeds=torch.cat([embeds, latents], dim=1),
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=False,
            **prompts.vision,
        )
        return unit_norm(mean_pool(output.last_hidden_state[:, -NUM_LATENTS:]))

    @torch.no_grad()
    def _prefix(self, embeds: Tensor, positions: Tensor) -> Prefix:
        output = self.backbone.decoder(
            inputs_embeds=embeds,
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=True,
        )
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return prefix_of(output, mask, positions)

    def _image_prefix(self) -> Prefix:
        return self._prefix(self.inputs.image_embeds, self.inputs.image_positions)

    def _text_prefix(self) -> Prefix:
        return self._prefix(self.inputs.text_embeds, self.inputs.text_positions)

    def _prompt_prefix(self) -> Prefix:
        return self.backbone.prefix(self.inputs.prompts)

    def _follow(self, images: Prefix, texts: Prefix) -> Tensor:
        embed = self.latents.embed
        return self._loss(embed(self.backbone, images), embed(self.backbone, texts))

    def _loss(self, images: Tensor, texts: Tensor) -> Tensor:
        return info_nce(images, texts, self.latents.temperature)

    def gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """Gradient of a side's loss in the latents, (num_latents, hidden)."""
        (gradient,) = torch.autograd.grad(loss(), self.latents.latents)
        return gradient


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def measure(backbone: Backbone, *, batch: int, repeats: int) -> dict[str, Any]:
    """Every ratio of the training part for one backbone.

    Returns:
        `ratios` (naive over ours; above 1 is faster or smaller), `limits` where the arithmetic gives one,
        `gradient_difference` (relative, largest over the sides) and `median_s`.
    """
    step = Step(backbone, batch)
    sides = {"naive": step.naive, "latent_only": step.latent_only, "cached": step.cached}
    reference = step.gradient(step.naive)
    difference = max(
        float((step.gradient(side) - reference).norm() / reference.norm())
        for name, side in sides.items()
        if name != "naive"
    )
    device = backbone.device
    seconds = medians(
        interleaved(
            {name: _whole(side) for name, side in sides.items()}, repeats=repeats, device=device
        )
    )
    backward = medians(_backward_times(step, repeats))
    whole = medians(
        interleaved(
            {
                "naive": step.naive_five_captions,
                "shared": step.shared_five_captions,
                "cached": step.cached_five_captions,
            },
            repeats=repeats,
            device=device,
        )
    )
    saved = {}
    for name in ("naive", "latent_only"):
        with SavedBytes(backbone.model) as counter:
            sides[name]()
            saved[name] = counter.total
    return {
        "ratios": {
            "step": seconds["naive"] / seconds["latent_only"],
            "backward": backward["naive"] / backward["latent_only"],
            "saved_bytes": saved["naive"] / saved["latent_only"],
            "step_cached_keys_values": seconds["naive"] / seconds["cached"],
            "five_captions_shared_image_prefix": whole["naive"] / whole["shared"],
            "five_captions_cached_keys_values": whole["naive"] / whole["cached"],
        },
        "gradient_difference": difference,
        "median_s": {
            "lm_step": seconds,
            "lm_backward": backward,
            "five_steps_with_vision": whole,
        },
        "saved_bytes": saved,
    }


def _whole(side: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: _backward(side())


def _backward_times(step: Step, repeats: int) -> dict[str, list[float]]:
    """Seconds of the backward pass alone; the forward pass runs outside the clock."""
    times: dict[str, list[float]] = {"naive": [], "latent_only": []}
    for _ in range(repeats):
        for name, side in (("naive", step.naive), ("latent_only", step.latent_only)):
            loss = side()

            def run(loss: Tensor = loss) -> Tensor:
                return _backward(loss)

            times[name] += _once(run, step.backbone.device)
    return times


def _once(run: Callable[[], Tensor], device: torch.device) -> list[float]:
    return interleaved({"only": run}, repeats=1, device=device, warm_up=False)["only"]


def sizes_for(family: str, *, full: bool) -> Sizes:
    """The published shape, or a quarter of its widths and depth for CPUs."""
    return (_FULL if full else _ON_CPU)[family]


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and return what `slq bench train` prints."""
    parser = argparse.ArgumentParser(
        prog="bench train", description="ratios of SLQ's frozen prefix in training"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--full-size", action="store_true", help="published widths and depths")
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds")
    parser.add_argument("--family", choices=sorted(_FULL), action="append", help="default: all")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise HardwareError(
            f"device {arguments.device!r} was asked for, but torch sees no CUDA GPU"
        )
    dtype = torch.bfloat16 if arguments.full_size else torch.float32
    device = torch.device(arguments.device)
    results: dict[str, Any] = {
        "bench": "train",
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "tokens": {
            "image_prefix": OPENING + GRID * GRID + CLOSING,
            "text_prefix": TEXT_TOKENS,
            "latents": NUM_LATENTS,
        },
        "flop_limits": {"step": 1.78, "step_cached_keys_values": 8.1},
    }
    for family in arguments.family or sorted(_FULL):
        sizes = sizes_for(family, full=arguments.full_size)
        backbone = random_backbone(family, sizes, Draw(dtype=dtype, device=arguments.device))
        results[family] = measure(backbone, batch=arguments.batch, repeats=arguments.repeats)
        del backbone
    return results
