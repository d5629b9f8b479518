"""Shared latent queries: the only trained tensors of SLQ, with one temperature (spec: SLQ section 1)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slq.backbones.base import Backbone
from slq.errors import ConfigError
from slq.pooling import mean_pool, unit_norm
from slq.prefix import Prefix
from slq.schema import Item

Init = Literal["embedding", "normal", "zeros"]
Pooling = Literal["mean", "last"]
Sets = Literal["shared", "separate"]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0


def bounded_temperature(log_temperature: Tensor) -> Tensor:
    """The scalar exp of a (1,) tensor, kept inside MIN_TEMPERATURE..MAX_TEMPERATURE.

    The gradient passes the bounds as if they were not there, so a temperature that overshot one can come back.
    """
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    free = log_temperature[0]
    return (free.detach().clamp(low, high) + (free - free.detach())).exp()


class LatentQueries(nn.Module):
    """`num_latents` vectors that are appended to every prompt, image or text alike.

    All parameters are float32 whatever the backbone's type: Adam in bfloat16 stalls on them.

    Args:
        num_latents: How many vectors; 20 in the paper.
        hidden_size: Width of the backbone's language model.
        init: `embedding` (normal with the backbone's embedding std), `normal` (std 1/sqrt(hidden)) or `zeros`.
        embedding_std: The std for `embedding`.
        temperature: Where the learnable temperature starts.
        pooling: `mean` over the latent positions (the paper's), or the `last` one, which sees all the others.
        sets: `shared` by images and texts (the paper's), or `separate`: prompts without an image get vectors of their
            own, which start at the same values.
        seed: Of the initial values.
    """

    method: Literal["slq"] = "slq"

    def __init__(
        self,
        num_latents: int,
        hidden_size: int,
        *,
        init: Init = "embedding",
        embedding_std: float = 0.02,
        temperature: float = 0.07,
        pooling: Pooling = "mean",
        sets: Sets = "shared",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.sets: Sets = sets
        scale = {"embedding": embedding_std, "normal": hidden_size**-0.5, "zeros": 0.0}
        if init not in scale:
            raise ConfigError(f"init {init!r} is unknown; choose one of {', '.join(scale)}")
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(num_latents, hidden_size, generator=generator) * scale[init]
        self.latents = nn.Parameter(values)
        self.text_latents = nn.Parameter(values.clone()) if sets == "separate" else None
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(temperature)])
        )  # deepspeed broadcasts bytes: no 0-d

    @property
    def num_latents(self) -> int:
        """Number of latent queries."""
        return int(self.latents.shape[0])

    @property
    def temperature(self) -> Tensor:
        """The scalar divisor of similarities, kept inside MIN_TEMPERATURE..MAX_TEMPERATURE."""
        return bounded_temperature(self.log_temperature)

    def embed(self, backbone: Backbone, prefix: Prefix) -> Tensor:
        """Embeddings of encoded prefixes: (batch, hidden) float32 unit vectors, differentiable in the latents."""
        return self.pool(self.states(backbone, prefix))

    def pool(self, states: Tensor) -> Tensor:
        """(batch, hidden) float32 unit vectors of (batch, num_latents, hidden) states."""
        return unit_norm(mean_pool(states if self.pooling == "mean" else states[:, -1:]))

    def states(self, backbone: Backbone, prefix: Prefix) -> Tensor:
        """(batch, num_latents, hidden) states at the latents after the final norm, in the backbone's dtype."""
        return backbone.follow(prefix, self.appended(prefix.shows_image).to(backbone.dtype))

    def appended(self, shows_image: Tensor) -> Tensor:
        """(batch, num_latents, hidden) float32: what stands behind each prompt.

        Args:
            shows_image: (batch,) bool, whether a prompt holds an image.
        """
        latents = self.latents.expand(len(shows_image), -1, -1)
        if self.text_latents is None:
            return latents
        return torch.where(shows_image[:, None, None], latents, self.text_latents)

    def embed_items(self, backbone: Backbone, items: Sequence[Item]) -> Tensor:
        """Embeddings of items, (batch, hidden) float32."""
        return self.embed(backbone, backbone.prefix(backbone.prompts(items)))


@torch.no_grad()
def embed_each(backbone: Backbone, prefix: Prefix, adapters: Sequence[LatentQueries]) -> Tensor:
    """Embeddings of encoded prefixes in one pass, each row by an adapter of its own.

    Shorter adapters are filled up with zeros behind their latents, which see those and are not seen by them.

    Args:
        backbone: Which all adapters belong to.
        prefix: Of any items.
        adapters: One a row; the same one may occur several times.

    Returns:
        (batch, hidden) float32 unit vectors, as `LatentQueries.embed` gives them.
    """
    if all(adapter is adapters[0] for adapter in adapters):
        return adapters[0].embed(backbone, prefix)
    longest = max(adapter.num_latents for adapter in adapters)
    rows = [
        F.pad(adapter.appended(shown)[0], (0, 0, 0, longest - adapter.num_latents))
        for adapter, shown in zip(adapters, prefix.shows_image[:, None], strict=True)
    ]
    states = backbone.follow(prefix, torch.stack(rows).to(backbone.dtype))
    return torch.cat(
        [
            adapter.pool(row[None, : adapter.num_latents])
            for adapter, row in zip(adapters, states, strict=True)
        ]
    )
