"""An `Encoder` as mteb evaluates it: `mteb.evaluate(MtebEncoder("runs/demo/adapter"), mteb.get_tasks([...]))`.

It has the methods of mteb's `EncoderProtocol` (mteb 2, `mteb/models/models_protocols.py`) and needs none of its base
classes, so that this module imports without mteb (`pip install 'slq[mteb]'`). Tasks of texts, of images, and of both
are answered; tasks' instructions are not used, as an adapter is trained with one prompt.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slq.encoder import Encoder
from slq.errors import DataError
from slq.pooling import unit_norm

_PARTS = ("text", "image")


class MtebEncoder:
    """Embeds mteb's batches with an adapter.

    Args:
        model_name: An adapter folder.
        revision: As mteb passes it; an adapter folder has one state, so it is ignored.
        device: `cpu` or `cuda[:n]`.
        encoder: Used in place of the folder's; `model_name` then only names it.

    Raises:
        ArtifactError: The folder holds no complete adapter.
    """

    def __init__(
        self,
        model_name: str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        encoder: Encoder | None = None,
        **_options: Any,
    ) -> None:
        del revision
        self.name = Path(model_name).name
        self.encoder = encoder or Encoder.from_pretrained(model_name, device=device or "cpu")

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 32,
        **_about_the_task: Any,
    ) -> NDArray[np.float32]:
        """Embed the inputs of a task.

        Args:
            inputs: Batches (mteb's DataLoader): lists of equal length under `text`, `image` or both.
            batch_size: Inputs per forward pass.

        Returns:
            (inputs, hidden) float32, unit norm, in their order.

        Raises:
            DataError: A batch has neither texts nor images, or an input is empty.
        """
        vectors = [self.encoder.encode(_items(batch), batch_size=batch_size) for batch in inputs]
        empty = np.empty((0, self.encoder.dimension), np.float32)
        return np.concatenate([empty, *vectors])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of every vector of one side with every one of the other: (first, second)."""
        return _rows(embeddings1) @ _rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of the vectors at the same place: (pairs,)."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(dim=1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb records of the model; the revision is the fingerprint of its embedding space."""
        from mteb.models import ModelMeta

        about = {
            "name": f"slq/{self.name}",
            "revision": self.encoder.fingerprint,
            "embed_dim": self.encoder.dimension,
            "modalities": list(_PARTS),
            "framework": ["PyTorch"],
            "use_instructions": False,
        }
        return ModelMeta.create_empty(overwrites=about)


def _items(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of a batch, as `Encoder.encode` takes them."""
    parts = [name for name in _PARTS if name in batch]
    if not parts:
        raise DataError(
            f"a batch of mteb holds {', '.join(sorted(batch)) or 'nothing'}, and slq embeds texts and images; choose "
            "tasks of these"
        )
    rows = zip(*(batch[name] for name in parts), strict=True)
    return [dict(zip(parts, row, strict=True)) for row in rows]


def _rows(vectors: Any) -> Tensor:
    rows = torch.as_tensor(vectors).float()
    return unit_norm(rows if rows.ndim == 2 else rows[None])
