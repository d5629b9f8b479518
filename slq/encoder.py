"""`Encoder`: items in, unit vectors out, in input order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from slq.artifacts import Adapter, fingerprint, load_adapter, load_adapter_config, settings_of
from slq.backbones import Backbone, Prompts, load_backbone
from slq.errors import DataError
from slq.latent_queries import LatentQueries
from slq.media import decode_image, to_rgb
from slq.pooling import unit_norm
from slq.prefix import Prefix
from slq.schema import Item


class Encoder:
    """Embeds texts and images with a frozen backbone.

    Args:
        backbone: The frozen model, or the one that a baseline changed.
        adapter: Trained (or untrained) latent queries, or a baseline; None reads the last token, zero-shot.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter | None = None) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.fingerprint = fingerprint(backbone, adapter)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str = "cpu", dtype: str | None = None
    ) -> "Encoder":
        """Load an adapter folder and the backbone it names.

        Args:
            folder: As written by `slq train`.
            device: `cpu` or `cuda[:n]`.
            dtype: Type of the backbone's weights; by default that of the adapter's training, as another one has
                another fingerprint.

        Raises:
            ArtifactError: The folder holds no complete adapter.
            ArtifactMismatchError: The backbone is not the one it was trained on.
        """
        config = load_adapter_config(Path(folder))
        revision = None if config.revision.startswith("sha256:") else config.revision
        backbone = load_backbone(
            config.base_model_name_or_path,
            revision=revision,
            device=device,
            dtype=dtype or config.dtype,
            max_pixels=config.max_pixels,
            settings=settings_of(config),
        )
        return cls(backbone, load_adapter(Path(folder), backbone))

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.backbone.hidden_size

    def encode(self, inputs: Sequence[Any], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Embed inputs.

        Args:
            inputs: Texts, PIL images, `{"text": ..., "image": ...}` or `Item`s, mixed freely.
            batch_size: Inputs per forward pass; images and texts run in batches of their own kind.

        Returns:
            (n, hidden) float32, unit norm, in input order.

        Raises:
            DataError: An input is empty or of an unknown kind.
        """
        items = [as_item(value) for value in inputs]
        vectors = np.empty((len(items), self.dimension), dtype=np.float32)
        for chunk in batches_by_length(items, batch_size):
            vectors[chunk] = self.encode_items([items[n] for n in chunk]).cpu().numpy()
        return vectors

    @torch.no_grad()
    def encode_items(self, items: Sequence[Item]) -> Tensor:
        """One forward pass over a batch: (batch, hidden) float32 on the backbone's device."""
        return self.encode_prompts(self.backbone.prompts(items))

    @torch.no_grad()
    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """One forward pass over token sequences that are ready: (batch, hidden) float32 on the backbone's device."""
        return self.encode_prefix(self.backbone.prefix(prompts))

    @torch.no_grad()
    def encode_prefix(self, prefix: Prefix) -> Tensor:
        """Embeddings of prefixes that are computed already; several encoders can share them."""
        if isinstance(self.adapter, LatentQueries):
            return self.adapter.embed(self.backbone, prefix)
        return unit_norm(prefix.last_hidden.float())


def batches_by_length(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Positions of items in batches of one modality and similar text length, so little is padded.

    Args:
        items: What will be encoded.
        batch_size: Items per batch at most.
    """
    order = sorted(range(len(items)), key=lambda n: (items[n].modality, len(items[n].text or "")))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def as_item(value: Any) -> Item:
    """An `Item` from what people pass: a text, a PIL image, a mapping, or an `Item` itself.

    Raises:
        DataError: `value` is none of them.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image):
        return Item(image=to_rgb(value))
    if isinstance(value, dict) and set(value) <= {"text", "image", "id"} and value:
        image = value.get("image")
        if isinstance(image, bytes):
            image = decode_image(image)
        elif isinstance(image, str | Path):
            image = decode_image(_read(Path(image)))
        elif isinstance(image, Image.Image):
            image = to_rgb(image)
        text = value.get("text")
        if isinstance(image, Image.Image | None) and isinstance(text, str | None):
            return Item(text=text, image=image, id=str(value.get("id", "")))
    raise DataError(
        f"cannot embed {type(value).__name__}; pass a text, a PIL image, or a mapping with text and/or image"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}") from None
